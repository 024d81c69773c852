"""Marks of an arena's slots, and masks of them: against plain lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from symmem.arena.slot_mask import DROPPED, SIGNALLED, from_text, masks_of, slots_of, to_text

marks = st.lists(st.sampled_from([0, DROPPED, SIGNALLED]), max_size=300)


@given(marks, st.integers(0, 5000))
def test_masks(some: list[int], before: int) -> None:
    every = [0] * before + some
    dropped, signalled = masks_of(bytearray(every))
    assert slots_of(dropped) == [slot for slot, mark in enumerate(every) if mark]
    assert slots_of(signalled) == [slot for slot, mark in enumerate(every) if mark == SIGNALLED]
    assert [dropped >> slot & 1 for slot in range(len(every))] == [int(mark > 0) for mark in every]


@given(st.integers(0, 2**300), st.integers(0, 5000))
def test_text(some: int, shift: int) -> None:
    text = to_text(some << shift)
    assert from_text(text) == some << shift
    assert len(text) <= len(f"{some:x}") + len("<<5000") + 1
