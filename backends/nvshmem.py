"""NVSHMEM through NVSHMEM4Py: symmetric memory on NVIDIA GPUs, within one host and across hosts.

A process initialises NVSHMEM once, over all ranks of the job, for one GPU. The first allocation does this, see
:mod:`symmem.backends.nvshmem_job`.

Allocation and freeing are collective over the job. Freeing is delayed until the next allocation, see
:mod:`symmem.backends.collective_heap`. A rendezvous is collective over its group only: the ranks exchange their PE
numbers, because NVSHMEM has already mapped all reachable memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from symmem.backends import gpu
from symmem.backends.base import Allocation, Backend, Capability, Collective, RankGroup, tensor_at
from symmem.backends.collective_heap import CollectiveHeap, job_group
from symmem.backends.nvshmem_job import start
from symmem.backends.nvshmem_library import NvshmemLibrary, Staging
from symmem.backends.pads import PaddedMapping, PadSlots, padded
from symmem.backends.signal_kernels import pad_nbytes
from symmem.errors import InvalidArgumentError, OutOfMemoryError

__all__ = ["NvshmemAllocation", "NvshmemBackend", "NvshmemMapping"]


class NvshmemAllocation(Allocation):
    """Memory on the symmetric heap. It is freed after all ranks have lost their last reference."""

    def __init__(self, backend: NvshmemBackend, device: torch.device, nbytes: int, pointer: int) -> None:
        super().__init__(backend, device, nbytes, pointer)
        self.slots = PadSlots(nbytes)


class NvshmemMapping(PaddedMapping):
    """The memory of all ranks of a group. NVSHMEM copies to and from peers that are not load/store reachable.

    Args:
        allocation: See :class:`PaddedMapping`. NVSHMEM uses its address as the address on every PE.
        group: See :class:`Mapping`.
        pointers: See :class:`Mapping`.
        pads: See :class:`SignalledMapping`.
        pes: Every rank's PE.
    """

    backend: NvshmemBackend

    def __init__(
        self,
        allocation: Allocation,
        group: RankGroup,
        pointers: Sequence[int],
        pads: Sequence[int],
        pes: Sequence[int],
    ) -> None:
        super().__init__(allocation, group, pointers, pads)
        self._pes = tuple(pes)
        self._own = allocation.pointer

    def put(self, rank: int, offset: int, source: torch.Tensor) -> None:
        """See :meth:`Mapping.put`."""
        with gpu.on_device(self.device):
            self.backend.staging.put(self._own + offset, source, self._pes[rank])

    def get(self, rank: int, offset: int, out: torch.Tensor) -> None:
        """See :meth:`Mapping.get`."""
        with gpu.on_device(self.device):
            self.backend.staging.get(out, self._own + offset, self._pes[rank])

    def multicast(self) -> int:
        """See :meth:`Mapping.multicast`. Local."""
        self.check_multicast_is_on()
        if self._pes != tuple(range(self.backend.library.n_pes())):
            self.no_multicast("NVSHMEM has it only for all ranks of the job, in their order, not for this group")
        pointer = self.backend.library.multicast_pointer(self._own)
        if not pointer:
            self.no_multicast("NVSHMEM gives no address: the GPUs have no NVLink SHARP, or it was switched off")
        return pointer


class NvshmemBackend(Backend):
    """Backend ``nvshmem``."""

    device_type = "cuda"
    capabilities = (
        Capability.REMOTE_TENSOR
        | Capability.CONTIGUOUS_VIEW
        | Capability.MULTICAST
        | Capability.SIGNALS
        | Capability.ONE_SIDED
        | Capability.MULTI_HOST
        | Capability.SECOND_GROUP
        | Capability.COLLECTIVE_ALLOCATION
    )

    library: NvshmemLibrary
    staging: Staging

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._job: RankGroup | None = None
        self._device: torch.device | None = None
        self._heap: CollectiveHeap[int] = CollectiveHeap(
            name, lambda pointer: self.library.free(pointer), lambda: gpu.synchronize(self._bound())
        )

    def pad_nbytes(self, size: int) -> int:
        """See :meth:`Backend.pad_nbytes`."""
        return pad_nbytes(size)

    def probe(self) -> None:
        """See :meth:`Backend.probe`. It only loads the library and reads its version.

        An allocation would need all ranks of the job, and fix NVSHMEM's job for the life of this process.
        """
        gpu.require_gpu(self.name)
        self._load()

    def allocate(self, nbytes: int, device: torch.device, group: RankGroup | None) -> NvshmemAllocation:
        """See :meth:`Backend.allocate`. Collective over the job, with the job's ``rendezvous_timeout``.

        Raises:
            MismatchError, PeerTimeoutError, PeerLostError: Ranks ask for different sizes, or do not come.
            InvalidArgumentError: The GPU differs from the GPU of the first allocation.
        """
        device = gpu.check_device(self.name, device)
        self._load()
        job = job_group(self.name, group, self._job)
        with gpu.on_device(device):
            if self._device is None:
                staging = start(self.library, job, device, lambda nbytes: self._malloc(nbytes, device))
                self.staging, self._device = staging, device
            elif self._device != device:
                raise InvalidArgumentError(
                    f"NVSHMEM binds a process to one GPU, here {self._device}; {device} was asked for",
                    hint="run one process per GPU, and allocate on that GPU",
                )
            self._job = job
            extent = PadSlots(nbytes).extent
            number, pointer = self._heap.allocate(
                job, extent, lambda _: self._malloc(extent, device), lambda: gpu.free_memory(device)
            )
        allocation = NvshmemAllocation(self, device, nbytes, pointer)
        weakref.finalize(allocation, self._heap.release, number).atexit = False
        return allocation

    def rendezvous(self, allocation: Allocation, collective: Collective) -> NvshmemMapping:
        """See :meth:`Backend.rendezvous`."""
        assert isinstance(allocation, NvshmemAllocation)
        group, device = collective.group, allocation.device
        with collective.exchange("translate", str(self.library.pe()).encode()) as received:
            pes = [int(contribution.payload) for contribution in received]
        with gpu.on_device(device):
            pointers = [self.library.peer_pointer(allocation.pointer, pe) for pe in pes]
            return padded(
                allocation.slots,
                pointers,
                collective,
                lambda pads: NvshmemMapping(allocation, group, pointers, pads, pes),
            )

    def _load(self) -> None:
        if not hasattr(self, "library"):
            self.library = NvshmemLibrary()

    def _bound(self) -> torch.device:
        assert self._device is not None
        return self._device

    def _malloc(self, nbytes: int, device: torch.device) -> int:
        """Zeroed memory on the symmetric heap. Collective over the job."""
        pointer = self.library.malloc(nbytes)
        if not pointer:
            raise OutOfMemoryError(
                f"NVSHMEM could not allocate {nbytes} bytes on its symmetric heap",
                hint="allocate less, or raise NVSHMEM_SYMMETRIC_SIZE or NVSHMEM_MAX_MEMORY_PER_GPU",
            )
        tensor_at(pointer, nbytes, device, None).zero_()
        gpu.finish_stream(device)  # zero it before any peer can see it
        return pointer
