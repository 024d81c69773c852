"""Arenas: symmetric memory that ranks cut up alike, each for itself.

An arena belongs to a group, a backend and a device. It has segments, each one allocation of the backend that was
rendezvoused once. A tensor is carved from one by an integer-only sub-allocator; every rank of the group makes the same
calls in the same order and so gets the same offset with no communication, and peers' pointers follow from it.

Freeing. The garbage collector drops tensors at other moments, and in another order, on each rank. So what is dropped
only goes into quarantine, and becomes free where all ranks meet anyway and each has it in quarantine
(:mod:`symmem.arena.reclaim`): where an arena would have to grow, at a rendezvous of the group, or at
:func:`symmem.collect`.

Divergence. A rolling hash of all that was allocated is compared whenever ranks meet. If it differs, the error names the
first allocation that does, and where in the program each rank made it; the arena cannot be used any more.

Contents. A carved tensor is not zeroed: its peers may have begun to store into it. Its signal pad is zero, for that
lies where only pads ever lie, and was zeroed when the ranks met last.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import sys
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import torch

from symmem.arena.allocation_log import AllocationRecord, RawRecord, nbytes_of
from symmem.arena.reclaim import Arenas, Meeting, compare
from symmem.arena.segment import GRANULE, GRANULE_BITS, SPARE, Carve, Segment, finish
from symmem.arena.slot_mask import masks_of, slots_of
from symmem.backends.base import Capability, tensor_at
from symmem.backends.libc import round_up
from symmem.errors import (
    DivergenceError,
    ForkedError,
    GroupError,
    InvalidArgumentError,
    MismatchError,
    OutOfMemoryError,
    PeerTimeoutError,
    ResourceLimitError,
    SymmemError,
    UnsupportedError,
    from_wire,
    to_wire,
)
from symmem.group.group import Collective, Group
from symmem.memory import cuda_graphs
from symmem.memory.call_site import NOWHERE, CallSite, internal
from symmem.memory.registry import register

if TYPE_CHECKING:
    from symmem.backends.base import Backend
    from symmem.memory.layout import Layout

__all__ = ["Arena", "arena_for", "carves"]

_EXTENT = 2 << 20  # segments are multiples of this, the granularity of GPU memory
_PADS_PART = 8  # one part in so many of the first segment, at most, is for signal pads of the arena's group
_TYPICAL = 1 << 16  # bytes of a tensor: so that there are pads for as many as may fit
_FEWEST_PADS = 16
_MORE_SLOTS = 64  # that are made at once
_SELDOM = 4096  # allocations between two meetings
_AT_ONCE = 256  # blocks that are freed while the ranks meet: half a millisecond
_MOST_STEPS = 64  # of growth; beyond, 1024 ** steps is more than a float can be
_SHOWN = 4096  # blocks of one event that are remembered
_HISTORY = 16384  # allocations and other events that are remembered: to name the first that differs, and for pictures


_arenas: WeakSet[Arena] = WeakSet()


class Arena:
    """Symmetric memory of one group, backend and device.

    Allocating in it is not collective, unless it must grow. All ranks of the group must allocate the same in the same
    order.

    Args:
        group: Whose ranks share it.
        backend: Which makes the memory.
        device: Where it lies.

    Attributes:
        segments: In the order in which it grew.
        count: Allocations so far.
        digest: Rolling hash of them.
        history: The last ones.
        drops: The last ones that were dropped: when, which, bytes; see :meth:`note`.
        reclaims: Those that came free last: when, which; the same.
        changes: What happened last to segments: when, what, which, bytes.
        marks: By slot, whether its block was dropped; see :mod:`symmem.arena.slot_mask`.
        dropped: As ``drops``, what was not looked at yet.
        agreed: Mask of the slots that came free and are not entered into the books yet; with their ``agreed_bytes``.
        live_bytes: Of blocks that are neither in quarantine, which has ``quarantined_blocks``, nor free.
        peak_bytes: The most that ``live_bytes`` ever was.
        process: Where it was made.
    """

    def __init__(self, group: Group, backend: Backend, device: torch.device) -> None:
        self.group, self.backend, self.device = group, backend, device
        self.segments: list[Segment] = []
        self.count, self.digest = 0, 0
        self.history: deque[RawRecord] = deque(maxlen=_HISTORY)
        self.drops: deque[tuple[float, RawRecord, int]] = deque(maxlen=_HISTORY)
        self.reclaims: deque[tuple[float, RawRecord]] = deque(maxlen=_HISTORY)
        self.changes: deque[tuple[float, str, int, int]] = deque(maxlen=_HISTORY)
        # Reclaimed: when, mask; or dropped at once.
        self._unnoted: list[tuple[float, int] | list[tuple[float, RawRecord, int]]] = []
        self.marks = bytearray()
        self.dropped: list[tuple[float, RawRecord, int]] = []
        self.agreed = self.agreed_bytes = 0
        self.live_bytes = self.peak_bytes = self.quarantined_bytes = self.quarantined_blocks = 0
        self.reclaimed_blocks = self.collections = self.growths = 0
        self._broken: SymmemError | None = None
        self.entries: list[RawRecord | None] = []  # by slot
        self.blocks: list[ref[Carve] | None] = []  # by slot
        # By slot, of what was dropped: further groups and this rank's pads for them.
        self.further: dict[int, list[tuple[ref[Group], int]]] = {}
        self._free_slots: list[int] = []
        self._pad = round_up(backend.pad_nbytes(group.size), GRANULE)
        self._pads: list[tuple[int, Segment, int]] = []  # from which slot on, where
        self._slots = 0 if self._pad else sys.maxsize  # as many as have pads
        self._short_at = -_SELDOM  # the allocation for which they did not suffice last
        self._each = group.settings.allocation_check == "each"
        self._unusual = self._each  # or broken, or in a forked child
        self.amid = False  # a change that must be done as a whole
        self.lock = threading.RLock()
        self.process = os.getpid()
        _arenas.add(self)

    def carve(self, layout: Layout, name: str | None, frame: FrameType | None) -> Carve:
        """A block for a tensor. Collective over the group if it must grow, or where each allocation is checked.

        Args:
            layout: Of the tensor.
            name: What the ranks call it.
            frame: Who asked for it; the first one from here outwards that is not of symmem is noted as the call site.

        Raises:
            DivergenceError: The ranks' allocations differ; on all ranks.
            OutOfMemoryError, ResourceLimitError: It cannot grow: on some rank there is no memory; it would pass
                ``arena_limit``. On all ranks.
            UnsupportedError: It must grow amid the capture of a CUDA graph.
        """
        # The warm path, whose budget is 3 us: hence plain tuples, and no helpers; it begins as `caller` does.
        while frame is not None and internal[frame.f_globals.get("__name__", "")]:
            frame = frame.f_back
        code, instruction = (frame.f_code, frame.f_lasti) if frame is not None else NOWHERE
        nbytes = layout.nbytes
        size = nbytes + GRANULE - 1 & -GRANULE or GRANULE
        with self.lock:
            if self.dropped:
                if len(self.dropped) == 1:
                    note = self.dropped.pop()
                    gone = note[2]
                    self.live_bytes -= gone
                    self.quarantined_bytes += gone
                    self.quarantined_blocks += 1
                    self.drops.append(note)
                else:
                    self.look()
            label = 0 if name is None else _label(name)
            if self._unusual or self.amid:
                self._check(self._proposed(size, layout, (code, instruction), name))
            self.amid = True
            if not self._free_slots:
                self._add_slots(self._proposed(size, layout, (code, instruction), name))
            for segment in self.segments:
                offset = segment.space.allocate(size)
                if offset is not None:
                    break
            else:
                if self.agreed:
                    self.absorb()
                self.amid = False
                self._make_room(self._proposed(size, layout, (code, instruction), name))
                self.amid = True
                segment, offset = self._take(size)
            slot = self._free_slots.pop()
            self.count += 1
            # Where it is as well: so ranks whose books differ are told, whatever the reason.
            self.digest = digest = hash((self.digest, layout.fingerprint, label, segment.index, offset, slot))
            entry = (self.count, digest, perf_counter(), segment.index, offset, size, layout, code, instruction, name)
            self.entries[slot] = entry
            self.history.append(entry)
            carve = Carve(self, segment, slot, offset, nbytes, layout, entry)
            self.blocks[slot] = ref(carve)
            segment.slots[offset] = slot
            segment.starts.add(offset >> GRANULE_BITS)
            self.live_bytes = live = self.live_bytes + size
            if live > self.peak_bytes:
                self.peak_bytes = live
            self.amid = False
            return carve

    def _proposed(self, size: int, layout: Layout, site: tuple[CodeType, int], name: str | None) -> AllocationRecord:
        """The next allocation, before it is known where it will be."""
        digest = hash((self.digest, layout.fingerprint, 0 if name is None else _label(name)))
        return AllocationRecord(self.count + 1, digest, 0.0, 0, 0, size, layout, CallSite(*site), name)

    def records(self) -> list[AllocationRecord]:
        """The last allocations, in order."""
        return [AllocationRecord.of(entry) for entry in self.history]

    def look(self) -> None:
        """Take note of what was dropped. Local."""
        number = len(self.dropped)  # more may come meanwhile
        if not number:
            return
        batch = self.dropped[:number]
        del self.dropped[:number]
        total = sum(map(operator.itemgetter(2), batch))
        self.live_bytes -= total
        self.quarantined_bytes += total
        self.quarantined_blocks += number
        self._unnoted.append(batch)

    def quarantine(self) -> tuple[int, int]:
        """Masks of the slots in quarantine, and of those among them that have signalled; all of them are noted."""
        dropped, signalled = masks_of(self.marks)
        self.look()  # afterwards: what is marked was entered into `dropped` before
        return dropped & ~self.agreed, signalled & ~self.agreed

    def _entries_of(self, slots: Sequence[int]) -> list[RawRecord]:
        """Those of slots that are in use."""
        entries: list[Any] = list(map(self.entries.__getitem__, slots))
        return entries

    def note(self) -> None:
        """Enter into ``drops`` and ``reclaims`` what was dropped or came free at once.

        It can wait until the slots are used again, so that the ranks need not wait for it.
        """
        for each in self._unnoted:
            if isinstance(each, list):
                self.drops += each
            else:
                when, agreed = each
                self.reclaims += zip(itertools.repeat(when), self._entries_of(slots_of(agreed)[-_SHOWN:]), strict=False)
        self._unnoted.clear()

    # Growing.

    def _take(self, size: int) -> tuple[Segment, int]:
        """A block, where room was made."""
        for segment in self.segments:
            if (offset := segment.space.allocate(size)) is not None:
                return segment, offset
        self.check_whole("allocate")  # a finalizer has taken it
        raise AssertionError

    @contextlib.contextmanager
    def _collective(self, operation: str, proposed: AllocationRecord) -> Iterator[Collective]:
        """A collective operation that is needed for an allocation; if the others do something else, says for which."""
        try:
            with self.group.collective(operation) as collective:
                cuda_graphs.refuse(self.device, "an arena cannot grow")
                yield collective
        except (MismatchError, PeerTimeoutError) as error:
            if not isinstance(error, DivergenceError):
                error.hint = (
                    f"{error.hint}. Rank {self.group.rank} came here since the arena of {self.backend.name!r} had no "
                    f"room for allocation {proposed.number}: {proposed}"
                )
            raise

    def _reclaim(self, proposed: AllocationRecord) -> None:
        with Meeting([self]) as meeting:
            with self._collective("allocate", proposed) as collective:
                meeting.hold(collective)
            meeting.settle()
        self.amid = True
        self.absorb()
        self.amid = False

    def _make_room(self, proposed: AllocationRecord) -> None:
        """Reclaim what all ranks have dropped, if there is no room; if that is not enough, grow. Collective."""
        size = proposed.nbytes
        if self.segments and not self._has_room(size):
            self._reclaim(proposed)
        if not self._has_room(size):
            self._grow(proposed)

    def _has_room(self, size: int) -> bool:
        return any(segment.space.largest_free >= size for segment in self.segments)

    def _grow(self, proposed: AllocationRecord) -> None:
        settings, first, size = self.group.settings, not self.segments, proposed.nbytes
        pads = _FEWEST_PADS * self._pad if first else 0
        least = round_up((size + pads) * SPARE // (SPARE - 1) + 2 * GRANULE, _EXTENT)
        steps = len(self.segments) - len(self._pads[1:])  # those for pads alone are no steps
        factor = settings.arena_growth ** min(steps, _MOST_STEPS)
        wished = round_up(int(settings.arena_size * factor), _EXTENT)
        nbytes = max(least, min(wished, self._left(least, size) & -_EXTENT))
        try:
            segment = self._add_segment(nbytes, proposed)
        except OutOfMemoryError as error:  # on all ranks
            if nbytes == least:
                raise
            _let_go(error)
            segment = self._add_segment(least, proposed)
        if first and self._pad:
            # The first pads come along, so that the ranks meet once.
            room = (segment.space.capacity - size) // self._pad
            most = min(segment.nbytes // _PADS_PART // self._pad, segment.nbytes // _TYPICAL, room)
            count = max(_FEWEST_PADS, most)
            offset = segment.space.allocate(count * self._pad)
            assert offset is not None
            self._enter_pads(segment, offset, count)

    def _left(self, least: int, size: int) -> int:
        """Bytes that may still be added.

        Raises:
            ResourceLimitError: Less than ``least``, which ``size`` bytes of tensors need. On all ranks, whose limits
                may differ.
        """
        limit = self.group.settings.arena_limit
        reserved = sum(segment.nbytes for segment in self.segments)
        if reserved + least <= limit:
            return limit - reserved
        error = ResourceLimitError(
            f"{size} bytes do not fit into the arena of {self.backend.name!r}: it has {reserved} bytes, "
            f"{self.live_bytes} of them live and {self.quarantined_bytes} in quarantine, and must not pass "
            f"arena_limit, {limit} bytes",
            hint="free tensors, raise arena_limit, or allocate with arena=False",
            rank=self.group.rank,
            group=self.group.name,
            step="allocate",
        )
        with self.group.collective("grow an arena"):
            raise error

    def _add_slots(self, proposed: AllocationRecord) -> None:
        """Let there be a free slot, where there was none. Collective if there are no more signal pads."""
        first = len(self.entries)
        if first == self._slots:
            if self.agreed:
                self.absorb()
            self.amid = False
            if self.segments:
                self._add_pads(proposed)
            else:
                self._grow(proposed)  # pads come along
            self.amid = True
        if not self._free_slots:
            more = min(_MORE_SLOTS, self._slots - first)
            self.entries += [None] * more
            self.blocks += [None] * more
            self.marks += bytes(more)
            self._free_slots += range(first + more - 1, first - 1, -1)

    def _add_pads(self, proposed: AllocationRecord) -> None:
        """Let the arena have twice as many tensors, for each of which it needs a signal pad. Collective.

        Unless so many can be reclaimed that the ranks will not soon meet again for this, or pads would take more memory
        than tensors; or some can be, and there is no memory for more.
        """
        if not self._free_slots:
            self._reclaim(proposed)
        seldom = self.count - self._short_at >= _SELDOM
        self._short_at = self.count
        reserved = sum(segment.nbytes for segment in self.segments)
        enough = 4 * len(self._free_slots) > self._slots
        if enough and (seldom or 4 * self._slots * self._pad > reserved):
            return
        least = round_up(self._slots * self._pad * SPARE // (SPARE - 1) + 2 * GRANULE, _EXTENT)
        try:
            self._left(least, self._slots * self._pad)
            segment = self._add_segment(least, proposed)
        except (OutOfMemoryError, ResourceLimitError) as error:  # on all ranks
            if not self._free_slots:
                raise
            _let_go(error)
            return  # those that were reclaimed are enough for now
        offset = segment.space.allocate(self._slots * self._pad)
        assert offset is not None
        self._enter_pads(segment, offset, self._slots)

    def _enter_pads(self, segment: Segment, offset: int, count: int) -> None:
        self._pads.append((self._slots, segment, offset))
        self._slots += count

    def pad_of(self, slot: int) -> tuple[Segment, int]:
        """Where the signal pad of a slot lies: the segment, and the offset in it.

        Memory for pads is never used for anything else: a pad must be zero on all ranks before any of them signals,
        and a tensor is handed out with nobody knowing what its peers do.
        """
        first, segment, offset = next(pads for pads in reversed(self._pads) if pads[0] <= slot)
        return segment, offset + (slot - first) * self._pad

    def _add_segment(self, nbytes: int, proposed: AllocationRecord) -> Segment:
        backend, group = self.backend, self.group
        together = Capability.COLLECTIVE_ALLOCATION in backend.capabilities
        allocation = None
        if together:
            cuda_graphs.refuse(self.device, "an arena cannot grow")
            allocation = backend.allocate(nbytes, self.device, group)
        with self._collective("grow an arena", proposed) as collective:
            compare(self, collective, proposed, nbytes)
            if allocation is None:
                allocation = backend.allocate(nbytes, self.device, group)
            mapping = backend.rendezvous(allocation, collective)
            mapping.serial = collective.serial
        index = self.growths
        segment = Segment(index, allocation, group, mapping, self.blocks)
        self.growths += 1
        self.segments.append(segment)
        register(segment)
        self.changes.append((perf_counter(), "grow", index, nbytes))
        return segment

    # Meeting; see symmem.arena.reclaim.

    def reclaim(self, agreed: int) -> int:
        """Make a mask of blocks free that all ranks have in quarantine; the same on all. Returns bytes.

        Many are only noted, so that the ranks do not wait for each other meanwhile. They are entered into the books
        when there is no other room, before the arena would grow: see :meth:`absorb`.
        """
        number, total = agreed.bit_count(), self.quarantined_bytes
        if number != self.quarantined_blocks:
            total = sum(map(nbytes_of, self._entries_of(slots_of(agreed))))
        if agreed:  # else a program that only ever meets would add to what is remembered for ever
            self._unnoted.append((perf_counter(), agreed))
        self.digest = hash((self.digest, number, agreed))
        self.quarantined_bytes -= total
        self.quarantined_blocks -= number
        self.agreed |= agreed
        self.agreed_bytes += total
        self.reclaimed_blocks += number
        self.collections += 1
        if self.agreed.bit_count() <= _AT_ONCE:
            self.absorb()
        return total

    def absorb(self) -> None:
        """Enter what came free into the books; at the same point of the sequence on all ranks."""
        self.note()
        by_index: dict[int, tuple[Segment, list[int]]] = {segment.index: (segment, []) for segment in self.segments}
        slots = slots_of(self.agreed)
        for slot, entry in zip(slots, self._entries_of(slots), strict=True):
            index, offset = entry[3], entry[4]
            segment, offsets = by_index[index]
            offsets.append(offset)
            del segment.slots[offset]
            self.entries[slot] = self.blocks[slot] = None
            self.marks[slot] = 0
            if pads := self.further.pop(slot, None):
                segment.free_pads([pad for _, pad in pads])
        for segment, offsets in by_index.values():
            segment.space.free_many(offsets)
            segment.tidy()
        self._free_slots += reversed(slots)
        self.agreed = self.agreed_bytes = 0

    def dropped_pads(self, group: Group) -> list[int]:
        """Slots of what this rank has dropped, whose signal pads for a further group are still taken."""
        further = list(self.further.items())
        return sorted(slot for slot, pads in further if any(known() is group for known, _ in pads))

    def free_pads(self, slots: Sequence[int], group: Group) -> None:
        """Free this rank's pads for a further group, all of whose ranks have dropped the tensors."""
        with self.lock:
            by_index = {segment.index: segment for segment in self.segments}
            for slot, entry in zip(slots, self._entries_of(slots), strict=True):
                mine = [pad for known, pad in self.further[slot] if known() is group]
                by_index[entry[3]].free_pads(mine)
                self.further[slot] = [(known, pad) for known, pad in self.further[slot] if known() is not group]

    def trim(self) -> int:
        """Give up segments in which nothing lives; the same on all ranks. Returns bytes."""
        self.absorb()
        empty = [segment for segment in self.segments if not segment.space.used]  # what holds pads is not
        for segment in empty:
            self.segments.remove(segment)
            self.changes.append((perf_counter(), "trim", segment.index, segment.nbytes))
        return sum(segment.nbytes for segment in empty)

    def clean_pads(self, slots: Sequence[int]) -> None:
        """Zero this rank's signal pads of slots, before anybody can use them again."""
        for slot in slots:
            segment, offset = self.pad_of(slot)
            tensor_at(segment.pointer + offset, self._pad, self.device, segment).zero_()
        if slots:
            finish(self.device)

    def check_whole(self, step: str) -> None:
        """Raise if a change is under way.

        Raises:
            GroupError: It is, on this very thread, which now runs a finalizer or a signal handler; or an exception out
                of one has ended it half-way, and this rank's book of the arena is no longer that of the others.
        """
        if self.amid:
            raise GroupError(
                f"{step!r} was begun amid another allocation or collection of the same arena, or after one that an "
                "exception out of a signal handler had ended half-way",
                hint="neither allocate nor collect in a finalizer, a signal handler or another callback; if a signal "
                "handler raised, the arena cannot be used any more: make a new group, or allocate with arena=False",
                rank=self.group.rank,
                group=self.group.name,
                step=step,
            )

    def _check(self, proposed: AllocationRecord) -> None:
        if self.process != os.getpid():
            raise ForkedError(
                "this process was forked after the arena was made: its memory is the parent's, who goes on using it",
                hint="make a group in the child, or start workers with the 'spawn' method",
                group=self.group.name,
                step="allocate",
            )
        self.check_whole("allocate")
        if self._broken:
            raise DivergenceError(
                f"this arena cannot be used since its ranks diverged: {self._broken.what}",
                hint=self._broken.hint,
                rank=self.group.rank,
                group=self.group.name,
                step="allocate",
                peers=self._broken.peers,
            )
        if self._each:
            with self.group.collective("check an allocation") as collective:
                compare(self, collective, proposed, proposed.nbytes, sites=True)

    def break_down(self, error: DivergenceError) -> DivergenceError:
        """Let every further allocation fail; returns the error."""
        # A copy: with its traceback it would hold frames, and what those hold, for as long as the arena lives.
        self._broken, self._unusual = from_wire(to_wire(error)), True
        return error


def _let_go(error: BaseException | None) -> None:
    """Let go of the frames that an error holds which was dealt with, and with them of the block that comes next.

    They hold the error as well, so that the block would be dropped only when the collector runs.
    """
    if error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        _let_go(error.__cause__)
        _let_go(error.__context__)


def _label(name: str) -> int:
    try:
        return zlib.crc32(name.encode())
    except (AttributeError, UnicodeError) as error:
        raise InvalidArgumentError(f"name must be text, not {name!r}") from error


def _mark_in_child() -> None:
    """In a forked child: nobody may allocate here, nor wait for a thread that held the lock at the fork."""
    for arena in list(_arenas):
        arena.lock, arena._unusual = threading.RLock(), True


os.register_at_fork(after_in_child=_mark_in_child)


def carves(backend: Backend) -> bool:
    """Whether arenas can hold a backend's memory: where it has signals, each tensor needs a pad of its own."""
    return Capability.SIGNALS not in backend.capabilities or backend.pad_nbytes(2) > 0


def arena_for(group: Group, backend: Backend, device: torch.device) -> Arena:
    """The arena of a group, backend and device; made when it is first asked for. Local.

    Raises:
        UnsupportedError: The backend's signals cannot work in an arena.
    """
    arenas = group.extension(Arenas)
    known = arenas.get((backend.name, device))
    if known is None:
        if not carves(backend):
            raise UnsupportedError(
                f"the backend {backend.name!r} cannot be used with an arena: its signals work at one place only",
                hint="allocate with arena=False",
                rank=group.rank,
                group=group.name,
                step="allocate",
            )
        known = arenas.setdefault((backend.name, device), Arena(group, backend, device))
    return known
