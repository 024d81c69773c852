"""PyTorch's own symmetric memory (``torch.distributed._symmetric_memory``), one backend for each of its transports.

``pytorch_cuda`` maps peers' memory by CUDA virtual memory management, ``pytorch_nccl`` by NCCL windows,
``pytorch_nvshmem`` by NVSHMEM. A process has one of these transports, frozen at the first allocation; other backends
work beside it.

Signals are ours on all three, in our own pads behind the user's bytes (:mod:`symmem.backends.pads`): torch's NCCL
transport has no barrier ("NYI"), that of its NVSHMEM transport does nothing. torch's operators, which use torch's
pads, never meet our words; they work on the tensors as they are, since torch finds its allocation by the address.

torch's NVSHMEM transport allocates, and makes its own pad at a rendezvous, collectively over all ranks of the job,
whatever the group; and it frees collectively when a tensor is collected. So here an allocation is rendezvoused over
the default process group at once, other groups only translate ranks, and freeing is put off until all ranks meet
(:mod:`symmem.backends.collective_heap`).
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
from symmem.backends.base import Allocation, Backend, Capability, Collective, Group
from symmem.backends.collective_heap import CollectiveHeap, job_group
from symmem.backends.pads import PaddedMapping, PadSlots, padded
from symmem.backends.signal_kernels import pad_words
from symmem.backends.torch_transport import BACKENDS, Transport, backend_of, connect
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
        memory: torch's tensor, our pads included; torch frees it with its last reference.
        slots: Room for our pads behind the user's bytes.
    """

    def __init__(
        self, backend: TorchBackend, device: torch.device, nbytes: int, memory: torch.Tensor, slots: PadSlots
    ) -> None:
        super().__init__(backend, device, nbytes, memory.data_ptr())
        self.memory, self.slots = memory, slots


class TorchMapping(PaddedMapping):
    """The memory of all ranks of a group.

    Args:
        backend: See :class:`PaddedMapping`, as for ``group``, ``device``, ``pointers`` and ``pads``.
        group: Ditto.
        device: Ditto.
        pointers: Ditto.
        pads: Ditto.
        multicast: torch's multicast address of the memory, or 0.
        keep: torch's handle, which keeps peers' memory mapped.
    """

    def __init__(
        self,
        backend: Backend,
        group: Group,
        device: torch.device,
        pointers: Sequence[int],
        pads: Sequence[int],
        multicast: int,
        keep: object,
    ) -> None:
        super().__init__(backend, group, device, pointers, pads)
        self._multicast, self._keep = multicast, keep

    def multicast(self) -> int:
        """See :meth:`Mapping.multicast`. Local: torch set it up, or not, in the rendezvous."""
        self.check_multicast_is_on()
        if not self._multicast:
            why = "torch gives no address for this group: its transport, the GPUs or the group have no multicast"
            self.no_multicast(why)
        return self._multicast


class _TorchBackend(Backend):
    """What the three have in common."""

    device_type = "cuda"
    capabilities = Capability.REMOTE_TENSOR | Capability.SIGNALS | Capability.ONE_SIDED | Capability.SECOND_GROUP

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.transport = Transport(_TRANSPORTS[name])
        if self.transport.name != "NCCL":
            self.capabilities = self.capabilities | Capability.MULTICAST

    def pad_nbytes(self, size: int) -> int:
        """See :meth:`Backend.pad_nbytes`."""
        return 4 * pad_words(size)

    def probe(self) -> None:
        """See :meth:`Backend.probe`. Asks whether torch has the transport, no more.

        An allocation would freeze torch's transport for the life of this process, and a rendezvous needs a process
        group; the first of each tell by name what fails.
        """
        gpu.require_gpu(self.name)
        self.transport.check()


class TorchBackend(_TorchBackend):
    """Backend ``pytorch_cuda``: allocation is local, a rendezvous maps the group's memory."""

    def allocate(self, nbytes: int, device: torch.device, group: Group | None) -> Allocation:
        """See :meth:`Backend.allocate`. The first one freezes torch's transport for this process.

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
                    hint="free tensors, or let torch give back what it holds in reserve: torch.cuda.empty_cache()",
                )
            memory = self.transport.empty(slots.extent, device).zero_()
            gpu.finish_stream(device)  # no peer may see it before
        return TorchAllocation(self, device, nbytes, memory, slots)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> TorchMapping:
        """See :meth:`Backend.rendezvous`.

        Raises:
            GroupError: The group has no process group, or with NCCL, that has no ``nccl`` backend for CUDA.
            RendezvousError: The ranks are not on one host.
        """
        assert isinstance(allocation, TorchAllocation)
        group, device = collective.group, allocation.device
        process_group = self._check_group(collective, device)
        # Before anything of torch waits for the others, without this timeout: all ranks have got as far as here.
        with collective.exchange("check", str(self.transport.meetings).encode()) as received:
            meetings = max(int(contribution.payload) for contribution in received)
        with gpu.on_device(device):
            self.transport.catch_up(meetings, device)
            if self.transport.name == "NCCL":
                connect(process_group, device)
            handle, pointers = self.transport.rendezvous(allocation.memory, process_group)
            # This rank's own memory keeps the address that its tensors have; NCCL's window has another one.
            pointers[group.rank] = allocation.pointer
            return padded(
                allocation.slots,
                pointers,
                collective,
                lambda pads: TorchMapping(self, group, device, pointers, pads, handle.multicast_ptr, handle),
            )

    def _check_group(self, collective: Collective, device: torch.device) -> ProcessGroup:
        self.transport.obey(collective.group.settings)
        process_group = _process_group(self.name, collective.group)
        if self.transport.name == "NCCL" and (found := backend_of(process_group, device)) != "nccl":
            raise GroupError(
                f"torch's NCCL transport needs a process group whose backend for CUDA is nccl; that of "
                f"{collective.group.name!r} is {found}",
                hint="init_process_group('cpu:gloo,cuda:nccl'), or new_group(..., backend='cpu:gloo,cuda:nccl')",
            )
        if not collective.passes_descriptors:
            raise RendezvousError(
                f"the ranks of {collective.group.name!r} are on several hosts, or in containers apart, and torch's "
                f"{self.transport.name} transport joins processes of one host",
                hint="choose a backend that spans hosts (`nvshmem`), or a group within one host",
            )
        return process_group


@dataclass
class _Piece:
    """Memory of NVSHMEM's heap, as torch's rendezvous over the default process group told."""

    memory: torch.Tensor
    pointers: tuple[int, ...]
    multicast: int


class _AllocatingTogether(_TorchBackend):
    """Those whose memory all ranks of the job allocate together, and release when the last rank has."""

    capabilities = _TorchBackend.capabilities | Capability.COLLECTIVE_ALLOCATION

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._job: Group | None = None
        self._device: torch.device | None = None
        self._heap: CollectiveHeap[_Piece] = CollectiveHeap(name, self._release, self._quiesce)

    def allocate(self, nbytes: int, device: torch.device, group: Group | None) -> Allocation:
        """See :meth:`Backend.allocate`. Collective over the default process group.

        Raises:
            GroupError: There is none.
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
        """What becomes of memory that all ranks have released."""
        raise NotImplementedError

    def _quiesce(self) -> None:
        assert self._device is not None
        gpu.synchronize(self._device)


class TorchNvshmemAllocation(Allocation):
    """Memory of torch's NVSHMEM transport. The heap keeps torch's tensor, until all ranks have released it.

    Attributes:
        slots: Room for our pads behind the user's bytes.
        world_pointers: Address of each global rank's memory, 0 if not reachable.
        world_multicast: Multicast address over all ranks of the job, or 0.
    """

    def __init__(self, backend: Backend, device: torch.device, nbytes: int, piece: _Piece, slots: PadSlots) -> None:
        super().__init__(backend, device, nbytes, piece.memory.data_ptr())
        self.slots = slots
        self.world_pointers, self.world_multicast = piece.pointers, piece.multicast


class TorchNvshmemBackend(_AllocatingTogether):
    """Backend ``pytorch_nvshmem``: allocation is collective over the job, a rendezvous translates ranks."""

    def _allocation(self, piece: _Piece, nbytes: int, slots: PadSlots) -> TorchNvshmemAllocation:
        return TorchNvshmemAllocation(self, piece.memory.device, nbytes, piece, slots)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> TorchMapping:
        """See :meth:`Backend.rendezvous`. Calls nothing of torch: the job's other ranks need not come."""
        assert isinstance(allocation, TorchNvshmemAllocation)
        group, device = collective.group, allocation.device
        with collective.exchange("translate", str(dist.get_rank()).encode()) as received:
            ranks = [int(contribution.payload) for contribution in received]
        pointers = [allocation.world_pointers[rank] for rank in ranks]
        everybody = ranks == list(range(len(allocation.world_pointers)))
        multicast = allocation.world_multicast if everybody else 0
        return padded(
            allocation.slots,
            pointers,
            collective,
            lambda pads: TorchMapping(self, group, device, pointers, pads, multicast, None),
        )

    def _make(self, nbytes: int, device: torch.device, collective: Collective, process_group: ProcessGroup) -> _Piece:
        self.transport.activate(device)
        self.transport.obey(collective.group.settings)
        collective.exchange("activate").close()  # no rank waits in NVSHMEM for one that failed until here
        memory = self.transport.empty(nbytes, device)
        # torch frees it collectively with the last reference: that is up to `_release`, and to no error or exit.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
        memory.zero_()
        gpu.finish_stream(device)  # no peer may see it before
        if process_group.size() == 1:  # torch makes no team of one
            return _Piece(memory, (memory.data_ptr(),), 0)
        handle, pointers = self.transport.rendezvous(memory, process_group)
        return _Piece(memory, tuple(pointers), handle.multicast_ptr)

    def _release(self, piece: _Piece) -> None:
        # The heap's own reference is the last one.
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(piece.memory))
        del piece.memory


class TorchNcclBackend(_AllocatingTogether, TorchBackend):
    """Backend ``pytorch_nccl``: memory that was released is used again, and never given back to NCCL.

    torch frees such memory (ncclMemFree) while NCCL's windows over it are still registered. What is allocated next at
    that address is then reached through the stale window: illegal accesses, with torch 2.11 and NCCL 2.28.9. Memory
    that is used again keeps its windows, which torch finds by process group; that is right only if all ranks use the
    same pieces again, which is why they allocate together.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._spare: dict[int, list[_Piece]] = {}  # by bytes; alike on all ranks

    def _allocation(self, piece: _Piece, nbytes: int, slots: PadSlots) -> TorchAllocation:
        return TorchAllocation(self, piece.memory.device, nbytes, piece.memory, slots)

    def _make(self, nbytes: int, device: torch.device, collective: Collective, process_group: ProcessGroup) -> _Piece:
        self.transport.activate(device)
        spare = self._spare.get(nbytes)
        piece = spare.pop() if spare else _Piece(self.transport.empty(nbytes, device), (), 0)
        piece.memory.zero_()
        gpu.finish_stream(device)  # no peer may see it before
        return piece

    def _release(self, piece: _Piece) -> None:
        self._spare.setdefault(piece.memory.numel(), []).append(piece)


def _process_group(backend: str, group: Group) -> ProcessGroup:
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
