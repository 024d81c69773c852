"""Arenas on one rank, or on ranks that are threads: carving, lifetime, look-up, growth, the book (mission G3)."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from thread_ranks import make_groups, succeed

import symmem
from symmem.arena import suballocator
from symmem.arena.allocation_log import AllocationLog
from symmem.arena.arena import arenas_of
from symmem.arena.arena_block import ArenaBlock
from symmem.arena.segment import GRANULE
from symmem.backends import get_backend
from symmem.backends.base import tensor_at
from symmem.errors import (
    ClosedError,
    ForkedError,
    GroupError,
    InvalidArgumentError,
    NotSymmetricError,
    OutOfMemoryError,
    PeerTimeoutError,
    ResourceLimitError,
)
from symmem.tensor import request

MIB = 1 << 20
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}

Make = Callable[..., "Rank"]


class Rank:
    """A group of one rank, and its arena of host memory."""

    def __init__(self, group: symmem.Group) -> None:
        self.group = group

    def allocate(self, sizes: Any = 8, dtype: Any = torch.uint8, **options: Any) -> symmem.SymmetricTensor:
        return symmem.allocate(sizes, dtype, group=self.group, backend="host", **options)

    def collect(self, **options: Any) -> int:
        return symmem.collect(self.group, **options)

    @property
    def log(self) -> AllocationLog:
        return arenas_of(self.group)[0].log

    @property
    def book(self) -> tuple[int, int]:
        """Bytes that are live, and in quarantine."""
        self.log.count_drops()
        return self.log.live_bytes, self.log.quarantined_bytes

    @property
    def segments(self) -> list[int]:
        return [segment.nbytes for segment in self.log.segments]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    def make(**settings: object) -> Rank:
        options = ",".join(f"{name}({value})" for name, value in settings.items())
        monkeypatch.setenv("SYMMEM_ENABLE", options)
        return Rank(symmem.Group.from_store(0, 1, dist.HashStore(), "arena"))

    return make


@pytest.fixture
def rank(make: Make) -> Rank:
    return make(arena_size="2MiB")


def span(st: symmem.SymmetricTensor) -> tuple[int, int]:
    return st._block.pointer, st._block.pointer + max(st._block.nbytes, 1)


# Carving.


def test_blocks_are_aligned_and_apart(rank: Rank) -> None:
    live = [rank.allocate(size) for size in (0, 1, 255, 256, 257, 1000, 4096, 70000, 3, 0)]
    for st in live:
        assert st._block.pointer % GRANULE == 0
        st.tensor.fill_(7)
    spans = sorted(map(span, live))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert rank.group.rank == 0
    assert all(st.groups == (rank.group,) for st in live)
    assert all(int(st.remote_pointers[0]) == st._block.pointer for st in live)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in QUANTIZED], ids=str)
def test_every_dtype(dtype: torch.dtype, rank: Rank) -> None:
    before, st, after = rank.allocate(3), rank.allocate((3, 2), dtype), rank.allocate(3)
    try:
        st.tensor.view(torch.uint8).fill_(1)
    except RuntimeError:  # of fewer than 8 bits
        st._block.tensor().fill_(1)
    before.tensor.fill_(2)
    after.tensor.fill_(3)
    assert (st.dtype, st.shape) == (dtype, (3, 2))
    assert (st._block.tensor() == 1).all()
    assert symmem.find(st.tensor)._block is st._block  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", sorted(QUANTIZED, key=str), ids=str)
def test_a_refused_dtype_leaves_the_arena_as_it_was(dtype: torch.dtype, rank: Rank) -> None:
    keep = rank.allocate()
    before = rank.log.count, rank.log.digest, rank.book
    with pytest.raises(InvalidArgumentError):
        rank.allocate(3, dtype)
    assert (rank.log.count, rank.log.digest, rank.book) == before
    del keep


def test_strides(rank: Rank) -> None:
    guard, st, behind = rank.allocate(512), rank.allocate((3, 4), torch.int16, strides=(100, 2)), rank.allocate(512)
    for each in (guard, behind):
        each.tensor.fill_(9)
    st.tensor.fill_(-1)
    assert st._block.nbytes == 2 * (2 * 100 + 3 * 2 + 1)
    assert st.contiguous_view()[0].stride() == (100, 2)
    assert (guard.tensor == 9).all()
    assert (behind.tensor == 9).all()
    with pytest.raises(InvalidArgumentError):
        rank.allocate((3, 4), strides=(1, 1))


@pytest.mark.parametrize("sizes", [0, (0,), (3, 0), (0, 2**40), ()], ids=str)
def test_tensors_of_nothing_and_of_no_dimensions(sizes: Any, rank: Rank) -> None:
    st = rank.allocate(sizes, torch.float64)
    st.barrier()
    st.tensor.fill_(1)
    assert st.remote_tensor(0).shape == st.shape
    assert st.contiguous_view().shape == (1, *st.shape)
    first = rank.book[0]
    del st
    assert rank.book == (0, first)
    assert first > 0


@pytest.mark.parametrize("name", [5, b"x", ["a"], "\ud800"], ids=repr)
def test_a_name_that_is_no_text(name: Any, rank: Rank) -> None:
    rank.allocate()
    before = rank.log.digest
    with pytest.raises(InvalidArgumentError, match="name"):
        rank.allocate(name=name)
    assert rank.log.digest == before
    assert rank.allocate(name="weights").tensor.shape == (8,)


def test_memory_of_its_own(rank: Rank) -> None:
    st = rank.allocate(arena=False)
    assert not isinstance(st._block, ArenaBlock)
    assert st.groups == ()
    assert rank.log.count == 0
    with pytest.raises(GroupError, match="there is none"):
        symmem.allocate(8, backend="host", arena=True)


def test_the_call_site_is_the_users(rank: Rank) -> None:
    st = rank.allocate(name="here")
    record = rank.log.recent()[-1]
    assert record.site.code.co_name == "allocate"
    assert record.site.code.co_filename == __file__
    assert str(record).startswith("[8] of torch.uint8 named 'here', 256 bytes, at ")
    del st


@pytest.mark.parametrize(
    ("module", "named"), [("symmem.ops.some", False), ("symmem.tools.some", True), ("symmemory", True), ("a.b", True)]
)
def test_a_call_site_within_symmem_is_that_of_its_caller(module: str, named: bool, rank: Rank) -> None:
    namespace: dict[str, Any] = {"__name__": module}
    exec("def through(allocate, *args, **options):\n    return allocate(*args, **options)", namespace)
    for _ in range(2):  # the second time it is known
        namespace["through"](symmem.allocate, 8, torch.uint8, group=rank.group, backend="host")
        found = rank.log.recent()[-1].site.code.co_name
        assert found == ("through" if named else "test_a_call_site_within_symmem_is_that_of_its_caller")


# Lifetime.

KEEPERS: dict[str, Callable[[symmem.SymmetricTensor], object]] = {
    "handle": lambda st: st,
    "tensor": lambda st: st.tensor,
    "view": lambda st: st.tensor[3:5].view(-1, 1),
    "alias": lambda st: st.tensor.detach(),
    "storage": lambda st: st.tensor.untyped_storage(),
    "remote view": lambda st: st.remote_tensor(0)[1:],
    "contiguous view": lambda st: st.contiguous_view()[0],
    "signal pad": lambda st: st.signal_pad(0),
    "second handle": lambda st: symmem.find(st.tensor),
    "wrapped view": lambda st: symmem.SymmetricTensor.wrap(st.tensor[2:]),
    "numpy-like": lambda st: (
        memoryview(st.tensor.untyped_storage()) if False else torch.utils.dlpack.to_dlpack(st.tensor)
    ),  # type: ignore[attr-defined]
    "closed, its tensor": lambda st: (st.tensor, st.close())[0],
}


@pytest.mark.parametrize("shape", [(1000,), (10, 100)])
@pytest.mark.parametrize("what", KEEPERS)
def test_whatever_reaches_the_memory_keeps_it(what: str, shape: tuple[int, ...], rank: Rank) -> None:
    st = rank.allocate(shape)
    st.tensor.fill_(5)
    pointer = st.tensor.data_ptr()
    kept = KEEPERS[what](st)
    assert kept is not None
    live, _ = rank.book
    del st
    gc.collect()
    assert rank.book == (live, 0)
    assert rank.collect() == 0
    other = rank.allocate(1000)
    other.tensor.fill_(6)
    assert other.tensor.data_ptr() != pointer
    del kept, other
    gc.collect()
    assert rank.book == (0, 2 * live)
    assert rank.collect() == 2 * live
    assert rank.book == (0, 0)
    assert rank.allocate(1000).tensor.data_ptr() == pointer or len(rank.log.segments) == 1


def test_what_was_dropped_is_not_reused_before_a_meeting(rank: Rank) -> None:
    seen = set()
    for _ in range(30):  # no more than there are signal pads
        st = rank.allocate(64)
        assert st._block.pointer not in seen
        seen.add(st._block.pointer)
        del st
    assert rank.collect() == 30 * GRANULE
    assert rank.allocate(64)._block.pointer in seen


def test_a_circle_is_in_use_until_the_collector_comes(rank: Rank) -> None:
    circle: list[object] = [rank.allocate()]
    circle.append(circle)
    gc.disable()
    try:
        del circle
        assert rank.collect() == 0
        gc.collect()
        assert rank.collect() == GRANULE
    finally:
        gc.enable()


def test_what_a_finalizer_brings_back_to_life_is_not_in_quarantine(rank: Rank) -> None:
    saved: list[Any] = []

    class Phoenix:
        def __init__(self, st: symmem.SymmetricTensor) -> None:
            self.st, self.me = st, self

        def __del__(self) -> None:
            saved.append(self.st)

    phoenix = Phoenix(rank.allocate(name="phoenix"))
    pointer = phoenix.st._block.pointer
    del phoenix
    gc.collect()
    assert len(saved) == 1
    assert rank.collect() == 0
    assert rank.allocate()._block.pointer != pointer
    saved[0].tensor.fill_(3)
    saved.clear()
    assert rank.collect() == 2 * GRANULE


def test_requests_that_are_equal_but_not_alike(rank: Rank) -> None:
    """What is remembered of a request must not be taken for another one's."""
    for sizes in (1, (1,), (1, 2)):
        assert rank.allocate(sizes, torch.uint8).tensor.numel() in (1, 2)
    for wrong in (True, (True,), 1.0, (1.0,), (1, 2.0), (True, 2)):
        with pytest.raises(InvalidArgumentError, match="integers"):
            rank.allocate(wrong, torch.uint8)
    for right, dtype in (((1, 2), torch.int16), ([1, 2], torch.uint8), (torch.Size((1, 2)), torch.uint8)):
        st = rank.allocate(right, dtype)
        assert (st.tensor.shape, st.tensor.dtype, st._block.nbytes) == ((1, 2), dtype, 2 * dtype.itemsize)
    assert rank.allocate((3, 2), torch.uint8, strides=(5, 1)).tensor.stride() == (5, 1)
    assert rank.allocate((3, 2), torch.uint8).tensor.stride() == (2, 1)
    assert rank.allocate((3, 2), torch.uint8, arena=False).groups == ()


def test_many_requests_are_not_all_remembered(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("symmem.tensor.request._REMEMBERED", 8)
    for size in range(40):
        assert rank.allocate((size,)).tensor.shape == (size,)
        assert len(rank.group.extension(request.Requests)) <= 9


def test_a_request_for_the_current_device_follows_it(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it led to is remembered for one CUDA device only."""
    asked: list[int] = []
    choose = request._choose

    def chosen(*args: Any) -> Any:
        asked.append(torch._C._cuda_getDevice())
        return dataclasses.replace(choose(*args), device=torch.device("cpu", asked[-1]), follows_current=True)

    monkeypatch.setattr("symmem.tensor.request._choose", chosen)
    for current in (0, 0, 1, 1, 0):
        monkeypatch.setattr("torch._C._cuda_getDevice", itertools.repeat(current).__next__, raising=False)
        assert rank.allocate((4,)).tensor.shape == (4,)
    assert asked == [0, 1, 0]


def test_close(rank: Rank) -> None:
    st = rank.allocate()
    tensor, second = st.tensor, symmem.find(st.tensor)
    assert second is not None
    with st:
        pass
    st.close()
    for use in (
        lambda: st.tensor,
        lambda: second.tensor,
        lambda: second.barrier(),
        lambda: st.remote_tensor(0),
        lambda: st.rendezvous(rank.group),
        lambda: symmem.SymmetricTensor.wrap(tensor),
    ):
        with pytest.raises(ClosedError):
            use()
    assert symmem.find(tensor) is None
    assert rank.collect() == 0
    tensor.fill_(1)
    use = tensor = second = st = None  # type: ignore[assignment]
    assert rank.collect() == GRANULE


# Look-up.


def test_neighbours_are_told_apart(rank: Rank) -> None:
    live = [rank.allocate(256) for _ in range(50)]  # with nothing between them
    assert len({st._block.pointer for st in live}) == 50
    for st in live:
        for view in (st.tensor, st.tensor[:1], st.tensor[255:], st.tensor[17:40]):
            found = symmem.find(view)
            assert found is not None
            assert found._block is st._block
        assert symmem.SymmetricTensor.wrap(st.tensor[9:])._layout.offset == 9


def over(pointer: int, owner: object, nbytes: int = 1) -> torch.Tensor:
    """Bytes of memory, as a tensor that belongs to nobody."""
    return tensor_at(pointer, nbytes, torch.device("cpu"), owner)


def test_what_lies_between_blocks_is_not_found(rank: Rank) -> None:
    st, behind = rank.allocate(100), rank.allocate(100)
    begin, end = span(st)
    segment = rank.log.segments[0]
    assert symmem.find(over(end - 1, segment))._block is st._block  # type: ignore[union-attr]
    pads, offset = rank.log.pads.locate(st._block.slot)  # type: ignore[attr-defined]
    places = [end, begin + 255, pads.pointer + offset, segment.pointer + segment.nbytes - 1]
    for pointer in places:
        assert symmem.find(over(pointer, segment)) is None
        with pytest.raises(NotSymmetricError, match="address"):
            symmem.SymmetricTensor.wrap(over(pointer, segment))
    with pytest.raises(NotSymmetricError, match="extent"):
        symmem.SymmetricTensor.wrap(over(end - 4, segment, 8))
    del behind


def test_what_was_dropped_is_not_found(rank: Rank) -> None:
    first, st, last = rank.allocate(1000), rank.allocate(1000), rank.allocate(1000)
    segment, (begin, end) = rank.log.segments[0], span(st)
    del st
    for _ in ("in quarantine", "reclaimed"):
        assert symmem.find(over(begin, segment)) is None
        assert symmem.find(over(end - 1, segment)) is None
        assert symmem.find(first.tensor[-1:]) is not None
        assert symmem.find(last.tensor[500:]) is not None
        rank.collect()
    # The place is cut up anew: what was there leaves no trace.
    small = [rank.allocate(256) for _ in range(3)]
    whole = rank.allocate(4096)
    for each in (*small, whole, first, last):
        found = symmem.find(each.tensor[-1:])
        assert found is not None
        assert found._block is each._block


def test_a_block_over_many_former_ones(rank: Rank) -> None:
    many = [rank.allocate(256) for _ in range(200)]
    del many
    rank.collect()
    large = rank.allocate(200 * 256)
    found = symmem.find(large.tensor[150 * 256 + 3 :])
    assert found is not None
    assert found._block is large._block


def test_looking_up_while_another_thread_allocates(rank: Rank) -> None:
    """`find` takes no lock of the arena: what lives is found all the while."""
    fixed = [rank.allocate(1000) for _ in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    over = threading.Event()

    def churn() -> None:
        while not over.is_set():
            some = [rank.allocate(500) for _ in range(10)]
            del some
            rank.collect()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for turn in range(3000):
            st = fixed[turn % 8]
            found = symmem.find(st.tensor[500:])
            assert found is not None
            assert found._block is st._block
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(before)


def test_two_threads_of_a_rank_in_two_groups(make: Make) -> None:
    """Each has its own arena; the collector runs amid everything."""
    ranks = [make(arena_size="2MiB", arena_limit="64MiB") for _ in range(2)]
    threshold = gc.get_threshold()
    gc.set_threshold(1)

    def work(me: int) -> int:
        rank, kept = ranks[me], []
        for turn in range(60):
            st = rank.allocate(100 + 50 * (turn % 7))
            st.tensor.fill_(turn)
            circle: list[object] = [rank.allocate(5)]
            circle.append(circle)
            if turn % 3 == 0:
                kept.append((turn, st))
            if turn % 20 == 19:
                rank.collect()
            assert all((each.tensor == number).all() for number, each in kept)
        return len(kept)

    try:
        assert succeed(2, work) == [20, 20]
    finally:
        gc.set_threshold(*threshold)


def test_two_threads_in_one_arena(rank: Rank) -> None:
    """On one rank there is no order to keep. Without the arena's lock two get the same block."""
    rank.allocate()
    before, ready = sys.getswitchinterval(), threading.Barrier(4)
    sys.setswitchinterval(1e-6)

    def work(me: int) -> list[symmem.SymmetricTensor]:
        ready.wait(10)
        return [rank.allocate(300) for _ in range(400)]

    try:
        live = [st for made in succeed(4, work) for st in made]
    finally:
        sys.setswitchinterval(before)
    assert len({st._block.pointer for st in live}) == 1600
    assert len({st._block.slot for st in live}) == 1600  # type: ignore[attr-defined]
    assert rank.log.count == 1601
    assert rank.book[0] == 1600 * 512


# Growth.


@pytest.mark.parametrize(
    ("size", "growth", "limit", "expected"),
    [
        ("2MiB", 2, "64MiB", [2, 4, 8, 16]),
        ("2MiB", 1, "64MiB", [2, 2, 2, 2]),
        ("3MiB", 1.5, "64MiB", [4, 6, 8, 12]),  # 3, 4.5, 6.75, 10.125: rounded up to 2 MiB
        ("2MiB", 1024, "32MiB", [2, 30]),  # what the limit leaves
        ("4MiB", 2, "11000001B", [4, 6]),  # the same, rounded down to 2 MiB
        ("1B", 1, "64MiB", [2, 2, 2]),
    ],
)
def test_growth_by_policy(size: str, growth: float, limit: str, expected: list[int], make: Make) -> None:
    rank = make(arena_size=size, arena_growth=growth, arena_limit=limit)
    live = []
    while not arenas_of(rank.group) or len(rank.segments) < len(expected):
        live.append(rank.allocate(500_000))
    assert rank.segments == [nbytes * MIB for nbytes in expected]
    spans = sorted(map(span, live))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_more_pads_are_no_step_of_growth(make: Make) -> None:
    rank = make(arena_size="2MiB", arena_growth=4)
    live = [rank.allocate(64) for _ in range(200)]
    extra = len(rank.segments) - 1
    assert 1 <= extra <= 3
    live.append(rank.allocate(3 * MIB))
    assert rank.segments[-1] == 8 * MIB


@pytest.mark.parametrize("nbytes", [2 * MIB - 1, 2 * MIB, 3 * MIB, 10 * MIB, 127 * 2**14, 127 * 2**14 + 1, 5_000_001])
def test_a_tensor_larger_than_a_segment_gets_one_that_holds_it(nbytes: int, make: Make) -> None:
    rank = make(arena_size="2MiB", arena_growth=1)
    small = rank.allocate()
    st = rank.allocate(nbytes)
    st.tensor[-1] = 1
    assert len(rank.segments) == 2
    assert nbytes < rank.segments[1] <= nbytes * 1.01 + 4 * MIB
    assert symmem.find(st.tensor[-1:])._block is st._block  # type: ignore[union-attr]
    del small


def test_growth_stays_finite(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, an arena takes what it needs, in ever so many steps; the factor must not overflow."""
    rank = make(arena_size="2MiB", arena_growth=1024)
    backend, real = get_backend("host"), type(get_backend("host")).allocate

    def short(nbytes: int, *args: Any) -> Any:
        if nbytes > 2 * MIB:
            raise OutOfMemoryError("planted")
        return real(backend, nbytes, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(backend, "allocate", short)
    live = [rank.allocate(1_500_000) for _ in range(110)]
    assert rank.segments == [2 * MIB] * 110
    del live


def test_the_limit(make: Make) -> None:
    rank = make(arena_size="2MiB", arena_growth=1, arena_limit="4MiB")
    with pytest.raises(ResourceLimitError, match="arena_limit, 4194304 bytes"):
        rank.allocate(5 * MIB)
    live = [rank.allocate(MIB) for _ in range(2)]
    before = rank.log.count, rank.log.digest, rank.book, rank.segments
    for _ in range(2):
        with pytest.raises(ResourceLimitError, match="0 in quarantine"):
            rank.allocate(MIB)
    after = rank.log.count, rank.book, rank.segments
    assert after == (before[0], *before[2:])
    assert rank.allocate(MIB // 4).tensor.shape == (MIB // 4,)
    del live[0]
    live.append(rank.allocate(MIB))  # room is made: the arena does not grow
    assert rank.segments == before[3]


def test_at_the_limit_slots_are_used_again(make: Make) -> None:
    """Where there is no memory for more signal pads, what was dropped makes room, each time; and is dropped at once."""
    rank = make(arena_size="2MiB", arena_limit="2MiB")
    live = [rank.allocate(64)]
    live += [rank.allocate(64) for _ in range(rank.log.pads.capacity - 1)]
    for _ in range(3):
        live.pop()
        live.append(rank.allocate(64))
    with pytest.raises(ResourceLimitError):
        rank.allocate(64)


def test_what_follows_a_step_that_one_rank_had_no_memory_for_is_dropped_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error that was dealt with must not hold it: its circle of references is for the collector to find."""
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_size(8MiB)")
    ranks = [Rank(group) for group in make_groups(2)]
    backend, real = get_backend("host"), type(get_backend("host")).allocate

    def short(nbytes: int, *args: Any) -> Any:
        if nbytes > 4 * MIB and threading.current_thread().name == "0":
            raise OutOfMemoryError("planted")
        return real(backend, nbytes, *args)  # type: ignore[arg-type]

    def work(me: int) -> int:
        ranks[me].allocate()
        return ranks[me].book[0]

    monkeypatch.setattr(backend, "allocate", short)
    assert succeed(2, work) == [0, 0]
    assert [rank.segments for rank in ranks] == [[2 * MIB]] * 2


def test_out_of_memory_leaves_the_arena_as_it_was(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = rank.allocate()
    before = rank.book, rank.segments, rank.log.count

    def none(*_: Any) -> Any:
        raise OutOfMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(get_backend("host"), "allocate", none)
        with pytest.raises(OutOfMemoryError, match="planted"):
            rank.allocate(8 * MIB)
    assert (rank.book, rank.segments, rank.log.count) == before
    assert rank.allocate(8 * MIB).tensor.numel() == 8 * MIB
    del keep


def mapped() -> tuple[int, int]:
    """Memory files mapped, and open."""
    while gc.collect():  # what one round frees may let go of more
        pass
    with open("/proc/self/maps") as maps:
        return maps.read().count("/memfd:symmem"), len(os.listdir("/proc/self/fd"))


def test_trim(make: Make) -> None:
    rank = make(arena_size="2MiB", arena_growth=1)
    first, before = rank.allocate(), mapped()
    live = [rank.allocate(2 * MIB) for _ in range(3)]
    kept = live.pop(1).contiguous_view()
    kept.fill_(4)
    held = mapped()
    assert held > before
    del live
    rank.collect(trim=False)
    assert len(rank.segments) == 4
    rank.collect(trim=True)
    assert len(rank.segments) == 2
    assert before < mapped() < held
    assert (kept == 4).all()
    again = rank.allocate(2 * MIB)
    again.tensor.fill_(5)
    assert (kept == 4).all()
    del kept, again
    assert rank.collect(trim=True) == 4 * MIB
    assert mapped() == before
    del first
    assert rank.collect(trim=True) == GRANULE
    assert rank.allocate().tensor.numel() == 8


def test_an_arena_goes_with_its_group_and_its_last_tensor(make: Make) -> None:
    rank = make(arena_size="2MiB")
    before = mapped()
    st = rank.allocate()
    tensor = st.tensor
    del rank, st
    tensor.fill_(1)
    assert mapped() > before
    del tensor
    assert mapped() == before


# The book.


def test_counters(rank: Rank) -> None:
    st = rank.allocate(1000)
    assert rank.book == (1024, 0)
    other = rank.allocate(1)
    assert rank.book == (1280, 0)
    del st
    assert rank.book == (256, 1024)
    rank.allocate(5)
    assert rank.book == (256, 1280)
    log = rank.log
    assert (log.peak_bytes, log.reclaimed_blocks, log.collections, log.growths) == (1280, 0, 0, 1)
    assert rank.collect() == 1280
    assert rank.book == (256, 0)
    assert (log.peak_bytes, log.reclaimed_blocks, log.collections) == (1280, 2, 1)
    del other
    rank.collect()
    assert rank.book == (0, 0)
    assert [what for _, what, *_ in log.changes] == ["grow"]
    assert [[entry[5] for _, entry, *_ in events] for events in (log.drops, log.reclaims)] == [[1024, 256, 256]] * 2
    assert all(one[0] < other[0] for one, other in zip(log.drops, log.reclaims, strict=True))


def test_each_drop_is_noted(rank: Rank) -> None:
    """One at a time, by the allocation that comes next, and many at a time."""
    sizes = [*range(0, 1000, 100)]  # no more than there are signal pads
    for size in sizes:
        rank.allocate(size)
    many = [rank.allocate(3000 + size) for size in sizes]
    del many
    assert rank.book == (0, sum(max(-(-size // 256), 1) * 256 for size in (*sizes, *(3000 + size for size in sizes))))
    rank.log.flush_events()
    assert sorted(entry[6].sizes[0] for _, entry, _ in rank.log.drops) == [*sizes, *(3000 + size for size in sizes)]
    assert rank.log.quarantined_blocks == len(rank.log.drops)


def test_many_blocks_at_once(rank: Rank) -> None:
    """They are entered into the books later; what is told of them is the same as if they were already."""
    kept = [rank.allocate(8) for _ in range(1000)]
    rank.collect()
    del kept[::2]
    assert rank.book == (500 * GRANULE, 500 * GRANULE)
    assert rank.collect() == 500 * GRANULE
    assert rank.log.agreed.bit_count() == 500
    assert rank.collect() == 0
    (told,) = (each for each in symmem.memory_snapshot()["arenas"] if each["stats"]["allocations"] == 1000)
    happened = Counter(each["event"] for each in told["events"])
    assert (happened["allocate"], happened["drop"], happened["reclaim"]) == (1000, 500, 500)
    states = Counter(each["state"] for each in told["segments"][0]["blocks"])
    assert states["quarantined"] == 0
    assert states["free"] >= 500
    assert symmem.memory_stats(rank.group)["live_blocks"] == 500
    del kept[::2]
    assert rank.collect() == 250 * GRANULE
    rank.log.absorb()
    assert rank.book == (250 * GRANULE, 0)
    assert len(rank.log.free_slots) == len(rank.log.records) - 250


def test_meetings_for_nothing_leave_nothing(rank: Rank) -> None:
    kept = [rank.allocate(8) for _ in range(1000)]
    del kept[::2]
    rank.collect()
    log = rank.log
    before, remembered = log.collections, (len(log.reclaims), len(log._pending))
    for _ in range(3):
        assert rank.collect() == 0
    assert log.agreed
    assert (len(log.reclaims), len(log._pending)) == remembered
    assert log.collections == before + 3
    log.absorb()
    remembered = len(log.reclaims), 0
    rank.collect()
    assert (len(log.reclaims), len(log._pending)) == remembered


def test_the_book_after_much_use(rank: Rank) -> None:
    kept = [rank.allocate(n) for n in range(0, 3000, 100)]
    for turn in range(20):
        some = [rank.allocate(turn * 37 + n) for n in range(20)]
        del some
        rank.collect()
    log = rank.log
    assert rank.book == (sum(max(-(-n // 256), 1) * 256 for n in range(0, 3000, 100)), 0)
    assert log.quarantine() == (0, 0)
    live = {slot for slot, entry in enumerate(log.records) if entry}
    assert live == {st._block.slot for st in kept}  # type: ignore[attr-defined]
    assert sorted(slot for segment in log.segments for slot in segment.slots.values()) == sorted(live)
    assert sorted(live | set(log.free_slots)) == list(range(len(log.records)))


# Signal pads.


def pad_of(st: symmem.SymmetricTensor, group: symmem.Group | None = None) -> int:
    return st.signal_pad(0, group=group).data_ptr()


def test_each_tensor_has_its_own_pad(rank: Rank) -> None:
    live = [rank.allocate(100) for _ in range(100)]  # more than there are pads at first
    pads = sorted(pad_of(st) for st in live)
    nbytes = get_backend("host").pad_nbytes(1)
    assert all(b - a >= nbytes for a, b in itertools.pairwise(pads))
    spans = [span(st) for st in live]
    for pad in pads:
        assert not any(begin - nbytes < pad < end for begin, end in spans)


def test_a_rendezvous_of_a_view_leaves_the_pads(rank: Rank) -> None:
    """The view's handle signals over the pad of the tensor, and that stays the tensor's own."""
    one, two = rank.allocate(100), rank.allocate(100)
    pads = pad_of(one), pad_of(two)
    for st in (one, two):
        view = symmem.SymmetricTensor.wrap(st.tensor[10:20]).rendezvous(rank.group)
        assert pad_of(view) == pad_of(st)
    assert (pad_of(one), pad_of(two)) == pads
    assert pads[0] != pads[1]


def test_what_comes_free_when_pads_run_out_is_one_piece(rank: Rank) -> None:
    """The tensor for which there was none goes to the beginning of it, and does not cut off what lies before it."""
    first = rank.allocate(8)._block.offset
    while not rank.log.collections:
        rank.allocate(8)
    assert len(rank.log.segments) == 1
    space = rank.log.segments[0].space
    live = [(offset, offset + nbytes) for offset, nbytes, in_use in space.blocks() if in_use]
    assert live == [(0, first), (first, first + GRANULE)]  # the pads, and the tensor; what is free lies behind them


def test_a_pad_is_zero_when_it_is_used_again(rank: Rank) -> None:
    for _ in range(3):
        st = rank.allocate(40000)
        st.tensor.fill_(255)
        assert not st.signal_pad(0).view(torch.int32).any()
        st.barrier(63)
        st.put_signal(0, 5)
        assert st.signal_pad(0).view(torch.int32).any()
        del st
        rank.collect()
        many = [rank.allocate(8) for _ in range(150)]  # over what was the tensor, or near
        for each in many:
            assert not each.signal_pad(0).view(torch.int32).any()
            each.barrier()
        del many, each
        rank.collect()


def test_pads_of_two_groups_are_apart(make: Make) -> None:
    rank = make(arena_size="2MiB")
    second = symmem.Group.from_store(0, 1, dist.HashStore(), "second")
    one, two = (rank.allocate(64).rendezvous(second) for _ in range(2))
    assert one.groups[0] in (rank.group, second)
    pads = [pad_of(st, group) for st in (one, two) for group in (rank.group, second)]
    assert len(set(pads)) == 4
    one.put_signal(0, 3, group=second)
    assert [int(st.signal_pad(0, group=group).sum()) for st in (one, two) for group in (rank.group, second)] == [
        *(0, 1),
        *(0, 0),
    ]
    view = symmem.SymmetricTensor.wrap(one.tensor[8:]).rendezvous(second)
    assert pad_of(view, second) == pads[1]


def test_the_group_that_meets_first_is_the_one_that_is_meant(make: Make) -> None:
    rank = make(arena_size="2MiB")
    second = symmem.Group.from_store(0, 1, dist.HashStore(), "second")
    for order in ([second], [rank.group, second], [second, rank.group], [second, second]):
        st = rank.allocate(64)
        assert st.groups == (rank.group,)
        for group in order:
            st.rendezvous(group)
        assert st.groups == (order[0], *({rank.group, second} - {order[0]}))
        st.put_signal(0, 3)
        assert [int(st.signal_pad(0, group=group).sum()) for group in st.groups] == [1, 0]


def fill(rank: Rank, further: symmem.Group, live: list[symmem.SymmetricTensor]) -> None:
    for _ in range(100):
        live.append(rank.allocate(64))
        live[-1].rendezvous(further)


def test_pads_of_further_groups_come_back(make: Make) -> None:
    rank = make(arena_size="2MiB")
    second = symmem.Group.from_store(0, 1, dist.HashStore(), "second")
    live: list[symmem.SymmetricTensor] = []
    with pytest.raises(ResourceLimitError, match="another signal pad"):
        fill(rank, second, live)
    room = len(live) - 1
    assert room >= 16
    assert live[-1].groups == (rank.group,)
    del live[-2]
    assert live[-1].rendezvous(second).groups == (second, rank.group)
    live.clear()
    with second.collective("meet"):
        pass
    for _ in range(3 * room):  # one at a time
        st = rank.allocate(64).rendezvous(second)
        assert not st.signal_pad(0, group=second).view(torch.int32).any()
        st.put_signal(0, 1, group=second)
        del st


def test_a_pad_of_a_further_group_waits_for_the_peer_that_keeps_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank drops a tensor and rendezvouses others, while its peer may still signal with it."""
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_size(2MiB)")
    all_ranks, pairs = make_groups(2, name="all"), make_groups(2, name="pair")

    def work(me: int) -> tuple[int, list[int]]:
        kept: list[symmem.SymmetricTensor] = []
        pads = []
        for turn in range(40):
            st = symmem.allocate(64, torch.uint8, group=all_ranks[me], backend="host").rendezvous(pairs[me])
            pads.append(st.signal_pad(me, group=pairs[me]).data_ptr())
            if turn == 0 and me == 1:
                kept.append(st)
            st.barrier(group=pairs[me], timeout=5.0)
            del st
        if kept:
            kept[0].put_signal(0, group=pairs[me])
        with pairs[me].collective("meet"):
            pass
        st = symmem.allocate(64, torch.uint8, group=all_ranks[me], backend="host").rendezvous(pairs[me])
        assert not st.signal_pad(me, group=pairs[me]).view(torch.int32).any()
        return pads[0], pads[1:]

    for first, others in succeed(2, work):
        assert first not in others  # the peer has it still
        assert len(set(others)) < len(others)  # some were used again


# Amid something else.


class Interrupt(Exception):
    pass


def test_an_allocation_in_a_finalizer_amid_an_allocation(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would get the same block, or leave free memory in the book twice: it is refused, and nothing has changed."""
    keep, told = [rank.allocate(2 * GRANULE), rank.allocate()], []
    keep.pop(0)
    rank.collect()  # a gap, of which a part is taken below
    original = suballocator.SubAllocator._put
    armed = True

    def put(self: Any, start: int, end: int) -> None:
        nonlocal armed
        if armed:
            armed = False
            for use in (rank.allocate, rank.collect):
                try:
                    use()
                except GroupError as error:
                    told.append(error)
        original(self, start, end)

    monkeypatch.setattr(suballocator.SubAllocator, "_put", put)
    keep.append(rank.allocate())
    assert ["during another allocation" in str(error) for error in told] == [True, True]
    assert rank.log.count == 3
    keep.append(rank.allocate())
    assert len({st._block.pointer for st in keep}) == 3


def test_an_allocation_that_an_interrupt_cuts_short(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank's book may differ from the others': whatever comes next in the arena says so."""
    keep = rank.allocate()

    def interrupted(*_: Any) -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("symmem.arena.arena.ArenaBlock", interrupted)
        with pytest.raises(Interrupt):
            rank.allocate()
    for use in (rank.allocate, rank.collect):
        with pytest.raises(GroupError, match="half-way"):
            use()
    keep.tensor.fill_(1)  # what lives can be used
    keep.barrier()
    assert rank.allocate(arena=False).tensor.numel() == 8


def test_an_allocation_that_fails_is_not_taken_for_one(make: Make) -> None:
    rank = make(arena_size="2MiB", arena_limit="2MiB")
    for _ in range(3):
        with pytest.raises(ResourceLimitError):
            rank.allocate(3 * MIB)
        assert rank.allocate().tensor.numel() == 8


def test_collecting_in_a_signal_handler(rank: Rank) -> None:
    """A handler may run between any two steps: it is told if that is amid the arena's work, else it works."""
    rank.allocate()
    rank.collect()  # both import modules, amid which a handler could not call them
    told: list[str] = []

    def handler(*_: Any) -> None:
        try:
            rank.collect()
            rank.allocate(3)
            told.append("")
        except GroupError as error:
            told.append(str(error))

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
    try:
        kept = []
        for turn in range(1500):
            st = rank.allocate(300)
            st.tensor.fill_(turn % 251)
            if turn % 10 == 0:
                kept.append((turn % 251, st))
            if turn % 50 == 0:
                try:
                    rank.collect()
                except GroupError as error:
                    told.append(str(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "" in told
    assert all("during another" in text or "was begun amid" in text for text in told if text)
    assert all((st.tensor == value).all() for value, st in kept)
    spans = sorted(span(st) for _, st in kept)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_what_an_allocation_reclaims_is_entered_as_a_whole(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than are entered at once: a signal handler that comes amid it is told, and leaves the books alone."""
    kept = [rank.allocate(4096) for _ in range(300)]
    told: list[str] = []
    enter = suballocator.SubAllocator.free_many

    def interrupted(self: suballocator.SubAllocator, offsets: Any) -> None:
        with pytest.raises(GroupError, match="during another") as caught:
            rank.collect()
        told.append(str(caught.value))
        enter(self, offsets)

    monkeypatch.setattr(suballocator.SubAllocator, "free_many", interrupted)
    others = [rank.allocate(1 << 20) for _ in rank.segments[1:]]  # which have been made for signal pads
    segments = rank.segments
    del kept
    large = rank.allocate(3 << 19)
    assert told
    monkeypatch.undo()
    assert rank.segments == segments
    assert rank.collect() == 0
    assert rank.log.live_bytes == (3 << 19) + (len(others) << 20)
    del large


def test_finalizers_that_look_and_collect(rank: Rank) -> None:
    """`__del__`, weakref and gc callbacks amid allocation, with the collector at every step."""
    told: list[Any] = []
    st = rank.allocate(name="looked up")

    class Finder:
        def __init__(self) -> None:
            self.circle = self

        def __del__(self) -> None:
            told.append(symmem.find(st.tensor) is not None)
            try:
                rank.collect()
            except GroupError:
                told.append(True)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(100):
            Finder()
            rank.allocate(10)
    finally:
        gc.set_threshold(*threshold)
        gc.collect()
    assert len(told) >= 100
    assert all(told)


def test_a_forked_child_has_no_arena(rank: Rank) -> None:
    """Its memory is the parent's. A thread that held the lock at the fork is not there to release it."""
    st = rank.allocate()
    st.tensor.fill_(1)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with rank.log.lock:
            held.set()
            over.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(10)
            st.tensor.fill_(2)
            for use in (rank.allocate, rank.collect, st.barrier):
                try:
                    use()
                except ForkedError:
                    continue
                os._exit(2)
            if symmem.find(st.tensor[3:]) is not None:
                del st
                gc.collect()
                code = 0
        finally:
            os._exit(code)
    over.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert (st.tensor == 2).all()
    assert rank.collect() == 0
    assert rank.allocate().tensor.numel() == 8


PROGRAM = """
import atexit, gc, sys, weakref
import torch, torch.distributed as dist
import symmem

group = symmem.Group.from_store(0, 1, dist.HashStore(), "ends")
allocate = lambda n=8: symmem.allocate(n, torch.uint8, group=group, backend="host")
collect = symmem.collect  # imports its module while the others are there

class Late:
    def __init__(self):
        self.st, self.me = allocate(), self
    def __del__(self):
        self.st.tensor.fill_(1)

def at_exit():
    global last
    print(collect(group))
    last = allocate()

atexit.register(at_exit)
left, late, torch.left, sys.left = allocate(), Late(), allocate().tensor, allocate().contiguous_view()
circle = [allocate()]; circle.append(circle)
leaf = torch.ones(8, requires_grad=True)
graph = (leaf * allocate().tensor.float()).sum()  # what autograd saved lives in C++
weakref.finalize(left, print, "gone")
gc.set_threshold(1)
del sys.modules["symmem.arena.arena"], sys.modules["symmem.memory.registry"]
allocate()
"""


def test_tensors_that_live_until_the_interpreter_ends() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    # What was dropped by then: the float copy's source, and the one of the last line.
    assert done.stdout.split() == ["512", "gone"]


def test_ranks_as_threads_share_an_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_size(2MiB)")
    groups = make_groups(3, name="arena threads")

    def work(me: int) -> list[int]:
        live, offsets = [], []
        for turn in range(30):
            st = symmem.allocate(100 * turn, torch.uint8, group=groups[me], backend="host")
            st.tensor.fill_(me)
            if turn % 3:
                live.append(st)
            offsets.append(st._block.offset)
            del st
            if turn % 10 == 9:
                symmem.collect(groups[me])
        live[-1].barrier()
        assert all((st.remote_tensor(peer) == peer).all() for st in live for peer in range(3))
        live[-1].barrier()
        with pytest.raises(PeerTimeoutError):
            live[0].wait_signal((me + 1) % 3, 7, timeout=0.05)
        return offsets

    first, *others = succeed(3, work)
    assert all(each == first for each in others)
