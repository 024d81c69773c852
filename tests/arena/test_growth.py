"""How an arena grows, up to its limit or until memory runs out, and how it shrinks."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
from arena_rank import MIB, Make, Rank, mapped, span
from thread_ranks import make_groups, succeed

import symmem
from symmem.arena.arena import arenas_of
from symmem.arena.segment import GRANULE
from symmem.backends import get_backend
from symmem.errors import (
    OutOfMemoryError,
    ResourceLimitError,
)


@pytest.mark.parametrize(
    ("size", "growth", "limit", "expected"),
    [
        ("2MiB", 2, "64MiB", [2, 4, 8, 16]),
        ("2MiB", 1, "64MiB", [2, 2, 2, 2]),
        ("3MiB", 1.5, "64MiB", [4, 6, 8, 12]),  # 3, 4.5, 6.75, 10.125: rounded up to 2 MiB
        ("2MiB", 1024, "32MiB", [2, 30]),  # the rest of the limit
        ("4MiB", 2, "11000001B", [4, 6]),  # the rest of the limit, rounded down to 2 MiB
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
    """If memory is short, an arena grows by the least size, in many steps; the factor must not overflow."""
    rank = make(arena_size="2MiB", arena_growth=1024)
    backend, real = get_backend("host"), type(get_backend("host")).allocate

    def short(nbytes: int, *args: Any) -> Any:
        if nbytes > 2 * MIB:
            raise OutOfMemoryError("planted")
        return real(backend, nbytes, *args)

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
    live.append(rank.allocate(MIB))  # reclaimed memory suffices: the arena does not grow
    assert rank.segments == before[3]


def test_at_the_limit_slots_are_used_again(make: Make) -> None:
    """Without memory for more signal pads, dropped tensors make room every time, and are dropped at once."""
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
    """The handled error must not keep it alive, because only the collector would find the reference cycle."""
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_size(8MiB)")
    ranks = [Rank(group) for group in make_groups(2)]
    backend, real = get_backend("host"), type(get_backend("host")).allocate

    def short(nbytes: int, *args: Any) -> Any:
        if nbytes > 4 * MIB and threading.current_thread().name == "0":
            raise OutOfMemoryError("planted")
        return real(backend, nbytes, *args)

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
