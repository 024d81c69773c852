"""Reports of kernels in host memory: waits, and the error of a stopped kernel, which has priority."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from emulated_gpu import COMPILER, WAITING, emulate
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import LONG

from symmem.backends import gpu, kernel_status, kernel_words
from symmem.backends.base import RankGroup
from symmem.backends.cuda_signals import _call_type
from symmem.backends.driver_errors import driver_error
from symmem.backends.kernel_status import failure, gpu_waits
from symmem.backends.kernel_words import NBYTES, KernelWords
from symmem.backends.signal_kernels import (
    BEAT,
    FLAG_BARRIER,
    GROUP_SPREAD,
    LATE,
    OPERATIONS,
    PLACES,
    REFUSED,
    SOURCE,
    TICK,
    lateness,
)
from symmem.errors import (
    InvalidArgumentError,
    OutOfMemoryError,
    PeerLostError,
    PeerTimeoutError,
    RendezvousError,
    ResourceLimitError,
    UnsupportedError,
)
from symmem.group.agreement import as_symmem_error
from symmem.memory import cuda_graphs
from symmem.ops.engines.collective_kernels import STEPS

WORLD = 3

kernel_words.name_steps(STEPS)  # the engine for CUDA does this too


class StubGroup:
    rank, size = 0, WORLD

    def __init__(self, name: str = "g") -> None:
        self.name = name

    def when_lost(self, function: Callable[[int], None]) -> None:
        self.lose = function

    def lost(self) -> tuple[int, ...]:
        return ()


def stub_group(name: str = "g") -> RankGroup:
    return cast(RankGroup, StubGroup(name))


class Words(KernelWords):
    """The words, written as kernels write them."""

    def __init__(self) -> None:
        self.memory = (ctypes.c_uint32 * (NBYTES // 4))(*[9] * (NBYTES // 4))
        self.goes_on: list[int] = []
        super().__init__(3, ctypes.addressof(self.memory), 0xABC0)

    def tell(self, operation: int, number: int, detail: int, peer: int, waited: int, left: int = 5) -> None:
        place = 4 * (1 + (number * GROUP_SPREAD + peer) % PLACES)
        self.memory[place : place + 4] = [operation << 24 | number, detail << 16 | peer, waited, left]


class Clock:
    """Time passes only by sleeping; ``meanwhile`` are actions of kernels during the next sleep."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, 0
        self.meanwhile: list[Callable[[], object]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        self.now += seconds
        for act in self.meanwhile:
            act()
        self.meanwhile.clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(kernel_words, "time", made)
    return made


@pytest.fixture
def words() -> Iterator[Words]:
    made = Words()
    yield made
    kernel_status.devices.remove(made)


def seen(waiting: KernelWords) -> list[tuple[str, str, tuple[int, ...], str | None]]:
    return [(wait.group.name, wait.step, wait.missing(), wait.device) for wait in waiting.waits()]


# Waiting threads.


def test_a_wait_that_goes_on_is_told(words: Words, clock: Clock) -> None:
    known = stub_group()
    number = words.enter(known)
    words.tell(1, number, 7, 2, waited=64)
    clock.meanwhile = [lambda: words.tell(1, number, 7, 2, waited=192, left=1000)]
    (wait,) = gpu_waits()
    assert (wait.group, wait.step, wait.missing(), wait.device) == (known, "barrier on channel 7", (2,), "cuda:3")
    assert clock.now - wait.began == pytest.approx(192 * 2**TICK / 1e9)
    assert wait.deadline - clock.now == pytest.approx(1000 * 2**TICK / 1e9)


def test_a_wait_that_is_over_is_not_told_and_costs_nothing_twice(words: Words, clock: Clock) -> None:
    assert seen(words) == []
    assert clock.slept == 0
    number = words.enter(kept := stub_group())
    words.tell(1, number, 7, 2, waited=64)
    assert seen(words) == []
    assert clock.slept == 1
    assert seen(words) == []
    assert clock.slept == 2  # asked again at once: it may just have been reported again
    clock.now += 1
    assert seen(words) == []
    assert clock.slept == 2
    words.tell(1, number, 7, 2, waited=128)
    clock.meanwhile = [lambda: words.tell(1, number, 7, 2, waited=192)]
    assert seen(words) == [(kept.name, "barrier on channel 7", (2,), "cuda:3")]


def test_one_that_begins_meanwhile_is_told_and_one_that_ends_is_not(words: Words, clock: Clock) -> None:
    number = words.enter(kept := stub_group())
    words.tell(3, number, 1, 1, waited=64)
    clock.meanwhile = [lambda: words.tell(2, number, 5, 2, waited=64)]
    assert seen(words) == [(kept.name, "put_signal on channel 5", (2,), "cuda:3")]


def test_peers_of_one_operation_are_told_together(words: Words, clock: Clock) -> None:
    """Start and deadline are the earliest of all peers."""
    step, name = min(STEPS.items())
    number, other = words.enter(kept := stub_group()), words.enter(another := stub_group("other"))
    words.tell(1, other, 0, 1, waited=1)
    clock.meanwhile = [
        lambda: words.tell(step, number, 0, 2, waited=64, left=900),
        lambda: words.tell(step, number, 0, 1, waited=128, left=800),
        lambda: words.tell(1, other, 0, 1, waited=70),
    ]
    waits = sorted(words.waits(), key=lambda wait: wait.group.name)
    assert [(wait.group, wait.step, wait.missing()) for wait in waits] == [
        (kept, name, (1, 2)),
        (another, "barrier on channel 0", (1,)),
    ]
    assert clock.now - waits[0].began == pytest.approx(128 * 2**TICK / 1e9)
    assert waits[0].deadline - clock.now == pytest.approx(800 * 2**TICK / 1e9)


def test_a_group_that_is_gone_is_not_told_of(words: Words, clock: Clock) -> None:
    gone = stub_group()
    number, reference = words.enter(gone), weakref.ref(gone)
    del gone
    assert reference() is None
    clock.meanwhile = [lambda: words.tell(1, number, 7, 2, waited=192)]
    words.tell(1, number, 7, 2, waited=64)
    assert seen(words) == []


@settings(max_examples=50)
@given(
    st.integers(0, 300),
    st.sets(st.integers(0, PLACES - 1), min_size=1, max_size=40),
    st.sampled_from([*range(1, len(OPERATIONS) + 1), *STEPS]),
    st.integers(0, 65535),
    st.integers(1, 2**32 - 1),
)
def test_all_peers_of_a_group_have_places(
    number: int, peers: set[int], operation: int, detail: int, ticks: int
) -> None:
    words = Words()
    known = stub_group()
    words._groups = [("", 0, weakref.ref(known))] * (number + 1)
    for peer in peers:
        words.tell(operation, number, detail, peer, ticks)
    (wait,) = words._decode(list(words._read().values()))
    assert wait.missing() == tuple(sorted(peers))
    assert wait.step == (STEPS.get(operation) or f"{OPERATIONS[operation - 1]} on channel {detail}")
    kernel_status.devices.remove(words)


def test_a_forked_child_does_not_look(words: Words) -> None:
    """The memory belongs to its parent, and may not be mapped in the child."""
    words.memory[0] = 1
    words.enter(stub_group())
    assert failure() is not None
    child = os.fork()
    if child == 0:
        os._exit(0 if failure() is None and gpu_waits() == [] else 1)
    assert os.waitpid(child, 0)[1] == 0


# The kernels of the signals, with GPUs made of threads.

REPLACED = {
    "load_relaxed": "return __atomic_load_n(word, __ATOMIC_RELAXED);",
    "load_acquire": "usleep(100); if (stopped) leave(); return __atomic_load_n(word, __ATOMIC_ACQUIRE);",
    "store_relaxed": "__atomic_store_n(word, value, __ATOMIC_RELAXED);",
    "fence": "__atomic_thread_fence(__ATOMIC_SEQ_CST);",
    "swap_release": "usleep(100); if (stopped) leave(); __atomic_compare_exchange_n(word, &expected, value, false, "
    "__ATOMIC_RELEASE, __ATOMIC_RELAXED); return expected;",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler here")
    file = tmp_path_factory.mktemp("signals") / "signals.so"
    # On a busy machine, a thread that yields is seldom run, and one that sleeps soon is. It must read the clock several
    # times while a reader looks.
    source = SOURCE.replace("const u32 SPINS = 64;", "const u32 SPINS = 4;")
    assert source != SOURCE
    return emulate(source, REPLACED | WAITING, KERNELS, {"WORLD": str(WORLD)}, file)


KERNELS = (*OPERATIONS, FLAG_BARRIER)


class Ranks:
    """The pads of all ranks. A thread runs a kernel. The kernels of all ranks report to the same memory."""

    def __init__(self, library: ctypes.CDLL, words: Words) -> None:
        self.library, self.words = library, words
        self.groups = [stub_group(f"of rank {rank}") for rank in range(WORLD)]
        self.pads = [(ctypes.c_uint32 * (32 * 72))() for _ in range(WORLD)]
        self.threads: list[threading.Thread] = []

    def launch(
        self, operation: str, rank: int, channel: int, peer: int = 0, seconds: float = LONG, strict: bool = False
    ) -> None:
        call = _call_type(WORLD)(
            pads=(ctypes.c_uint64 * WORLD)(*map(ctypes.addressof, self.pads)),
            status=ctypes.addressof(self.words.memory),
            limit=int(seconds * 1e9),
            channel=channel,
            rank=rank,
            peer=peer,
            group=self.words.enter(self.groups[rank]),
            strict=strict,
        )
        which, count = KERNELS.index(operation), WORLD if "barrier" in operation else 1
        thread = threading.Thread(target=lambda: self.library.launch(which, ctypes.byref(call), 1, count))
        thread.start()
        self.threads.append(thread)

    def become(self, *expected: tuple[int, str, tuple[int, ...]]) -> None:
        """Poll until the waits are as expected: rank, step and awaited ranks."""
        wanted = [(f"of rank {rank}", step, missing) for rank, step, missing in expected]
        deadline = time.monotonic() + LONG
        while sorted(each[:3] for each in seen(self.words)) != wanted:
            assert time.monotonic() < deadline, seen(self.words)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(LONG)
            assert not thread.is_alive()


def test_kernels_that_wait_say_for_whom(library: ctypes.CDLL, words: Words) -> None:
    ranks, step = Ranks(library, words), "barrier on channel 5"
    ranks.launch("barrier", 0, 5)
    ranks.become((0, step, (1, 2)))
    ranks.launch("barrier", 1, 5)
    ranks.become((0, step, (2,)), (1, step, (2,)))
    ranks.launch("wait_signal", 2, 63, 1)
    ranks.become((0, step, (2,)), (1, step, (2,)), (2, "wait_signal on channel 63", (1,)))
    ranks.launch("put_signal", 1, 63, 2)
    ranks.launch("barrier", 2, 5)
    ranks.join()
    ranks.become()
    assert words.failure() is None


def test_a_barrier_of_flags_uses_no_other_words(library: ctypes.CDLL, words: Words) -> None:
    ranks, step = Ranks(library, words), "barrier on channel 200"  # a channel of PyTorch's pads
    for _turn in range(2):
        ranks.launch(FLAG_BARRIER, 0, 200)
        ranks.launch(FLAG_BARRIER, 1, 200)
        ranks.become((0, step, (2,)), (1, step, (2,)))
        used = [index for index, word in enumerate(ranks.pads[2]) if word]
        assert used == [200 * WORLD, 200 * WORLD + 1]
        ranks.launch(FLAG_BARRIER, 2, 200)
        ranks.join()
        assert not any(map(any, ranks.pads))
    assert words.failure() is None


def test_a_flag_that_is_not_taken(library: ctypes.CDLL, words: Words) -> None:
    ranks = Ranks(library, words)
    ranks.launch("put_signal", 1, 2, 0)
    ranks.join()
    ranks.launch("put_signal", 1, 2, 0)
    ranks.become((1, "put_signal on channel 2", (0,)))
    for _ in range(2):
        ranks.launch("wait_signal", 0, 2, 1)
    ranks.join()
    ranks.become()


def test_who_gives_up_has_said_so_before(library: ctypes.CDLL, words: Words) -> None:
    ranks = Ranks(library, words)
    try:
        ranks.launch("wait_signal", 0, 9, 2, seconds=4.0)  # so long that the thread runs meanwhile
        ranks.join()
    finally:
        library.restart()
    (told,) = words._decode(list(words._read().values()))
    assert (told.group, told.step, told.missing()) == (ranks.groups[0], "wait_signal on channel 9", (2,))
    assert told.deadline - time.monotonic() < 4.0
    with pytest.raises(PeerTimeoutError, match=r"wait_signal on channel 9. rank 2 did not come") as caught:
        raise words.failure() or AssertionError
    assert caught.value.peers == (2,)


@pytest.mark.parametrize("kernel", KERNELS)
def test_waits_end_when_a_rank_is_lost(kernel: str, library: ctypes.CDLL, words: Words) -> None:
    ranks, operation = Ranks(library, words), kernel.removeprefix("flag_")
    if operation == "put_signal":
        ranks.launch(kernel, 0, 3, 1)
        ranks.join()
    ranks.launch(kernel, 0, 3, 1)
    ranks.become((0, f"{operation} on channel 3", (1, 2) if operation == "barrier" else (1,)))
    assert words.loss(0) is None
    ranks.groups[0].lose(2)  # type: ignore[attr-defined]
    ranks.join()
    error = words.loss(0)
    assert isinstance(error, PeerLostError)
    assert (error.peers, error.group, error.step) == ((2,), "of rank 0", f"{operation} on channel 3")
    assert words.failure() is None  # this process can work on
    ranks.launch(kernel, 0, 3, 1)  # in a graph, for example
    ranks.join()
    words.enter(stub_group("another one"))
    assert words.loss(1) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_strict_kernels_trap_when_a_rank_is_lost(kernel: str, library: ctypes.CDLL, words: Words) -> None:
    ranks, operation = Ranks(library, words), kernel.removeprefix("flag_")
    try:
        if operation == "put_signal":
            ranks.launch(kernel, 0, 3, 1)
            ranks.join()
        ranks.launch(kernel, 0, 3, 1, strict=True)
        ranks.become((0, f"{operation} on channel 3", (1, 2) if operation == "barrier" else (1,)))
        ranks.groups[0].lose(2)  # type: ignore[attr-defined]
        ranks.join()
    finally:
        library.restart()
    error = words.failure()
    assert isinstance(error, PeerLostError)
    assert (error.peers, error.step) == ((2,), f"{operation} on channel 3")


def test_what_a_lost_rank_stored_before_is_taken(library: ctypes.CDLL, words: Words) -> None:
    ranks = Ranks(library, words)
    ranks.launch("put_signal", 1, 2, 0)
    ranks.join()
    number = words.enter(ranks.groups[0])
    ranks.groups[0].lose(1)  # type: ignore[attr-defined]
    ranks.launch("wait_signal", 0, 2, 1)
    ranks.join()
    assert words.loss(number) is None


def test_groups_are_limited(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_words, "GROUPS", 2)
    groups = [stub_group(f"{number}") for number in range(3)]
    assert [words.enter(group) for group in groups[:2]] == [0, 1]
    assert words.enter(groups[0]) == 0
    with pytest.raises(ResourceLimitError, match="used 2 groups on cuda:3"):
        words.enter(groups[2])


# How often a wait is reported: a kernel with a clock that the test sets.

PROBE = """
typedef unsigned int u32;
typedef unsigned long long u64;
struct Call { u32 *status; u64 limit; u32 group, count; const u64 *times; u32 *told, *goes_on; };
thread_local u64 clock_shows;
%s
void probe(Call call) {
  u64 began = 0;
  u32 *place = call.status + 4 * (1 + (call.group * GROUP_SPREAD + 3) %% PLACES);
  u32 *goes_on = call.goes_on + call.count * (blockIdx.x * blockDim.x + threadIdx.x);
  for (u32 i = 0; i < call.count; ++i) {
    clock_shows = call.times[i];
    place[2] = 0;
    goes_on[i] = waits_on(&call, 5, 3, SPINS * (i + 1), began);
    call.told[i] = place[2];
  }
}
"""


class Probe(ctypes.Structure):
    _fields_ = (
        ("status", ctypes.c_void_p),
        ("limit", ctypes.c_uint64),
        ("group", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("times", ctypes.c_void_p),
        ("told", ctypes.c_void_p),
        ("goes_on", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler here")
    replaced, file = WAITING | {"read_clock": "return clock_shows;"}, tmp_path_factory.mktemp("probe") / "probe.so"
    return emulate(PROBE % lateness("2", "what"), replaced, ("probe",), {}, file)


def told_at(probe: ctypes.CDLL, words: Words, milliseconds: Sequence[float], limit: int = 10**9) -> list[float]:
    """The clock readings at which a thread reports its wait, and the start that it reports."""
    start = 1_700_000_000_000_000_123
    times = (ctypes.c_uint64 * len(milliseconds))(*(start + int(each * 10**6) for each in milliseconds))
    told, goes_on = ((ctypes.c_uint32 * len(milliseconds))() for _ in range(2))
    addresses = ctypes.addressof(times), ctypes.addressof(told), ctypes.addressof(goes_on)
    call = Probe(ctypes.addressof(words.memory), limit * 10**6, 700, len(milliseconds), *addresses)
    probe.launch(0, ctypes.byref(call), 1, 1)
    words.goes_on = list(goes_on)
    for at, ticks in zip(milliseconds, told, strict=True):
        assert not ticks or abs(ticks * 2**TICK / 1e6 - at + milliseconds[0]) < 1.1
    return [at for at, ticks in zip(milliseconds, told, strict=True) if ticks]


def test_a_wait_is_told_after_each_beat(probe: ctypes.CDLL, words: Words) -> None:
    assert told_at(probe, words, [0, 1, 66, 68, 69, 133, 135, 136, 200]) == [68, 135]
    assert told_at(probe, words, [0, 380, 381, 382, 383, 384, 385, 390]) == [
        380,
        381,
        382,
        383,
        384,
    ]  # the thread was not scheduled
    assert len(told_at(probe, words, [*range(0, 60_001, 10)])) == 60_000_000_000 >> BEAT


def test_threads_look_for_a_lost_rank_in_turns(probe: ctypes.CDLL, words: Words) -> None:
    """If all threads looked at host memory at once, their loads would occupy the bus for a millisecond."""
    count, quiet = 600, 5  # readings of the clock, and how many of them are in the first millisecond
    words._release(700, 2)
    start = 1_700_000_000_000_000_000
    times = (ctypes.c_uint64 * count)(*(start + (n >= quiet) * 2**TICK for n in range(count)))
    told = (ctypes.c_uint32 * count)()
    for blocks, threads, turns in ((1, 1, 1), (1, 8, 8), (3, 100, 256)):
        goes_on = (ctypes.c_uint32 * (blocks * threads * count))()
        addresses = ctypes.addressof(times), ctypes.addressof(told), ctypes.addressof(goes_on)
        call = Probe(ctypes.addressof(words.memory), 10**15, 700, count, *addresses)
        probe.launch(0, ctypes.byref(call), blocks, threads)
        for thread in range(blocks * threads):
            looked = next(n for n in range(quiet, count) if (n + 1) % turns == thread % turns)
            # After its look, a thread checks once more whether its data came.
            assert goes_on[thread * count : (thread + 1) * count].index(0) == looked + 1
    begin = 4 * (1 + PLACES) + 8 * 700
    assert list(words.memory[begin : begin + 8]) == [3, 0, 0, 0, 2, 5, 3, 0]


def test_a_wait_ends_when_its_time_is_up(probe: ctypes.CDLL, words: Words) -> None:
    try:
        assert told_at(probe, words, [0, 70, 99, 101, 140], limit=100) == [70]
        assert list(words.status) == [2, 5, 3, 700]
        place = 4 * (1 + (700 * GROUP_SPREAD + 3) % PLACES)
        assert words.memory[place : place + 2] + words.memory[place + 3 : place + 4] == [
            *(2 << 24 | 700, 5 << 16 | 3),
            int(30e6) >> TICK,
        ]
    finally:
        probe.restart()


# Collective operations that gave up.


def test_an_operation_that_gave_up_is_told_once(words: Words) -> None:
    groups = [stub_group(), stub_group("other")]
    number, other = (words.enter(group) for group in groups)
    record = 4 * (1 + PLACES) + 8 * number + 4
    assert kernel_status.take_error(groups[0]) is None
    for cause, kind, text in (
        (LATE << 16 | 0 << 8 | 2, PeerTimeoutError, "rank 2 did not come in time. This operation and .* NaN"),
        (LATE << 16 | 1 << 8 | 2, PeerTimeoutError, "rank 2 did not come while rank 1 waited for it. This operation"),
        (REFUSED << 16 | 2 << 8 | 2, RendezvousError, "rank 2 refused a call. This operation"),
    ):
        words.memory[record : record + 4] = [16, 0, 1, cause]
        assert words.loss(number) is None
        error = kernel_status.take_error(groups[0])
        assert type(error) is kind
        assert re.search(text, str(error))
        assert (error.rank, error.group, error.step, error.peers) == (0, "g", "all_reduce", (2,))
        assert kernel_status.take_error(groups[0]) is None
        assert words.abandonment(number) is not None
        words.resume(number, error)
        assert words.abandonment(number) is None
        assert kernel_status.take_error(groups[0]) is None
    assert words.take_error(other) is None


def test_the_full_error_replaces_one_that_is_not_raised_yet(words: Words) -> None:
    known = stub_group()
    number = words.enter(known)
    record = 4 * (1 + PLACES) + 8 * number + 4
    words.memory[record : record + 4] = [16, 0, 1, REFUSED << 16 | 1 << 8 | 1]
    assert words.take_error(number, PeerTimeoutError) is None
    full = InvalidArgumentError("no")
    words.resume(number, full)
    assert list(words.given_up(number)) == [0] * 4
    assert words.take_error(number) is full
    assert words.refuse(number, 16, 0) == REFUSED << 16
    assert list(words.given_up(number)) == [16, 0, 0, REFUSED << 16]
    assert words.take_error(number) is None  # the caller has raised it


def test_a_lost_rank_comes_first(words: Words) -> None:
    known = StubGroup()
    number = words.enter(cast(RankGroup, known))
    record = 4 * (1 + PLACES) + 8 * number + 4
    words.memory[record : record + 4] = [16, 0, 1, LATE << 16 | 1]
    known.lose(2)
    assert words.abandonment(number) is None
    assert words.take_error(number) is None
    assert isinstance(words.loss(number), PeerLostError)


# A stopped kernel, seen by the next call of CUDA.


def fail(*_: Any) -> Any:
    raise RuntimeError("CUDA error: unspecified launch failure")


def query_of_an_event(patch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(record=lambda _: None, query=fail)
    patch.setattr("torch.cuda.Event", lambda: event)
    patch.setattr("torch.cuda.current_stream", lambda _: None)
    gpu.idle(torch.device("cuda", 0), 1.0)


def a_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.cuda.current_stream", lambda _: SimpleNamespace(synchronize=fail))
    gpu.finish_stream(torch.device("cuda", 0))


def a_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.cuda.synchronize", fail)
    gpu.synchronize(torch.device("cuda", 0))


def a_capture(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch._C._cuda_isCurrentStreamCapturing", fail, raising=False)
    cuda_graphs.is_capturing(torch.device("cuda", 0))


def a_call_of_the_driver(patch: pytest.MonkeyPatch) -> None:
    raise driver_error("CUDA_ERROR_LAUNCH_FAILED", "cuMemMap: CUDA_ERROR_LAUNCH_FAILED")


def a_collective_operation(patch: pytest.MonkeyPatch) -> None:
    """The error on the other ranks."""
    raise as_symmem_error(RuntimeError("CUDA error: unspecified launch failure"))


@pytest.mark.parametrize(
    "ask", [a_capture, a_stream, a_device, query_of_an_event, a_call_of_the_driver, a_collective_operation]
)
def test_the_error_of_the_kernel_wins(
    ask: Callable[[pytest.MonkeyPatch], object], words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Exception, match=r"launch failure|LAUNCH_FAILED") as plain:
        ask(monkeypatch)
    assert not isinstance(plain.value, PeerTimeoutError)
    known = stub_group()
    words.memory[:4] = [1, 7, 2, words.enter(known)]
    with pytest.raises(PeerTimeoutError, match=r"rank 0, group g, step barrier on channel 7. rank 2 did") as caught:
        ask(monkeypatch)
    assert caught.value.peers == (2,)


def test_errors_that_have_a_name_keep_it(words: Words) -> None:
    assert isinstance(driver_error("CUDA_ERROR_OUT_OF_MEMORY", "cuMemCreate"), OutOfMemoryError)
    known = stub_group()
    words.memory[:4] = [1, 7, 2, words.enter(known)]
    with pytest.raises(UnsupportedError), kernel_status.named:
        raise UnsupportedError("no")
    with pytest.raises(ValueError, match="of another kind"), kernel_status.named:
        raise ValueError("of another kind")
