"""The set that finds the block of an address: against a sorted list, and while another thread changes it."""

from __future__ import annotations

import bisect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from symmem.index import IntegerSet

# Members near the edges of words of every level, and few enough that they meet.
numbers = st.one_of(
    st.integers(0, 40),
    st.builds(lambda power, off: max(2**power + off, 0), st.integers(0, 30), st.integers(-2, 2)),
    st.integers(0, 2**30 + 2),
)


class Against(RuleBasedStateMachine):
    @initialize(bits=st.integers(0, 31))
    def make(self, bits: int) -> None:
        self.limit = 1 << bits
        self.set, self.members = IntegerSet(self.limit), list[int]()

    @rule(number=numbers)
    def add(self, number: int) -> None:
        number %= self.limit
        self.set.add(number)
        if number not in self.members:
            bisect.insort(self.members, number)

    @rule(number=numbers)
    def discard(self, number: int) -> None:
        number %= self.limit
        self.set.discard(number)
        if number in self.members:
            self.members.remove(number)

    @rule(data=st.data())
    def discard_a_member(self, data: st.DataObject) -> None:
        if self.members:
            number = data.draw(st.sampled_from(self.members))
            self.set.discard(number)
            self.members.remove(number)

    @rule(number=numbers)
    def look(self, number: int) -> None:
        number %= self.limit
        at = bisect.bisect_right(self.members, number)
        assert self.set.last_until(number) == (self.members[at - 1] if at else None)

    @invariant()
    def all_members_are_found(self) -> None:
        before = None
        for member in getattr(self, "members", ()):
            assert self.set.last_until(member) == member
            assert member == 0 or self.set.last_until(member - 1) == before
            before = member

    @invariant()
    def what_is_empty_takes_no_room(self) -> None:
        if not getattr(self, "members", True):
            assert not any(self.set._levels)


TestAgainst = Against.TestCase
TestAgainst.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("limit", [1, 2, 1023, 1024, 1025, 2**20, 2**20 + 1])
def test_the_last_number_within_the_limit(limit: int) -> None:
    full = IntegerSet(limit)
    assert full.last_until(limit - 1) is None
    full.add(limit - 1)
    full.add(0)
    assert full.last_until(limit - 1) == limit - 1
    assert full.last_until(max(limit - 2, 0)) == 0


@pytest.fixture
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
def test_looking_needs_no_lock() -> None:
    """Members that stay are found while a thread enters and removes others, empties words and fills them again."""
    fixed = [0, 5000, 2**20, 2**25]
    changing, chance = IntegerSet(2**30), random.Random(1)
    for number in fixed:
        changing.add(number)
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            some = [number for _ in range(20) if (number := chance.randrange(2**26)) not in fixed]
            for number in some:
                changing.add(number)
            for number in some:
                changing.discard(number)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for turn in range(8000):
            number = fixed[turn % len(fixed)]
            assert changing.last_until(number) == number
            found = changing.last_until(number + 4000)
            assert found is not None
            assert number <= found <= number + 4000
    finally:
        over.set()
        thread.join()


class Watched(dict[int, int]):
    """A level that lets something happen at a step of another's."""

    def __init__(self, at_pop: Callable[[], None] | None = None, after_get: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.at_pop, self.after_get = at_pop, after_get

    def pop(self, *args: Any) -> Any:
        popped = super().pop(*args)
        if self.at_pop:
            self.at_pop()
        return popped

    def get(self, *args: Any) -> Any:  # type: ignore[override]
        found = super().get(*args)
        if self.after_get:
            self.after_get()
        return found


def test_a_finalizer_that_looks_amid_a_removal() -> None:
    seen = []
    numbers = IntegerSet(2**30)
    numbers._levels = [Watched(at_pop=lambda: seen.append(numbers._last_until(2**28 + 5000))) for _ in numbers._levels]
    numbers.add(3)
    numbers.add(2**28)
    numbers.discard(2**28)
    assert seen == [3, 3]


def test_a_member_that_goes_while_it_is_found() -> None:
    numbers = IntegerSet(2**30)

    def remove() -> None:
        top.after_get = None
        numbers.discard(2**28)

    top = numbers._levels[-1] = Watched()
    numbers.add(3)
    numbers.add(2**28)
    top.after_get = remove
    assert numbers.last_until(2**29) == 3
