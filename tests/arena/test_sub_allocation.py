"""Sub-allocation on one rank, or on ranks that are threads: layouts, call sites, requests, threads."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import sys
import threading
from typing import Any

import pytest
import torch
from arena_rank import Make, Rank, span
from patience import LONG
from thread_ranks import make_groups, succeed

import symmem
from symmem.arena.arena_block import ArenaBlock
from symmem.arena.segment import GRANULE
from symmem.errors import (
    GroupError,
    InvalidArgumentError,
    PeerTimeoutError,
)
from symmem.tensor import request

DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}


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
    except RuntimeError:  # the dtype has fewer than 8 bits
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
    assert record.site.code.co_filename == Rank.allocate.__code__.co_filename
    assert str(record).startswith("[8] of torch.uint8 named 'here', 256 bytes, at ")
    del st


@pytest.mark.parametrize(
    ("module", "named"), [("symmem.ops.some", False), ("symmem.tools.some", True), ("symmemory", True), ("a.b", True)]
)
def test_a_call_site_within_symmem_is_that_of_its_caller(module: str, named: bool, rank: Rank) -> None:
    namespace: dict[str, Any] = {"__name__": module}
    exec("def through(allocate, *args, **options):\n    return allocate(*args, **options)", namespace)
    for _ in range(2):  # the second call finds the module in the cache
        namespace["through"](symmem.allocate, 8, torch.uint8, group=rank.group, backend="host")
        found = rank.log.recent()[-1].site.code.co_name
        assert found == ("through" if named else "test_a_call_site_within_symmem_is_that_of_its_caller")


def test_requests_that_are_equal_but_not_alike(rank: Rank) -> None:
    """A remembered request must not answer a different one."""
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
    """The result is remembered for one CUDA device only."""
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


def test_two_threads_of_a_rank_in_two_groups(make: Make) -> None:
    """Every group has its own arena, and the collector runs in the middle of everything."""
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
    """One rank may allocate in any order. Without the arena's lock, two threads would get the same block."""
    rank.allocate()
    before, ready = sys.getswitchinterval(), threading.Barrier(4)
    sys.setswitchinterval(1e-6)

    def work(me: int) -> list[symmem.SymmetricTensor]:
        ready.wait(LONG)
        return [rank.allocate(300) for _ in range(400)]

    try:
        live = [st for made in succeed(4, work) for st in made]
    finally:
        sys.setswitchinterval(before)
    assert len({st._block.pointer for st in live}) == 1600
    assert len({st._block.slot for st in live}) == 1600
    assert rank.log.count == 1601
    assert rank.book[0] == 1600 * 512


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
