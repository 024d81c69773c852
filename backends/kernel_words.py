"""Reports that kernels write to host memory, readable without the GPU: which of them wait, and why one stopped.

The host writes there too: if a process of a group ends, kernels that wait for the group are told to give up.

This module never calls CUDA: if the process hangs or a kernel has trapped, no call of CUDA is safe or gives a reason.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from symmem.backends.base import RankGroup
from symmem.backends.kernel_status import devices
from symmem.backends.pending_waits import Wait
from symmem.backends.signal_kernels import BAD_CHANNEL, BEAT, DIFFERS, GROUPS, LATE, OPERATIONS, PLACES, REFUSED, TICK
from symmem.errors import (
    InvalidArgumentError,
    MismatchError,
    PeerLostError,
    PeerTimeoutError,
    RendezvousError,
    ResourceLimitError,
    SymmemError,
)

__all__ = ["NBYTES", "KernelWords", "name_steps"]

_NBYTES = 16  # bytes of the status, and of a place
_RECORDS = _NBYTES * (1 + PLACES)  # offset of the records of groups
_RECORD = 32  # bytes of a record
NBYTES = _RECORDS + _RECORD * GROUPS
"""Bytes of the memory: the status, the places of waiting threads, then the records of groups."""

_UNFINISHED = "What they could not finish is NaN in reductions; in results that are only moved, all bits are 1"

_PERIOD = 2.2 * 2**BEAT / 1e9  # seconds within which a waiting thread reports again

_steps: dict[int, str] = {}


def name_steps(names: Mapping[int, str]) -> None:
    """Add names of operations, for kernels of other modules. Their numbers are above the numbers of the signals.

    Instead of a channel, such a kernel writes 0.
    """
    _steps.update(names)


def _step(operation: int, channel: int) -> str:
    return _steps.get(operation) or f"{OPERATIONS[operation - 1]} on channel {channel}"


class _Reading(NamedTuple):
    """The result of the last reading: its time, and the content of every place."""

    when: float
    records: dict[int, bytes]


class KernelWords:
    """The reports of the kernels of this process on one GPU. They live as long as the process.

    Attributes:
        ordinal: The GPU.
        status: The report of the kernel that trapped: {operation, channel, peer, group}, or zeros.
        status_address: Its address for kernels. The places of waiting threads follow it, in the layout of
            :func:`symmem.backends.signal_kernels.lateness`.
    """

    def __init__(self, ordinal: int, host: int, device: int) -> None:
        """Zero the memory. ``host`` and ``device`` are the addresses of ``NBYTES`` bytes that are never freed."""
        ctypes.memset(host, 0, NBYTES)
        self.ordinal, self.status_address = ordinal, device
        self.status = (ctypes.c_uint32 * 4).from_address(host)
        self._places, self._records = host + _NBYTES, host + _RECORDS
        self._last = _Reading(0.0, {})
        self._groups: list[tuple[str, int, weakref.ref[RankGroup]]] = []
        self._groups_lock = threading.Lock()
        self._seen: set[int] = set()  # the groups whose record this process has read
        self._errors: dict[int, SymmemError] = {}  # of groups; not raised yet
        devices.append(self)

    def enter(self, group: RankGroup) -> int:
        """The number of a group in the reports of kernels. From now on, its kernels give up if it loses a rank.

        Raises:
            ResourceLimitError: This process has used too many groups on this GPU.
        """
        with self._groups_lock:
            for number, (_name, _rank, known) in enumerate(self._groups):
                if known() is group:
                    return number
            number = len(self._groups)
            if number == GROUPS:
                raise ResourceLimitError(
                    f"this process has used {GROUPS} groups on cuda:{self.ordinal}, which is the limit",
                    hint="use the same groups again instead of making new ones",
                    rank=group.rank,
                    group=group.name,
                )
            self._groups.append((group.name, group.rank, weakref.ref(group)))
        group.when_lost(functools.partial(self._release, number))
        return number

    # Kernels that gave up.

    def _record(self, number: int) -> ctypes.Array[ctypes.c_uint32]:
        return (ctypes.c_uint32 * (_RECORD // 4)).from_address(self._records + _RECORD * number)

    def _release(self, number: int, lost: int) -> None:
        """Let kernels of a group give up their waits, because a rank is lost."""
        self._record(number)[0] = 1 + lost

    def given_up(self, number: int) -> ctypes.Array[ctypes.c_uint32]:
        """Return {operation, channel, peer, cause} of kernels of a group that gave up, or zeros."""
        return (ctypes.c_uint32 * 4).from_address(self._records + _RECORD * number + 16)

    def loss(self, number: int) -> PeerLostError | None:
        """The error of the kernels of a group that gave up because a rank is lost; None if none did."""
        operation, channel, _awaited, _cause = self.given_up(number)
        lost = self._record(number)[0] - 1
        if not operation or lost < 0:
            return None
        name, rank, _group = self._groups[number]
        return PeerLostError(
            f"rank {lost}'s process ended before it came. This operation and the group's later ones gave up. "
            + _UNFINISHED,
            hint=f"look in the log of rank {lost} for the first error. This process can still use its memory and "
            f"cuda:{self.ordinal}: make a new group of the ranks that are left",
            rank=rank,
            group=name,
            step=_step(operation, channel),
            peers=(lost,),
        )

    # Kernels of collective operations that gave up because a rank came late, refused the call, or made another one.

    def abandonment(self, number: int) -> SymmemError | None:
        """The error of collective operations of a group that gave up, until :meth:`resume`; None if none did."""
        operation, channel, peer, cause = self.given_up(number)
        if not operation or self._record(number)[0]:
            return None
        name, rank, _group = self._groups[number]
        kind, by, about = (cause >> 16, cause >> 8 & 0xFF, cause & 0xFF) if cause else (LATE, rank, peer)
        located: dict[str, Any] = {"rank": rank, "group": name, "step": _step(operation, channel), "peers": (about,)}
        gave_up = f"This operation and the group's later ones gave up. {_UNFINISHED}"
        if kind == REFUSED:
            return RendezvousError(
                f"rank {by} refused a call. {gave_up}",
                hint=f"the log of rank {by} names the reason. The next calls of all ranks work again",
                **located,
            )
        if kind == DIFFERS:
            return MismatchError(
                f"ranks {by} and {about} make different calls. {gave_up}",
                hint="the group's next operation names every rank's call, and where the program makes it",
                **located,
            )
        came = "did not come in time" if by == rank else f"did not come while rank {by} waited for it"
        return PeerTimeoutError(
            f"rank {about} {came}. {gave_up}",
            hint=f"see what rank {about} did. The next calls of all ranks work again. If it is only slow, raise "
            "signal_timeout",
            **located,
        )

    def take_error(self, number: int, kind: type[SymmemError] = SymmemError) -> SymmemError | None:
        """Return the error of collective operations that gave up, if it has this type. Every error is returned once."""
        self._read_record(number)
        return self._errors.pop(number) if isinstance(self._errors.get(number), kind) else None

    def _read_record(self, number: int) -> None:
        if number not in self._seen and (error := self.abandonment(number)):
            self._seen.add(number)
            self._errors[number] = error

    def take_error_of(self, group: RankGroup) -> SymmemError | None:
        """The same, for a group."""
        numbers = [number for number, (_name, _rank, known) in enumerate(self._groups) if known() is group]
        return self.take_error(numbers[0]) if numbers else None

    def refuse(self, number: int, operation: int, rank: int) -> int:
        """Record that this rank has refused a call, as if its kernels gave up; returns the cause for the peers."""
        cause = REFUSED << 16 | rank << 8 | rank
        self._seen.add(number)  # the caller raises the error
        self.given_up(number)[:] = [operation, 0, rank, cause]
        return cause

    def resume(self, number: int, error: SymmemError) -> None:
        """Forget that kernels gave up, because no kernel of the group runs and their workspaces are reset.

        Args:
            number: The group.
            error: Why they gave up. It replaces an error that :meth:`take_error` has not returned yet.
        """
        self._read_record(number)
        if number in self._errors:
            self._errors[number] = error
        self._seen.discard(number)
        self.given_up(number)[:] = [0] * 4

    # Stopped kernels.

    def failure(self) -> SymmemError | None:
        """The error of the signal or collective operation on this GPU that trapped; None if there is none."""
        operation, channel, peer, number = self.status
        if not operation:
            return None
        name, rank, known = self._groups[number]
        group = known()
        if operation == BAD_CHANNEL:
            return InvalidArgumentError(
                f"a kernel used signal channel {channel}, but its device view has {peer} channels",
                hint="give device_view() signals with more channels; restart the job: this process can no longer use "
                f"cuda:{self.ordinal}",
                rank=rank,
                group=name,
                step="signal in a kernel",
            )
        if released := self._record(number)[0]:
            peer = released - 1  # the awaited rank may only wait for this one
        lost = bool(released) or (group is not None and peer in group.lost())
        kind = PeerLostError if lost else PeerTimeoutError
        event = f"rank {peer}'s process ended before it came" if lost else f"rank {peer} did not come in time"
        first = f"look in the log of rank {peer} for the first error"
        slow = "" if lost else "; if it is only slow, raise signal_timeout"
        return kind(
            f"{event}; this process's kernels were stopped, so that none continues with stale data",
            hint=f"{first}, and restart the job: this process can no longer use cuda:{self.ordinal}{slow}",
            rank=rank,
            group=name,
            step=_step(operation, channel),
            peers=(peer,),
        )

    # Waiting threads.

    def waits(self) -> list[Wait]:
        """The waits in progress on this GPU that are 67 ms old or more, as of the last 0.15 seconds.

        If a place does not change for that long, its wait is over. So this method sleeps for that long, but only if a
        place has changed since the last call.
        """
        before, now = self._last, time.monotonic()
        first = self._read()
        if first == before.records and now - before.when >= _PERIOD:
            return []
        if first:
            time.sleep(_PERIOD)
        second = self._read()
        self._last = _Reading(time.monotonic(), second)
        return self._decode([record for place, record in second.items() if record != first.get(place)])

    def _read(self) -> dict[int, bytes]:
        """The content of every place that was ever used. Its first word is not 0."""
        data = ctypes.string_at(self._places, PLACES * _NBYTES)
        records = {place: data[place * _NBYTES :][:_NBYTES] for place in range(PLACES)}
        return {place: record for place, record in records.items() if any(record[:4])}

    def _decode(self, records: list[bytes]) -> list[Wait]:
        """One wait per operation of a group, with all awaited peers, the earliest start and the earliest deadline."""
        found: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
        for record in records:
            waiter, awaited, ticks, left = (int.from_bytes(record[i : i + 4], "little") for i in range(0, _NBYTES, 4))
            found.setdefault((waiter & 0xFFFFFF, waiter >> 24, awaited >> 16), []).append(
                (awaited & 0xFFFF, ticks, left)
            )
        now, waits = time.monotonic(), []
        for (number, operation, channel), peers in found.items():
            group = self._groups[number][2]()
            if group is None:
                continue  # the group is gone
            missing = functools.partial(tuple, sorted(peer for peer, _, _ in peers))
            began = now - max(ticks for _, ticks, _ in peers) * 2**TICK / 1e9
            deadline = now + min(left for _, _, left in peers) * 2**TICK / 1e9
            step = _step(operation, channel)
            waits.append(Wait(group, step, missing, began, deadline, 0, f"cuda:{self.ordinal}"))
        return waits
