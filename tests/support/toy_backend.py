"""A complete third-party backend: anonymous memory files, mapped with Python's mmap."""

import ctypes
import mmap
import os
import weakref

import torch

from symmem.backends.base import Allocation, Backend, Capability, Collective, Group, Mapping


def _map(descriptor: int) -> tuple[int, mmap.mmap]:
    """Map a file; returns its address, and the object that keeps it mapped."""
    memory = mmap.mmap(descriptor, 0)
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(memory)), memory


class ToyAllocation(Allocation):
    def __init__(self, backend: Backend, nbytes: int) -> None:
        self.file = os.memfd_create("symmem-toy")
        weakref.finalize(self, os.close, self.file)
        os.truncate(self.file, max(nbytes, 1))
        pointer, self.memory = _map(self.file)
        super().__init__(backend, torch.device("cpu"), nbytes, pointer)


class ToyMapping(Mapping):
    def __init__(self, allocation: ToyAllocation, group: Group, files: list[int]) -> None:
        pointers, self.memory = map(list, zip(*map(_map, files), strict=True))
        pointers[group.rank] = allocation.pointer  # the address of this rank's tensors
        super().__init__(allocation.backend, group, allocation.device, pointers)


class ToyBackend(Backend):
    device_type = "cpu"
    capabilities = Capability.REMOTE_TENSOR | Capability.ONE_SIDED

    def probe(self) -> None:
        ToyAllocation(self, 1)

    def allocate(self, nbytes: int, device: torch.device, group: Group | None) -> ToyAllocation:
        return ToyAllocation(self, nbytes)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> ToyMapping:
        assert isinstance(allocation, ToyAllocation)
        with collective.exchange("files", b"", [allocation.file]) as received:
            return ToyMapping(allocation, collective.group, [rank.descriptors[0] for rank in received])
