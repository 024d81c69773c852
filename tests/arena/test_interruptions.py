"""Finalizers, signal handlers, exceptions and forks in the middle of an allocation or a collection."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import warnings
from typing import Any

import pytest
from arena_rank import MIB, Make, Rank, span
from patience import LONG

import symmem
from symmem.arena import suballocator
from symmem.arena.segment import GRANULE
from symmem.errors import (
    DivergenceError,
    ForkedError,
    GroupError,
    ResourceLimitError,
)


class Interrupt(Exception):
    pass


def test_an_allocation_in_a_finalizer_during_an_allocation(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would get the same block, or free memory twice. So it is refused, and nothing changes."""
    keep, told = [rank.allocate(2 * GRANULE), rank.allocate()], []
    keep.pop(0)
    rank.collect()  # a gap; the allocation below takes a part of it
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
    """This rank's log may differ from the other logs, so the arena begins again."""
    keep = rank.allocate()
    log = rank.log

    def interrupted(*_: Any) -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("symmem.arena.arena.ArenaBlock", interrupted)
        with pytest.raises(Interrupt):
            rank.allocate()
    with pytest.raises(DivergenceError, match="half-way: Interrupt"):
        keep.barrier()
    rank.allocate().barrier()
    assert rank.log is not log
    keep.tensor.fill_(1)
    keep.barrier()


def test_an_entry_that_an_interrupt_cuts_short(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    rank.allocate()

    def interrupted(*_: Any) -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr("symmem.arena.allocation_log.hash_of_name", interrupted)
        with pytest.raises(Interrupt):
            rank.log.enter("a block", None)
    assert rank.log.divergence is not None
    rank.allocate().barrier()


def test_an_allocation_that_fails_is_not_taken_for_one(make: Make) -> None:
    rank = make(arena_size="2MiB", arena_limit="2MiB")
    for _ in range(3):
        with pytest.raises(ResourceLimitError):
            rank.allocate(3 * MIB)
        assert rank.allocate().tensor.numel() == 8


def test_collecting_in_a_signal_handler(rank: Rank) -> None:
    """A handler may run between any two steps. Its calls fail during the arena's own work; otherwise they work."""
    rank.allocate()
    rank.collect()  # both calls import modules, and a handler cannot call them during the import
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
    assert all("during another" in text or "was begun during" in text for text in told if text)
    assert all((st.tensor == value).all() for value, st in kept)
    spans = sorted(span(st) for _, st in kept)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_what_an_allocation_reclaims_is_entered_as_a_whole(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler during the absorption of many blocks gets an error, and changes nothing."""
    kept = [rank.allocate(4096) for _ in range(300)]
    told: list[str] = []
    enter = suballocator.SubAllocator.free_many

    def interrupted(self: suballocator.SubAllocator, offsets: Any) -> None:
        with pytest.raises(GroupError, match="during another") as caught:
            rank.collect()
        told.append(str(caught.value))
        enter(self, offsets)

    monkeypatch.setattr(suballocator.SubAllocator, "free_many", interrupted)
    others = [rank.allocate(1 << 20) for _ in rank.segments[1:]]  # these segments were added for signal pads
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
    """`__del__`, weakref and gc callbacks during allocations, with the collector at every step."""
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
    """The memory belongs to the parent. The child lacks the thread that held the lock at the fork."""
    st = rank.allocate()
    st.tensor.fill_(1)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with rank.log.lock:
            held.set()
            over.wait(LONG)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(LONG)
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
