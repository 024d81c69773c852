"""The sub-allocator against a list of intervals, in long runs, and with equal results on every rank."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from symmem.arena.suballocator import SubAllocator
from symmem.errors import InvalidArgumentError


def state(allocator: SubAllocator) -> dict[str, Any]:
    """The whole state, with the order of the dicts, because the order also decides the place of blocks."""

    def ordered(value: Any) -> Any:
        if isinstance(value, list):
            return [ordered(each) for each in value]
        return list(value.items()) if isinstance(value, dict) else value

    return {name: ordered(getattr(allocator, name)) for name in SubAllocator.__slots__}


def gaps(live: dict[int, int], capacity: int) -> list[tuple[int, int]]:
    """Offset and bytes of the gaps between live blocks."""
    found, end = [], 0
    for offset, size in [*sorted(live.items()), (capacity, 0)]:
        if offset > end:
            found.append((end, offset - end))
        assert offset >= end, "blocks overlap"
        end = offset + size
    assert end == capacity
    return found


def check(allocator: SubAllocator, live: dict[int, int]) -> None:
    """Check that everything that the allocator reports follows from the live blocks."""
    free = gaps(live, allocator.capacity)
    largest = max((size for _, size in free), default=0)
    expected = [(*block, True) for block in live.items()] + [(*gap, False) for gap in free]
    assert list(allocator.blocks()) == sorted(expected)
    assert len(allocator) == len(live)
    assert allocator.used == sum(live.values())
    assert allocator.free_bytes == allocator.capacity - allocator.used
    assert allocator.largest_free == largest
    assert allocator.fragmentation == (1 - largest / sum(size for _, size in free) if free else 0.0)


def whole(allocator: SubAllocator) -> bool:
    return list(allocator.blocks()) == [(0, allocator.capacity, False)] and allocator.used == len(allocator) == 0


class AgainstIntervals(RuleBasedStateMachine):
    """Two instances, as on two ranks, and the live blocks as a dict."""

    @initialize(
        granularity=st.sampled_from((1, 16, 256)),
        granules=st.integers(1, 40) | st.integers(41, 3000),
        odd=st.integers(0, 255),
    )
    def make(self, granularity: int, granules: int, odd: int) -> None:
        self.granularity = granularity
        capacity = granules * granularity + odd % granularity
        self.ranks = [SubAllocator(capacity, granularity) for _ in range(2)]
        assert self.ranks[0].capacity == granules * granularity
        self.live: dict[int, int] = {}

    def on_all(self, call: Callable[[SubAllocator], Any]) -> Any:
        one, other = map(call, self.ranks)
        assert one == other
        return one

    @rule(
        granules=st.integers(0, 8) | st.integers(60, 140) | st.integers(0, 3001),
        less=st.integers(0, 255),
    )
    def allocate(self, granules: int, less: int) -> None:
        nbytes = max(granules * self.granularity - less % self.granularity, 0)
        size = max(granules, 1) * self.granularity
        offset = self.on_all(lambda rank: rank.allocate(nbytes))
        room = [gap for gap in gaps(self.live, self.ranks[0].capacity) if gap[1] >= size]
        if offset is None:
            assert not room
            return
        assert any(start <= offset and offset + size <= start + length for start, length in room)
        assert offset % self.granularity == 0
        assert self.on_all(lambda rank: rank.size_of(offset)) == size
        self.live[offset] = size

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.live)))
        self.on_all(lambda rank: rank.free(offset))
        del self.live[offset]

    @rule(data=st.data(), seed=st.randoms(use_true_random=False))
    def free_many(self, data: st.DataObject, seed: random.Random) -> None:
        chosen = [offset for offset in sorted(self.live) if data.draw(st.booleans())]
        for rank in self.ranks:
            seed.shuffle(chosen)
            rank.free_many(iter(chosen))
        for offset in chosen:
            del self.live[offset]

    @rule(offset=st.integers(-300, 3001 * 256), share=st.floats(0, 1))
    def free_what_is_not_live(self, offset: int, share: float) -> None:
        if offset in self.live:
            offset += 1
        if offset in self.live:
            return  # blocks of one byte
        before = self.on_all(state)
        valid = sorted(self.live)[: int(share * len(self.live))]
        for call in (SubAllocator.free, SubAllocator.size_of, lambda rank, it: rank.free_many([*valid, it])):
            for rank in self.ranks:
                with pytest.raises(InvalidArgumentError, match=f"offset {offset} "):
                    call(rank, offset)
        if valid:
            with pytest.raises(InvalidArgumentError, match=f"offset {valid[-1]} occurs twice"):
                self.ranks[0].free_many([valid[-1], *valid])
        assert self.on_all(state) == before

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "ranks"):
            self.on_all(state)
            check(self.ranks[0], self.live)

    def teardown(self) -> None:
        if hasattr(self, "ranks"):
            self.ranks[0].free_many(self.live)
            for offset in self.live:
                self.ranks[1].free(offset)
            assert all(map(whole, self.ranks))


AgainstIntervals.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAgainstIntervals = AgainstIntervals.TestCase


def mixed(rng: random.Random) -> int:
    return rng.choice((rng.randrange(2000), rng.randrange(1 << 17), 0, 512, 65536))


def powers(rng: random.Random) -> int:
    return (1 << rng.randrange(18)) + rng.choice((-1, 0, 0, 1))


def alike(rng: random.Random) -> int:
    """Some tensors of a model, many times."""
    return rng.choice((4096, 4096 * 3, 100_000, 1024 * 77, 64, 250_000))


@pytest.mark.parametrize(
    ("draw", "capacity", "granularity"),
    [(mixed, 30_000_019, 256), (powers, 7_777_777, 64), (alike, (1 << 26) - 1, 512)],
)
def test_a_long_run(draw: Callable[[random.Random], int], capacity: int, granularity: int) -> None:
    """100,000 operations, with half of the capacity in use, with most of it, and nearly full."""
    rng = random.Random(f"{draw.__name__} {capacity}")
    allocator = SubAllocator(capacity, granularity)
    taken = bytearray(allocator.capacity // granularity)  # a byte per granule: 1 if it is in a live block
    live: dict[int, int] = {}
    order: list[int] = []  # the keys of live, for a quick random choice

    def pick() -> int:
        place = rng.randrange(len(order))
        order[place], order[-1] = order[-1], order[place]
        return order.pop()

    def mark(offset: int, value: int) -> None:
        first, count = offset // granularity, live[offset] // granularity
        assert taken.count(1 - value, first, first + count) == count
        taken[first : first + count] = bytes((value,)) * count

    refusals = 0
    for operation in range(100_000):
        full = allocator.used > allocator.capacity * (0.5, 0.8, 1.0)[operation // 5000 % 3]
        if rng.random() < (0.3 if full else 0.7) or not live:
            nbytes = draw(rng)
            size = max(-(-nbytes // granularity), 1) * granularity
            offset = allocator.allocate(nbytes)
            if offset is None:
                refusals += 1
                assert allocator.largest_free < size
                if refusals % 50 == 0:
                    assert not any(length >= size for _, length in gaps(live, allocator.capacity))
            else:
                assert offset % granularity == 0
                assert offset not in live
                live[offset] = size
                mark(offset, 1)
                order.append(offset)
        elif rng.random() < 0.01:
            chosen = [pick() for _ in range(rng.randint(0, min(len(live), 60)))]
            allocator.free_many(chosen)
            for offset in chosen:
                mark(offset, 0)
                del live[offset]
        else:
            offset = pick()
            allocator.free(offset)
            mark(offset, 0)
            del live[offset]
        if operation % 500 == 0:
            check(allocator, live)
    assert refusals > 100  # it was full at times
    check(allocator, live)
    allocator.free_many(order)
    assert whole(allocator)


def allocated(allocator: SubAllocator, nbytes: int) -> int:
    offset = allocator.allocate(nbytes)
    assert offset is not None
    return offset


@given(st.randoms(use_true_random=False), st.integers(0, 60))
def test_free_many_does_not_depend_on_the_order(rng: random.Random, count: int) -> None:
    sizes = [rng.choice((1, 700, 3000, 70_000)) for _ in range(60)]
    ranks = [SubAllocator(3_000_000) for _ in range(2)]
    offsets, same = ([allocated(rank, nbytes) for nbytes in sizes] for rank in ranks)
    assert offsets == same
    chosen = rng.sample(offsets, count)
    ranks[0].free_many(sorted(chosen))
    ranks[1].free_many(chosen)
    assert state(ranks[0]) == state(ranks[1])
    assert [ranks[0].allocate(nbytes) for nbytes in sizes] == [ranks[1].allocate(nbytes) for nbytes in sizes]


def test_what_was_freed_last_is_used_first() -> None:
    allocator = SubAllocator(1 << 30)
    sizes = (5000, 300, 1_000_000, 1, 1_010_000, 1)  # both large sizes share a bin
    offsets = [allocated(allocator, nbytes) for nbytes in sizes]
    for place in (0, 2, 4):
        allocator.free(offsets[place])
        assert allocator.allocate(sizes[place]) == offsets[place]
    for first, last in ((2, 4), (4, 2)):
        allocator.free(offsets[first])
        allocator.free(offsets[last])
        assert [allocator.allocate(1_000_000) for _ in range(2)] == [offsets[last], offsets[first]]


def test_a_small_block_does_not_break_up_a_large_one() -> None:
    allocator = SubAllocator(1 << 20)
    offsets = [allocated(allocator, nbytes) for nbytes in (4096, 1, 2048, 1, 70_000, 1)]
    allocator.free_many(offsets[::2])
    assert [allocator.allocate(nbytes) for nbytes in (2000, 4000, 65_536)] == [offsets[2], offsets[0], offsets[4]]


def test_a_block_that_is_not_the_last_of_its_bin_is_found() -> None:
    """Two sizes of one bin, the larger block freed first, and all other bins empty: the linear search."""
    allocator = SubAllocator(129 * 256 + 256 + 128 * 256, 256)
    large, _, small = (allocated(allocator, granules * 256) for granules in (129, 1, 128))
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(129 * 256) == large


@pytest.mark.parametrize("capacity", [256, 257, 511, 63 * 256, 64 * 256, 65 * 256, (1 << 40) + 12345])
def test_all_of_the_capacity_can_be_had_at_once(capacity: int) -> None:
    allocator = SubAllocator(capacity)
    assert allocator.allocate(capacity // 256 * 256 + 1) is None
    assert allocator.allocate(capacity // 256 * 256) == 0
    assert (allocator.free_bytes, allocator.largest_free, allocator.fragmentation) == (0, 0, 0.0)
    assert allocator.allocate(0) is None
    allocator.free(0)
    assert whole(allocator)


def test_sizes_that_a_bin_begins_with() -> None:
    """Sizes around powers of two and around the first size of bins: freed and reused between two neighbours."""
    for granules in sorted(
        {(32 + step << bits) + by for bits, step, by in itertools.product(range(8), (0, 1, 31), (-1, 0, 1))}
    ):
        allocator = SubAllocator((granules + 2) * 256)
        assert [allocator.allocate(256), allocator.allocate(granules * 256)] == [0, 256]
        assert allocator.allocate(256) == (granules + 1) * 256
        allocator.free(256)
        assert allocator.allocate(granules * 256 + 1) is None
        assert allocator.allocate(granules * 256) == 256


def test_bad_input_is_refused_with_the_place() -> None:
    def refused(expected: str, call: Callable[..., Any], *args: Any) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            call(*args)
        assert str(caught.value) == expected

    for granularity in (0, -256, 3, 384):
        refused(f"the granularity must be a power of two, not {granularity}", SubAllocator, 4096, granularity)
    for capacity in (0, -1, 255):
        refused(f"a capacity of {capacity} bytes is less than one granule of 256", SubAllocator, capacity)
    allocator = SubAllocator(4096)
    assert [allocator.allocate(512), allocator.allocate(256)] == [0, 512]
    before = state(allocator)
    refused("cannot allocate -1 bytes", allocator.allocate, -1)
    for call in (allocator.free, allocator.size_of, lambda offset: allocator.free_many([0, offset, 512])):
        refused("offset 256 is inside the block of 512 bytes at 0", call, 256)
        refused("offset 513 is inside the block of 256 bytes at 512", call, 513)
        refused("offset 768 is free: it was freed twice, or never allocated", call, 768)
        refused("offset 4096 is outside of the 4096 bytes", call, 4096)
        refused("offset -1 is outside of the 4096 bytes", call, -1)
    refused("offset 512 occurs twice in the offsets to free", allocator.free_many, [512, 0, 512])
    assert state(allocator) == before
    allocator.free(0)
    refused("offset 0 is free: it was freed twice, or never allocated", allocator.free, 0)
