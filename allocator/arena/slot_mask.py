"""Masks of slots: a set of an arena's slots as one integer, made from a byte per slot.

The byte of a slot is its mark. Setting a mark is a single step, so a finalizer may do it in the middle of anything. In
a mask, the bit ``1 << slot`` stands for a slot. All functions here take a few steps in C, however many slots there are.
"""

from __future__ import annotations

import itertools

__all__ = ["DROPPED", "SIGNALLED", "from_text", "masks_of", "slots_of", "to_text"]

DROPPED, SIGNALLED = 1, 2
"""Marks: the block was dropped; the block was dropped and has signalled. All other slots have 0."""

_DIGIT = {least: bytes(b"01"[mark >= least] for mark in range(256)) for least in (DROPPED, SIGNALLED)}
_BIT = bytes(digit == ord("1") for digit in range(256))


def masks_of(marks: bytearray) -> tuple[int, int]:
    """Masks of the slots that were dropped, and of the dropped ones that have signalled; both of the same moment."""
    marks = marks[::-1]  # a copy, made in one step
    signalled = int(marks.translate(_DIGIT[SIGNALLED]), 2) if SIGNALLED in marks else 0
    return int(marks.translate(_DIGIT[DROPPED]) or b"0", 2), signalled


def slots_of(mask: int) -> list[int]:
    """The slots in a mask, in order."""
    return list(itertools.compress(itertools.count(), f"{mask:b}"[::-1].encode().translate(_BIT)))


def to_text(mask: int) -> str:
    """A mask in hexadecimal, with a shift, because often all low bits are 0."""
    shift = max((mask & -mask).bit_length() - 1, 0)
    return f"{mask >> shift:x}<<{shift}"


def from_text(text: str) -> int:
    """The inverse of :func:`to_text`."""
    digits, shift = text.split("<<")
    return int(digits, 16) << int(shift)
