"""CUDA memory that ranks map into each other's address space, through the driver's virtual memory management.

An allocation is physical memory on one GPU, mapped in its process. At a rendezvous every rank exports its memory and
maps the memory of all others side by side. Within a host, memory passes as a file descriptor by SCM_RIGHTS, as the
memory files of ``host`` do; between hosts of one NVLink fabric, as a fabric handle. Kernels then load and store over
NVLink without any library. Every process holds a reference to the memory that it has mapped, so freeing is local. See
:mod:`symmem.backends.vmm` for kernels that still run when memory is freed.

A rank's own memory is mapped at the address of its tensors. The first ``contiguous_view`` maps it a second time, in the
row of all ranks' memory. Within one kernel, CUDA does not order accesses through one address with accesses through the
other ("virtual aliasing").
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from symmem.backends.base import Allocation, Backend, Capability, Collective, RankGroup
from symmem.backends.cuda_signals import CudaSignals
from symmem.backends.driver import Driver, load_driver
from symmem.backends.gpu_metadata import cannot_map, check_gpus, gpu_metadata, no_multicast
from symmem.backends.libc import round_up
from symmem.backends.multicast import Multicast, granularity, why_not
from symmem.backends.pad_blocks import GroupPads, PadBlock, Slot, mapping_order
from symmem.backends.shared import SharedMapping, pass_and_map
from symmem.backends.vmm import DeviceRange, MemoryHandle, Token, exchange_handles, free_pending
from symmem.errors import (
    BackendUnavailableError,
    OutOfMemoryError,
    SymmemError,
)

__all__ = ["NativeAllocation", "NativeBackend", "NativeMapping"]

log = logging.getLogger("symmem.native")


class NativeAllocation(Allocation):
    """Physical memory on one GPU, and its mapping in this process.

    Args:
        backend: The backend.
        device: The GPU.
        nbytes: The bytes that the caller asked for.
        pointer: Address of the mapping.
        handle: The physical memory, exported at every rendezvous.
        extent: Its size: ``nbytes`` rounded up to the granularity, and at least one granule.
        fabric: Whether it can be exported to other hosts.
        owner: Keeps the mapping.
    """

    def __init__(
        self,
        backend: NativeBackend,
        device: torch.device,
        nbytes: int,
        pointer: int,
        handle: MemoryHandle,
        extent: int,
        fabric: bool,
        owner: object,
    ) -> None:
        super().__init__(backend, device, nbytes, pointer)
        self.handle, self.extent, self.fabric, self._owner = handle, extent, fabric, owner


class NativeMapping(SharedMapping):
    """The memory of all ranks, with signals on streams, and a multicast object on request.

    Args:
        backend: The backend that made it.
        allocation: This rank's memory.
        group: The group of the rendezvous.
        region: The range with the memory of the other ranks, and a gap for this rank's memory.
        pads: The signal pads of the group.
        slot: This rank's pad.
        metadata: The metadata of all ranks.
    """

    _region: DeviceRange

    def __init__(
        self,
        backend: NativeBackend,
        allocation: NativeAllocation,
        group: RankGroup,
        region: DeviceRange,
        pads: GroupPads,
        slot: Slot,
        metadata: list[dict[str, Any]],
    ) -> None:
        addresses = pads.addresses(metadata, group, slot)
        super().__init__(backend, group, allocation.device, region, allocation.extent, allocation.pointer, addresses)
        self._driver = backend.driver
        self._memory, self._fabric = allocation.handle, allocation.fabric
        self._group_pads = pads  # keeps the blocks mapped
        self._no_multicast = no_multicast(metadata)
        self._multicast: Multicast | None = None
        self._lock = threading.Lock()

    def signals_at(self, pads: Sequence[int]) -> CudaSignals:
        return CudaSignals(self.group, self.device, pads)

    def contiguous(self) -> tuple[int, int]:
        # This rank's memory is mapped into its gap here, because mapping it takes as long as mapping a peer's memory,
        # and few programs need it.
        own, region = self.group.rank * self._stride, self._region
        with self._lock, self._driver.on(self._driver.ordinal(self.device)):
            try:
                if not region.holds(own):
                    region.map(own, self._memory, self._stride)
                region.open()
            except SymmemError as error:
                error.located(rank=self.group.rank, group=self.group.name, step="contiguous_view")
                raise
        return super().contiguous()

    def multicast(self) -> int:
        if self._no_multicast:
            self.no_multicast(self._no_multicast)
        if self._multicast is None:
            ordinal = self._driver.ordinal(self.device)
            self._multicast = Multicast(self._driver, self.group, ordinal, self._memory, self._stride, self._fabric)
        return self._multicast.address


def _pad_nbytes(size: int) -> int:
    return round_up(CudaSignals.nbytes(size), 256)


class NativeBackend(Backend):
    """Backend ``native``.

    Attributes:
        pads: Signal pads, by group and GPU.
    """

    device_type = "cuda"
    capabilities = (
        Capability.REMOTE_TENSOR
        | Capability.CONTIGUOUS_VIEW
        | Capability.MULTICAST
        | Capability.SIGNALS
        | Capability.ONE_SIDED
        | Capability.SECOND_GROUP
    )

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.pads: weakref.WeakKeyDictionary[RankGroup, GroupPads] = weakref.WeakKeyDictionary()

    def pad_nbytes(self, size: int) -> int:
        return CudaSignals.nbytes(size)

    @functools.cached_property
    def driver(self) -> Driver:
        """The CUDA driver. It is made on first use, because that initialises CUDA.

        Raises:
            BackendUnavailableError: Something is missing; the text names it.
        """
        return load_driver()

    def probe(self) -> None:
        driver = self.driver
        try:
            seen = self._pass_and_map(driver.current_device())
        except BackendUnavailableError:
            raise
        except (OSError, RuntimeError, SymmemError) as error:
            raise BackendUnavailableError(
                f"the backend 'native' could not make, export and map memory: {error}",
                hint="a container may forbid it, or the GPU may be out of memory or have failed: see the error above",
            ) from error
        if not seen:
            raise BackendUnavailableError(
                "on this GPU a store is not visible through a second mapping of the same memory",
                hint="run `symmem doctor` again on an idle machine, and look in `dmesg` for Xid errors",
            )

    def _pass_and_map(self, device: torch.device) -> bool:
        ordinal = self.driver.ordinal(device)
        allocation = self.allocate(1, device, None)
        with self.driver.on(ordinal):
            reserve = functools.partial(self._reserve, ordinal)
            return pass_and_map(allocation.handle.descriptor(), allocation.extent, reserve, allocation.tensor())

    @functools.cache  # noqa: B019  # a backend lives as long as its process
    def has_fabric(self, ordinal: int) -> bool:
        """Whether memory of a GPU can be exported to other hosts. It tries an export: the attribute may be wrong."""
        if not self.driver.attribute(ordinal, "HANDLE_TYPE_FABRIC_SUPPORTED"):
            return False
        try:
            with self.driver.on(ordinal):
                handle = MemoryHandle(
                    self.driver, self.driver.create(ordinal, self.driver.granularity(ordinal, True), True)
                )
                MemoryHandle.take(self.driver, self.driver.export_fabric(handle.value))
        except SymmemError as error:
            log.debug("GPU %d advertises fabric handles, and they do not work: %s", ordinal, error)
            return False
        return True

    @functools.cache  # noqa: B019  # a backend lives as long as its process
    def _granularity(self, ordinal: int) -> int:
        memory = self.driver.granularity(ordinal, self.has_fabric(ordinal))
        return round_up(memory, granularity(self.driver, ordinal))

    def _create(self, ordinal: int, nbytes: int) -> MemoryHandle:
        try:
            return MemoryHandle(self.driver, self.driver.create(ordinal, nbytes, self.has_fabric(ordinal)))
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"cannot allocate {nbytes} bytes on GPU {ordinal} ({self.driver.name(ordinal)}): {error.what}",
                hint=error.hint,
            ) from error

    def _reserve(self, ordinal: int, nbytes: int) -> DeviceRange:
        return DeviceRange(self.driver, ordinal, nbytes, self._granularity(ordinal))

    def _map_own(self, ordinal: int, nbytes: int) -> tuple[MemoryHandle, DeviceRange]:
        """New memory, mapped in this process only and not zeroed."""
        with contextlib.ExitStack() as undo:
            handle = self._create(ordinal, nbytes)
            undo.callback(handle.close)
            region = self._reserve(ordinal, nbytes)
            undo.callback(region.close)
            region.map(0, handle, nbytes)
            region.open()
            undo.pop_all()
        return handle, region

    def allocate(self, nbytes: int, device: torch.device, group: RankGroup | None) -> NativeAllocation:
        # The memory is zeroed on a separate stream before this returns. So it can be used on any stream, no peer stores
        # into it earlier, and an allocation during a stream capture does not become part of the graph.
        ordinal = self.driver.ordinal(device)
        with self.driver.on(ordinal), contextlib.ExitStack() as undo:
            free_pending()
            extent = max(round_up(nbytes, self._granularity(ordinal)), self._granularity(ordinal))
            handle, region = self._map_own(ordinal, extent)
            undo.callback(handle.close)
            undo.callback(region.close)
            self.driver.zero(ordinal, region.address, extent)
            undo.pop_all()
        fabric = self.has_fabric(ordinal)
        return NativeAllocation(self, device, nbytes, region.address, handle, extent, fabric, region)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> NativeMapping:
        # The driver serialises these calls over all processes of the host, so their number decides the time of a
        # rendezvous. A rank imports and maps the memory of every peer, and only new blocks of pads besides.
        assert isinstance(allocation, NativeAllocation)
        driver, group = self.driver, collective.group
        ordinal = driver.ordinal(allocation.device)
        pads = self.pads.setdefault(group, GroupPads())
        with driver.on(ordinal), contextlib.ExitStack() as undo:
            slot = pads.take(ordinal, _pad_nbytes(group.size), functools.partial(self._make_block, ordinal, group.size))
            on_failure = undo.enter_context(contextlib.ExitStack())
            on_failure.callback(slot.give_back)
            # Zero the pad before the ranks agree that all have mapped: no rank signals before that.
            driver.zero(ordinal, slot.address, _pad_nbytes(group.size))
            mine = gpu_metadata(driver, ordinal, allocation.extent, why_not(driver, ordinal, group.settings))
            mine["pad"] = slot.metadata
            received = undo.enter_context(
                exchange_handles(driver, collective, "map", mine, (allocation.handle, *slot.handles), allocation.fabric)
            )
            metadata = [entry for entry, _tokens in received]
            tokens = [sent for _entry, sent in received]
            check_gpus(driver, metadata, ordinal, group)
            pads.map(metadata, tokens, group, ordinal, functools.partial(self._reserve, ordinal))
            region = self._map_peers(ordinal, allocation.extent, tokens, metadata, group)
            on_failure.callback(region.close)
            mapping = NativeMapping(self, allocation, group, region, pads, slot, metadata)
            if any(len(sent) > 1 for sent in tokens):  # the same result on all ranks
                collective.exchange("pads").close()
                slot.block.shared = True
            on_failure.pop_all()
            region.afterwards.append(slot.give_back)
        return mapping

    def _make_block(self, ordinal: int, size: int) -> PadBlock:
        return PadBlock(*self._map_own(ordinal, round_up(_pad_nbytes(size), self._granularity(ordinal))))

    def _map_peers(
        self,
        ordinal: int,
        extent: int,
        tokens: Sequence[tuple[Token, ...]],
        metadata: Sequence[dict[str, Any]],
        group: RankGroup,
    ) -> DeviceRange:
        """The memory of all other ranks side by side, with a gap for this rank's memory."""
        region, peers = self._reserve(ordinal, group.size * extent), mapping_order(group)
        try:
            for peer in peers:
                region.place(peer * extent, tokens[peer][0], extent)
            region.open()
        except SymmemError as error:
            named = cannot_map(error, region, peers, metadata, group)
            region.close()
            raise named from error
        return region
