"""The growth of an arena: reclaim dropped blocks if that makes enough room, else add a segment.

All ranks take the same decisions, because they depend only on the allocation log and on the settings. They compare both
before they add memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from symmem.arena.reclaim import ReclaimRound, compare_logs
from symmem.arena.segment import GRANULE, SPARE
from symmem.backends.base import Capability
from symmem.backends.libc import round_up
from symmem.errors import DivergenceError, MismatchError, OutOfMemoryError, PeerTimeoutError, ResourceLimitError
from symmem.group.compare import exchange_json
from symmem.memory import cuda_graphs

if TYPE_CHECKING:
    from symmem.arena.allocation_log import AllocationLog, AllocationRecord
    from symmem.arena.segment import Segment
    from symmem.group.agreement import CollectiveOperation

__all__ = ["Growth"]

_GRANULARITY = 2 << 20  # bytes; segments are multiples of it, as GPU memory is
_PADS_PART = 8  # at most 1/_PADS_PART of the first segment is for signal pads
_TYPICAL = 1 << 16  # bytes of a typical tensor; the first segment has a pad for every tensor of this size
_FEWEST_PADS = 16
_MORE_SLOTS = 64  # slots that are added together
_SELDOM = 4096  # allocations; reclaim rounds that are further apart than this are cheap
_MOST_STEPS = 64  # steps of growth that count; 1024 ** steps must fit a float


class Growth:
    """Makes room in one arena. The methods are collective over its group, except where they say otherwise.

    Args:
        log: The allocation log of the arena. The caller holds its lock.
    """

    def __init__(self, log: AllocationLog) -> None:
        self._log = log
        self._last_shortage = -_SELDOM  # number of the allocation that last lacked a signal pad

    def make_room(self, proposed: AllocationRecord) -> None:
        """Make room for an allocation: by a reclaim round, and if that is not enough, by a segment."""
        size = proposed.nbytes
        if self._log.segments and not self._has_room(size):
            self._reclaim(proposed)
        if not self._has_room(size):
            self._grow(proposed)

    def make_slot(self, proposed: AllocationRecord) -> None:
        """Provide a free slot. Local if there is a signal pad for another slot.

        The caller is in a transaction of the log; it is interrupted for collective steps.
        """
        log = self._log
        first = len(log.records)
        if first == log.pads.capacity:
            if log.agreed:
                log.absorb()
            log.in_transaction = False
            if log.segments:
                self._add_pads(proposed)
            else:
                self._grow(proposed)  # this adds pads too
            log.in_transaction = True
        if not log.free_slots:
            log.add_slots(min(_MORE_SLOTS, log.pads.capacity - first))

    def _has_room(self, size: int) -> bool:
        return any(segment.space.largest_free >= size for segment in self._log.segments)

    def _reclaim(self, proposed: AllocationRecord) -> None:
        with ReclaimRound([self._log]) as reclaim_round:
            with self._collective("allocate", proposed) as collective:
                reclaim_round.run(collective)
            reclaim_round.apply()
        self._log.in_transaction = True
        self._log.absorb()
        self._log.in_transaction = False

    def _grow(self, proposed: AllocationRecord) -> None:
        """Add a segment for an allocation, of the size that the settings ask for if memory suffices."""
        log, settings, size = self._log, self._log.group.settings, proposed.nbytes
        first, pad = not log.segments, log.pads.nbytes
        least = _segment_for(size + (_FEWEST_PADS * pad if first else 0))
        steps = len(log.segments) - len(log.pads.areas[1:])  # segments for pads alone do not count
        factor = settings.arena_growth ** min(steps, _MOST_STEPS)
        wished = round_up(int(settings.arena_size * factor), _GRANULARITY)
        nbytes = max(least, min(wished, self._headroom(least, size) & -_GRANULARITY))
        try:
            segment = self._add_segment(nbytes, proposed)
        except OutOfMemoryError as error:  # on all ranks
            if nbytes == least:
                raise
            _release_frames(error)
            segment = self._add_segment(least, proposed)
        if first and pad:  # the first pads share the first segment, so that the ranks communicate once
            room = (segment.space.capacity - size) // pad
            most = min(segment.nbytes // _PADS_PART // pad, segment.nbytes // _TYPICAL, room)
            self._place_pads(segment, max(_FEWEST_PADS, most))

    def _add_pads(self, proposed: AllocationRecord) -> None:
        """Double the number of signal pads, and so of the tensors that the arena can hold.

        Add no pads if a reclaim round frees so many slots that the next shortage is far away, or if pads would take
        more memory than tensors, or if there is no memory for pads and the round has freed at least one slot.
        """
        log = self._log
        if not log.free_slots:
            self._reclaim(proposed)
        seldom = log.count - self._last_shortage >= _SELDOM
        self._last_shortage = log.count
        count, nbytes = log.pads.capacity, log.pads.capacity * log.pads.nbytes
        enough = 4 * len(log.free_slots) > count
        if enough and (seldom or 4 * nbytes > log.reserved_bytes):
            return
        least = _segment_for(nbytes)
        try:
            self._headroom(least, nbytes)
            segment = self._add_segment(least, proposed)
        except (OutOfMemoryError, ResourceLimitError) as error:  # on all ranks
            if not log.free_slots:
                raise
            _release_frames(error)
            return  # the reclaimed slots are enough for now
        self._place_pads(segment, count)

    def _place_pads(self, segment: Segment, count: int) -> None:
        """Use memory of a new segment for signal pads. Local."""
        offset = segment.space.allocate(count * self._log.pads.nbytes)
        assert offset is not None
        self._log.pads.add(segment, offset, count)

    def _headroom(self, least: int, size: int) -> int:
        """Bytes that the setting ``arena_limit`` still allows to add. Collective if it fails.

        Raises:
            ResourceLimitError: A segment of ``least`` bytes, for tensors of ``size`` bytes, would pass the limit. All
                ranks raise it, because their limits may differ.
        """
        log = self._log
        limit, reserved = log.group.settings.arena_limit, log.reserved_bytes
        if reserved + least <= limit:
            return limit - reserved
        error = ResourceLimitError(
            f"{size} bytes do not fit into the arena of {log.kind}: it has {reserved} bytes, "
            f"{log.live_bytes} of them live and {log.quarantined_bytes} in quarantine, and must not pass "
            f"arena_limit, {limit} bytes",
            hint="free tensors, raise arena_limit, or allocate with arena=False",
            rank=log.group.rank,
            group=log.group.name,
            step="allocate",
        )
        with log.group.collective("grow an arena"):
            raise error

    def _add_segment(self, nbytes: int, proposed: AllocationRecord) -> Segment:
        log, backend = self._log, self._log.backend
        allocation = None
        if Capability.COLLECTIVE_ALLOCATION in backend.capabilities:
            cuda_graphs.refuse(log.device, "an arena cannot grow")
            allocation = backend.allocate(nbytes, log.device, log.group)
        with self._collective("grow an arena", proposed) as collective:
            compare_logs(log, collective, proposed, nbytes)
            if not log.segments:
                self._begin(collective)
            if allocation is None:
                allocation = backend.allocate(nbytes, log.device, log.group)
            mapping = backend.rendezvous(allocation, collective)
            mapping.serial = collective.serial
        return log.add_segment(allocation, mapping)

    def _begin(self, collective: CollectiveOperation) -> None:
        """Agree on the arena's sequence of the ledger, and on what the predecessor's ranks made alike. Collective."""
        log, ledger, old = self._log, self._log.group.ledger, self._log.predecessor
        index, born, made = None, 0, []
        if old is not None:
            born, made = old.born, [(record.number, record.digest) for record in old.recent()]
            if old.acts is not None and ledger is not None:
                index = old.acts.index
                ledger.clear(index)  # all ranks have come here, so all have raised the error in it
        received = exchange_json(collective, "ledger", [ledger and ledger.claimed, [index, born], made])
        claimed, before, histories = zip(*received, strict=True)
        shared = all(each == before[0] for each in before)  # else an interrupt has come in between
        if old is not None and shared:
            alike = set.intersection(*({tuple(each) for each in history} for history in histories))
            old.usable = max((number for number, _ in alike), default=0)
        if ledger is not None:
            log.acts = ledger.claim(index if shared and index is not None else max(claimed), log.kind)

    @contextlib.contextmanager
    def _collective(self, operation: str, proposed: AllocationRecord) -> Iterator[CollectiveOperation]:
        """A collective operation for an allocation. If the other ranks do something else, the hint names it."""
        log = self._log
        try:
            with log.group.collective(operation) as collective:
                collective.half_done = functools.partial(log.stop, "an allocation")
                cuda_graphs.refuse(log.device, "an arena cannot grow")
                yield collective
        except (MismatchError, PeerTimeoutError) as error:
            if not isinstance(error, DivergenceError):
                error.hint = (
                    f"{error.hint}. Rank {log.group.rank} is here because the arena of {log.kind} has no "
                    f"room for allocation {proposed.number}: {proposed}"
                )
            raise


def _segment_for(nbytes: int) -> int:
    """Bytes of the smallest segment that has ``nbytes`` beside the signal pads of further groups."""
    return round_up(nbytes * SPARE // (SPARE - 1) + 2 * GRANULE, _GRANULARITY)


def _release_frames(error: BaseException | None) -> None:
    """Release the frames of a handled error, because they would keep the next block alive.

    The frames refer to the error too. Without this, only the garbage collector would drop the block.
    """
    if error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        _release_frames(error.__cause__)
        _release_frames(error.__context__)
