"""Bad input and faults on host memory: every surviving rank gets the documented error within the timeout.

Nothing is left behind. Ranks are processes. They return their error, and their resources before and after.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import LONG, SOON
from programs import run_to_the_end
from told import Told
from told import told as told_of_any_group

import symmem
from symmem.backends import descriptors as scm
from symmem.backends import get_backend, libc
from symmem.errors import SymmemError
from symmem.group.agreement import Rounds
from symmem.tools.conformance import CASES, Case, run_case
from symmem.tools.conformance.case import Resources
from symmem.tools.ranks import RankPool, rank_store

WORLD = 3
NewPool = Callable[..., RankPool]


@pytest.fixture
def pool(living_pool: NewPool) -> RankPool:
    """Ranks that survive the test."""
    return living_pool(WORLD, process_group=None)


@pytest.fixture
def mortals(new_pool: NewPool) -> RankPool:
    """Ranks of which the test kills some."""
    return new_pool(WORLD, process_group=None)


# What ranks do.

groups: dict[str, symmem.Group] = {}


def group(name: str = "faults") -> symmem.Group:
    """The group of all ranks of the pool."""
    if name not in groups:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        groups[name] = symmem.Group.from_store(rank, size, rank_store(), name)
    return groups[name]


def meet(group: symmem.Group, timeout: float = LONG) -> None:
    with group.collective("meet", timeout):
        pass


def told(operation: Callable[[], object]) -> Told:
    """The error of an operation on a rank, which names a group of this file if any."""
    result = told_of_any_group(operation)
    assert result.group is None or result.group.startswith("faults"), result.group
    return result


def works(group: symmem.Group, elements: int = 1000) -> None:
    """Allocate, rendezvous and read every rank's memory."""
    st = symmem.allocate(elements, torch.int32, backend="host", arena=False).rendezvous(group, timeout=LONG)
    st.tensor.fill_(group.rank + 1)
    st.barrier(timeout=LONG)
    assert [st.remote_tensor(rank)[-1].item() for rank in range(group.size)] == list(range(1, group.size + 1))
    st.barrier(timeout=LONG)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def survivors(pool: RankPool, victim: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of all ranks but ``victim``, which must have died."""
    outcomes = pool.outcomes(function, *args)
    assert "died with exit code -9" in str(outcomes.pop(victim).error)
    for outcome in outcomes:
        assert outcome.error is None, outcome.trace
    return [outcome.value for outcome in outcomes]


# A rank dies.


def see_death(moment: str, victim: int) -> tuple[Told, Resources, Resources]:
    mine = group("faults " + moment)
    if moment != "before the first meeting":
        meet(mine)
    before = Resources.now()
    st = symmem.allocate(5000, backend="host", arena=False)
    if moment in ("in a barrier", "in wait_signal", "in put_signal"):
        st.rendezvous(mine)
    if mine.rank == victim:
        if moment == "after the exchange":
            backend = get_backend("host")
            original = backend.rendezvous
            backend.rendezvous = lambda *args: (original(*args), die())  # type: ignore[assignment, method-assign]
        else:
            if moment == "in put_signal":
                st.put_signal((victim + 1) % WORLD, timeout=LONG)
            time.sleep(0.2)  # the others are waiting now
            die()
    operation: Callable[[], object] = lambda: st.rendezvous(mine, timeout=LONG)  # noqa: E731
    if moment == "before the first meeting":
        operation = lambda: st.rendezvous(mine, timeout=LONG)  # noqa: E731
    elif moment == "in a barrier":
        operation = lambda: st.barrier(3, timeout=LONG)  # noqa: E731
    elif moment == "in wait_signal":
        operation = lambda: st.wait_signal(victim, 4, timeout=LONG)  # noqa: E731
    elif moment == "in put_signal":
        st.put_signal(victim, timeout=LONG)
        operation = lambda: st.put_signal(victim, timeout=LONG)  # noqa: E731
    error = told(operation)
    if moment == "in a barrier":
        assert told(lambda: st.barrier(3, timeout=LONG)).kind == "PeerLostError"  # and again
    st = operation = None  # type: ignore[assignment]
    return error, before, Resources.now()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    "moment",
    ["before the first meeting", "before", "after the exchange", "in a barrier", "in wait_signal", "in put_signal"],
)
def test_a_rank_that_is_killed_is_named_by_all_at_once(moment: str, victim: int, mortals: RankPool) -> None:
    """Before, during and after the rendezvous, and before the group's first collective step too."""
    for error, before, after in survivors(mortals, victim, see_death, moment, victim):
        assert (error.kind, error.peers) == ("PeerLostError", (victim,)), error
        assert f"rank {victim}" in error.text or f"ranks [{victim}]" in error.text
        assert "What to do" in error.text
        assert error.took < SOON
        assert after == before


def see_leader_die(step: str) -> tuple[Told, Resources, Resources]:
    mine = group("faults at " + step)
    before = Resources.now()
    if mine.rank == 0:
        if step == "accept":
            scm.Listener.accept = lambda self: die()  # type: ignore[assignment, method-assign, return-value]
        else:

            def dying(original: Callable[..., Any]) -> Callable[..., Any]:
                def run(self: Rounds, operation: Any, name: str, *rest: Any) -> Any:
                    received = original(self, operation, name, *rest)
                    if name == step:
                        die()
                    return received

                return run

            for method in ("exchange", "settle"):
                setattr(Rounds, method, dying(getattr(Rounds, method)))
    store = rank_store()
    if store.add("here", 1) == WORLD:
        store.set("all are here", "")
    store.wait(["all are here"])
    error = told(lambda: meet(mine, 3.0))
    return error, before, Resources.now()


@pytest.mark.parametrize("step", ["join", "connect", "accept", "watch", "joined"])
def test_a_leader_that_dies_in_the_bootstrap_is_named(step: str, mortals: RankPool) -> None:
    """Within the timeout, at any step."""
    for error, before, after in survivors(mortals, 0, see_leader_die, step):
        assert error.kind in ("PeerLostError", "PeerTimeoutError"), error
        assert error.peers == (0,), error
        assert error.took < SOON
        if step != "joined":
            assert after == before


# A rank is stopped, or does not come.


def see_stop(victim: int, pids: list[int], what: str) -> tuple[list[Told], Resources, Resources]:
    mine = group()
    meet(mine)
    before = Resources.now()
    st = symmem.allocate(100, backend="host", arena=False)
    if what == "barrier":
        st.rendezvous(mine)
    store = rank_store()
    key = f"seen {what} {victim}"
    errors = []
    if mine.rank == victim:
        store.add(key, 1)
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        while store.add(key, 0) < 1 or not _is_stopped(pids[victim]):
            time.sleep(0.01)
    timeout = 1.0 if mine.rank != victim else LONG
    if what == "barrier":
        errors.append(told(lambda: st.barrier(7, timeout=timeout)))
    else:
        errors.append(told(lambda: st.rendezvous(mine, timeout=timeout)))
    if mine.rank != victim and store.add(key, 1) == WORLD:
        os.kill(pids[victim], signal.SIGCONT)
    meet(mine)
    works(mine)
    st = None  # type: ignore[assignment]
    return errors, before, Resources.now()


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("what", ["rendezvous", "barrier"])
def test_a_stopped_rank_is_a_timeout_that_names_it(what: str, victim: int, pool: RankPool) -> None:
    """SIGSTOP. When the rank continues, it learns at once that the others gave up. A retry works."""
    results = pool.run(see_stop, victim, pool.pids, what)
    for rank, (errors, before, after) in enumerate(results):
        for error in errors:
            assert error.kind == "PeerTimeoutError", (rank, error)
            assert error.took < SOON
            if rank != victim:
                assert error.peers == (victim,), (rank, error)
        assert after == before


def see_absence(absent: int, name: str) -> tuple[Told | None, Resources, Resources]:
    mine = group(name)
    before = Resources.now()
    st = symmem.allocate(10, backend="host", arena=False)
    error = told(lambda: st.rendezvous(mine, timeout=1.0)) if mine.rank != absent else None
    st = None  # type: ignore[assignment]
    return error, before, Resources.now()


@pytest.mark.parametrize("absent", [0, 1])
@pytest.mark.parametrize("met", [False, True])
def test_a_rank_that_never_comes_is_named(absent: int, met: bool, pool: RankPool) -> None:
    """Over the store, before the ranks know each other, and over sockets."""
    name = f"faults {absent} {met}"
    if met:
        pool.run(meet_by_name, name)
    results = pool.run(see_absence, absent, name)
    for rank, (error, before, after) in enumerate(results):
        if rank != absent:
            assert (error.kind, error.peers) == ("PeerTimeoutError", (absent,))
            assert "timeout 1 s" in error.text
            assert "same calls in the same order" in error.text
            assert error.took < SOON
        assert after == before


def meet_by_name(name: str) -> None:
    meet(group(name))


# No memory, no descriptors left.


@contextlib.contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def room_for(descriptors: int) -> Iterator[None]:
    """Within the block, this process may open so many more descriptors."""
    fillers = [os.open("/dev/null", os.O_RDONLY)]
    try:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        while fillers[-1] < highest:
            fillers.append(os.dup(fillers[0]))
        with limit(resource.RLIMIT_NOFILE, max(highest, *fillers) + 1 + descriptors):
            yield
    finally:
        for filler in fillers:
            os.close(filler)


def address_space(more: int) -> contextlib.AbstractContextManager[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limit(resource.RLIMIT_AS, pages * libc.PAGE + more)


@contextlib.contextmanager
def mappings_run_out(after: int) -> Iterator[None]:
    """Simulate max_map_count: so many calls of mmap work, and later calls fail."""
    original = libc._libc
    left = after

    def mmap(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            return original.mmap(*args)
        ctypes.set_errno(errno.ENOMEM)
        return libc._MAP_FAILED

    others = {name: getattr(original, name) for name in ("munmap", "syscall", "recvmsg")}
    libc._libc = SimpleNamespace(mmap=mmap, **others)  # type: ignore[assignment]
    try:
        yield
    finally:
        libc._libc = original


LIMITS: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[None]], str, str]] = {
    "no descriptor": (lambda: room_for(0), "ResourceLimitError", "RLIMIT_NOFILE"),
    "descriptors for the pad only": (lambda: room_for(1), "ResourceLimitError", "RLIMIT_NOFILE"),
    "descriptors for some peers": (lambda: room_for(4), "ResourceLimitError", "RLIMIT_NOFILE"),
    "little address space": (lambda: address_space(12 << 20), "OutOfMemoryError", "RLIMIT_AS"),
    "no mapping": (lambda: mappings_run_out(0), "OutOfMemoryError", "mappings"),
    "some mappings": (lambda: mappings_run_out(3), "OutOfMemoryError", "mappings"),
    "small files": (lambda: limit(resource.RLIMIT_FSIZE, 1 << 10), "ResourceLimitError", "RLIMIT_FSIZE"),
}


def see_limit(name: str, culprit: int, moment: str) -> tuple[Told, Resources, Resources]:
    mine = group()
    works(mine)
    before = Resources.now()
    limited = LIMITS[name][0]() if mine.rank == culprit else contextlib.nullcontext()
    made: list[symmem.SymmetricTensor] = []

    def allocate() -> None:
        made.append(symmem.allocate(16 << 20, torch.uint8, backend="host", group=mine, arena=False))

    if moment == "allocate":

        def both() -> None:
            with limited:
                allocate()
            made[0].rendezvous(mine, timeout=LONG)

        error = told(both)
    else:
        allocate()
        with limited:
            error = told(lambda: made[0].rendezvous(mine, timeout=LONG))
        assert told(lambda: made[0].remote_tensor(0, group=mine)).kind == "NotRendezvousedError"
        made[0].rendezvous(mine, timeout=LONG)  # the retry
        assert made[0].remote_tensor((mine.rank + 1) % WORLD)[5] == 0
        meet(mine)
    made.clear()
    works(mine)
    return error, before, Resources.now()


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("no descriptor", "allocate"),
        ("little address space", "allocate"),
        ("no mapping", "allocate"),
        ("small files", "allocate"),
        *((name, "rendezvous") for name in LIMITS),
    ],
)
def test_a_limit_of_one_rank_is_the_named_error_of_all(name: str, moment: str, culprit: int, pool: RankPool) -> None:
    """At allocate and during the rendezvous. All ranks get it at once, a retry works, and nothing leaks."""
    _limit, kind, text = LIMITS[name]
    for error, before, after in pool.run(see_limit, name, culprit, moment):
        assert (error.kind, error.rank) == (kind, culprit), error
        assert text in error.text
        assert "What to do" in error.text
        assert error.took < SOON
        assert after == before


def see_full_bootstrap(culprit: int, room: int) -> tuple[Told, Resources, Resources]:
    mine = group(f"faults {culprit} {room}")
    before = Resources.now()
    with room_for(room) if mine.rank == culprit else contextlib.nullcontext():
        error = told(lambda: meet(mine))
    if error.kind:
        meet(mine)
    works(mine)
    groups.pop(mine.name).close()
    mine = None  # type: ignore[assignment]
    return error, before, Resources.now()


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_first_meeting_needs_descriptors_and_says_so(culprit: int, pool: RankPool) -> None:
    """With room for 0, 1, 2, ... descriptors, all ranks raise the named error until there is enough room."""
    for room in range(20):
        results = pool.run(see_full_bootstrap, culprit, room)
        assert all(after == before for _error, before, after in results), (room, results)
        kinds = {error.kind for error, _before, _after in results}
        if kinds == {""}:
            assert room > 3
            return
        assert kinds == {"ResourceLimitError"}, (room, results)
        assert all(error.rank == culprit and error.took < SOON for error, *_ in results), (room, results)
    pytest.fail("20 descriptors are not enough")


def see_sizes() -> tuple[list[Told], Resources, Resources]:
    mine = group()
    meet(mine)
    before = Resources.now()
    errors = []
    for size in (1 << 50, (1 << 62,), (1 << 32, 1 << 31)):
        if mine.rank == 1:
            errors.append(
                told(lambda size=size: symmem.allocate(size, torch.uint8, backend="host", group=mine, arena=False))  # type: ignore[misc]
            )
        else:
            errors.append(told(lambda: meet(mine)))
        meet(mine)
    return errors, before, Resources.now()


def test_more_than_the_available_memory_is_refused_on_all(pool: RankPool) -> None:
    """The error comes before any page is touched."""
    for errors, before, after in pool.run(see_sizes):
        assert [error.kind for error in errors] == ["OutOfMemoryError", "OutOfMemoryError", "InvalidArgumentError"]
        assert all(error.rank == 1 for error in errors)
        assert all("are available" in error.text for error in errors[:2])
        assert after == before


# Strangers.


def listen_among_strangers() -> tuple[float, Resources, Resources]:
    mine = group("faults strangers")
    before = Resources.now()
    store = rank_store()
    if mine.rank == 0:
        original = scm.Listener.__init__

        def init(self: scm.Listener, size: int) -> None:
            original(self, size)
            store.set("address", self.welcome.address)
            store.wait(["strangers are there"])

        scm.Listener.__init__ = init  # type: ignore[method-assign]
    store.wait(["strangers are there"]) if mine.rank else None
    begin = time.monotonic()
    works(mine)
    took = time.monotonic() - begin if mine.rank else 0.0
    groups.pop(mine.name).close()
    del mine
    return took, before, Resources.now()


def test_strangers_neither_disturb_nor_delay(new_pool: NewPool) -> None:
    """A process that connects to the leader's socket with nothing, garbage or a wrong hello is refused."""
    pool = new_pool(WORLD, process_group=None)
    hello = scm._HELLO
    shown = [b"", b"x", os.urandom(100), b"GET / HTTP/1.1\r\n\r\n", b"\0" * hello.size]
    shown += [hello.pack(os.urandom(32), rank) for rank in range(4)]
    shown += [b""] * 400
    pool.submit(listen_among_strangers)
    pool._store.wait(["address"])
    address = pool._store.get("address").decode()
    assert f"@{address}" in Path("/proc/net/unix").read_text()
    with contextlib.ExitStack() as undo:
        strangers = []
        for data in shown:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect("\0" + address)
            sock.sendall(data)
            strangers.append(sock)
        pool._store.set("strangers are there", "")
        outcomes = pool.collect()
        for outcome in outcomes:
            assert outcome.error is None, outcome.trace
            took, before, after = outcome.value
            assert took < SOON
            assert after == before
        for sock in strangers:
            sock.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""  # refused without an answer
    assert address not in Path("/proc/net/unix").read_text()


# Containers and hosts.


def leave_network(rank: int) -> int:
    """Move to a new network namespace; returns 0, or the error number."""
    if int(os.environ["RANK"]) != rank:
        return 0
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    return ctypes.get_errno() if unshare(0x40000000) else 0  # CLONE_NEWNET


def rendezvous_apart() -> tuple[Told, Resources, Resources]:
    mine = group("faults apart")
    with told_nothing(mine):
        before = Resources.now()
        st = symmem.allocate(10, backend="host", arena=False)
        error = told(lambda: st.rendezvous(mine, timeout=LONG))
        st = None  # type: ignore[assignment]
        return error, before, Resources.now()


@contextlib.contextmanager
def told_nothing(mine: symmem.Group) -> Iterator[None]:
    meet(mine)  # steps without descriptors work
    yield
    meet(mine)


def test_ranks_in_different_containers_are_told_which(new_pool: NewPool) -> None:
    """Rank 1 has a separate network namespace."""
    pool = new_pool(WORLD, process_group=None)
    if error := max(pool.run(leave_network, 1)):
        pytest.skip(f"this process may make no network namespace: {os.strerror(error)}")
    for error, before, after in pool.run(rendezvous_apart):
        assert (error.kind, error.peers) == ("RendezvousError", (1,)), error
        assert "different containers of one host" in error.text
        own = os.stat("/proc/self/ns/net").st_ino
        assert f"network namespace {own}) on ranks 0, 2" in error.text
        assert "on rank 1" in error.text
        assert error.took < SOON
        assert after == before


def stand_on_host(hosts: list[str]) -> None:
    os.environ["SYMMEM_HOST_ID"] = hosts[int(os.environ["RANK"])]


def test_ranks_on_different_hosts_are_told_which(new_pool: NewPool) -> None:
    """Simulated by SYMMEM_HOST_ID."""
    pool = new_pool(WORLD, process_group=None)
    pool.run(stand_on_host, ["here", "here", "there"])
    for error, before, after in pool.run(rendezvous_apart):
        assert (error.kind, error.peers) == ("RendezvousError", (2,)), error
        assert "(here) on ranks 0-1" in error.text
        assert "(there) on rank 2" in error.text
        assert "spans hosts" in error.text
        assert after == before


# Fork.

kept: list[Any] = []


def fork_after_rendezvous() -> tuple[int, dict[str, Any]] | None:
    mine = group()
    st = symmem.allocate(10, torch.int64, backend="host", arena=False).rendezvous(mine)
    st.tensor.fill_(5)
    kept.append(st)
    meet(mine)
    if mine.rank != 1:
        return None
    there, here = os.pipe()
    if child := os.fork():
        os.close(here)
        with os.fdopen(there) as pipe:
            return child, json.loads(pipe.readline())
    told_by_child: dict[str, Any] = {}
    with contextlib.suppress(BaseException):
        uses: dict[str, Callable[[], object]] = {
            "remote_tensor": lambda: st.remote_tensor(0),
            "remote_pointers": lambda: st.remote_pointers,
            "contiguous_view": st.contiguous_view,
            "multicast_ptr": lambda: st.multicast_ptr,
            "signal_pad": lambda: st.signal_pad(0),
            "barrier": lambda: st.barrier(timeout=LONG),
            "put_signal": lambda: st.put_signal(0),
            "wait_signal": lambda: st.wait_signal(0),
            "put": lambda: st.put(st.tensor, 0),
            "get": lambda: st.get(0),
            "synchronize": st.synchronize,
            "rendezvous": lambda: st.rendezvous(mine),
            "collective": lambda: meet(mine),
        }
        told_by_child = {name: told(use).kind for name, use in uses.items()}
        told_by_child["sum"] = int(st.tensor.sum())
        st.tensor[0] = 6
        st.close()  # only the own view
    os.write(here, json.dumps(told_by_child).encode() + b"\n")
    while True:  # outlives the rank
        time.sleep(1)


def look_after_fork() -> int:
    mine = group()
    meet(mine)
    value = int(kept[-1].remote_tensor(1)[0])
    works(mine)
    return value


def wait_for_the_dead() -> list[Told]:
    if group().rank == 1:
        die()
    return [told(lambda: kept[-1].barrier(1, timeout=LONG)), told(lambda: meet(group()))]


def test_a_forked_child_is_no_rank_and_hides_no_death(mortals: RankPool) -> None:
    """In the child every method raises ForkedError. Its tensor is shared. Others notice the death of the parent."""
    results = mortals.run(fork_after_rendezvous)
    child, told_by_child = results[1]
    try:
        assert told_by_child.pop("sum") == 50
        assert len(told_by_child) == 13
        assert set(told_by_child.values()) == {"ForkedError"}, told_by_child
        assert mortals.run(look_after_fork) == [6, 6, 6]
        for errors in survivors(mortals, 1, wait_for_the_dead):
            for error in errors:
                assert (error.kind, error.peers) == ("PeerLostError", (1,)), error
                assert error.took < SOON
        os.kill(child, 0)  # it was alive the whole time
    finally:
        os.kill(child, signal.SIGKILL)


# Use after free.


def free_what_peers_use() -> tuple[list[str], int]:
    mine = group()
    st = symmem.allocate(3, torch.int64, backend="host", arena=False).rendezvous(mine)
    st.tensor.fill_(mine.rank + 10)
    meet(mine)
    theirs = st.remote_tensor(1)
    kept.append(theirs)
    pointer = st.tensor.data_ptr()
    if mine.rank == 1:
        kept.clear()
        del theirs
    st.close()
    kinds = [told(use).kind for use in (lambda: st.tensor, lambda: st.remote_tensor(1), st.barrier, st.rendezvous)]
    st = None  # type: ignore[assignment]
    gc.collect()
    meet(mine)
    if mine.rank == 1:
        assert f"{pointer:x}-" not in Path("/proc/self/maps").read_text()
    return kinds, -1 if mine.rank == 1 else int(kept[-1].sum())


def read_what_the_dead_freed() -> int:
    if group().rank == 1:
        die()
    told(lambda: meet(group()))
    return int(kept[-1].sum())


def test_freed_memory_stays_with_those_who_use_it(mortals: RankPool) -> None:
    """The owner freed it, then died. A peer can still read its tensor of it, and handles raise ClosedError."""
    results = mortals.run(free_what_peers_use)
    assert [kinds for kinds, _ in results] == [["ClosedError"] * 4] * WORLD
    assert [value for _, value in results] == [33, -1, 33]
    assert survivors(mortals, 1, read_what_the_dead_freed) == [33, 33]


# What is left.

PROGRAM = """
import os, signal, sys, torch.distributed as dist
import symmem

file, mode = sys.argv[1:]
os.setsid()
print(os.getpid(), flush=True)

def rank(rank):
    group = symmem.Group.from_store(rank, 2, dist.FileStore(file + mode, 2), "ends")
    st = symmem.allocate(1 << 20, backend="host", arena=False).rendezvous(group)
    if rank == 0:
        print(group._rounds.sockets._peers[1].getsockname()[1:].decode(), flush=True)
    view = st.contiguous_view()
    st.barrier()
    if mode == "exception":
        raise RuntimeError("on purpose")
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    globals()["left"] = st, view  # for the interpreter to destroy

other = os.fork()
rank(1 if other == 0 else 0)
if other:
    os.waitpid(other, 0)
"""


def _nothing_left(address: str) -> bool:
    # Fakes of libraries, in other tests, keep their memory there.
    files = [path.name for path in Path("/dev/shm").glob("*symmem*") if "fake" not in path.name]
    assert files == []
    assert address.startswith("symmem-")
    return f"@{address}" not in Path("/proc/net/unix").read_text()


@pytest.mark.ranks
@pytest.mark.parametrize(("mode", "code"), [("normal", 0), ("exception", 1), ("killed", -9)])
def test_however_ranks_end_nothing_is_left(mode: str, code: int, tmp_path: Path) -> None:
    """After a normal exit, an exception or SIGKILL of all ranks: no file, no socket, no process."""
    done = run_to_the_end(PROGRAM, str(tmp_path / "store"), mode)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("on purpose") >= (mode == "exception")
    assert mode == "exception" or done.stderr == ""
    session, address = done.stdout.split()
    deadline = time.monotonic() + LONG
    while _processes_of(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _processes_of(session) == []
    assert _nothing_left(address)


def _processes_of(session: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, _group, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if its_session == session and state != "Z":
                found.append(path.parent.name)
    return found


def test_a_pool_that_is_killed_leaves_nothing(new_pool: NewPool) -> None:
    """SIGKILL of all ranks while they work."""
    pool = new_pool(WORLD, process_group=None)
    address = pool.run(meet_and_keep)[0]
    assert not _nothing_left(address)  # the leader's ends of the connections exist
    for rank in range(WORLD):
        pool.kill(rank)
    assert all("died" in str(outcome.error) for outcome in pool.outcomes(meet_and_keep))
    assert _nothing_left(address)


def meet_and_keep() -> str:
    mine = group("faults kept")
    kept.append(symmem.allocate(1 << 20, backend="host", arena=False).rendezvous(mine))
    assert mine._rounds.sockets is not None
    return mine._rounds.sockets._peers[1].getsockname()[1:].decode() if mine.rank == 0 else ""


# The check of leaks itself.

leaked: list[Any] = []


def run_planted(kind: str) -> None:
    def plant(ctx: Any) -> None:
        if ctx.rank == 1 and kind == "descriptor":
            leaked.append(os.open("/dev/null", os.O_RDONLY))
        elif ctx.rank == 1 and kind == "mapping":
            file = os.memfd_create("symmem")
            os.ftruncate(file, libc.PAGE)
            leaked.append(libc.Region(libc.PAGE))
            leaked[-1].place(0, file, libc.PAGE)
            os.close(file)

    CASES["planted"] = Case("planted", plant, None, 1, False)
    try:
        run_case("planted", "host")
    finally:
        del CASES["planted"]


@pytest.mark.parametrize("kind", ["descriptor", "mapping"])
def test_a_planted_leak_fails_its_case(kind: str, new_pool: NewPool) -> None:
    """The leak check of the conformance suite finds a leaked descriptor and mapping, and passes without a leak."""
    pool = new_pool(2)
    pool.run(run_planted, "none")
    outcomes = pool.outcomes(run_planted, kind)
    for outcome in outcomes:  # all ranks raise
        assert isinstance(outcome.error, SymmemError), outcome.trace
        assert f"AssertionError: {kind}s leaked" in str(outcome.error)
        assert outcome.error.rank == 1
    # Five are the arena's, and two are the ledger's.
    assert "mappings=8) after" in str(outcomes[0].error) or kind == "descriptor"
