"""What kernels leave in host memory, for the host to read without asking the GPU: who waits, and why one stopped.

Nothing here calls CUDA: in a process that hangs, or whose kernels have trapped, no call of it is safe, or says why.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
import weakref
from collections.abc import Mapping
from typing import NamedTuple

from symmem.backends.base import Group
from symmem.backends.kernel_status import devices
from symmem.backends.pending_waits import Wait
from symmem.backends.signal_kernels import BAD_CHANNEL, BEAT, OPERATIONS, PLACES, TICK
from symmem.errors import InvalidArgumentError, MismatchError, PeerLostError, PeerTimeoutError, SymmemError

__all__ = ["NBYTES", "KernelWords", "name_steps"]

_NBYTES = 16  # of the status, and of each place
NBYTES = _NBYTES * (1 + PLACES)
"""Of the memory: the status, then the places of those that wait."""

_PERIOD = 2.2 * 2**BEAT / 1e9  # seconds within which who still waits says so again

_steps: dict[int, str] = {}


def name_steps(names: Mapping[int, str]) -> None:
    """Say what else kernels may name as the operation: numbers above those of the signals, for kernels elsewhere.

    In the place of the channel they write 0 for a peer that did not come, or 1 for one that differs.
    """
    _steps.update(names)


def _step(operation: int, channel: int) -> str:
    return _steps.get(operation) or f"{OPERATIONS[operation - 1]} on channel {channel}"


class _Reading(NamedTuple):
    """What was read before: at what time, and what each place held."""

    when: float
    records: dict[int, bytes]


class KernelWords:
    """The words of the kernels of this process on one GPU, for as long as it lives.

    Attributes:
        ordinal: The GPU.
        status: What a kernel has left before it trapped: {operation, channel, peer, group}, or zeros.
        status_address: Its address for kernels; behind it are the places of those that wait, as
            :func:`symmem.backends.signal_kernels.lateness` lays them out.
    """

    def __init__(self, ordinal: int, host: int, device: int) -> None:
        """Begin with zeros; ``host`` and ``device`` are the addresses of ``NBYTES`` bytes that are never freed."""
        ctypes.memset(host, 0, NBYTES)
        self.ordinal, self.status_address = ordinal, device
        self.status = (ctypes.c_uint32 * 4).from_address(host)
        self._places = host + _NBYTES
        self._last = _Reading(0.0, {})
        self._groups: list[tuple[str, int, weakref.ref[Group]]] = []
        self._groups_lock = threading.Lock()
        devices.append(self)

    def enter(self, group: Group) -> int:
        """A number by which kernels name a group."""
        with self._groups_lock:
            for number, (_name, _rank, known) in enumerate(self._groups):
                if known() is group:
                    return number
            self._groups.append((group.name, group.rank, weakref.ref(group)))
            return len(self._groups) - 1

    # Why a kernel stopped.

    def failure(self) -> SymmemError | None:
        """What a kernel wrote before it trapped, by any of this GPU's signals and collective operations."""
        operation, channel, peer, number = self.status
        if not operation:
            return None
        name, rank, known = self._groups[number]
        group = known()
        if operation == BAD_CHANNEL:
            return InvalidArgumentError(
                f"a kernel used signal channel {channel}, of which its device view has {peer}",
                hint="give device_view() signals with more channels; restart: this process cannot use "
                f"cuda:{self.ordinal} any more",
                rank=rank,
                group=name,
                step="signal in a kernel",
            )
        if operation in _steps and channel:
            return MismatchError(
                f"rank {peer} takes part with other memory: elsewhere, in symmetric memory or not, or of another size; "
                "this process's kernels were stopped",
                hint="pass tensors of the same shape on all ranks, at the same place in symmetric memory or outside",
                rank=rank,
                group=name,
                step=_steps[operation],
                peers=(peer,),
            )
        lost = group is not None and peer in group.lost()
        kind = PeerLostError if lost else PeerTimeoutError
        what = f"rank {peer}'s process ended before it came" if lost else f"rank {peer} did not come in time"
        first = f"look at the log of rank {peer} for the first error"
        slow = "" if lost else "; if it is only slow, raise signal_timeout"
        return kind(
            f"{what}; this process's kernels were stopped, so that none goes on with stale data",
            hint=f"{first}, and restart the job: this process cannot use cuda:{self.ordinal} any more{slow}",
            rank=rank,
            group=name,
            step=_step(operation, channel),
            peers=(peer,),
        )

    # Who waits.

    def waits(self) -> list[Wait]:
        """The waits that are under way on this GPU, of 67 ms or more; told as of the last 0.15 seconds.

        A place whose content stays the same for that long is of a wait that is over. To see whether it does, this
        sleeps for that long, but only if something has changed since it was last asked.
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
        """What each place that was ever used holds; its first word is not 0."""
        data = ctypes.string_at(self._places, PLACES * _NBYTES)
        records = {place: data[place * _NBYTES :][:_NBYTES] for place in range(PLACES)}
        return {place: record for place, record in records.items() if any(record[:4])}

    def _decode(self, records: list[bytes]) -> list[Wait]:
        """One wait for all peers that an operation of a group waits for; since and until when the first of them is."""
        found: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
        for record in records:
            who, whom, ticks, left = (int.from_bytes(record[i : i + 4], "little") for i in range(0, _NBYTES, 4))
            found.setdefault((who & 0xFFFFFF, who >> 24, whom >> 16), []).append((whom & 0xFFFF, ticks, left))
        now, told = time.monotonic(), []
        for (number, operation, channel), peers in found.items():
            group = self._groups[number][2]()
            if group is None:
                continue  # nobody can ask about it any more
            missing = functools.partial(tuple, sorted(peer for peer, _, _ in peers))
            began = now - max(ticks for _, ticks, _ in peers) * 2**TICK / 1e9
            deadline = now + min(left for _, _, left in peers) * 2**TICK / 1e9
            step = _step(operation, channel)
            told.append(Wait(group, step, missing, began, deadline, 0, f"cuda:{self.ordinal}"))
        return told
