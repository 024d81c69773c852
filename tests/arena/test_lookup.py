"""Finding the block that holds an address in an arena."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from arena_rank import Rank, span

import symmem
from symmem.backends.base import tensor_at
from symmem.errors import (
    NotSymmetricError,
)


def test_neighbours_are_told_apart(rank: Rank) -> None:
    live = [rank.allocate(256) for _ in range(50)]  # adjacent blocks
    assert len({st._block.pointer for st in live}) == 50
    for st in live:
        for view in (st.tensor, st.tensor[:1], st.tensor[255:], st.tensor[17:40]):
            found = symmem.find(view)
            assert found is not None
            assert found._block is st._block
        assert symmem.SymmetricTensor.wrap(st.tensor[9:])._layout.offset == 9


def over(pointer: int, owner: object, nbytes: int = 1) -> torch.Tensor:
    """Bytes of memory as a tensor without a block."""
    return tensor_at(pointer, nbytes, torch.device("cpu"), owner)


def test_what_lies_between_blocks_is_not_found(rank: Rank) -> None:
    st, behind = rank.allocate(100), rank.allocate(100)
    begin, end = span(st)
    segment = rank.log.segments[0]
    assert symmem.find(over(end - 1, segment))._block is st._block  # type: ignore[union-attr]
    pads, offset = rank.log.pads.locate(st._block.slot)  # type: ignore[attr-defined]
    places = [end, begin + 255, pads.pointer + offset, segment.pointer + segment.nbytes - 1]
    for pointer in places:
        assert symmem.find(over(pointer, segment)) is None
        with pytest.raises(NotSymmetricError, match="address"):
            symmem.SymmetricTensor.wrap(over(pointer, segment))
    with pytest.raises(NotSymmetricError, match="extent"):
        symmem.SymmetricTensor.wrap(over(end - 4, segment, 8))
    del behind


def test_what_was_dropped_is_not_found(rank: Rank) -> None:
    first, st, last = rank.allocate(1000), rank.allocate(1000), rank.allocate(1000)
    segment, (begin, end) = rank.log.segments[0], span(st)
    del st
    for _ in ("in quarantine", "reclaimed"):
        assert symmem.find(over(begin, segment)) is None
        assert symmem.find(over(end - 1, segment)) is None
        assert symmem.find(first.tensor[-1:]) is not None
        assert symmem.find(last.tensor[500:]) is not None
        rank.collect()
    # New blocks reuse the place; the old ones leave no trace.
    small = [rank.allocate(256) for _ in range(3)]
    whole = rank.allocate(4096)
    for each in (*small, whole, first, last):
        found = symmem.find(each.tensor[-1:])
        assert found is not None
        assert found._block is each._block


def test_a_block_over_many_former_ones(rank: Rank) -> None:
    many = [rank.allocate(256) for _ in range(200)]
    del many
    rank.collect()
    large = rank.allocate(200 * 256)
    found = symmem.find(large.tensor[150 * 256 + 3 :])
    assert found is not None
    assert found._block is large._block


def test_looking_up_while_another_thread_allocates(rank: Rank) -> None:
    """`find` takes no lock of the arena, and always finds live tensors."""
    fixed = [rank.allocate(1000) for _ in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    over = threading.Event()

    def churn() -> None:
        while not over.is_set():
            some = [rank.allocate(500) for _ in range(10)]
            del some
            rank.collect()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for turn in range(3000):
            st = fixed[turn % 8]
            found = symmem.find(st.tensor[500:])
            assert found is not None
            assert found._block is st._block
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(before)
