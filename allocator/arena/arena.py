"""Arenas: symmetric memory from which every rank sub-allocates the same blocks without communication.

An arena belongs to a group, a backend and a device. It consists of segments. A segment is one allocation of the
backend, and was rendezvoused once. A tensor is sub-allocated from a segment by an algorithm that uses integers alone.
All ranks of the group make the same calls in the same order, so they get the same offset. The addresses of the peers'
tensors follow from it.

Freeing. The garbage collector drops tensors at different moments, and in a different order, on every rank. So a dropped
block only goes into quarantine. It becomes free in a reclaim round, if all ranks have it in quarantine
(:mod:`symmem.arena.reclaim`). Reclaim rounds run when the ranks communicate anyway: before the arena would grow, at a
rendezvous of the group, and in :func:`symmem.collect`.

Divergence. The ranks compare a rolling hash of all allocations at once by the group's ledger, or else whenever they
communicate. If it differs, the error names the first allocation that differs, and the place in the program where every
rank made it. The next allocation begins the arena again, with new memory: the ranks meet there.
Tensors that were allocated before the first difference stay usable after that meeting; later ones stay refused.

Contents. A new tensor is not zeroed, because a peer may already store into it. Its signal pad is zero: memory for pads
is never used for anything else, and the reclaim round has zeroed every pad that was used.
"""

from __future__ import annotations

import os
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING
from weakref import ref

import torch

from symmem.arena.allocation_log import AllocationLog, AllocationRecord, hash_of_name
from symmem.arena.arena_block import ArenaBlock
from symmem.arena.growth import Growth
from symmem.arena.reclaim import compare_logs
from symmem.arena.segment import GRANULE, GRANULE_BITS, Segment
from symmem.backends.base import Capability
from symmem.errors import DivergenceError, UnsupportedError
from symmem.group.call_site import NOWHERE, CallSite, internal
from symmem.group.group import Group

if TYPE_CHECKING:
    from symmem.backends.base import Backend
    from symmem.memory.layout import Layout

__all__ = ["Arena", "Arenas", "arena_for", "arenas_of", "compare_arenas", "supports_arenas", "used_arenas"]


class Arena:
    """Symmetric memory of one group, backend and device.

    An allocation is not collective, unless the arena must grow. All ranks of the group must make the same allocations
    in the same order.

    Args:
        group: The ranks that share the arena.
        backend: The backend that makes the memory.
        device: The device of the memory.

    Attributes:
        log: The allocation log: segments, slots, history, statistics.
        process: The process that made the arena.
    """

    def __init__(self, group: Group, backend: Backend, device: torch.device) -> None:
        self.group, self.backend, self.device = group, backend, device
        self.log = AllocationLog(group, backend, device)
        self.process = self.log.process
        self._growth = Growth(self.log)
        self._earlier: list[ref[AllocationLog]] = []
        self._checks_each = self.log.restricted = group.settings.allocation_check == "each"
        group.on_divergence.append(self._note)
        group.before_collective.append(self._raise_noted)

    def sub_allocate(self, layout: Layout, name: str | None, frame: FrameType | None) -> ArenaBlock:
        """Allocate a block for a tensor. Collective over the group if the arena must grow, or checks each allocation.

        Args:
            layout: The layout of the tensor.
            name: The program's name for the tensor.
            frame: The call site is the first frame outside of symmem, from this one outwards.

        Raises:
            DivergenceError: The ranks have allocated differently. On all ranks.
            OutOfMemoryError: The arena must grow, and a rank has no memory. On all ranks.
            ResourceLimitError: The arena must grow, and would pass the setting ``arena_limit``. On all ranks.
            UnsupportedError: The arena must grow during the capture of a CUDA graph.
        """
        # The warm path has a budget of 3 us. So it uses plain tuples, calls no helpers, and repeats `caller` here.
        described, log = None, self.log
        if log.restricted:
            log = self._current_log()
        if frame is not None and (acts := log.acts) is not None:
            described = acts.find(name, layout.fingerprint, frame)
        if described is not None:
            part, text_id, code, instruction, _ = described
        else:
            while frame is not None and internal[frame.f_globals.get("__name__", "")]:
                frame = frame.f_back
            code, instruction = (frame.f_code, frame.f_lasti) if frame is not None else NOWHERE
            part = 0 if name is None else hash_of_name(name)
        nbytes = layout.nbytes
        size = nbytes + GRANULE - 1 & -GRANULE or GRANULE
        with log.lock:
            if dropped := log.dropped:
                if len(dropped) == 1:
                    drop = dropped.pop()
                    dropped_bytes = drop[2]
                    log.live_bytes -= dropped_bytes
                    log.quarantined_bytes += dropped_bytes
                    log.quarantined_blocks += 1
                    log.drops.append(drop)
                else:
                    log.count_drops()
            mine = False
            try:
                if log.restricted or log.in_transaction:
                    self._check(log.proposal(size, layout, CallSite(code, instruction), name))
                log.in_transaction = mine = True
                if not log.free_slots:
                    self._growth.make_slot(log.proposal(size, layout, CallSite(code, instruction), name))
                for segment in log.segments:
                    offset = segment.space.allocate(size)
                    if offset is not None:
                        break
                else:
                    segment, offset = self._take_new(log.proposal(size, layout, CallSite(code, instruction), name))
                slot = log.free_slots.pop()
                log.count = number = log.count + 1
                if described is None and log.acts is not None:
                    part, text_id, *_ = log.describe(layout, name, frame)
                # The digest covers the place too. So ranks with different logs notice, whatever the reason is.
                log.digest = digest = hash((log.digest, layout.fingerprint, part, segment.index, offset, slot))
                if (acts := log.acts) is not None and acts.enter(number, digest, text_id):
                    log.compare_acts(number, is_use=False)
                record = (number, digest, perf_counter(), segment.index, offset, size, layout, code, instruction, name)
                log.records[slot] = record
                log.history.append(record)
                block = ArenaBlock(log, segment, slot, offset, nbytes, layout, record)
                log.blocks[slot] = ref(block)
                segment.slots[offset] = slot
                segment.starts.add(offset >> GRANULE_BITS)
                log.live_bytes = live = log.live_bytes + size
                if live > log.peak_bytes:
                    log.peak_bytes = live
                log.in_transaction = False
                return block
            except BaseException as error:
                if mine:
                    log.stop_if_half_done("an allocation", error)
                raise

    def _note(self, error: DivergenceError) -> None:
        if error.arena == self.log.kind:
            self.log.invalidate(error)

    def _raise_noted(self) -> None:
        if self.log.noted and self.process == os.getpid():
            self.log.compare_acts(self.log.count)

    def enter(self, block: str, frame: FrameType | None) -> None:
        """See :meth:`AllocationLog.enter`."""
        self._current_log().enter(block, frame)

    def _current_log(self) -> AllocationLog:
        """The log to allocate from. After a divergence, the arena begins again with a new one.

        Every rank that raises a divergence fails the same round of the group with it, or has failed it. So all ranks
        begin again at their next allocation, and meet in the first growth.
        """
        old = self.log
        with old.lock:
            if self.log is old and old.divergence is not None and self.process == os.getpid():
                new = AllocationLog(self.group, self.backend, self.device)
                # If the ranks diverged again before they met, they still share the log of their last meeting.
                new.restricted, new.predecessor = self._checks_each, old if old.growths else old.predecessor
                self._earlier = [*(known for known in self._earlier if known()), ref(old)]
                self._growth, self.log = Growth(new), new
        return self.log

    @property
    def logs(self) -> list[AllocationLog]:
        """The log, after those from before divergences that still have live tensors."""
        return [*(log for known in self._earlier if (log := known())), self.log]

    def _take_new(self, proposed: AllocationRecord) -> tuple[Segment, int]:
        """Make room for an allocation and take it. Collective."""
        log = self.log
        if log.agreed:
            log.absorb()
        log.in_transaction = False
        self._growth.make_room(proposed)
        log.in_transaction = True
        for segment in log.segments:
            if (offset := segment.space.allocate(proposed.nbytes)) is not None:
                return segment, offset
        log.check_idle("allocate")  # a finalizer has taken the room
        raise AssertionError

    def _check(self, proposed: AllocationRecord) -> None:
        self.log.check_usable()
        if self._checks_each:
            with self.group.collective("check an allocation") as collective:
                compare_logs(self.log, collective, proposed, proposed.nbytes, sites=True)


class Arenas(dict[tuple[str, torch.device], Arena]):
    """The arenas of one group by backend and device, oldest first; kept in ``group.extension``."""


def supports_arenas(backend: Backend) -> bool:
    """Whether arenas can hold a backend's memory. If it has signals, every tensor needs its own signal pad."""
    return Capability.SIGNALS not in backend.capabilities or backend.pad_nbytes(2) > 0


def arena_for(group: Group, backend: Backend, device: torch.device) -> Arena:
    """The arena of a group, backend and device; the first call makes it. Local.

    Raises:
        UnsupportedError: The backend's signals cannot work in an arena.
    """
    arenas = group.extension(Arenas)
    known = arenas.get((backend.name, device))
    if known is None:
        if not supports_arenas(backend):
            raise UnsupportedError(
                f"the backend {backend.name!r} cannot be used with an arena, because its signals have a fixed place",
                hint="allocate with arena=False",
                rank=group.rank,
                group=group.name,
                step="allocate",
            )
        known = arenas.setdefault((backend.name, device), Arena(group, backend, device))
    return known


def arenas_of(group: Group) -> list[Arena]:
    """All arenas of a group on this rank, oldest first."""
    return list(group.extension(Arenas).values())


def used_arenas(group: Group) -> list[Arena]:
    """The arenas of a group that have allocated something, in an order that all ranks share.

    A rank may have more arenas, from requests that failed or that asked for memory outside of arenas. An arena that has
    diverged does not count, until it begins again.
    """
    used = [arena for arena in arenas_of(group) if arena.log.count and arena.log.divergence is None]
    return sorted(used, key=lambda arena: (arena.backend.name, str(arena.device)))


def is_missed_elsewhere(group: Group) -> bool:
    """Whether another rank has raised a divergence, and now waits for all ranks to begin an arena again. Local.

    Then it does not come to the operator in which this rank waits for it.
    """
    ledger = group.ledger
    if ledger is None or not any(arena.log.acts and arena.log.acts.is_raised for arena in used_arenas(group)):
        return False
    others = [rank for rank in range(group.size) if rank != group.rank]
    return ledger.waits_of(others).keys() != ledger.waits_of(others, rounds=False).keys()


def compare_arenas(group: object) -> None:
    """Compare the allocations of the ranks from all arenas of a group, as far as this is possible locally.

    For calls of all ranks that have timed out.

    Raises:
        DivergenceError: They differ, and this rank has not been told before.
    """
    if isinstance(group, Group):
        for arena in used_arenas(group):
            arena.log.compare_acts(0, in_operator=True)
