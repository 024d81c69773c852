"""Signal pads within an allocation: room behind the user's bytes, a slot for each group that rendezvouses it.

For backends whose library maps an allocation as a whole (torch's transports, NVSHMEM). A pad inside costs nothing,
where a pad of its own would cost a second rendezvous (18 ms with torch's CUDA transport, 200 ms with its NCCL
transport, on 8 GPUs), and it keeps clear of the words that torch's own operators use in torch's own pad.

A rank may have used up other slots than its peers (it may be in other groups), so each takes any free slot of its
own and tells the others where it is.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from symmem.backends.base import Backend, Collective, Group, Mapping
from symmem.backends.libc import round_up
from symmem.backends.signal_kernels import pad_words
from symmem.errors import ResourceLimitError

if TYPE_CHECKING:
    from symmem.backends.cuda_signals import CudaSignals

__all__ = ["MAX_RANKS", "SLOT_NBYTES", "PadSlots", "PaddedMapping", "padded"]

MAX_RANKS = 72
"""The largest group that has signals: as many GPUs as NVLink joins today, and what torch's own pads are made for."""

SLOT_NBYTES = round_up(4 * pad_words(MAX_RANKS), 256)
"""Bytes of a slot; see :mod:`symmem.backends.signal_kernels`."""

SLOTS = 8
"""Groups that may rendezvous one allocation."""


class PadSlots:
    """The slots of one allocation.

    Args:
        nbytes: The user's bytes, which come first.

    Attributes:
        extent: Bytes to allocate, at least one of them the user's. The caller fills them with zeros.
    """

    def __init__(self, nbytes: int) -> None:
        self._begin = round_up(max(nbytes, 1), 256)
        self.extent = self._begin + SLOTS * SLOT_NBYTES
        self._free = list(range(SLOTS))
        self._lock = threading.Lock()

    def take(self) -> int:
        """Offset of a slot that no other group uses.

        Raises:
            ResourceLimitError: All are in use.
        """
        with self._lock:
            if not self._free:
                raise ResourceLimitError(
                    f"{SLOTS} groups have rendezvoused this memory, and there is room for no more signal pads",
                    hint="allocate another tensor for the other groups",
                )
            return self._begin + self._free.pop(0) * SLOT_NBYTES

    def give_back(self, offset: int) -> None:
        """Let another group have it; its words must be 0, as they are if no mapping over it was used."""
        # Called by the collector as well, thus without the lock: appending is one step.
        self._free.append((offset - self._begin) // SLOT_NBYTES)


class PaddedMapping(Mapping):
    """A mapping whose signals are ours, over pads in the allocation; of the signals it is the whole implementation.

    Args:
        backend: See :class:`Mapping`, as for ``group``, ``device`` and ``pointers``.
        group: Ditto.
        device: Ditto.
        pointers: Ditto.
        pads: Address of each rank's pad in this process; 0 where the rank is not load/store reachable.
    """

    def __init__(
        self,
        backend: Backend,
        group: Group,
        device: torch.device,
        pointers: Sequence[int],
        pads: Sequence[int],
    ) -> None:
        super().__init__(backend, group, device, pointers)
        self._pads = tuple(pads)

    def signal_pad(self, rank: int) -> tuple[int, int]:
        """See :meth:`Mapping.signal_pad`."""
        return self._signals.signal_pad(rank)

    def signals_at(self, pads: Sequence[int]) -> CudaSignals:
        """See :meth:`Mapping.signals_at`."""
        from symmem.backends.cuda_signals import CudaSignals

        return CudaSignals(self.group, self.device, pads)

    def check_multicast_is_on(self) -> None:
        """Raise if the settings forbid it: a library may have set it up all the same."""
        settings = self.group.settings
        if settings.multicast == "off":
            self.no_multicast(f"it is switched off by {settings.origins.get('multicast', 'the configuration')}")

    def barrier(self, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.barrier`."""
        self._signals.barrier(channel, timeout)

    def put_signal(self, rank: int, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.put_signal`."""
        self._signals.put_signal(rank, channel, timeout)

    def wait_signal(self, rank: int, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.wait_signal`."""
        self._signals.wait_signal(rank, channel, timeout)

    def check(self) -> None:
        """See :meth:`Mapping.check`."""
        if "_signals" in self.__dict__:
            self._signals.check()

    @functools.cached_property
    def _signals(self) -> CudaSignals:
        # Made when they are first used: memory without signals needs neither cuda.bindings nor a compiler.
        if self.group.size > MAX_RANKS:
            self.unsupported("signals", f"the group has {self.group.size} ranks, more than {MAX_RANKS}")
        return self.signals_at(self._pads)


M = TypeVar("M", bound=PaddedMapping)


def padded(slots: PadSlots, pointers: Sequence[int], collective: Collective, make: Callable[[tuple[int, ...]], M]) -> M:
    """Tell each other where the pads are, and make the mapping. Collective.

    Args:
        slots: Of this rank's allocation. The slot goes back when the mapping is gone.
        pointers: Address of each rank's allocation in this process, or 0.
        collective: The rendezvous.
        make: Makes the mapping from the address of each rank's pad.
    """
    taken = slots.take()
    try:
        with collective.exchange("pads", str(taken).encode()) as received:
            offsets = [int(contribution.payload) for contribution in received]
        mapping = make(tuple(p + o if p else 0 for p, o in zip(pointers, offsets, strict=True)))
    except BaseException:
        slots.give_back(taken)
        raise
    weakref.finalize(mapping, slots.give_back, taken).atexit = False
    return mapping
