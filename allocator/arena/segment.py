"""A segment of an arena, and the blocks that are carved from it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from symmem.arena.slot_mask import DROPPED, SIGNALLED
from symmem.arena.suballocator import SubAllocator
from symmem.backends.base import Capability, tensor_at
from symmem.errors import ResourceLimitError
from symmem.memory.address_index import IntegerSet
from symmem.memory.block import Block

if TYPE_CHECKING:
    from symmem.arena.allocation_log import RawRecord
    from symmem.arena.arena import Arena
    from symmem.backends.base import Allocation, Mapping, Signals
    from symmem.group.group import Group
    from symmem.memory.layout import Layout

__all__ = ["GRANULE", "GRANULE_BITS", "SPARE", "Carve", "MappedSegments", "Segment", "finish"]

GRANULE_BITS = 8
GRANULE = 1 << GRANULE_BITS
"""Offsets of tensors and of their signal pads are multiples of this."""

SPARE = 128
"""One part in so many of a segment is for signal pads of further groups."""

_STALE = 1024  # places where blocks began that a segment remembers at least


class Segment:
    """One allocation of the backend, cut into blocks.

    Args:
        index: Its number within the arena.
        allocation: The memory.
        group: The arena's.
        mapping: Every rank's memory; made over that group.
        blocks: The arena's blocks, by slot.

    Attributes:
        first: What every block of it has from the beginning: mappings, and what was compared.
        space: What is carved, the same on all ranks.
        slots: The slot of each block, by offset.
        starts: The granules at which blocks begin, or have begun, for finding a block by an address within.
    """

    def __init__(
        self,
        index: int,
        allocation: Allocation,
        group: Group,
        mapping: Mapping,
        blocks: Sequence[weakref.ref[Carve] | None],
    ) -> None:
        self.index, self.allocation = index, allocation
        self.mapping = mapping
        self.first: tuple[dict[Group, Mapping], frozenset[Any]] = {group: mapping}, frozenset([group])
        self.pointer, self.nbytes = allocation.pointer, allocation.nbytes
        self.space = SubAllocator(self.nbytes - self.nbytes // SPARE, GRANULE)
        self.slots: dict[int, int] = {}
        self._blocks = blocks
        self.starts = IntegerSet(self.nbytes >> GRANULE_BITS)
        # Pads of further groups, each rank for itself; free again when all ranks of the group have dropped the tensor.
        self._spare = SubAllocator(self.nbytes // SPARE, GRANULE)
        self._lock = threading.Lock()

    def tidy(self) -> None:
        """Forget where blocks began that are no more, once that is most of what is known."""
        if len(self.starts) > 4 * len(self.slots) + _STALE:
            starts = IntegerSet(self.nbytes >> GRANULE_BITS)
            for offset in self.slots:
                starts.add(offset >> GRANULE_BITS)
            self.starts = starts

    def at(self, address: int) -> Block | None:
        """The live block that holds an address within the segment; it needs no lock.

        O(log n), but for what began in its place before, and for entering each place in the index once.
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
        # What holds a live tensor stays as it is. Of any other address the slot may be another block's by now.
        return block if block and block.offset <= offset < block.offset + max(block.nbytes, 1) else None

    def take_pad(self, group: Group) -> int:
        """Offset of a zeroed signal pad for a group that is not the arena's. Local.

        Raises:
            ResourceLimitError: There is no room for one more.
        """
        backend, device = self.allocation.backend, self.allocation.device
        nbytes = backend.pad_nbytes(group.size)
        with self._lock:
            offset = self._spare.allocate(nbytes)
        if offset is None:
            raise ResourceLimitError(
                f"{len(self._spare)} tensors of this segment are in use by further groups, and there is no room for "
                "another signal pad",
                hint="let go of some, on all ranks, set a larger arena_size, or allocate with arena=False",
            )
        offset += self.space.capacity
        tensor_at(self.pointer + offset, nbytes, device, self).zero_()
        finish(device)
        return offset

    def free_pads(self, offsets: Sequence[int]) -> None:
        """Undo :meth:`take_pad`."""
        with self._lock:
            self._spare.free_many(offset - self.space.capacity for offset in offsets)


class MappedSegments(weakref.WeakKeyDictionary[Segment, "Mapping"]):
    """Mappings of segments of other groups' arenas that one group has rendezvoused; kept in ``group.extensions``."""


def finish(device: torch.device) -> None:
    """Wait until the current stream has done its work."""
    if device.type == "cuda":
        from symmem.backends.gpu import finish_stream

        finish_stream(device)


_NONE: dict[Any, Any] = {}  # stands for the many dicts that stay empty; never changed


class Carve(Block):
    """A block of an arena. When nothing refers to it any more, it is in quarantine."""

    __slots__ = ("_entry", "_mark", "_signals", "_taken", "arena", "segment", "slot")

    def __init__(
        self, arena: Arena, segment: Segment, slot: int, offset: int, nbytes: int, layout: Layout, entry: RawRecord
    ) -> None:
        # All that Block.__init__ does, in a part of the time.
        self.allocation, self.layout, self.offset, self.nbytes = segment.allocation, layout, offset, nbytes
        self.pointer = segment.pointer + offset
        self.mappings, self.compared = segment.first
        self.first, self.process, self.closed = None, arena.process, False
        self.arena, self.segment, self.slot, self._entry = arena, segment, slot, entry
        self._signals: dict[Mapping, Signals] = _NONE
        self._taken: dict[Group, int] = _NONE  # offset of this rank's pad, of further groups
        self._mark = DROPPED

    def __del__(self) -> None:
        # Called by the collector as well, anywhere and on any thread: each of these is one step, and the mark the last.
        arena, slot = self.arena, self.slot
        if self._taken:
            arena.further[slot] = [(weakref.ref(group), pad) for group, pad in self._taken.items()]
        arena.dropped.append((perf_counter(), self._entry, self._entry[5]))
        arena.marks[slot] = self._mark

    @property
    def home(self) -> tuple[str, int, int]:
        """The group whose arena it is part of: its name, its size, and this rank in it."""
        return self.arena.group.name, self.arena.group.size, self.arena.group.rank

    def mapping_for(self, group: Group) -> Mapping | None:
        """That of the segment, whichever of its tensors the group has met for."""
        return self.mappings.get(group) or group.extension(MappedSegments).get(self.segment)

    def dropped_pads(self, group: Group) -> list[int] | None:
        """See :meth:`Block.dropped_pads`."""
        if group is self.arena.group or Capability.SIGNALS not in self.allocation.backend.capabilities:
            return None
        return self.arena.dropped_pads(group)

    def free_pads(self, group: Group, slots: Sequence[int]) -> None:
        """See :meth:`Block.free_pads`."""
        self.arena.free_pads(slots, group)

    def pad_for(self, group: Group) -> int:
        """See :meth:`Block.pad_for`."""
        if group not in self._taken:
            self._taken = {**self._taken, group: self.segment.take_pad(group)}
        return self._taken[group]

    def enter(self, group: Group, mapping: Mapping, pads: Sequence[int]) -> None:
        """See :meth:`Block.enter`."""
        super().enter(group, mapping, pads)
        group.extension(MappedSegments)[self.segment] = mapping
        if pads:
            self._signals = {**self._signals, mapping: _signals_at(mapping, pads)}

    def signals(self, mapping: Mapping) -> Signals:
        """Who signals for this tensor alone: within an arena, each has pads of its own."""
        if Capability.SIGNALS not in mapping.backend.capabilities:
            return mapping  # whose methods say so
        self._mark = SIGNALLED
        if mapping not in self._signals:
            segment, offset = self.arena.pad_of(self.slot)
            signals = _signals_at(segment.mapping, (offset,) * mapping.group.size)
            self._signals = {**self._signals, mapping: signals}
        return self._signals[mapping]


def _signals_at(mapping: Mapping, offsets: Sequence[int]) -> Signals:
    """Signals over the pads at each rank's offset."""
    return mapping.signals_at([p + o if p else 0 for p, o in zip(mapping.pointers, offsets, strict=True)])
