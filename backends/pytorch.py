"""PyTorch's symmetric memory (``torch.distributed._symmetric_memory``), with one backend per transport.

``pytorch_cuda`` maps the memory of peers by CUDA virtual memory management, ``pytorch_nccl`` by NCCL windows,
``pytorch_nvshmem`` by NVSHMEM. A process can use one of these transports; the first allocation decides it. Other
backends work in the same process.

On all three, signals are symmem's, in pads behind the user's bytes (:mod:`symmem.backends.pads`). The barrier of
torch's NCCL transport is not implemented ("NYI"), and the barrier of its NVSHMEM transport does nothing. torch's
operators use torch's pads, so they do not conflict with ours. They work on our tensors, because torch finds its
allocation by the address.

torch's NVSHMEM transport allocates collectively over all ranks of the job. At a rendezvous of any group it makes a pad
collectively over all ranks, and it frees collectively when a tensor is collected. So the backend makes the rendezvous
over the default process group directly after the allocation. Other groups only translate ranks, and freeing is delayed
until the next allocation (:mod:`symmem.backends.collective_heap`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from symmem.backends import gpu
from symmem.backends.base import Allocation, Backend, Capability, Collective, RankGroup
from symmem.backends.collective_heap import CollectiveHeap, job_group
from symmem.backends.pads import PaddedMapping, PadSlots, padded
from symmem.backends.signal_kernels import pad_nbytes
from symmem.backends.torch_transport import BACKENDS, TorchTransport, backend_of, connect
from symmem.errors import GroupError, OutOfMemoryError, RendezvousError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "TorchAllocation",
    "TorchBackend",
    "TorchMapping",
    "TorchNcclBackend",
    "TorchNvshmemAllocation",
    "TorchNvshmemBackend",
]

_TRANSPORTS = {name: transport for transport, name in BACKENDS.items()}


class TorchAllocation(Allocation):
    """Memory of a torch transport.

    Attributes:
        memory: torch's tensor, including our pads. torch frees it with its last reference.
        slots: The pads behind the user's bytes.
    """

    def __init__(
        self, backend: TorchBackend, device: torch.device, nbytes: int, memory: torch.Tensor, slots: PadSlots
    ) -> None:
        super().__init__(backend, device, nbytes, memory.data_ptr())
        self.memory, self.slots = memory, slots


class TorchMapping(PaddedMapping):
    """The memory of all ranks of a group.

    Args:
        allocation: See :class:`PaddedMapping`.
        group: See :class:`Mapping`.
        pointers: See :class:`Mapping`.
        pads: See :class:`SignalledMapping`.
        multicast: torch's multicast address of the memory, or 0.
        keep: torch's handle, which keeps the memory of peers mapped.
    """

    def __init__(
        self,
        allocation: Allocation,
        group: RankGroup,
        pointers: Sequence[int],
        pads: Sequence[int],
        multicast: int,
        keep: object,
    ) -> None:
        super().__init__(allocation, group, pointers, pads)
        self._multicast, self._keep = multicast, keep

    def multicast(self) -> int:
        """See :meth:`Mapping.multicast`. Local: torch made the address in the rendezvous, or none."""
        self.check_multicast_is_on()
        if not self._multicast:
            self.no_multicast(
                "torch gives no address for this group: its transport, the GPUs or the group have no multicast"
            )
        return self._multicast


class _TorchBackend(Backend):
    """The common part of the three backends."""

    device_type = "cuda"
    capabilities = (
        Capability.REMOTE_TENSOR
        | Capability.CONTIGUOUS_VIEW
        | Capability.SIGNALS
        | Capability.ONE_SIDED
        | Capability.SECOND_GROUP
    )

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.transport = TorchTransport(_TRANSPORTS[name])
        if self.transport.name != "NCCL":
            self.capabilities = self.capabilities | Capability.MULTICAST

    def pad_nbytes(self, size: int) -> int:
        """See :meth:`Backend.pad_nbytes`."""
        return pad_nbytes(size)

    def probe(self) -> None:
        """See :meth:`Backend.probe`. It only checks that torch has the transport.

        An allocation would freeze torch's transport for the life of this process, and a rendezvous needs a process
        group. If they fail later, they raise named errors.
        """
        gpu.require_gpu(self.name)
        self.transport.check()


class TorchBackend(_TorchBackend):
    """Backend ``pytorch_cuda``: allocation is local, a rendezvous maps the group's memory."""

    def allocate(self, nbytes: int, device: torch.device, group: RankGroup | None) -> Allocation:
        """See :meth:`Backend.allocate`. The first allocation freezes torch's transport for this process.

        Raises:
            BackendUnavailableError: Another transport is frozen already.
        """
        device = gpu.check_device(self.name, device)
        slots = PadSlots(nbytes)
        with gpu.on_device(device):
            self.transport.activate(device)
            room = gpu.free_memory(device)
            if slots.extent > room:
                raise OutOfMemoryError(
                    f"{nbytes} bytes on {device} were asked for, {room} are free",
                    hint="free tensors, or let torch release its unused cache: torch.cuda.empty_cache()",
                )
            memory = self.transport.empty(slots.extent, device).zero_()
            gpu.finish_stream(device)  # zero it before any peer can see it
        return TorchAllocation(self, device, nbytes, memory, slots)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> TorchMapping:
        """See :meth:`Backend.rendezvous`.

        Raises:
            GroupError: The group has no process group, or NCCL is needed and its backend for CUDA is not ``nccl``.
            RendezvousError: The ranks are not on one host.
        """
        assert isinstance(allocation, TorchAllocation)
        group, device = collective.group, allocation.device
        process_group = self._check_group(collective, device)
        # Ensure that all ranks have come this far: torch waits for them without our timeout.
        with collective.exchange("check", str(self.transport.rendezvous_count).encode()) as received:
            count = max(int(contribution.payload) for contribution in received)
        with gpu.on_device(device):
            self.transport.catch_up(count, device)
            if self.transport.name == "NCCL":
                connect(process_group, device)
            handle, pointers = self.transport.rendezvous(allocation.memory, process_group)
            # Tensors of this rank already use this address. NCCL's window has another address for the same memory.
            pointers[group.rank] = allocation.pointer
            return padded(
                allocation.slots,
                pointers,
                collective,
                lambda pads: TorchMapping(allocation, group, pointers, pads, handle.multicast_ptr, handle),
            )

    def _check_group(self, collective: Collective, device: torch.device) -> ProcessGroup:
        self.transport.obey(collective.group.settings)
        process_group = _process_group(self.name, collective.group)
        if self.transport.name == "NCCL" and (found := backend_of(process_group, device)) != "nccl":
            raise GroupError(
                "torch's NCCL transport needs a process group with the backend nccl for CUDA; "
                f"{collective.group.name!r} has {found}",
                hint="init_process_group('cpu:gloo,cuda:nccl'), or new_group(..., backend='cpu:gloo,cuda:nccl')",
            )
        if not collective.passes_descriptors:
            raise RendezvousError(
                f"the ranks of {collective.group.name!r} are on several hosts or in separate containers, and torch's "
                f"{self.transport.name} transport works within one host only",
                hint="choose a backend that spans hosts (`nvshmem`), or a group within one host",
            )
        return process_group


@dataclass
class _Piece:
    """Memory that all ranks allocated together, with the results of torch's rendezvous over all ranks."""

    memory: torch.Tensor
    pointers: tuple[int, ...]
    multicast: int


class _CollectiveAllocation(_TorchBackend):
    """A backend with memory that all ranks of the job allocate together, and that is freed after all release it."""

    capabilities = _TorchBackend.capabilities | Capability.COLLECTIVE_ALLOCATION

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._job: RankGroup | None = None
        self._device: torch.device | None = None
        self._heap: CollectiveHeap[_Piece] = CollectiveHeap(name, self._release, self._quiesce)

    def allocate(self, nbytes: int, device: torch.device, group: RankGroup | None) -> Allocation:
        """See :meth:`Backend.allocate`. Collective over the default process group.

        Raises:
            GroupError: No default process group exists.
            BackendUnavailableError: Another transport is frozen already.
            MismatchError, PeerTimeoutError, PeerLostError: Ranks ask for different sizes, or do not come.
        """
        self._device = device = gpu.check_device(self.name, device)
        job = job_group(self.name, group, self._job)
        process_group = _process_group(self.name, job)
        self._job = job
        slots = PadSlots(nbytes)
        with gpu.on_device(device):
            number, piece = self._heap.allocate(
                job,
                slots.extent,
                lambda collective: self._make(slots.extent, device, collective, process_group),
                lambda: gpu.free_memory(device),
            )
        allocation = self._allocation(piece, nbytes, slots)
        weakref.finalize(allocation, self._heap.release, number).atexit = False
        return allocation

    def _allocation(self, piece: _Piece, nbytes: int, slots: PadSlots) -> Allocation:
        raise NotImplementedError

    def _make(self, nbytes: int, device: torch.device, collective: Collective, process_group: ProcessGroup) -> _Piece:
        raise NotImplementedError

    def _release(self, piece: _Piece) -> None:
        """Free memory that all ranks have released, or keep it for reuse."""
        raise NotImplementedError

    def _quiesce(self) -> None:
        assert self._device is not None
        gpu.synchronize(self._device)


class TorchNvshmemAllocation(Allocation):
    """Memory of torch's NVSHMEM transport. The heap keeps torch's tensor until all ranks have released it.

    Attributes:
        slots: The pads behind the user's bytes.
        world_pointers: Address of every global rank's memory; 0 if it is not reachable.
        world_multicast: Multicast address over all ranks of the job, or 0.
    """

    def __init__(self, backend: Backend, device: torch.device, nbytes: int, piece: _Piece, slots: PadSlots) -> None:
        super().__init__(backend, device, nbytes, piece.memory.data_ptr())
        self.slots = slots
        self.world_pointers, self.world_multicast = piece.pointers, piece.multicast


class TorchNvshmemBackend(_CollectiveAllocation):
    """Backend ``pytorch_nvshmem``: allocation is collective over the job, a rendezvous translates ranks."""

    def _allocation(self, piece: _Piece, nbytes: int, slots: PadSlots) -> TorchNvshmemAllocation:
        return TorchNvshmemAllocation(self, piece.memory.device, nbytes, piece, slots)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> TorchMapping:
        """See :meth:`Backend.rendezvous`. It does not call torch, so other ranks of the job need not take part."""
        assert isinstance(allocation, TorchNvshmemAllocation)
        group = collective.group
        with collective.exchange("translate", str(dist.get_rank()).encode()) as received:
            ranks = [int(contribution.payload) for contribution in received]
        pointers = [allocation.world_pointers[rank] for rank in ranks]
        is_whole_job = ranks == list(range(len(allocation.world_pointers)))
        multicast = allocation.world_multicast if is_whole_job else 0
        return padded(
            allocation.slots,
            pointers,
            collective,
            lambda pads: TorchMapping(allocation, group, pointers, pads, multicast, None),
        )

    def _make(self, nbytes: int, device: torch.device, collective: Collective, process_group: ProcessGroup) -> _Piece:
        self.transport.activate(device)
        self.transport.obey(collective.group.settings)
        collective.exchange("activate").close()  # no rank waits in NVSHMEM for a rank that failed before
        memory = self.transport.empty(nbytes, device)
        # torch frees it collectively with its last reference. Only `_release` may do that, not an error or the exit.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
        memory.zero_()
        gpu.finish_stream(device)  # zero it before any peer can see it
        if process_group.size() == 1:  # torch makes no team of one
            return _Piece(memory, (memory.data_ptr(),), 0)
        handle, pointers = self.transport.rendezvous(memory, process_group)
        return _Piece(memory, tuple(pointers), handle.multicast_ptr)

    def _release(self, piece: _Piece) -> None:
        # The heap holds the last reference.
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(piece.memory))
        del piece.memory


class TorchNcclBackend(_CollectiveAllocation, TorchBackend):
    """Backend ``pytorch_nccl``: released memory is reused, and never returned to NCCL.

    torch frees such memory (ncclMemFree) while NCCL's windows over it are still registered. A later allocation at the
    same address is then reached through the stale window: illegal accesses with torch 2.11 and NCCL 2.28.9. Reused
    memory keeps its windows, and torch finds them by process group. This is correct only if all ranks reuse the same
    pieces, so they allocate together.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._spare: dict[int, list[_Piece]] = {}  # by bytes; the same on all ranks

    def _allocation(self, piece: _Piece, nbytes: int, slots: PadSlots) -> TorchAllocation:
        return TorchAllocation(self, piece.memory.device, nbytes, piece.memory, slots)

    def _make(self, nbytes: int, device: torch.device, collective: Collective, process_group: ProcessGroup) -> _Piece:
        self.transport.activate(device)
        spare = self._spare.get(nbytes)
        piece = spare.pop() if spare else _Piece(self.transport.empty(nbytes, device), (), 0)
        piece.memory.zero_()
        gpu.finish_stream(device)  # zero it before any peer can see it
        return piece

    def _release(self, piece: _Piece) -> None:
        self._spare.setdefault(piece.memory.numel(), []).append(piece)


def _process_group(backend: str, group: RankGroup) -> ProcessGroup:
    process_group: ProcessGroup | None = group.process_group
    if process_group is None:
        raise GroupError(
            f"the backend {backend!r} needs process groups of torch.distributed, and {group.name!r} was made from "
            "a store, or its process group was destroyed",
            hint="call torch.distributed.init_process_group(), and pass a process group",
            rank=group.rank,
            group=group.name,
        )
    return process_group
