"""Signal pads inside an allocation: slots behind the user's bytes, one per group that rendezvouses the memory.

They are for backends with a library that maps an allocation as a whole (torch's transports, NVSHMEM). A pad inside
costs nothing. A separate pad would cost a second rendezvous: 18 ms with torch's CUDA transport and 200 ms with its
NCCL transport, on 8 GPUs. Our pads are also separate from torch's pad, which torch's own operators use.

A rank may have used other slots than its peers, because it may be in other groups. So every rank takes any free slot
and tells the others its offset.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from symmem.backends.base import Collective
from symmem.backends.libc import round_up
from symmem.backends.signal_kernels import pad_nbytes
from symmem.backends.signalled import SignalledMapping
from symmem.backends.untraced import untraced
from symmem.errors import ResourceLimitError, SymmemError

if TYPE_CHECKING:
    from symmem.backends.base import Allocation, RankGroup
    from symmem.backends.cuda_signals import CudaSignals
    from symmem.backends.vmm import DeviceRange

__all__ = ["MAX_RANKS", "PadSlots", "PaddedMapping", "padded"]

MAX_RANKS = 72
"""The largest group that has signals: NVLink joins as many GPUs today, and torch's own pads have the same limit."""

SLOTS = 8
"""Number of groups that may rendezvous one allocation."""


class PadSlots:
    """The slots of one allocation.

    Args:
        nbytes: The user's bytes, which come first.

    Attributes:
        extent: Bytes to allocate; at least one of them is the user's. The caller fills them with zeros.
        slot_nbytes: Bytes of a slot; see :mod:`symmem.backends.signal_kernels`.
    """

    def __init__(self, nbytes: int) -> None:
        self._begin = round_up(max(nbytes, 1), 256)
        self.slot_nbytes = round_up(pad_nbytes(MAX_RANKS), 256)
        self.extent = self._begin + SLOTS * self.slot_nbytes
        self._free = list(range(SLOTS))
        self._lock = threading.Lock()

    def take(self) -> int:
        """Take a free slot; returns its offset.

        Raises:
            ResourceLimitError: All slots are in use.
        """
        with self._lock:
            if not self._free:
                raise ResourceLimitError(
                    f"{SLOTS} groups have rendezvoused this memory, and there is no room for more signal pads",
                    hint="allocate another tensor for the other groups",
                )
            return self._begin + self._free.pop(0) * self.slot_nbytes

    @untraced
    def give_back(self, offset: int) -> None:
        """Make a slot available to another group. Its words must be 0, as they are if no mapping over it was used."""
        # The garbage collector calls this too, so it takes no lock: an append is atomic.
        self._free.append((offset - self._begin) // self.slot_nbytes)


class PaddedMapping(SignalledMapping):
    """A mapping with pads inside the allocation and signals by kernels.

    Args:
        allocation: This rank's memory.
        group: See :class:`Mapping`.
        pointers: See :class:`Mapping`.
        pads: See :class:`SignalledMapping`.
    """

    def __init__(self, allocation: Allocation, group: RankGroup, pointers: Sequence[int], pads: Sequence[int]) -> None:
        super().__init__(allocation.backend, group, allocation.device, pointers, pads)
        self._nbytes = allocation.nbytes
        self._second: tuple[DeviceRange, int, int] | None = None
        self._lock = threading.Lock()

    def contiguous(self) -> tuple[int, int]:
        """See :meth:`Mapping.contiguous`. The first call maps the memory of all ranks a second time."""
        from symmem.backends.driver import load_driver
        from symmem.backends.vmm import map_again

        if not all(self.pointers):
            self.unsupported("contiguous_view", "some ranks' memory is not load/store reachable from here")
        driver = load_driver()
        ordinal = driver.ordinal(self.device)
        with self._lock, driver.on(ordinal):
            if self._second is None:
                try:
                    self._second = map_again(driver, ordinal, self.pointers, self._nbytes)
                except SymmemError as error:
                    error.located(rank=self.group.rank, group=self.group.name, step="contiguous_view")
                    raise
        region, offset, stride = self._second
        return region.address + offset, stride

    def home_of(self, address: int) -> int:
        """See :meth:`Mapping.home_of`."""
        if self._second is None:
            return address
        region, offset, stride = self._second
        rank, within = divmod(address - region.address - offset, stride)
        return self.pointers[rank] + within if 0 <= rank < self.group.size else address

    def signals_at(self, pads: Sequence[int]) -> CudaSignals:
        from symmem.backends.cuda_signals import CudaSignals

        return CudaSignals(self.group, self.device, pads)

    def check_multicast_is_on(self) -> None:
        """Raise if the settings forbid multicast: the library may have set it up nevertheless."""
        settings = self.group.settings
        if settings.multicast == "off":
            self.no_multicast(f"it is switched off by {settings.origins.get('multicast', 'the configuration')}")

    @functools.cached_property
    def signals(self) -> CudaSignals:
        if self.group.size > MAX_RANKS:
            self.unsupported("signals", f"the group has {self.group.size} ranks, more than {MAX_RANKS}")
        return self.signals_at(self._pads)


M = TypeVar("M", bound=PaddedMapping)


def padded(slots: PadSlots, pointers: Sequence[int], collective: Collective, make: Callable[[tuple[int, ...]], M]) -> M:
    """Exchange the offsets of the pads, and make the mapping. Collective.

    Args:
        slots: The slots of this rank's allocation. The slot is given back when the mapping is gone.
        pointers: Address of every rank's allocation in this process, or 0.
        collective: The rendezvous.
        make: Makes the mapping from the address of every rank's pad.
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
