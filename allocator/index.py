"""Which of many integers is the last one before a given one: for finding the block that holds an address."""

from __future__ import annotations

__all__ = ["IntegerSet"]

_BITS = 10  # of an integer that one level looks at; a word has 2**10 bits, which Python handles in one step


class IntegerSet:
    """Non-negative integers; all operations are O(log n) of the largest one.

    A tree of words: a bit in a word of level 0 stands for a member, and a bit in one of level k + 1 for a word of level
    k that isn't 0.

    One may change it at a time; looking needs no lock, and finds what is in it all the while.

    Args:
        limit: What all members are less than.
    """

    __slots__ = ("_levels",)

    def __init__(self, limit: int) -> None:
        depth = max(1, -(-(limit - 1).bit_length() // _BITS))
        self._levels: list[dict[int, int]] = [{} for _ in range(depth)]

    def add(self, member: int) -> None:
        """Enter a member, which may be there already."""
        for level in self._levels:
            member, bit = member >> _BITS, member & (1 << _BITS) - 1
            word = level.get(member, 0)
            level[member] = word | 1 << bit
            if word:
                return

    def discard(self, member: int) -> None:
        """Take a member out, which may not be there."""
        emptied = []
        for level in self._levels:
            member, bit = member >> _BITS, member & (1 << _BITS) - 1
            word = level.get(member, 0) & ~(1 << bit)
            if word:
                level[member] = word
                break
            emptied.append((level, member))
        for level, number in reversed(emptied):  # so that no bit ever stands for a word that isn't there
            level.pop(number, None)

    def last_until(self, number: int) -> int | None:
        """The largest member that is at most ``number``; None if there is none."""
        while True:
            try:
                return self._last_until(number)
            except KeyError:  # a word that another thread has emptied meanwhile
                continue

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
