"""Multicast objects: one address that stores to, or reduces over, the memory of all ranks of a group (NVLink SHARP).

The rendezvous decides whether a group may have one, from :func:`why_not` on every rank. If it may not, a request for
the pointer fails locally, and cuMulticastCreate is never called, not even to probe.

The order of calls is that required by the CUDA driver API and used by PyTorch's CUDASymmetricMemory. One rank creates
and exports the object. Every rank imports it, the creator too, which then releases its first reference. Every GPU
joins. Only then is memory bound.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

from symmem.backends.base import RankGroup
from symmem.backends.driver import Driver
from symmem.backends.vmm import DeviceRange, MemoryHandle, exchange_handles
from symmem.config.machine import multicast_blocker
from symmem.errors import SymmemError

if TYPE_CHECKING:
    from symmem.config import Settings

__all__ = ["Multicast", "granularity", "why_not"]


def why_not(driver: Driver, ordinal: int, settings: Settings) -> str:
    """The reason why this rank may not have a multicast pointer; an empty text if it may."""
    if settings.multicast == "off":
        return f"multicast is switched off ({settings.origins.get('multicast', 'by the settings')})"
    if not driver.attribute(ordinal, "MULTICAST_SUPPORTED"):
        return f"the GPU {driver.name(ordinal)} does not support multicast"
    return ""


def granularity(driver: Driver, ordinal: int) -> int:
    """The size of memory must be a multiple of this to be bound to a multicast object; 1 if that is impossible."""
    if multicast_blocker() or not driver.attribute(ordinal, "MULTICAST_SUPPORTED"):
        return 1
    try:
        return driver.multicast_granularity(ordinal)
    except SymmemError:  # binding will fail too and give the reason
        return 1


class Multicast:
    """A multicast object over the memory of all ranks. Its construction is collective.

    It is unmapped, unbound and released with its last reference, without communication.

    Args:
        driver: The driver.
        group: The ranks, on one GPU per rank.
        ordinal: This rank's GPU.
        memory: This rank's memory.
        nbytes: Bytes of the memory; the same on all ranks, and a multiple of :func:`granularity`.
        fabric: Whether handles can be exported to other hosts.

    Attributes:
        address: The multicast address.

    Raises:
        SymmemError: The same on all ranks. Everything made so far is undone.
    """

    def __init__(
        self, driver: Driver, group: RankGroup, ordinal: int, memory: MemoryHandle, nbytes: int, fabric: bool
    ) -> None:
        with group.collective("multicast_ptr") as collective, contextlib.ExitStack() as undo:
            undo.enter_context(driver.on(ordinal))
            created = []
            if group.rank == 0:
                created = [MemoryHandle(driver, driver.multicast_create(nbytes, group.size, fabric))]
                undo.callback(created[0].close)
            with exchange_handles(driver, collective, "create", {}, created, fabric) as received:
                handle = MemoryHandle.take(driver, received[0][1][0])
            on_failure = undo.enter_context(contextlib.ExitStack())
            on_failure.callback(handle.close)
            region = DeviceRange(driver, ordinal, nbytes, granularity(driver, ordinal))
            on_failure.callback(region.close)
            driver.multicast_add(handle.value, ordinal)
            collective.exchange("join").close()
            driver.multicast_bind(handle.value, memory.value, nbytes)
            unbind = functools.partial(driver.multicast_unbind, handle.value, ordinal, nbytes)
            region.afterwards += (unbind, handle.close)
            self.address = region.map(0, handle, nbytes)
            region.open()
            collective.exchange("bind").close()  # no rank may use it before all have bound their memory
            on_failure.pop_all()
        self._region = region
