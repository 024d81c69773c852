"""Host shared memory: symmetric memory for CPU tensors, on any Linux machine, without a GPU or privileges.

An allocation is an anonymous memory file (memfd_create(2)). It has no name, so nothing remains on the system, however
its processes end. At a rendezvous every rank passes its file, and a second file for its signal pad, to the others, and
maps all of them side by side. The kernel frees the memory when no process maps it any more.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

import torch

from symmem.backends.base import Allocation, Backend, Capability, Collective, RankGroup
from symmem.backends.libc import PAGE, Region, available_memory, require_signals, round_up
from symmem.backends.memory_files import check_memory_file, make_memory_file
from symmem.backends.shared import SharedMapping, pass_and_map
from symmem.backends.signals import SharedSignals
from symmem.errors import BackendUnavailableError, OutOfMemoryError, SymmemError

__all__ = ["HostAllocation", "HostBackend", "HostMapping"]


class HostAllocation(Allocation):
    """A memory file and its mapping in this process.

    Args:
        backend: The backend.
        nbytes: The bytes that the caller asked for.
        pointer: Address of the mapping.
        descriptor: The memory file, kept for later rendezvous.
        extent: Its size: at least ``nbytes`` and one page, in whole pages.
        owner: Keeps the mapping.
    """

    def __init__(
        self, backend: HostBackend, nbytes: int, pointer: int, descriptor: int, extent: int, owner: object
    ) -> None:
        super().__init__(backend, torch.device("cpu"), nbytes, pointer)
        self.descriptor, self.extent, self._owner = descriptor, extent, owner

    @classmethod
    def make(cls, backend: HostBackend, nbytes: int) -> HostAllocation:
        """New memory."""
        extent = max(round_up(nbytes, PAGE), PAGE)
        region, file = Region(extent), make_memory_file(extent)
        pointer = region.place(0, file, extent)
        return cls(backend, nbytes, pointer, file, extent, region)


class _Files(Region):
    """A range of addresses for mappings of memory files."""

    def open(self) -> None:
        """Nothing to do: a mapped file is accessible at once."""


class HostMapping(SharedMapping):
    """The memory of all ranks, with signals between processes."""

    def __init__(
        self, backend: HostBackend, allocation: HostAllocation, group: RankGroup, files: list[tuple[int, ...]]
    ) -> None:
        extent, pad = allocation.extent, _pad_extent(group.size)
        first_pad = group.size * extent
        region = _Files(first_pad + group.size * pad)
        for rank, (memory, signals) in enumerate(files):
            check_memory_file(memory, extent, rank)
            check_memory_file(signals, pad, rank)
            region.place(rank * extent, memory, extent)
        pads = [region.place(first_pad + rank * pad, file, pad) for rank, (_, file) in enumerate(files)]
        super().__init__(backend, group, allocation.device, region, extent, allocation.pointer, pads)

    def signals_at(self, pads: Sequence[int]) -> SharedSignals:
        return SharedSignals(self.group, pads, self._region)


def _pad_extent(size: int) -> int:
    return round_up(SharedSignals.nbytes(size), PAGE)


class HostBackend(Backend):
    """Backend ``host``."""

    device_type = "cpu"
    capabilities = (
        Capability.REMOTE_TENSOR
        | Capability.CONTIGUOUS_VIEW
        | Capability.SIGNALS
        | Capability.ONE_SIDED
        | Capability.SECOND_GROUP
    )

    def probe(self) -> None:
        if not sys.platform.startswith("linux"):
            raise BackendUnavailableError(
                f"the backend 'host' needs Linux, not {sys.platform}: memory files and futexes",
                hint="use a Linux machine, virtual machine or container",
            )
        require_signals()
        try:
            allocation = self.allocate(1, torch.device("cpu"), None)
            seen = pass_and_map(allocation.descriptor, allocation.extent, _Files, allocation.tensor())
        except (OSError, SymmemError) as error:
            reason = error.what if isinstance(error, SymmemError) else error
            raise self._unavailable(f"it could not make, pass and map a page of shared memory: {reason}") from error
        if not seen:
            raise self._unavailable("a store to shared memory is not visible through a second mapping")

    def pad_nbytes(self, size: int) -> int:
        return SharedSignals.nbytes(size)

    def _unavailable(self, why: str) -> BackendUnavailableError:
        return BackendUnavailableError(
            f"the backend 'host' does not work: {why}",
            hint="a sandbox may forbid memfd_create, unix sockets or mmap: check its policy",
        )

    def allocate(self, nbytes: int, device: torch.device, group: RankGroup | None) -> HostAllocation:
        # The kernel makes the pages of a memory file at their first access, and kills a process (or sends SIGBUS) if no
        # memory is left then. So an allocation larger than the available memory fails here, with an error.
        available = available_memory()
        if nbytes > available:
            raise OutOfMemoryError(
                f"{nbytes} bytes of shared memory were asked for, {available} are available",
                hint="free memory, allocate less, or raise the container's memory limit",
            )
        return HostAllocation.make(self, nbytes)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> HostMapping:
        assert isinstance(allocation, HostAllocation)
        group = collective.group
        with contextlib.closing(make_memory_file(_pad_extent(group.size))) as pad:
            received = collective.exchange("map", b"", [allocation.descriptor, pad])
        with received:
            return HostMapping(self, allocation, group, [c.descriptors for c in received])
