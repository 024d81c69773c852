"""CUDA memory that ranks map into each other's address space, through the driver's virtual memory management.

An allocation is physical memory on one GPU, mapped in its process. At a rendezvous each rank exports it, as a file
descriptor that passes by SCM_RIGHTS as ``host``'s memory files do, or between hosts of one NVLink fabric as a
fabric handle, and maps that of all others side by side. Kernels then load and store over NVLink, with no library in
between. Each process holds a reference to what it has mapped, so freeing is local; see :mod:`symmem.backends.vmm`
for what happens to kernels that are still running.

A rank's own memory is mapped where its tensors are, and from the first ``contiguous_view`` on a second time, in the row
of all ranks' memory. Within one kernel CUDA does not order accesses through one with accesses through the other
("virtual aliasing").
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

from symmem.backends.base import Allocation, Backend, Capability, Collective, Group
from symmem.backends.cuda_signals import CudaSignals
from symmem.backends.driver import Driver, load_driver
from symmem.backends.gpu_cards import cannot_map, check_cards, gpu_card, no_multicast
from symmem.backends.libc import round_up
from symmem.backends.multicast import Multicast, granularity, why_not
from symmem.backends.pad_blocks import GroupPads, PadBlock, Slot, mapping_order
from symmem.backends.shared import SharedMapping, pass_and_map
from symmem.backends.vmm import DeviceRange, MemoryHandle, Token, exchange_handles, free_what_is_left
from symmem.errors import (
    BackendUnavailableError,
    OutOfMemoryError,
    SymmemError,
)

__all__ = ["NativeAllocation", "NativeBackend", "NativeMapping"]

log = logging.getLogger("symmem.native")


class NativeAllocation(Allocation):
    """Physical memory on one GPU, and its mapping in this process.

    Attributes:
        handle: The physical memory; exported at each rendezvous.
        extent: Bytes of it: ``nbytes`` rounded up to the granularity, at least one.
        fabric: Whether it can be exported to other hosts.
    """

    def __init__(
        self, backend: NativeBackend, device: torch.device, nbytes: int, handle: MemoryHandle, region: DeviceRange
    ) -> None:
        super().__init__(backend, device, nbytes, region.address)
        self.handle, self._region = handle, region
        self.extent = region.pieces[0][1]
        self.fabric = backend.has_fabric(backend.driver.ordinal(device))


class NativeMapping(SharedMapping):
    """All ranks' memory, with signals on streams, and a multicast object once somebody asks for it.

    Args:
        backend: Whose it is.
        allocation: This rank's memory.
        group: The group that met.
        region: Where the memory of the other ranks is mapped, with a gap for this one's.
        pads: Where the signal pads are.
        slot: This rank's pad.
        cards: Of each rank.
    """

    _region: DeviceRange

    def __init__(
        self,
        backend: NativeBackend,
        allocation: NativeAllocation,
        group: Group,
        region: DeviceRange,
        pads: GroupPads,
        slot: Slot,
        cards: list[dict[str, Any]],
    ) -> None:
        addresses = pads.addresses(cards, group, slot)
        super().__init__(backend, group, allocation.device, region, allocation.extent, allocation.pointer, addresses)
        self._driver = backend.driver
        self._memory, self._fabric = allocation.handle, allocation.fabric
        self._group_pads = pads  # keeps the blocks mapped
        self._no_multicast = no_multicast(cards)
        self._multicast: Multicast | None = None
        self._lock = threading.Lock()

    def signals_at(self, pads: Sequence[int]) -> CudaSignals:
        return CudaSignals(self.group, self.device, pads)

    def contiguous(self) -> tuple[int, int]:
        # The own memory is put into its gap now: at each rendezvous this would take as long as mapping a peer's.
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
        pads: Signal pads of each group, by GPU.
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
        self.pads: weakref.WeakKeyDictionary[Group, dict[int, GroupPads]] = weakref.WeakKeyDictionary()

    def pad_nbytes(self, size: int) -> int:
        return CudaSignals.nbytes(size)

    @functools.cached_property
    def driver(self) -> Driver:
        """The CUDA driver; made when it is first needed, for it initialises CUDA.

        Raises:
            BackendUnavailableError: What is missing here.
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
                hint="see the text above; a container may forbid it, or the GPU may be out of memory or have failed",
            ) from error
        if not seen:
            raise BackendUnavailableError(
                "on this GPU a store is not visible through a second mapping of the same memory",
                hint="run `symmem doctor` again on an idle machine, and look at `dmesg` for Xid errors",
            )

    def _pass_and_map(self, device: torch.device) -> bool:
        ordinal = self.driver.ordinal(device)
        allocation = self.allocate(1, device, None)
        with self.driver.on(ordinal):
            reserve = functools.partial(self._reserve, ordinal)
            return pass_and_map(allocation.handle.descriptor(), allocation.extent, reserve, allocation.tensor())

    @functools.cache  # noqa: B019  # a backend lives as long as its process
    def has_fabric(self, ordinal: int) -> bool:
        """Whether memory of a GPU can be exported to other hosts, shown by doing it: the attribute alone lies."""
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
                f"{nbytes} bytes of memory on GPU {ordinal} ({self.driver.name(ordinal)}) cannot be had: {error.what}",
                hint=error.hint,
            ) from error

    def _reserve(self, ordinal: int, nbytes: int) -> DeviceRange:
        return DeviceRange(self.driver, ordinal, nbytes, self._granularity(ordinal))

    def _map_own(self, ordinal: int, nbytes: int) -> tuple[MemoryHandle, DeviceRange]:
        """New memory, mapped in this process alone; not zeroed."""
        with contextlib.ExitStack() as undo:
            handle = self._create(ordinal, nbytes)
            undo.callback(handle.close)
            region = self._reserve(ordinal, nbytes)
            undo.callback(region.close)
            region.map(0, handle, nbytes)
            region.open()
            undo.pop_all()
        return handle, region

    def allocate(self, nbytes: int, device: torch.device, group: Group | None) -> NativeAllocation:
        # Zeroed before it returns, on a stream of its own: so the memory is of use on any stream, a peer can never
        # store into it before it is zeroed, and an allocation amid a stream capture does not become part of the graph.
        ordinal = self.driver.ordinal(device)
        with self.driver.on(ordinal), contextlib.ExitStack() as undo:
            free_what_is_left()
            extent = max(round_up(nbytes, self._granularity(ordinal)), self._granularity(ordinal))
            handle, region = self._map_own(ordinal, extent)
            undo.callback(handle.close)
            undo.callback(region.close)
            self.driver.zero(ordinal, region.address, extent)
            undo.pop_all()
        return NativeAllocation(self, device, nbytes, handle, region)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> NativeMapping:
        # The driver does one of these calls at a time, over all processes of the host: their number is what a
        # rendezvous costs. A rank imports and maps each peer's memory, and nothing else but new blocks of pads.
        assert isinstance(allocation, NativeAllocation)
        driver, group = self.driver, collective.group
        ordinal = driver.ordinal(allocation.device)
        pads = self.pads.setdefault(group, {}).setdefault(ordinal, GroupPads())
        with driver.on(ordinal), contextlib.ExitStack() as undo:
            slot = pads.take(_pad_nbytes(group.size), functools.partial(self._make_block, ordinal, group.size))
            on_failure = undo.enter_context(contextlib.ExitStack())
            on_failure.callback(slot.give_back)
            # Before the ranks agree that all have mapped: until then nobody signals.
            driver.zero(ordinal, slot.address, _pad_nbytes(group.size))
            card = gpu_card(driver, ordinal, allocation.extent, why_not(driver, ordinal, group.settings))
            card["pad"] = slot.card
            received = undo.enter_context(
                exchange_handles(driver, collective, "map", card, (allocation.handle, *slot.handles), allocation.fabric)
            )
            cards, tokens = [card for card, _tokens in received], [tokens for _card, tokens in received]
            check_cards(driver, cards, ordinal, group)
            pads.map(cards, tokens, group, functools.partial(self._reserve, ordinal))
            region = self._map_peers(ordinal, allocation.extent, tokens, cards, group)
            on_failure.callback(region.close)
            mapping = NativeMapping(self, allocation, group, region, pads, slot, cards)
            if any(len(sent) > 1 for sent in tokens):  # the same on all ranks
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
        cards: Sequence[dict[str, Any]],
        group: Group,
    ) -> DeviceRange:
        """All ranks' memory side by side, with a gap where this rank's would be."""
        region, peers = self._reserve(ordinal, group.size * extent), mapping_order(group)
        try:
            for peer in peers:
                region.place(peer * extent, tokens[peer][0], extent)
            region.open()
        except SymmemError as error:
            named = cannot_map(error, region, peers, cards, group)
            region.close()
            raise named from error
        return region
