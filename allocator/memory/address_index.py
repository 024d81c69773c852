"""A set of integers that finds the predecessor of a number; used to find the block that holds an address."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["IntegerSet"]

_BITS = 10  # bits of an integer per level of the tree; a word has 2**10 bits, and Python handles it in one step


class IntegerSet:
    """A set of non-negative integers that only grows; a search takes O(log limit).

    The set is a tree of words. A bit in a word of level 0 stands for a member. A bit in a word of level k + 1 stands
    for a word of level k that is not 0. :attr:`add` only appends to a list, in one step. The next search moves the new
    members into the tree.

    Any thread may add and search at any time: while another thread does so, or in a finalizer that interrupts this
    thread in the middle of a search.

    Args:
        limit: All members are less than this.

    Attributes:
        add: Adds a member; adding it again does no harm.
    """

    __slots__ = ("_added", "_entered", "_entering", "_levels", "add")

    def __init__(self, limit: int) -> None:
        depth = max(1, -(-(limit - 1).bit_length() // _BITS))
        self._levels: list[dict[int, int]] = [{} for _ in range(depth)]
        self._added: list[int] = []  # not in the tree yet
        self._entered = 0
        self._entering = threading.Lock()  # only tried, never waited for
        self.add: Callable[[int], None] = self._added.append

    def __len__(self) -> int:
        """How many members were added; duplicates count again."""
        return self._entered + len(self._added)

    def last_until(self, number: int) -> int | None:
        """The largest member that is at most ``number``, or None."""
        added = self._enter_added() if self._added else []
        before = [member for member in added if member <= number]
        if (found := self._last_until(number)) is not None:
            before.append(found)
        return max(before, default=None)

    def _enter_added(self) -> list[int]:
        """Move new members into the tree. If another caller does that now, return them, since they may be missing."""
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
        # From the lowest level up, so that a bit never stands for a missing word. Every level is written again, because
        # an exception from a signal handler may have stopped the last attempt half-way.
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
            number -= 1  # continue in the words before this one
            if number < 0:
                return None
        return None
