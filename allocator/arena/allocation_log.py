"""The allocation log of an arena: the state that ranks keep equal without communication.

Every rank makes the same calls in the same order on its own log. An allocation adds a record, and the digest, a rolling
hash, covers all records. The ranks compare the digests whenever they communicate. Equal digests mean equal segments,
slots, offsets and free memory.

A slot is the number of a live block, and of its signal pad. A reclaim round makes the slots of dropped blocks free
again.

A few fields describe this rank alone: the blocks that it has dropped, its statistics of live and quarantined bytes, and
its signal pads for further groups.
"""

from __future__ import annotations

import itertools
import logging
import operator
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakSet, ref

import torch

from symmem.arena.segment import GRANULE, Segment, SignalPads
from symmem.arena.slot_mask import masks_of, slots_of
from symmem.backends.base import Capability
from symmem.backends.libc import round_up
from symmem.errors import (
    DivergenceError,
    ForkedError,
    GroupError,
    InvalidArgumentError,
    SymmemError,
    from_wire,
    to_wire,
)
from symmem.group.call_site import NOWHERE, CallSite, caller, outside
from symmem.memory.layout import Layout
from symmem.memory.registry import register

if TYPE_CHECKING:
    from symmem.backends.base import Allocation, Backend, Mapping
    from symmem.group.group import Group
    from symmem.group.ledger import ActSequence
    from symmem.memory.block import Block

logger = logging.getLogger("symmem.arena")

__all__ = ["AllocationLog", "AllocationRecord", "RawRecord", "hash_of_name"]

_ABSORBED_AT_ONCE = 256  # blocks that a reclaim round frees itself, in half a millisecond
_SHOWN = 4096  # blocks of one reclaim round that the events show
_HISTORY = 16384  # allocations, and other events, that the log remembers
_NO_MEMORY = Layout.make(0, torch.uint8, None)  # of an entry

Described: TypeAlias = tuple[int, int, CodeType, int, CodeType]
"""How the ledger describes the allocations of two lines: their part of the digest, the id of the text, the code object
and instruction of the call site, and the code object of its caller, which the key names by its id."""

RawRecord: TypeAlias = tuple[int, int, float, int, int, int, Layout, CodeType, int, "str | None"]
"""The fields of an :class:`AllocationRecord` as a plain tuple, because that is faster to make."""

_nbytes_of: Callable[[RawRecord], int] = operator.itemgetter(5)

_logs: WeakSet[AllocationLog] = WeakSet()


class AllocationRecord(NamedTuple):
    """One allocation from an arena. The records of all ranks are equal, except for the time and the call site.

    With 0 bytes, it is another act that all ranks must make alike: the entry into a block called ``name``.
    """

    number: int
    digest: int
    time: float
    segment: int
    offset: int
    nbytes: int
    layout: Layout
    site: CallSite
    name: str | None

    @classmethod
    def of(cls, raw: RawRecord) -> AllocationRecord:
        """Make a record from its fields."""
        return cls(*raw[:7], CallSite(*raw[7:9]), raw[9])

    def __str__(self) -> str:
        if not self.nbytes:
            return f"the entry into {self.name}, at {self.site}"
        layout, named = self.layout, f" named {self.name!r}" if self.name else ""
        usual = layout.strides == Layout.make(layout.sizes, layout.dtype, None).strides
        strides = "" if usual else f" with strides {list(layout.strides)}"
        return f"{list(layout.sizes)} of {layout.dtype}{strides}{named}, {self.nbytes} bytes, at {self.site}"


class AllocationLog:
    """The log of one arena on one rank. Its methods are local; callers hold :attr:`lock`.

    Args:
        group: The group of the arena.
        backend: The backend that makes the memory.
        device: The device of the memory.

    Attributes:
        process: The process that made the log; a forked child must not use it.
        lock: Protects everything here. A reclaim round holds it as long as it takes.
        in_transaction: True while a change is half done. See :meth:`check_idle`.
        restricted: True if an allocation must call :meth:`check_usable` first.
        divergence: The error with which the ranks have diverged. Every rank raises it once, or has raised it.
        noted: Whether this rank has logged a divergence that it has not raised yet.
        born: The number of the group's round in which the ranks met for the first segment; 0 before.
        predecessor: The log that all ranks had before a divergence, until this one has a segment.
        usable: After a divergence, the last allocation that all ranks have made alike; 0 until they have met again.
        segments: In the order in which the arena grew.
        pads: The signal pads of the slots.
        count: Number of allocations and entries so far; see :meth:`enter`.
        entries: Number of entries so far.
        digest: Rolling hash of all allocations, entries and reclaim rounds.
        history: The most recent allocations.
        records: Record by slot; None for a free slot.
        blocks: Block by slot; a dead reference in quarantine.
        free_slots: The last one is used first.
        slot_marks: By slot, whether the block was dropped. See :mod:`symmem.arena.slot_mask`.
        further_pads: By slot of a dropped block, its further groups and this rank's pads for them.
        dropped: Dropped blocks that are not counted yet: time, record, bytes. See :meth:`count_drops`.
        agreed: Mask of the slots that reclaim rounds have freed, but :meth:`absorb` has not processed yet.
        agreed_bytes: Bytes of the ``agreed`` slots.
        drops: The most recent drops: time, record, bytes. See :meth:`flush_events`.
        reclaims: The most recently reclaimed blocks: time, record. See :meth:`flush_events`.
        changes: The most recent changes of segments: time, "grow" or "trim", index, bytes, address.
        acts: The allocations as acts of the group's ledger; None if they are compared only when the ranks meet.
        live_bytes: Bytes of blocks that are neither free nor in quarantine.
        peak_bytes: The maximum of ``live_bytes`` so far.
        quarantined_bytes: Bytes of ``quarantined_blocks``, the blocks in quarantine.
        reclaimed_blocks: Number of blocks that ``collections`` reclaim rounds have freed.
        growths: Number of segments that were added.
    """

    # Slots, because an instance with more than 30 attributes is otherwise slower on the warm path of an allocation.
    __slots__ = (
        "__weakref__",
        "_pending",
        "acts",
        "agreed",
        "agreed_bytes",
        "backend",
        "blocks",
        "born",
        "changes",
        "collections",
        "count",
        "device",
        "digest",
        "divergence",
        "dropped",
        "drops",
        "entries",
        "free_slots",
        "further_pads",
        "group",
        "growths",
        "history",
        "in_transaction",
        "live_bytes",
        "lock",
        "noted",
        "pads",
        "peak_bytes",
        "predecessor",
        "process",
        "quarantined_blocks",
        "quarantined_bytes",
        "reclaimed_blocks",
        "reclaims",
        "records",
        "restricted",
        "segments",
        "slot_marks",
        "usable",
    )

    def __init__(self, group: Group, backend: Backend, device: torch.device) -> None:
        self.group, self.backend, self.device = group, backend, device
        self.process = os.getpid()
        self.lock = threading.RLock()
        self.in_transaction = self.restricted = self.noted = False
        self.divergence: DivergenceError | None = None
        self.usable = self.born = 0
        self.predecessor: AllocationLog | None = None
        self.segments: list[Segment] = []
        self.acts: ActSequence | None = None
        self.pads = SignalPads(backend.pad_nbytes(group.size), device)
        self.count = self.entries = self.digest = 0
        self.history: deque[RawRecord] = deque(maxlen=_HISTORY)
        self.records: list[RawRecord | None] = []
        self.blocks: list[ref[Block] | None] = []
        self.free_slots: list[int] = []
        self.slot_marks = bytearray()
        self.further_pads: dict[int, list[tuple[ref[Group], int]]] = {}
        self.dropped: list[tuple[float, RawRecord, int]] = []
        self.agreed = self.agreed_bytes = 0
        self.drops: deque[tuple[float, RawRecord, int]] = deque(maxlen=_HISTORY)
        self.reclaims: deque[tuple[float, RawRecord]] = deque(maxlen=_HISTORY)
        self.changes: deque[tuple[float, str, int, int, int]] = deque(maxlen=_HISTORY)
        # Events that are not in `drops` and `reclaims` yet: a batch of drops, or time and mask of a reclaim round.
        self._pending: list[tuple[float, int] | list[tuple[float, RawRecord, int]]] = []
        self.live_bytes = self.peak_bytes = self.quarantined_bytes = self.quarantined_blocks = 0
        self.reclaimed_blocks = self.collections = self.growths = 0
        _logs.add(self)

    @property
    def kind(self) -> str:
        """The backend and the type of the device; the same on all ranks."""
        return f"{self.backend.name} on {self.device.type}"

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self.segments)

    # Allocations.

    def proposal(self, size: int, layout: Layout, site: CallSite, name: str | None) -> AllocationRecord:
        """The record of the next allocation, before its segment and offset are known."""
        digest = hash((self.digest, layout.fingerprint, 0 if name is None else hash_of_name(name)))
        return AllocationRecord(self.count + 1, digest, 0.0, 0, 0, size, layout, site, name)

    def describe(self, layout: Layout, name: str | None, frame: FrameType | None) -> Described:
        """Describe an allocation for the ledger, by the frame that calls symmem. The result is remembered.

        All ranks must allocate from the same two lines: the one that calls symmem, and the one that calls its function.
        The lines count by file name, function and number, because folders differ between hosts and containers. Code
        that Inductor has generated counts by its function, because its lines depend on the rank. A name counts instead
        of the lines.
        """
        code, instruction = (frame.f_code, frame.f_lasti) if frame is not None else NOWHERE
        outer = frame and frame.f_back
        outer_code, outer_instruction = (outer.f_code, outer.f_lasti) if outer is not None else (code, instruction)
        key = name, layout.fingerprint, id(code), instruction, id(outer_code), outer_instruction
        assert self.acts is not None
        known: Described | None = self.acts.known.get(key)
        if known is not None:
            return known
        sites = [CallSite(code, instruction)]
        if outer is not None:
            sites.append(CallSite(outer_code, outer_instruction))
        nbytes = 0 if layout is _NO_MEMORY else round_up(layout.nbytes, GRANULE) or GRANULE
        text = str(AllocationRecord(0, 0, 0.0, 0, 0, nbytes, layout, sites[0], name))
        text += "".join(f", called at {site}" for site in sites[1:])
        part = hash_of_name("".join(map(_portable, sites)) if name is None else name)
        known = self.acts.known[key] = part, self.acts.add_text(text), code, instruction, outer_code
        return known

    def enter(self, block: str, frame: FrameType | None) -> None:
        """Compare the entry into a block of the program, such as ``use_symmetric_memory``, as if it allocated. Local.

        Raises:
            DivergenceError: The ranks have allocated differently.
            ForkedError, GroupError: See :meth:`check_usable`.
        """
        frame = outside(frame)
        with self.lock:
            if self.restricted or self.in_transaction:
                self.check_usable()
            self.in_transaction = True
            try:
                self.count += 1
                self.entries += 1
                self.digest = hash((self.digest, hash_of_name(block)))
                if self.acts is not None:
                    text_id = self.describe(_NO_MEMORY, block, frame)[1]
                    if self.acts.enter(self.count, self.digest, text_id):
                        self.compare_acts(self.count, is_use=False)
                self.history.append(
                    (self.count, self.digest, perf_counter(), 0, 0, 0, _NO_MEMORY, *caller(frame), block)
                )
            except BaseException as error:
                self.stop_if_half_done("an entry", error)
                raise
            self.in_transaction = False

    def has_diverged(self, number: int) -> bool:
        """Whether the block of an allocation cannot be used, because a rank has found a divergence. Local."""
        if self.divergence is not None:
            return number > self.usable
        return self.acts is not None and self.acts.is_found

    def compare_acts(
        self,
        number: int,
        late: Sequence[int] = (),
        is_use: bool = True,
        access: Sequence[int] = (),
        in_operator: bool = False,
    ) -> None:
        """Compare the allocations with the neighbours' in the ledger. Local.

        Args:
            number: The allocation.
            late: See :meth:`ActSequence.compare_counts`.
            is_use: Whether peers' memory is about to be used. If not, a difference is only logged. So all ranks raise
                it at the use that they make together, and none of them waits in another library for one that has raised
                in an allocation. Once a rank has raised it, allocations raise too, because the next one of that rank
                waits for the others. So they do if a rank has a view of this rank's memory already. A use is too late
                for a library's kernels that reach peers by this rank's own address: with ``COLLECTIVE_ALLOCATION``, the
                allocation raises.
            access: The ranks with memory that this rank is about to use.
            in_operator: Whether an operator raises. Then the others' allocations need not raise: the operator fails on
                all ranks, and all must call it to stay in step.

        Raises:
            DivergenceError: They differ, or have differed before.
        """
        with self.lock:
            if self.divergence is not None:
                if number > self.usable:
                    self.check_usable()
            elif self.acts is not None:
                is_use |= Capability.COLLECTIVE_ALLOCATION in self.backend.capabilities or self.acts.is_raised
                if self.noted and not is_use:
                    return
                try:
                    self.acts.look(self.count)
                    self.acts.rely_on(number, access, self.count)
                    self.acts.compare_counts(self.count, late)
                except DivergenceError as error:
                    if not self.noted:
                        self.group.fail("allocate", error)  # a collective in which another rank waits fails with it
                    if not is_use and not self.acts.is_relied_on:
                        self.noted = True
                        logger.warning("%s\n  This is raised where peers' memory is used next.", error)
                        return
                    self.in_transaction = False
                    if not in_operator:
                        self.acts.note_raised()
                    self.invalidate(error)
                    error.propagated_to = self.group.name
                    raise error from None

    def recent(self) -> list[AllocationRecord]:
        """The most recent allocations, in order."""
        return [AllocationRecord.of(raw) for raw in self.history]

    def add_slots(self, number: int) -> None:
        """Add free slots."""
        first = len(self.records)
        self.records += [None] * number
        self.blocks += [None] * number
        self.slot_marks += bytes(number)
        self.free_slots += range(first + number - 1, first - 1, -1)

    def add_segment(self, allocation: Allocation, mapping: Mapping) -> Segment:
        """Add a segment; returns it."""
        segment = Segment(self.growths, allocation, self.group, mapping, self.blocks)
        self.born = self.born or mapping.serial
        self.growths += 1
        self.segments.append(segment)
        self.predecessor = None
        register(segment)
        self.changes.append((perf_counter(), "grow", segment.index, segment.nbytes, segment.pointer))
        return segment

    # Dropped blocks.

    def count_drops(self) -> None:
        """Move the blocks in ``dropped`` from the live ones to the quarantined ones."""
        number = len(self.dropped)  # the collector may add more meanwhile
        if not number:
            return
        batch = self.dropped[:number]
        del self.dropped[:number]
        total = sum(map(operator.itemgetter(2), batch))
        self.live_bytes -= total
        self.quarantined_bytes += total
        self.quarantined_blocks += number
        self._pending.append(batch)

    def quarantine(self) -> tuple[int, int]:
        """Masks of the slots in quarantine, and of those that have also signalled. All of them are counted."""
        dropped, signalled = masks_of(self.slot_marks)
        self.count_drops()  # after reading the marks, because a block enters `dropped` before it is marked
        return dropped & ~self.agreed, signalled & ~self.agreed

    def reclaim(self, agreed: int) -> int:
        """Free the slots of a mask that all ranks have in quarantine. The mask is the same on all ranks.

        If there are many, this only notes them, so that no rank waits for another meanwhile. They are freed when the
        arena has no other room, before it would grow; see :meth:`absorb`.

        Returns:
            Bytes freed.
        """
        number, total = agreed.bit_count(), self.quarantined_bytes
        if number != self.quarantined_blocks:
            total = sum(map(_nbytes_of, self._used(slots_of(agreed))))
        if agreed:  # otherwise a program that only collects would add events forever
            self._pending.append((perf_counter(), agreed))
        self.digest = hash((self.digest, number, agreed))
        self.quarantined_bytes -= total
        self.quarantined_blocks -= number
        self.agreed |= agreed
        self.agreed_bytes += total
        self.reclaimed_blocks += number
        self.collections += 1
        if self.agreed.bit_count() <= _ABSORBED_AT_ONCE:
            self.absorb()
        return total

    def absorb(self) -> None:
        """Free the memory and the slots in ``agreed``. All ranks do this at the same point of the sequence."""
        self.flush_events()
        by_index: dict[int, tuple[Segment, list[int]]] = {segment.index: (segment, []) for segment in self.segments}
        slots = slots_of(self.agreed)
        for slot, record in zip(slots, self._used(slots), strict=True):
            index, offset = record[3], record[4]
            segment, offsets = by_index[index]
            offsets.append(offset)
            del segment.slots[offset]
            self.records[slot] = self.blocks[slot] = None
            self.slot_marks[slot] = 0
            if pads := self.further_pads.pop(slot, None):
                segment.free_pads([pad for _, pad in pads])
        for segment, offsets in by_index.values():
            segment.space.free_many(offsets)
            segment.tidy()
        self.free_slots += reversed(slots)
        self.agreed = self.agreed_bytes = 0

    def trim(self) -> None:
        """Remove segments without live blocks and signal pads. The same on all ranks."""
        self.absorb()
        for segment in [segment for segment in self.segments if not segment.space.used]:
            self.segments.remove(segment)
            self.changes.append((perf_counter(), "trim", segment.index, segment.nbytes, segment.pointer))

    def flush_events(self) -> None:
        """Move pending events to ``drops`` and ``reclaims``. It must happen before the slots are used again."""
        for event in self._pending:
            if isinstance(event, list):
                self.drops += event
            else:
                when, agreed = event
                self.reclaims += zip(itertools.repeat(when), self._used(slots_of(agreed)[-_SHOWN:]), strict=False)
        self._pending.clear()

    def _used(self, slots: Sequence[int]) -> list[RawRecord]:
        """The records of slots that are in use."""
        records: list[Any] = list(map(self.records.__getitem__, slots))
        return records

    # Signal pads of further groups. Every rank has its own.

    def dropped_pads(self, group: Group) -> list[int]:
        """Slots of blocks that this rank has dropped, but that still hold a signal pad for a further group."""
        further = list(self.further_pads.items())
        return sorted(slot for slot, pads in further if any(known() is group for known, _ in pads))

    def free_pads(self, slots: Sequence[int], group: Group) -> None:
        """Free this rank's pads for a further group, after all ranks of that group have dropped the tensors."""
        with self.lock:
            by_index = {segment.index: segment for segment in self.segments}
            for slot, record in zip(slots, self._used(slots), strict=True):
                pads = self.further_pads[slot]
                by_index[record[3]].free_pads([pad for known, pad in pads if known() is group])
                self.further_pads[slot] = [(known, pad) for known, pad in pads if known() is not group]

    # Refusals.

    def check_idle(self, step: str) -> None:
        """Raise if a change is in progress.

        Raises:
            GroupError: It is in progress on this thread, and this is a finalizer or a signal handler.
        """
        if self.in_transaction:
            raise GroupError(
                f"{step!r} began during another allocation or collection of the same arena",
                hint="do not allocate or collect in a finalizer, a signal handler or another callback",
                rank=self.group.rank,
                group=self.group.name,
                step=step,
            )

    def check_usable(self) -> None:
        """Raise if nothing can be allocated.

        Raises:
            ForkedError: This is a forked child.
            GroupError: See :meth:`check_idle`.
            DivergenceError: The ranks have diverged.
        """
        if self.process != os.getpid():
            raise ForkedError(
                "this process was forked after the arena was made, and the memory still belongs to the parent",
                hint="make a group in the child, or start workers with the 'spawn' method",
                group=self.group.name,
                step="allocate",
            )
        self.check_idle("allocate")
        if self.divergence is not None:
            error = DivergenceError(
                f"this memory cannot be used because the ranks have diverged: {self.divergence.what}",
                hint=f"allocate it again: the next allocation begins a new arena. To find the cause: "
                f"{self.divergence.hint}",
                rank=self.group.rank,
                group=self.group.name,
                step="allocate",
                peers=self.divergence.peers,
            )
            error.propagated_to = self.group.name
            raise error

    def stop_if_half_done(self, change: str, error: BaseException) -> None:
        """Tell all ranks of an exception that has stopped a change, unless all ranks have it or know of it."""
        if self.divergence is None and (self.in_transaction or not self.shares(error)):
            self.group.fail("allocate", self.stop(change, error))
            error.propagated_to = self.group.name  # type: ignore[attr-defined]  # an outer call must not report it again

    def shares(self, error: BaseException) -> bool:
        """Whether the other ranks fail too, or know of this error. They do not know of an exception of a handler."""
        return isinstance(error, SymmemError) or getattr(error, "propagated_to", None) == self.group.name

    def stop(self, change: str, error: BaseException) -> DivergenceError:
        """Let the arena begin again on all ranks, because an exception has stopped a change half-way on this rank.

        This log may differ from the other ranks' logs now.

        Returns:
            What the other ranks raise. The caller reports it to the group.
        """
        self.in_transaction = False
        reason = DivergenceError(
            f"rank {self.group.rank} stopped {change} half-way: {type(error).__name__}",
            hint="the next allocation begins a new arena; allocate again on all ranks what was allocated last",
            peers=(self.group.rank,),
            arena=self.kind,
        )
        reason.located(rank=self.group.rank, group=self.group.name, step="allocate")
        if self.acts is not None:
            self.acts.publish(reason)
            self.acts.note_raised()
        self.invalidate(reason)
        return reason

    def invalidate(self, error: DivergenceError) -> None:
        """Note that the ranks have diverged. All ranks raise this error."""
        # Keep a copy. The error itself has a traceback, and would keep its frames and their objects alive.
        copy = from_wire(to_wire(error))
        assert isinstance(copy, DivergenceError)
        self.divergence, self.restricted = copy, True


def _portable(site: CallSite) -> str:
    """A call site as it is on every rank."""
    folder, _, file = site.code.co_filename.rpartition("/")
    return f"{file}:{site.line}:{site.code.co_name};" if "torchinductor" not in folder else f"{site.code.co_name};"


def hash_of_name(name: str) -> int:
    """The part of a digest that stands for the name of an allocation.

    Raises:
        InvalidArgumentError: It is not text.
    """
    try:
        return zlib.crc32(name.encode())
    except (AttributeError, UnicodeError) as error:
        raise InvalidArgumentError(f"name must be text, not {name!r}") from error


def _restrict_child() -> None:
    """In a forked child, refuse allocations, and replace locks that a thread of the parent may have held."""
    for log in list(_logs):
        log.lock, log.restricted = threading.RLock(), True


os.register_at_fork(after_in_child=_restrict_child)
