"""The memory of an arena: segments, and the signal pads in them."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from symmem.arena.suballocator import SubAllocator
from symmem.backends.base import tensor_at
from symmem.backends.libc import round_up
from symmem.errors import ResourceLimitError
from symmem.memory.address_index import IntegerSet

if TYPE_CHECKING:
    import torch

    from symmem.backends.base import Allocation, Mapping
    from symmem.group.group import Group
    from symmem.memory.block import Block

__all__ = ["GRANULE", "GRANULE_BITS", "SPARE", "MappedSegments", "Segment", "SignalPads"]

GRANULE_BITS = 8
GRANULE = 1 << GRANULE_BITS
"""Bytes. Offsets of tensors and of their signal pads are multiples of this."""

SPARE = 96
"""A segment keeps 1/SPARE of its memory for the signal pads of further groups."""

_STALE = 1024  # starts of freed blocks that a segment always tolerates in its index


class Segment:
    """One allocation of the backend, from which blocks are sub-allocated.

    Args:
        index: Its number in the arena.
        allocation: The memory.
        group: The group of the arena.
        mapping: Every rank's memory, made for that group.
        blocks: The arena's blocks, by slot.

    Attributes:
        first: The ``mappings`` and ``compared`` of a new block.
        space: The sub-allocator; the same on all ranks.
        slots: Slot by offset of the block.
        starts: The granules at which blocks begin, or began earlier. Used to find a block by an address inside it.
    """

    def __init__(
        self,
        index: int,
        allocation: Allocation,
        group: Group,
        mapping: Mapping,
        blocks: Sequence[weakref.ref[Block] | None],
    ) -> None:
        self.index, self.allocation = index, allocation
        self.mapping = mapping
        self.first: tuple[dict[Group, Mapping], frozenset[Any]] = {group: mapping}, frozenset([group])
        self.pointer, self.nbytes = allocation.pointer, allocation.nbytes
        self.space = SubAllocator(self.nbytes - self.nbytes // SPARE, GRANULE)
        self.slots: dict[int, int] = {}
        self._blocks = blocks
        self.starts = IntegerSet(self.nbytes >> GRANULE_BITS)
        # Pads of further groups. Every rank allocates its own. A pad is free again when all ranks of the group have
        # dropped the tensor.
        self._spare = SubAllocator(self.nbytes // SPARE, GRANULE)
        self._lock = threading.Lock()

    def tidy(self) -> None:
        """Rebuild ``starts`` if most of its members are starts of freed blocks."""
        if len(self.starts) > 4 * len(self.slots) + _STALE:
            starts = IntegerSet(self.nbytes >> GRANULE_BITS)
            for offset in self.slots:
                starts.add(offset >> GRANULE_BITS)
            self.starts = starts

    def at(self, address: int) -> Block | None:
        """The live block that holds an address in the segment. Needs no lock.

        O(log n), plus the freed blocks that began in the same place, plus one insertion per new block.
        """
        offset = address - self.pointer
        slot, granule = self.slots.get(offset), offset >> GRANULE_BITS
        starts = self.starts
        while slot is None:
            start = starts.last_until(granule)
            if start is None:
                return None
            slot, granule = self.slots.get(start << GRANULE_BITS), start - 1
            if slot is None and granule < 0:
                return None
        known = self._blocks[slot]
        block = known() if known else None
        # A live tensor keeps its block in place. For any other address, the slot may belong to another block by now.
        return block if block and block.offset <= offset < block.offset + max(block.nbytes, 1) else None

    def take_pad(self, group: Group) -> int:
        """Take a zeroed signal pad for a further group, other than the arena's; returns its offset. Local.

        Raises:
            ResourceLimitError: There is no room for another pad.
        """
        backend, device = self.allocation.backend, self.allocation.device
        nbytes = backend.pad_nbytes(group.size)
        with self._lock:
            offset = self._spare.allocate(nbytes)
        if offset is None:
            raise ResourceLimitError(
                f"further groups use {len(self._spare)} tensors of this segment, and there is no room for another "
                "signal pad",
                hint="drop some of these tensors on all ranks, set a larger arena_size, or allocate with arena=False",
            )
        offset += self.space.capacity
        tensor_at(self.pointer + offset, nbytes, device, self).zero_()
        _finish(device)
        return offset

    def free_pads(self, offsets: Sequence[int]) -> None:
        """Undo :meth:`take_pad`."""
        with self._lock:
            self._spare.free_many(offset - self.space.capacity for offset in offsets)


class MappedSegments(weakref.WeakKeyDictionary[Segment, "Mapping"]):
    """Segments of other groups' arenas that one group has rendezvoused, and their mappings; see ``Group.extension``."""


class SignalPads:
    """The signal pads of an arena's slots.

    Memory for pads is never used for anything else. A pad must be zero on all ranks before any rank signals, but a rank
    hands out a tensor without knowing what its peers do.

    Args:
        nbytes: Bytes of one pad, or 0 if the backend needs none.
        device: The device of the memory.

    Attributes:
        nbytes: Bytes per pad, a multiple of ``GRANULE``.
        capacity: Slots that have a pad.
        areas: First slot, segment and offset of every range of pads, in order.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self._device = round_up(nbytes, GRANULE), device
        self.capacity = 0 if nbytes else sys.maxsize
        self.areas: list[tuple[int, Segment, int]] = []

    def add(self, segment: Segment, offset: int, count: int) -> None:
        """Use memory at an offset of a segment for the next ``count`` pads."""
        self.areas.append((self.capacity, segment, offset))
        self.capacity += count

    def locate(self, slot: int) -> tuple[Segment, int]:
        """The segment and the offset of a slot's pad."""
        first, segment, offset = next(area for area in reversed(self.areas) if area[0] <= slot)
        return segment, offset + (slot - first) * self.nbytes

    def clear(self, slots: Sequence[int]) -> None:
        """Zero this rank's pads of slots, before any rank can use them again."""
        for slot in slots:
            segment, offset = self.locate(slot)
            tensor_at(segment.pointer + offset, self.nbytes, self._device, segment).zero_()
        if slots:
            _finish(self._device)


def _finish(device: torch.device) -> None:
    """Wait until the current stream has done its work."""
    if device.type == "cuda":
        from symmem.backends.gpu import finish_stream

        finish_stream(device)
