"""Which of many integers is the last one before a given one: for finding the block that holds an address."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["IntegerSet"]

_BITS = 10  # of an integer that one level looks at; a word has 2**10 bits, which Python handles in one step


class IntegerSet:
    """Non-negative integers, to which more can be added; looking is O(log n) of the largest one.

    A tree of words: a bit in a word of level 0 stands for a member, and a bit in one of level k + 1 for a word of level
    k that isn't 0. Adding takes one step; who looks next enters what was added into the tree, once for each.

    Any thread may add and look at any time, also amid what another one does here, or this very one below a finalizer.

    Args:
        limit: What all members are less than.

    Attributes:
        add: Enters a member, which may be there already.
    """

    __slots__ = ("_added", "_entered", "_entering", "_levels", "add")

    def __init__(self, limit: int) -> None:
        depth = max(1, -(-(limit - 1).bit_length() // _BITS))
        self._levels: list[dict[int, int]] = [{} for _ in range(depth)]
        self._added: list[int] = []  # and not in the tree yet
        self._entered = 0
        self._entering = threading.Lock()  # nobody waits for it
        self.add: Callable[[int], None] = self._added.append

    def __len__(self) -> int:
        """How many were added, some of them more than once."""
        return self._entered + len(self._added)

    def last_until(self, number: int) -> int | None:
        """The largest member that is at most ``number``; None if there is none."""
        added = self._enter_added() if self._added else []
        before = [member for member in added if member <= number]
        if (found := self._last_until(number)) is not None:
            before.append(found)
        return max(before, default=None)

    def _enter_added(self) -> list[int]:
        """Enter what was added; or, if that is under way already, return it, for it may not be in the tree yet."""
        if not self._entering.acquire(blocking=False):
            return self._added[:]
        try:
            added = self._added[:]
            for member in added:
                self._enter(member)
            self._entered += len(added)
            del self._added[: len(added)]
        finally:
            self._entering.release()
        return []

    def _enter(self, member: int) -> None:
        # From the lowest, so that no bit ever stands for a word that isn't there; and all of them, for an exception out
        # of a signal handler may have ended the last attempt half-way.
        for level in self._levels:
            member, bit = member >> _BITS, member & (1 << _BITS) - 1
            level[member] = level.get(member, 0) | 1 << bit

    def _last_until(self, number: int) -> int | None:
        for depth, level in enumerate(self._levels):
            number, bit = number >> _BITS, number & (1 << _BITS) - 1
            if word := level.get(number, 0) & (2 << bit) - 1:
                for below in (level, *reversed(self._levels[:depth])):
                    word = word if below is level else below[number]
                    number = number << _BITS | word.bit_length() - 1
                return number
            number -= 1  # words before this one
            if number < 0:
                return None
        return None
