"""Random programs on ranks that die, stop, raise, skip calls and are interrupted: make chaos, or chaos.py --help.

An episode is a random program on 2 to 4 ranks, with a fault at a random step of one rank. Its seed determines all but
the moments at which timers fire. All ranks make the same calls, and check every result and all bytes of their memory.
After an interrupt or a skipped call, all ranks work on in the same group: at most two steps may fail before all work.
After every fault, the ranks that are left meet in a new group, check their memory again, and work on. After a restart,
new processes run the program again with the same store, as torchrun does.

The report counts faults, steps and findings. A finding is a wrong value, a rank that hangs or was told too late, an
error without a cause, ranks that do not get back in step, or a descriptor that was left open.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import symmem
from symmem import ops
from symmem.errors import InvalidArgumentError, SymmemError
from symmem.tools.ranks import RankPool

FAULTS = ("kill", "kill in a wait", "restart", "interrupt", "skip", "exception", "stop", "exit", "none")
DEADLY = ("kill", "kill in a wait", "restart", "exit")  # the others notice that the process has ended
TIMEOUT = 10.0  # seconds, of every wait in the ranks
SETTINGS = f"rendezvous_timeout({TIMEOUT:g}s),signal_timeout({TIMEOUT:g}s),arena_size(1MiB)"


class Told(NamedTuple):
    """What one rank saw of an episode.

    Attributes:
        steps: The steps that it made.
        error: The class of the error that ended its program early; None if none did.
        text: The text of the error.
        named: Whether the error names the rank with the fault.
        seconds: Between the fault and the error.
        findings: What was wrong.
    """

    steps: int
    error: str | None
    text: str
    named: bool
    seconds: float
    findings: list[str]


class Program:
    """The random program of an episode, as one rank runs it."""

    def __init__(self, group: symmem.Group, store: dist.Store, seed: int) -> None:
        self.group, self.rank, self.world, self.store = group, group.rank, group.size, store
        self.rng = random.Random(seed)
        self.live: list[tuple[symmem.SymmetricTensor, int]] = []
        self.findings: list[str] = []
        self._count = itertools.count()

    def check(self, right: object, text: str) -> None:
        """Note a finding unless ``right``."""
        if not right:
            self.findings.append(text)

    # Steps. All ranks draw the same random numbers.

    def allocate(self) -> None:
        """Fill a new tensor with a pattern."""
        own = self.rng.random() < 0.1
        nbytes = self.rng.choice((1, 100, 4096, 100_000, 600_000))
        st = symmem.allocate(nbytes, torch.uint8, group=self.group, backend="host", arena=not own)
        value = self.rng.randrange(1, 200)
        if own:
            st.rendezvous(self.group)
        st.tensor.fill_(value + self.rank)
        self.live.append((st, value))

    def drop(self) -> None:
        """Check a tensor, and drop it."""
        if self.live:
            st, value = self.live.pop(self.rng.randrange(len(self.live)))
            self.check(st.tensor.eq(value + self.rank).all(), "this rank's memory has changed")

    def look(self) -> None:
        """Check a peer's memory."""
        if self.live:
            st, value = self.rng.choice(self.live)
            ops.barrier(group=self.group)  # the owner has filled it
            peer = self.rng.randrange(self.world)
            self.check(st.remote_tensor(peer, group=self.group).eq(value + peer).all(), "a peer's memory is wrong")
            ops.barrier(group=self.group)  # before the owner drops it

    def collect(self) -> None:
        """Let the ranks free what all have dropped."""
        symmem.collect(self.group)

    def all_reduce(self) -> None:
        """Sum one element, several, or more than a piece."""
        elements, value = self.rng.choice((1, 1000, 300_000)), self.rng.randrange(1000)
        result = ops.all_reduce(torch.full((elements,), float(value + self.rank)), self.group)
        right = self.world * value + self.world * (self.world - 1) // 2
        self.check(result.eq(right).all(), "all_reduce is wrong")

    def all_gather(self) -> None:
        """Gather every rank's number."""
        value = self.rng.randrange(1000)
        result = ops.all_gather(torch.full((50,), value + self.rank), self.group)
        right = torch.arange(self.world).repeat_interleave(50) + value
        self.check(result.view(-1).eq(right).all(), "all_gather is wrong")

    def broadcast(self) -> None:
        """From a random root."""
        root, value = self.rng.randrange(self.world), self.rng.randrange(1000)
        result = ops.broadcast(torch.full((20,), value + self.rank), self.group, root=root)
        self.check(result.eq(value + root).all(), "broadcast is wrong")

    def put(self) -> None:
        """Write to all ranks, between two barriers."""
        st = symmem.allocate((self.world, 8), torch.int64, group=self.group, backend="host")
        value = self.rng.randrange(1000)
        ops.barrier(group=self.group)
        for peer in range(self.world):
            ops.put(st.tensor[self.rank], torch.full((8,), value + self.rank), peer, self.group)
        ops.barrier(group=self.group)
        self.check(st.tensor.eq(torch.arange(self.world).view(-1, 1) + value).all(), "put is wrong")
        ops.barrier(group=self.group)

    def subgroup(self) -> None:
        """Some ranks make a group, use it, and leave it."""
        members = sorted(self.rng.sample(range(self.world), self.rng.randint(2, self.world)))
        name = f"{self.group.name} {next(self._count)}"
        value = self.rng.randrange(1000)
        if self.rank in members:
            rank, size = members.index(self.rank), len(members)
            group = symmem.Group.from_store(rank, size, self.store, name, job_ranks=members)
            try:
                result = ops.all_reduce(torch.full((10,), value + self.rank), group)
            except SymmemError as error:
                if error.group == name:
                    error.peers = tuple(members[peer] for peer in error.peers)  # for the report
                raise
            self.check(result.eq(value * size + sum(members)).all(), "all_reduce of a subgroup is wrong")
            group.close()

    def threads(self) -> None:
        """Two threads allocate and compute at a time. Each has a group and its arena."""
        names = [f"{self.group.name} {next(self._count)}" for _ in range(2)]
        values = [self.rng.randrange(1000) for _ in names]

        def work(name: str, value: int) -> None:
            group = symmem.Group.from_store(self.rank, self.world, self.store, name)
            for _ in range(3):
                st = symmem.allocate(500, torch.float32, group=group, backend="host")
                result = ops.all_reduce(st.tensor.fill_(value + self.rank), group)
                right = self.world * value + sum(range(self.world))
                self.check(result.eq(right).all(), "all_reduce of a thread is wrong")
            group.close()

        with ThreadPoolExecutor(len(names)) as workers:  # waits for both, also if one raises
            list(workers.map(work, names, values))

    def redirect(self) -> None:
        """Compute with memory that an op allocated in the arena."""
        with symmem.use_symmetric_memory(self.group, backend="host"):
            x = torch.full((2000,), 1.0 + self.rank)
            y = x * 2
        result = ops.all_reduce(y, self.group)
        self.check(result.eq(self.world * (self.world + 1)).all(), "all_reduce of redirected memory is wrong")

    def fork(self) -> None:
        """A child that does nothing."""
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)

    def go_on(self, steps: int = 6) -> None:
        """All ranks make the same steps together; the last ones must work."""
        failed, store = [], dist.PrefixStore("in step", self.store)
        for step in range(steps):
            store.set(f"step {step} of rank {self.rank}", "")
            store.wait([f"step {step} of rank {rank}" for rank in range(self.world)], timedelta(seconds=4 * TIMEOUT))
            try:
                st = symmem.allocate(100, torch.float32, group=self.group, backend="host")
                total = ops.all_reduce(st.tensor.fill_(float(step + self.rank)), self.group)
                self.check(total.eq(step * self.world + sum(range(self.world))).all(), "ranks are out of step")
                peer = st.remote_tensor((self.rank + 1) % self.world, group=self.group)
                self.check(peer.eq(step + (self.rank + 1) % self.world).all(), "a peer's new memory is wrong")
                ops.barrier(group=self.group)  # before this rank fills the next tensor
            except SymmemError as error:
                failed.append(f"step {step}: {error}")
        if len(failed) > 2:
            self.findings.append(f"the ranks do not get back in step: {failed}")

    def refused(self) -> None:
        """One rank's call is refused, so all ranks are told."""
        wrong = self.rank == self.rng.randrange(self.world)
        try:
            ops.all_reduce(torch.ones(4), self.group, out=torch.ones(5 if wrong else 4))
        except InvalidArgumentError:
            return
        self.findings.append("a refused call was not told")

    STEPS = (*[allocate] * 4, *[drop] * 3, look, collect, *[all_reduce] * 3, all_gather, broadcast, put, subgroup)
    STEPS += (redirect, fork, threads)


@contextlib.contextmanager
def after(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Call ``action()`` from another thread, while the block runs or after it."""
    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def open_files() -> set[str]:
    """What the descriptors of this process are open on, but for kinds that only torch opens."""
    while gc.collect():  # a freed object may release others
        pass
    found = set()
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            found.add(os.readlink(f"/proc/self/fd/{each}"))
    return {each for each in found if not each.startswith(("/dev/", "/proc/", "pipe:", "anon_inode:[eventfd]"))}


def stop() -> None:
    """Stop this process for a while."""
    if (child := os.fork()) == 0:
        time.sleep(0.3)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(child, 0)


def interrupt(number: int, frame: object) -> None:
    """The signal handler of an interrupt, which must come once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


class SkippedError(Exception):
    """The program of this rank raises before a call."""


class Drawn(NamedTuple):
    """What the seed of an episode determines, besides the program.

    Attributes:
        world: Number of ranks.
        fault: The kind of the fault.
        culprit: The rank with the fault.
        steps: Number of steps.
        at: The step of the fault.
        delay: Seconds from the beginning of that step, if a timer makes the fault.
    """

    world: int
    fault: str
    culprit: int
    steps: int
    at: int
    delay: float


def draw(seed: int) -> Drawn:
    """Draw an episode."""
    world, rng = random.Random(seed ^ 0x5EED).randint(2, 4), random.Random(~seed)
    fault, culprit = rng.choice(FAULTS), rng.randrange(world)
    steps = rng.randrange(20, 60)
    return Drawn(world, fault, culprit, steps, rng.randrange(2, steps), rng.random() * 0.003)


def episode(seed: int, folder: str, port: int, restarted: bool = False) -> Told:
    """Run one episode on this rank; without the fault if the ranks were restarted."""
    store, rank = dist.TCPStore("127.0.0.1", port), int(os.environ["RANK"])
    world, fault, culprit, steps, at, delay = draw(seed)
    fault = "none" if restarted else fault
    noted = Path(folder, "fault")
    symmem.Group.from_store(0, 1, dist.HashStore()).close()  # opens what a process keeps
    before = open_files()
    group = symmem.Group.from_store(rank, world, store, f"episode {seed}")
    program = Program(group, store, seed)
    error: BaseException | None = None
    ended = 0.0

    def note() -> None:
        noted.write_text(repr(time.monotonic()))

    def die() -> None:
        note()
        os.kill(os.getpid(), signal.SIGKILL)

    step = 0
    try:
        for step in range(steps):
            chosen, around = program.rng.choice(Program.STEPS), contextlib.ExitStack()
            if step == at and fault == "exception":
                chosen = Program.refused
            if step == at and fault == "skip":
                chosen = random.Random(seed).choice((Program.all_reduce, Program.allocate, Program.look))
            if step == at and rank == culprit:
                if fault in ("kill", "restart"):
                    die()
                elif fault == "exit":
                    note()
                    os._exit(0)
                elif fault == "stop":
                    stop()
                elif fault == "skip":
                    note()
                    raise SkippedError
                elif fault == "kill in a wait":
                    around.enter_context(after(delay, die))
                elif fault == "interrupt":
                    signal.signal(signal.SIGINT, interrupt)
                    around.enter_context(after(delay, lambda: (note(), os.kill(os.getpid(), signal.SIGINT))))
            with around:  # one line for all ranks, because the lines of allocations are compared
                chosen(program)
    except (SymmemError, KeyboardInterrupt, SkippedError) as caught:
        error, ended = caught, time.monotonic()
        if rank == culprit and fault == "interrupt":
            note()  # the step may have gone on for some time; from now on, the others wait in vain
    if fault in ("interrupt", "skip"):
        program.go_on()
    findings = program.findings
    for st, value in program.live:
        if not st.tensor.eq(value + rank).all() and not (error and st is program.live[-1][0]):
            findings.append("this rank's memory is wrong after the fault")
    group.close()  # so that nobody waits for this rank
    left = [each for each in range(world) if each != culprit or fault not in DEADLY]
    through = dist.PrefixStore(f"through {restarted}", store)
    through.set(str(rank), "")
    through.wait([str(each) for each in left], timedelta(seconds=4 * TIMEOUT))
    try:
        again = symmem.Group.from_store(left.index(rank), len(left), store, f"after episode {seed}")
        total = ops.all_reduce(torch.ones(10), again)
        program.check(total.eq(len(left)).all(), "the ranks that are left compute wrongly")
        again.close()
    except SymmemError as caught:
        findings.append(f"the ranks that are left cannot work on: {caught}")
    if error is not None and (fault == "none" or (rank != culprit and fault in ("stop", "exception"))):
        findings.append(f"an error without a cause: {error}\n{''.join(traceback.format_exception(error))}")
    if error is None and fault in ("kill", "restart", "exit") and at < steps - 20:
        findings.append("a death was not noticed in 20 steps")
    seconds = max(ended - float(noted.read_text()), 0.0) if error is not None and noted.exists() else 0.0
    named = isinstance(error, SymmemError) and (
        culprit in (getattr(error, "peers", None) or ()) or f"rank {culprit}" in str(error)
    )
    kind, text = (type(error).__name__, str(error)) if error is not None else (None, "")
    del program, group, again, error
    with contextlib.suppress(UnboundLocalError):
        del st
    left_open = open_files() - before
    if left_open:
        findings.append(f"left open: {sorted(left_open)}")
    return Told(step + 1, kind, text, named, seconds, findings)


def run(seed: int) -> tuple[str, int, list[Told | None], list[str]]:
    """Run one episode; returns its fault, the culprit, what every rank saw, and what was found from outside."""
    world, fault, who, *_ = draw(seed)
    found: list[str] = []
    saw: list[Told | None] = []
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        for restarts in range(1 + (fault == "restart")):
            elastic = {"TORCHELASTIC_RUN_ID": "chaos", "TORCHELASTIC_RESTART_COUNT": str(restarts)}
            with RankPool(world, env={"SYMMEM_ENABLE": SETTINGS, **elastic}, process_group=None) as pool:
                outcomes = pool.outcomes(episode, seed, folder, server.port, restarts > 0, timeout=8 * TIMEOUT)
            for rank, outcome in enumerate(outcomes):
                fell = fault in DEADLY and not restarts and rank == who and "died with exit code" in str(outcome.error)
                if outcome.error is not None and not fell:
                    found.append(f"rank {rank}: {outcome.error}\n{outcome.trace}")
                if restarts and outcome.value is not None:
                    found += [f"rank {rank} after the restart: {each}" for each in outcome.value.findings]
            saw = saw or [outcome.value for outcome in outcomes]
    return fault, who, saw, found


def report(first: int, results: list[tuple[str, int, list[Told | None], list[str]]], seconds: float) -> bool:
    """Print the report; returns whether there are no findings."""
    faults = Counter(fault for fault, *_ in results)
    steps = sum(told.steps for _, _, saw, _ in results for told in saw if told)
    findings: list[str] = []
    delays: dict[str, list[float]] = {}
    unnamed: list[str] = []
    slow: list[tuple[float, str]] = []
    for number, (fault, culprit, saw, found) in enumerate(results):
        for text in found:
            findings.append(f"seed {first + number}, {fault} of rank {culprit}: {text}")
        for rank, told in enumerate(saw):
            if told is None:
                continue
            findings += [
                f"seed {first + number}, {fault} of rank {culprit}, rank {rank}: {text}" for text in told.findings
            ]
            if told.error and rank != culprit:
                delays.setdefault(fault, []).append(told.seconds)
                seen = f"seed {first + number}, {fault} of rank {culprit}, rank {rank}: {told.text}"
                if not told.named:
                    unnamed.append(seen)
                if told.seconds > (1 if fault in DEADLY else TIMEOUT + 1):
                    slow.append((told.seconds, seen))
    print(f"{len(results)} episodes from seed {first}, {seconds:.0f} s, {steps} steps of ranks\n")
    print(
        "| fault | episodes | survivors told | median s | 95 % s | longest s |\n| --- | --- | --- | --- | --- | --- |"
    )
    for fault in FAULTS:
        waits = sorted(delays.get(fault, []))
        shown = [f"{waits[min(int(len(waits) * q), len(waits) - 1)]:.3f}" if waits else "" for q in (0.5, 0.95, 1)]
        print(f"| {fault} | {faults[fault]} | {len(waits)} | {' | '.join(shown)} |")
        if waits and waits[-1] > TIMEOUT + 1:
            findings.append(f"{fault}: a rank was told after {waits[-1]:.1f} s")
    print(f"\nerrors that do not name the rank: {len(unnamed)}; findings: {len(findings)}")
    for text in unnamed[:5]:
        print("- not named:", text)
    for late, text in sorted(slow, reverse=True)[:10]:
        print(f"- after {late:.1f} s: {text}")
    for text in findings:
        print("-", text)
    return not findings


def main() -> None:
    """Run episodes until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the first episode")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--episodes", type=int, default=1 << 30, help="at most so many; 1 replays the seed")
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) // 2, 1), help="episodes at a time")
    options = parser.parse_args()
    begin = time.monotonic()
    seeds = itertools.count(options.seed)
    results: list[Any] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        while len(results) < options.episodes and time.monotonic() - begin < 60 * options.minutes:
            batch = min(4 * options.jobs, options.episodes - len(results))
            results += pool.map(run, itertools.islice(seeds, batch))
    sys.exit(not report(options.seed, results, time.monotonic() - begin))


if __name__ == "__main__":
    main()
