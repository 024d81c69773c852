"""The set that finds blocks by address: against a sorted list, and while another thread changes it."""

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

from symmem.memory.address_index import IntegerSet

# Members near the edges of words of every level, and few enough to collide.
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
    """All members are found at once while other threads add and search."""
    fixed, numbers, chance = [0, 5000, 2**20, 2**25], IntegerSet(2**30), random.Random(1)
    for number in fixed:
        numbers.add(number)
    over = threading.Event()
    wrong: list[int] = []

    def look() -> None:
        while not over.is_set():
            number = fixed[chance.randrange(4)]
            if not number <= (numbers.last_until(number + 4000) or 0) <= number + 4000:
                wrong.append(number)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in chance.sample(range(2**26), 8000):
            numbers.add(number)
            if numbers.last_until(number) != number:
                wrong.append(number)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []


class Watched(dict[int, int]):
    """A level that runs a callback between two steps."""

    def __init__(self, after_get: Callable[[], None]) -> None:
        super().__init__()
        self.after_get = after_get

    def get(self, *args: Any) -> Any:
        found = super().get(*args)
        self.after_get()
        return found


def test_a_finalizer_that_adds_and_looks_while_members_are_entered() -> None:
    """It finds members that are not in the tree yet, and no member is lost."""
    seen: list[int | None] = []
    numbers, mine = IntegerSet(2**30), [2**29, 2**28 + 1]
    inside = False

    def finalizer() -> None:
        nonlocal inside
        if mine and not inside:
            inside = True
            number = mine.pop()
            numbers.add(number)
            seen.extend([numbers.last_until(2**28), numbers.last_until(number + 1)])
            inside = False

    numbers._levels = [Watched(finalizer) for _ in numbers._levels]
    numbers.add(3)
    numbers.add(2**28)
    assert numbers.last_until(5) == 3
    assert seen == [2**28, 2**28 + 1, 2**28, 2**29]
    assert [numbers.last_until(number) for number in (2**28, 2**29 - 1, 2**30 - 1)] == [2**28, 2**28 + 1, 2**29]


class Interrupt(Exception):
    pass


def test_an_interrupt_while_members_are_entered() -> None:
    numbers, steps = IntegerSet(2**30), iter(range(100))

    def interrupt() -> None:
        if next(steps) in (1, 4, 8):
            raise Interrupt

    numbers._levels = [Watched(interrupt) for _ in numbers._levels]
    for number in (3, 2**20, 2**28):
        numbers.add(number)
    for _ in range(3):
        with pytest.raises(Interrupt):
            numbers.last_until(2**30 - 1)
    found = [numbers.last_until(number) for number in (2**20 - 1, 2**28 - 1, 2**30 - 1)]
    assert found == [3, 2**20, 2**28]
