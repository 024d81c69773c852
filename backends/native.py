"""CUDA memory that ranks map into each other's address space, through the driver's virtual memory management.

An allocation is physical memory on one GPU, mapped in its process. At a rendezvous each rank exports it, as a file
descriptor that passes by SCM_RIGHTS as ``host``'s memory files do, or between hosts of one NVLink fabric as a
fabric handle, and maps that of all ranks side by side. Kernels then load and store over NVLink, with no library in
between. Each process holds a reference to what it has mapped, so freeing is local; see :mod:`symmem.backends.vmm`
for what happens to kernels that are still running.

A rank's own memory is mapped twice: where its tensors are, and in the row of all ranks' memory (``contiguous_view``).
Within one kernel CUDA does not order accesses through one with accesses through the other ("virtual aliasing").
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Sequence

import torch

from symmem.backends.base import Allocation, Backend, Capability, Collective, Group
from symmem.backends.cuda_signals import CudaSignals
from symmem.backends.driver import Driver, load_driver
from symmem.backends.gpu_cards import cannot_map, check_cards, gpu_card, no_multicast
from symmem.backends.libc import round_up
from symmem.backends.multicast import Multicast, granularity, why_not
from symmem.backends.shared import SharedMapping, Signals, pass_and_map
from symmem.backends.vmm import DeviceRange, Handle, Token, exchange_handles, free_what_is_left
from symmem.errors import (
    BackendUnavailableError,
    MulticastUnavailableError,
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
        self, backend: NativeBackend, device: torch.device, nbytes: int, handle: Handle, region: DeviceRange
    ) -> None:
        super().__init__(backend, device, nbytes, region.address)
        self.handle, self._region = handle, region
        self.extent = region.pieces[0][1]
        self.fabric = backend.has_fabric(backend.driver.ordinal(device))


class NativeMapping(SharedMapping):
    """All ranks' memory, with signals on streams, and a multicast object once somebody asks for it."""

    def __init__(
        self,
        backend: NativeBackend,
        allocation: NativeAllocation,
        group: Group,
        region: DeviceRange,
        tokens: Sequence[tuple[Token, ...]],
        pad: Handle,
        pad_stride: int,
        no_multicast: str,
    ) -> None:
        super().__init__(
            backend, group, allocation.device, region, tokens, allocation.extent, pad_stride, allocation.pointer
        )
        self._driver = backend.driver
        self._memory, self._fabric = allocation.handle, allocation.fabric
        self._pad = pad  # a fabric handle, unlike a descriptor, can be imported only while its exporter has this
        self._no_multicast = no_multicast
        self._multicast: Multicast | None = None

    @functools.cached_property
    def signals(self) -> Signals:
        return CudaSignals(self.group, self.device, self._pads)

    def check(self) -> None:
        signals = vars(self).get("signals")  # nothing can have failed of signals that were never made
        if isinstance(signals, CudaSignals):
            signals.check()

    def multicast(self) -> int:
        if self._no_multicast:
            raise MulticastUnavailableError(
                self._no_multicast,
                hint="store to each remote_tensor instead; `symmem config show` says where a setting comes from",
                rank=self.group.rank,
                group=self.group.name,
                step="multicast_ptr",
            )
        if self._multicast is None:
            ordinal = self._driver.ordinal(self.device)
            self._multicast = Multicast(self._driver, self.group, ordinal, self._memory, self._stride, self._fabric)
        return self._multicast.address


class NativeBackend(Backend):
    """Backend ``native``."""

    device_type = "cuda"
    capabilities = (
        Capability.REMOTE_TENSOR
        | Capability.CONTIGUOUS_VIEW
        | Capability.MULTICAST
        | Capability.SIGNALS
        | Capability.ONE_SIDED
        | Capability.SECOND_GROUP
    )

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
            descriptor = self.driver.export_descriptor(allocation.handle.value)
            try:
                reserve = functools.partial(self._reserve, ordinal)
                return pass_and_map(descriptor, allocation.extent, reserve, allocation.tensor())
            finally:
                os.close(descriptor)

    @functools.cache  # noqa: B019  # a backend lives as long as its process
    def has_fabric(self, ordinal: int) -> bool:
        """Whether memory of a GPU can be exported to other hosts, shown by doing it: the attribute alone lies."""
        if not self.driver.attribute(ordinal, "HANDLE_TYPE_FABRIC_SUPPORTED"):
            return False
        try:
            with self.driver.on(ordinal):
                handle = Handle(self.driver, self.driver.create(ordinal, self.driver.granularity(ordinal, True), True))
                Handle.take(self.driver, self.driver.export_fabric(handle.value))
        except SymmemError as error:
            log.debug("GPU %d advertises fabric handles, and they do not work: %s", ordinal, error)
            return False
        return True

    @functools.cache  # noqa: B019  # a backend lives as long as its process
    def _granularity(self, ordinal: int) -> int:
        memory = self.driver.granularity(ordinal, self.has_fabric(ordinal))
        return round_up(memory, granularity(self.driver, ordinal))

    def _create(self, ordinal: int, nbytes: int) -> Handle:
        try:
            return Handle(self.driver, self.driver.create(ordinal, nbytes, self.has_fabric(ordinal)))
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{nbytes} bytes of memory on GPU {ordinal} ({self.driver.name(ordinal)}) cannot be had: {error.what}",
                hint=error.hint,
            ) from error

    def _reserve(self, ordinal: int, nbytes: int) -> DeviceRange:
        return DeviceRange(self.driver, ordinal, nbytes, self._granularity(ordinal))

    def allocate(self, nbytes: int, device: torch.device, group: Group | None) -> NativeAllocation:
        # Zeroed before it returns, on a stream of its own: so the memory is of use on any stream, a peer can never
        # store into it before it is zeroed, and an allocation amid a stream capture does not become part of the graph.
        ordinal = self.driver.ordinal(device)
        with self.driver.on(ordinal), contextlib.ExitStack() as undo:
            free_what_is_left()
            extent = max(round_up(nbytes, self._granularity(ordinal)), self._granularity(ordinal))
            handle = self._create(ordinal, extent)
            undo.callback(handle.close)
            region = self._reserve(ordinal, extent)
            undo.callback(region.close)
            region.map(0, handle, extent)
            region.open()
            self.driver.zero(ordinal, region.address, extent)
            undo.pop_all()
        return NativeAllocation(self, device, nbytes, handle, region)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> NativeMapping:
        assert isinstance(allocation, NativeAllocation)
        driver, group, extent = self.driver, collective.group, allocation.extent
        ordinal = driver.ordinal(allocation.device)
        pad_stride = round_up(CudaSignals.nbytes(group.size), self._granularity(ordinal))
        with driver.on(ordinal), contextlib.ExitStack() as undo:
            pad = self._create(ordinal, pad_stride)
            on_failure = undo.enter_context(contextlib.ExitStack())
            on_failure.callback(pad.close)
            card = gpu_card(driver, ordinal, extent, why_not(driver, ordinal, group.settings))
            received = undo.enter_context(
                exchange_handles(driver, collective, "map", card, (allocation.handle, pad), allocation.fabric)
            )
            cards = [card for card, _tokens in received]
            tokens = [tokens for _card, tokens in received]
            check_cards(driver, cards, ordinal, group)
            region = self._reserve(ordinal, group.size * (extent + pad_stride))
            on_failure.callback(region.close)
            try:
                mapping = NativeMapping(self, allocation, group, region, tokens, pad, pad_stride, no_multicast(cards))
            except SymmemError as error:
                raise cannot_map(error, region, cards, group) from error
            # Before the ranks agree that all have mapped: until then nobody signals.
            driver.zero(ordinal, mapping.signal_pad(group.rank)[0], pad_stride)
            on_failure.pop_all()
        return mapping
