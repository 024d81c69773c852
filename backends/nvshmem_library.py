"""The calls of NVSHMEM that symmem makes, through NVSHMEM4Py. No other module imports NVSHMEM4Py.

Memory goes through ``nvshmem.bindings``, the C interface. Buffers of ``nvshmem.core`` raise or free in the garbage
collector, do not work with a library that PyTorch initialised, and refuse some dtypes
(https://docs.nvidia.com/nvshmem/api/api/language_bindings/python). The initialisation goes through ``nvshmem.core``, so
that a user's calls of NVSHMEM4Py in the same process find it initialised.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from symmem.backends import gpu
from symmem.backends.base import tensor_at
from symmem.errors import BackendUnavailableError

__all__ = ["STAGING_NBYTES", "NvshmemLibrary", "Staging"]

STAGING_NBYTES = 4 * 2**20
"""Bytes of the staging memory. Copies to and from unreachable peers are made in pieces of this size."""


class NvshmemLibrary:
    """NVSHMEM's host library, loaded. It is the same library that PyTorch's NVSHMEM transport uses.

    Pointers and streams are integers, sizes are in bytes. Collective calls wait for all PEs without a timeout: the
    caller ensures that all of them come.

    Raises:
        BackendUnavailableError: NVSHMEM4Py or the library cannot be loaded.
    """

    def __init__(self) -> None:
        try:
            import nvshmem.bindings
            import nvshmem.core
        except ImportError as error:
            raise BackendUnavailableError(
                f"the backend 'nvshmem' needs NVSHMEM4Py: {error}", hint=gpu.install_hint("nvshmem4py")
            ) from error
        self._core, self._bindings = nvshmem.core, nvshmem.bindings
        try:
            self.version = str(self._core.get_version().libnvshmem_version)
        except Exception as error:  # the library finder and the bindings have separate classes of errors
            raise BackendUnavailableError(
                f"NVSHMEM4Py is installed, but NVSHMEM's library cannot be loaded: {error}",
                hint=f"{gpu.install_hint('nvshmem')}; if torch requires a version of it, install that version",
            ) from error

    @property
    def initialized(self) -> bool:
        """Whether this process has initialised it, by any code."""
        states = self._bindings.Init_status
        status = self._bindings.init_status()
        return bool(int(states.STATUS_IS_INITIALIZED) <= status < int(states.STATUS_INVALID))

    def unique_id(self) -> bytes:
        """An id for :meth:`initialize`. From this call on, this process listens for the other PEs."""
        unique = self._core.get_unique_id()
        return ctypes.string_at(unique.ptr, unique._data.nbytes)

    def initialize(self, device_index: int, unique_id: bytes, pe: int, n_pes: int) -> None:
        """Join the job with one GPU. Collective over all PEs."""
        from cuda.core import Device

        unique = self._core.get_unique_id(empty=True)
        if len(unique_id) != unique._data.nbytes:
            raise BackendUnavailableError(
                f"an NVSHMEM id has {len(unique_id)} bytes on rank 0 and {unique._data.nbytes} here",
                hint="install the same version of NVSHMEM4Py on all ranks",
            )
        ctypes.memmove(unique.ptr, unique_id, len(unique_id))
        device = Device(device_index)
        device.set_current()
        self._core.init(device=device, uid=unique, rank=pe, nranks=n_pes, initializer_method="uid")

    def finalize(self) -> None:
        """Leave the job and free all memory. Collective over all PEs."""
        self._core.finalize()

    def pe(self) -> int:
        """This process's number in the job."""
        return int(self._bindings.my_pe())

    def n_pes(self) -> int:
        """The number of processes of the job."""
        return int(self._bindings.n_pes())

    def malloc(self, nbytes: int) -> int:
        """Allocate on the symmetric heap; 0 if that fails. Collective over all PEs."""
        return int(self._bindings.malloc(nbytes))

    def free(self, pointer: int) -> None:
        """Free memory. Collective over all PEs."""
        self._bindings.free(pointer)

    def peer_pointer(self, pointer: int, pe: int) -> int:
        """The address of a PE's memory in this process; 0 if it is not load/store reachable."""
        return int(self._bindings.ptr(pointer, pe))

    def multicast_pointer(self, pointer: int) -> int:
        """The multicast address of memory over all PEs; 0 if it has none."""
        return int(self._bindings.mc_ptr(int(self._bindings.Team_id.TEAM_WORLD), pointer))

    def put(self, to: int, source: int, nbytes: int, pe: int, stream: int) -> None:
        """Copy to the memory ``to`` of a PE, on a stream. Later work of the stream runs after the copy is complete."""
        self._bindings.putmem_on_stream(to, source, nbytes, pe, stream)
        self._bindings.quiet_on_stream(stream)

    def get(self, to: int, source: int, nbytes: int, pe: int, stream: int) -> None:
        """Copy from the memory ``source`` of a PE, on a stream."""
        self._bindings.getmem_on_stream(to, source, nbytes, pe, stream)


class Staging:
    """A buffer on the heap for copies to and from unreachable peers.

    The network can access only memory that NVSHMEM has registered. A user's tensor is not registered.

    Args:
        library: NVSHMEM.
        device: The GPU.
        pointer: ``STAGING_NBYTES`` bytes on the symmetric heap.
    """

    def __init__(self, library: NvshmemLibrary, device: torch.device, pointer: int) -> None:
        self._library, self._device, self._pointer = library, device, pointer
        self._memory = tensor_at(pointer, STAGING_NBYTES, device, None)
        self._done: Any = None  # torch.cuda.Event

    def put(self, to: int, source: torch.Tensor, pe: int) -> None:
        """Copy a uint8 tensor to the symmetric address ``to`` of a PE, on the current stream."""
        self._wait()
        for at in range(0, source.numel(), STAGING_NBYTES):
            part = source[at : at + STAGING_NBYTES]
            self._memory[: part.numel()].copy_(part)
            stream = gpu.current_stream(self._device)
            self._library.put(to + at, self._pointer, part.numel(), pe, stream)
        self._record()

    def get(self, out: torch.Tensor, source: int, pe: int) -> None:
        """Copy from the symmetric address ``source`` of a PE into a uint8 tensor, on the current stream."""
        self._wait()
        for at in range(0, out.numel(), STAGING_NBYTES):
            part = out[at : at + STAGING_NBYTES]
            stream = gpu.current_stream(self._device)
            self._library.get(self._pointer, source + at, part.numel(), pe, stream)
            part.copy_(self._memory[: part.numel()])
        self._record()

    def _wait(self) -> None:
        """Let the current stream wait until the last copy, maybe on another stream, no longer uses the buffer."""
        if self._done is not None:
            self._done.wait()

    def _record(self) -> None:
        if self._device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
