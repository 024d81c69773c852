"""Which of an arena's slots were dropped: a mark for each, and sets of slots as one integer.

A mark is a byte, and setting one is a single step that may happen anywhere, in the middle of anything. Of a mask, the
bit ``1 << slot`` stands for a slot. All functions here take a few steps in C, however many slots there are.
"""

from __future__ import annotations

import itertools

__all__ = ["DROPPED", "SIGNALLED", "from_text", "masks_of", "slots_of", "to_text"]

DROPPED, SIGNALLED = 1, 2
"""Marks: a block that was dropped; and one that was dropped, and had signalled. 0 is any other slot."""

_DIGIT = {least: bytes(b"01"[mark >= least] for mark in range(256)) for least in (DROPPED, SIGNALLED)}
_BIT = bytes(digit == ord("1") for digit in range(256))


def masks_of(marks: bytearray) -> tuple[int, int]:
    """Masks of the slots that were dropped, and of those among them that had signalled; as it is at one moment."""
    marks = marks[::-1]  # a copy
    signalled = int(marks.translate(_DIGIT[SIGNALLED]), 2) if SIGNALLED in marks else 0
    return int(marks.translate(_DIGIT[DROPPED]) or b"0", 2), signalled


def slots_of(mask: int) -> list[int]:
    """The slots in a mask, in order."""
    return list(itertools.compress(itertools.count(), f"{mask:b}"[::-1].encode().translate(_BIT)))


def to_text(mask: int) -> str:
    """A mask in hexadecimal; what is in use is often the last part of it alone."""
    shift = max((mask & -mask).bit_length() - 1, 0)
    return f"{mask >> shift:x}<<{shift}"


def from_text(text: str) -> int:
    """The inverse of :func:`to_text`."""
    digits, shift = text.split("<<")
    return int(digits, 16) << int(shift)
