"""Blocks of arenas."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from symmem.arena.segment import MappedSegments, Segment
from symmem.arena.slot_mask import DROPPED, SIGNALLED
from symmem.backends.base import Capability
from symmem.backends.signals import SharedSignals
from symmem.backends.untraced import untraced
from symmem.memory.block import Block

if TYPE_CHECKING:
    from symmem.arena.allocation_log import AllocationLog, RawRecord
    from symmem.backends.base import Mapping, RankGroup, Signals
    from symmem.group.group import Group
    from symmem.memory.layout import Layout

__all__ = ["ArenaBlock"]

_NONE: dict[Any, Any] = {}  # shared by all blocks without entries; never changed
_MOMENT = 1.0  # seconds


class ArenaBlock(Block):
    """A block of an arena. It goes into quarantine when the last reference to it is dropped."""

    __slots__ = ("_further_pads", "_mark", "_record", "_signals", "log", "segment", "slot")

    def __init__(
        self,
        log: AllocationLog,
        segment: Segment,
        slot: int,
        offset: int,
        nbytes: int,
        layout: Layout,
        record: RawRecord,
    ) -> None:
        # This does all that Block.__init__ does, but faster.
        self.allocation, self.layout, self.offset, self.nbytes = segment.allocation, layout, offset, nbytes
        self.pointer = segment.pointer + offset
        self.mappings, self.compared = segment.first
        self.first, self.process, self.closed = None, log.process, False
        self.log, self.segment, self.slot, self._record = log, segment, slot, record
        self._signals: dict[Mapping, Signals] = _NONE
        self._further_pads: dict[Group, int] = _NONE  # offset of this rank's pad
        self._mark = DROPPED

    @untraced
    def __del__(self, now: Callable[[], float] = perf_counter) -> None:  # globals may be gone at the interpreter's end
        # The collector may call this anywhere and on any thread. So every statement takes effect in a single step, and
        # the mark comes last.
        log, slot = self.log, self.slot
        if self._further_pads:
            log.further_pads[slot] = [(weakref.ref(group), pad) for group, pad in self._further_pads.items()]
        log.dropped.append((now(), self._record, self._record[5]))
        log.slot_marks[slot] = self._mark

    @property
    def diverged(self) -> bool:
        """See :attr:`Block.diverged`."""
        log = self.log
        acts = log.acts
        return log.divergence is not None or (acts is not None and (acts.is_ahead or acts.is_found))

    def before_access(self, group: RankGroup, rank: int | None = None) -> None:
        """See :meth:`Block.before_access`."""
        log, number = self.log, self._record[0]
        acts = log.acts
        if acts is None or log.divergence is not None or log.process != os.getpid():
            return  # after a divergence, the ledger has the acts of the next log
        ranks = range(log.group.size) if rank is None or group is not log.group else (rank,)
        if uncompared := acts.uncompared(number, ranks):
            acts.await_ranks(number, uncompared, _MOMENT)
            log.compare_acts(number, access=uncompared)

    def check_acts(self, late: Sequence[int] = (), group: RankGroup | None = None) -> None:
        """See :meth:`Block.check_acts`."""
        self.log.compare_acts(self._record[0], late if group is self.log.group else ())

    @property
    def home(self) -> tuple[str, int, int]:
        """See :attr:`Block.home`."""
        return self.log.group.name, self.log.group.size, self.log.group.rank

    def mapping_for(self, group: Group) -> Mapping | None:
        """The mapping of the segment, if the group has rendezvoused any block of it."""
        return self.mappings.get(group) or group.extension(MappedSegments).get(self.segment)

    def dropped_pads(self, group: Group) -> list[int] | None:
        """See :meth:`Block.dropped_pads`."""
        if group is self.log.group or Capability.SIGNALS not in self.allocation.backend.capabilities:
            return None
        return self.log.dropped_pads(group)

    def free_pads(self, group: Group, slots: Sequence[int]) -> None:
        """See :meth:`Block.free_pads`."""
        self.log.free_pads(slots, group)

    def pad_for(self, group: Group) -> int:
        """See :meth:`Block.pad_for`."""
        if group not in self._further_pads:
            self._further_pads = {**self._further_pads, group: self.segment.take_pad(group)}
        return self._further_pads[group]

    def enter(self, group: Group, mapping: Mapping, pads: Sequence[int]) -> None:
        """See :meth:`Block.enter`."""
        super().enter(group, mapping, pads)
        group.extension(MappedSegments)[self.segment] = mapping
        if pads:
            self._signals = {**self._signals, mapping: _signals_at(mapping, pads)}

    def signals(self, mapping: Mapping) -> Signals:
        """The signals of this tensor. Every tensor of an arena has its own signal pads."""
        if Capability.SIGNALS not in mapping.backend.capabilities:
            return mapping  # its methods raise the right error
        self._mark = SIGNALLED
        if mapping not in self._signals:
            segment, offset = self.log.pads.locate(self.slot)
            signals = _signals_at(segment.mapping, (offset,) * mapping.group.size)
            if isinstance(signals, SharedSignals):
                signals.stopped = functools.partial(self.log.has_diverged, self._record[0])
            self._signals = {**self._signals, mapping: signals}
        return self._signals[mapping]

    def pads(self, mapping: Mapping) -> list[int]:
        """See :meth:`Block.pads`."""
        if mapping in self._signals or Capability.SIGNALS not in mapping.backend.capabilities:
            return super().pads(mapping)
        self._mark = SIGNALLED
        segment, offset = self.log.pads.locate(self.slot)
        return _addresses(segment.mapping, (offset,) * mapping.group.size)


def _signals_at(mapping: Mapping, offsets: Sequence[int]) -> Signals:
    """Signals over the pads at every rank's offset."""
    return mapping.signals_at(_addresses(mapping, offsets))


def _addresses(mapping: Mapping, offsets: Sequence[int]) -> list[int]:
    return [pointer + offset if pointer else 0 for pointer, offset in zip(mapping.pointers, offsets, strict=True)]
