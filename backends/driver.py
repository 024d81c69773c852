"""The CUDA driver calls that symmem makes, with types and named errors.

All calls of the driver go through :class:`Driver`; tests replace it by a fake over host memory. Handles and addresses
are integers, sizes are bytes, and GPUs are ordinals: N in torch's ``cuda:N``, counted over the devices that this
process can see.

Source: the CUDA driver API, "Virtual Memory Management" and "Multicast Object Management".
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from symmem.backends.driver_errors import driver_error
from symmem.backends.gpu import install_hint
from symmem.errors import BackendUnavailableError, UnsupportedError

__all__ = ["Driver", "load_driver"]

_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the legacy default stream
_PORTABLE, _DEVICE_MAP = 1, 2  # CU_MEMHOSTALLOC_*
_CAPTURE_ERRORS = range(900, 909)  # CUDA_ERROR_STREAM_CAPTURE_*


class Driver:
    """The initialised driver.

    If a call fails, a method raises its named error (:func:`driver_error`), unless it says otherwise.

    Raises:
        BackendUnavailableError: The Python package, the driver library, a device, or CUDA in torch is missing. They
            are checked in this order.
    """

    def __init__(self) -> None:
        self.bindings = _import_bindings()
        handle_types = self.bindings.CUmemAllocationHandleType
        self._posix = handle_types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._fabric = handle_types.CU_MEM_HANDLE_TYPE_FABRIC
        self._initialise()
        self._devices = tuple(self._call("cuDeviceGet", i) for i in range(self._call("cuDeviceGetCount")))
        if not self._devices:
            raise driver_error("CUDA_ERROR_NO_DEVICE", "this process can see no NVIDIA GPU")
        if not torch.cuda.is_available():
            built = "is built without CUDA" if torch.version.cuda is None else "finds no usable CUDA device"
            raise BackendUnavailableError(
                f"torch {torch.__version__} {built}",
                hint="install a torch built for CUDA (see pytorch.org), or use the backend 'host'",
            )

    def _initialise(self) -> None:
        try:
            (code,) = self.bindings.cuInit(0)
        except RuntimeError as error:
            raise BackendUnavailableError(
                f"the NVIDIA driver library cannot be loaded: {error}",
                hint="install the NVIDIA driver; start a container with its GPUs (docker: --gpus all)",
            ) from error
        if code:
            raise BackendUnavailableError(
                f"the NVIDIA driver does not work: {self._text(code)}",
                hint=driver_error(code.name, "").hint,
            )

    def _call(self, function: str, *arguments: object) -> Any:
        """Call a function of the driver; returns its result, a list of several results, or None."""
        try:
            code, *results = getattr(self.bindings, function)(*arguments)
        except RuntimeError as error:  # the installed driver is older than this function
            raise UnsupportedError(f"{function}: {error}", hint="install a newer NVIDIA driver") from error
        if code:
            raise driver_error(code.name, f"{function}: {self._text(code)}")
        return results if len(results) > 1 else results[0] if results else None

    def _text(self, code: Any) -> str:
        _, text = self.bindings.cuGetErrorString(code)
        return f"{code.name} ({text.decode() if text else 'unknown'})"

    # Devices.

    def current_device(self) -> torch.device:
        """Torch's current device."""
        return torch.device("cuda", torch.cuda.current_device())

    def ordinal(self, device: torch.device) -> int:
        """The GPU of a device of torch."""
        return torch.cuda.current_device() if device.index is None else device.index

    @functools.cache  # noqa: B019  # a process has one driver
    def identities(self) -> tuple[str, ...]:
        """The UUID of every visible GPU, by ordinal. It identifies the GPU on any machine."""
        return tuple(self._call("cuDeviceGetUuid", device).bytes.hex() for device in self._devices)

    @functools.cache  # noqa: B019  # a process has one driver
    def name(self, ordinal: int) -> str:
        """The model of a GPU."""
        text = self._call("cuDeviceGetName", 96, self._devices[ordinal])
        return str(text.rstrip(b"\0").decode())

    @functools.cache  # noqa: B019  # a process has one driver
    def attribute(self, ordinal: int, name: str) -> int:
        """A CU_DEVICE_ATTRIBUTE by the rest of its name. An advertised feature may not work: test it."""
        key = getattr(self.bindings.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", key, self._devices[ordinal]))

    @functools.cache  # noqa: B019  # a process has one driver
    def can_access_peer(self, ordinal: int, peer: int) -> bool:
        """Whether a GPU can load from and store to the memory of another."""
        return bool(self._call("cuDeviceCanAccessPeer", self._devices[ordinal], self._devices[peer]))

    @functools.cache  # noqa: B019  # a process has one driver
    def context(self, ordinal: int) -> Any:
        """The primary context of a GPU, which torch uses too."""
        return self._call("cuDevicePrimaryCtxRetain", self._devices[ordinal])

    @contextlib.contextmanager
    def on(self, ordinal: int) -> Iterator[None]:
        """Make the primary context of a GPU current in this thread for the length of the block.

        The block may make calls that CUDA considers unsafe during a stream capture: none of ours joins the capture.
        """
        modes = self.bindings.CUstreamCaptureMode
        self._call("cuCtxPushCurrent", self.context(ordinal))
        try:
            before = self._call("cuThreadExchangeStreamCaptureMode", modes.CU_STREAM_CAPTURE_MODE_RELAXED)
            try:
                yield
            finally:
                self.bindings.cuThreadExchangeStreamCaptureMode(before)
        finally:
            self.bindings.cuCtxPopCurrent()  # if this fails, the block has failed with the same error

    def enter(self, ordinal: int) -> None:
        """Make the primary context of a GPU current in this thread permanently."""
        self._call("cuCtxSetCurrent", self.context(ordinal))

    def quiesce(self, ordinal: int) -> bool:
        """Wait until a GPU has done all work of this process; False if a stream capture forbids it.

        Errors of the device are ignored: a failed device does no more work.
        """
        with contextlib.suppress(RuntimeError):  # the device has failed
            if torch.cuda.is_current_stream_capturing():
                return False  # the driver call would end the capture
        (code,) = self.bindings.cuCtxSynchronize()
        return int(code) not in _CAPTURE_ERRORS

    # Memory.

    def granularity(self, ordinal: int, fabric: bool) -> int:
        """The size of memory on a GPU must be a multiple of this."""
        flags = self.bindings.CUmemAllocationGranularity_flags
        prop = self._memory_kind(ordinal, fabric)
        return int(self._call("cuMemGetAllocationGranularity", prop, flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED))

    def create(self, ordinal: int, nbytes: int, fabric: bool) -> int:
        """Physical memory on a GPU, exportable as a file descriptor and, with ``fabric``, as a fabric handle."""
        return int(self._call("cuMemCreate", nbytes, self._memory_kind(ordinal, fabric), 0))

    def _memory_kind(self, ordinal: int, fabric: bool) -> Any:
        cu = self.bindings
        prop = cu.CUmemAllocationProp()
        prop.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location = self._location(ordinal)
        prop.requestedHandleTypes = self._handle_types(fabric)
        return prop

    def _location(self, ordinal: int) -> Any:
        location = self.bindings.CUmemLocation()
        location.type = self.bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = ordinal
        return location

    def _handle_types(self, fabric: bool) -> Any:
        return self._posix | self._fabric if fabric else self._posix

    def retain(self, address: int) -> int:
        """Another reference to the handle of the memory that is mapped at an address. The caller releases it."""
        return int(self._call("cuMemRetainAllocationHandle", address))

    def range_of(self, address: int) -> tuple[int, int]:
        """Address and bytes of the mapping that holds an address."""
        base, nbytes = self._call("cuMemGetAddressRange", address)
        return int(base), int(nbytes)

    def release(self, handle: int) -> None:
        """Release a handle. The memory lives on while it is mapped, exported or imported anywhere."""
        self._call("cuMemRelease", handle)

    def export_descriptor(self, handle: int) -> int:
        """A file descriptor for a handle. Another process of this host can import it; the caller closes it."""
        return int(self._call("cuMemExportToShareableHandle", handle, self._posix, 0))

    def import_descriptor(self, descriptor: int) -> int:
        """The handle for a descriptor of another process. The caller closes the descriptor."""
        return int(self._call("cuMemImportFromShareableHandle", descriptor, self._posix))

    def export_fabric(self, handle: int) -> bytes:
        """64 bytes for a handle. A process on any host of the NVLink fabric can import them."""
        return bytes(self._call("cuMemExportToShareableHandle", handle, self._fabric, 0).data)

    def import_fabric(self, exported: bytes) -> int:
        """The handle for the bytes that :meth:`export_fabric` returned."""
        return int(self._call("cuMemImportFromShareableHandle", exported, self._fabric))

    def reserve(self, nbytes: int, alignment: int) -> int:
        """Reserve a range of addresses."""
        return int(self._call("cuMemAddressReserve", nbytes, alignment, 0, 0))

    def unreserve(self, address: int, nbytes: int) -> None:
        """Free a whole reserved range. Nothing may be mapped in it."""
        self._call("cuMemAddressFree", address, nbytes)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        """Map the first ``nbytes`` of a handle's memory into a reserved range, without access rights yet."""
        self._call("cuMemMap", address, nbytes, 0, handle, 0)

    def unmap(self, address: int, nbytes: int) -> None:
        """Undo one :meth:`map`. It does not wait for kernels that use the memory: see :meth:`quiesce`."""
        self._call("cuMemUnmap", address, nbytes)

    def allow(self, ordinal: int, address: int, nbytes: int) -> None:
        """Let a GPU load from and store to a range that one or more maps fill completely."""
        access = self.bindings.CUmemAccessDesc()
        access.location = self._location(ordinal)
        access.flags = self.bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuMemSetAccess", address, nbytes, [access], 1)

    def zero(self, ordinal: int, address: int, nbytes: int) -> None:
        """Set memory to zero; complete when the call returns. Must be called within :meth:`on`."""
        stream = self._own_stream(ordinal)
        self._call("cuMemsetD8Async", address, 0, nbytes, stream)
        self._call("cuStreamSynchronize", stream)

    def order(self, before: int, after: int, capturing: bool) -> None:
        """Let a stream wait for the work of another one so far. Call it within :meth:`on`.

        Does nothing if only one of them is being captured.

        Args:
            before: The stream with the work.
            after: The stream that waits.
            capturing: Whether ``after`` is being captured.
        """
        if bool(int(self._call("cuStreamIsCapturing", before))) != capturing:
            return
        event = self._call("cuEventCreate", _NO_TIMING)
        try:
            self._call("cuEventRecord", event, before)
            self._call("cuStreamWaitEvent", after, event, 0)
        finally:
            self._call("cuEventDestroy", event)  # CUDA keeps what the streams still need

    def fill(self, address: int, word: int, nbytes: int, stream: int) -> None:
        """Set memory, a multiple of 4 bytes, to copies of a word of 32 bits, on a stream. Call it within :meth:`on`."""
        self._call("cuMemsetD32Async", address, word, nbytes // 4, stream)

    def read(self, address: int, nbytes: int, stream: int) -> bytes:
        """The content of memory when the stream comes to it. Waits for that. Call it within :meth:`on`."""
        content = bytearray(nbytes)
        self._call("cuMemcpyDtoHAsync", content, address, nbytes, stream)
        self._call("cuStreamSynchronize", stream)
        return bytes(content)

    @functools.cache  # noqa: B019  # a process has one driver
    def _own_stream(self, ordinal: int) -> Any:
        return self._call("cuStreamCreate", _NON_BLOCKING)

    # Captured graphs.

    def capture_of(self, stream: int) -> tuple[int, int]:
        """The id and the graph of the capture that a stream takes part in."""
        try:
            code, _status, number, graph, *_rest = self.bindings.cuStreamGetCaptureInfo(stream)
        except RuntimeError as error:
            raise UnsupportedError(f"cuStreamGetCaptureInfo: {error}", hint="install a newer NVIDIA driver") from error
        if code:
            raise driver_error(code.name, f"cuStreamGetCaptureInfo: {self._text(code)}")
        return int(number), int(graph)

    def retain_in_graph(self, graph: int, function: int, argument: int) -> None:
        """Let the driver call a C function with one pointer when a graph and all graphs made from it are gone."""
        flags = self.bindings.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
        ended = self._call("cuUserObjectCreate", argument, self.bindings.CUhostFn(function), 1, flags)
        move = self.bindings.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
        self._call("cuGraphRetainUserObject", self.bindings.CUgraph(graph), ended, 1, move)

    # Multicast: only if the settings allow it.

    def multicast_granularity(self, ordinal: int) -> int:
        """The size of memory to bind to a multicast object must be a multiple of this."""
        flags = self.bindings.CUmulticastGranularity_flags
        prop = self._multicast_kind(self.granularity(ordinal, False), 2, False)
        return int(self._call("cuMulticastGetGranularity", prop, flags.CU_MULTICAST_GRANULARITY_MINIMUM))

    def multicast_create(self, nbytes: int, devices: int, fabric: bool) -> int:
        """A multicast object for so many GPUs. Its handle is exported, mapped and released like memory."""
        return int(self._call("cuMulticastCreate", self._multicast_kind(nbytes, devices, fabric)))

    def _multicast_kind(self, nbytes: int, devices: int, fabric: bool) -> Any:
        prop = self.bindings.CUmulticastObjectProp()
        prop.numDevices, prop.size, prop.handleTypes = devices, nbytes, int(self._handle_types(fabric))
        return prop

    def multicast_add(self, multicast: int, ordinal: int) -> None:
        """Let a GPU join. All must join before memory is bound."""
        self._call("cuMulticastAddDevice", multicast, self._devices[ordinal])

    def multicast_bind(self, multicast: int, memory: int, nbytes: int) -> None:
        """Bind the first ``nbytes`` of a GPU's memory."""
        self._call("cuMulticastBindMem", multicast, 0, memory, 0, nbytes, 0)

    def multicast_unbind(self, multicast: int, ordinal: int, nbytes: int) -> None:
        """Undo :meth:`multicast_bind`."""
        self._call("cuMulticastUnbind", multicast, self._devices[ordinal], 0, nbytes)

    # Kernels.

    def function(self, kernel: int) -> Any:
        """The loaded function of a CUkernel in the current context, for cuLaunchKernel."""
        return self._call("cuKernelGetFunction", self.bindings.CUkernel(kernel))

    def pinned(self, nbytes: int) -> tuple[int, int]:
        """Host memory that kernels can store to: its addresses for the CPU and the GPU. It is never freed."""
        host = self._call("cuMemHostAlloc", nbytes, _PORTABLE | _DEVICE_MAP)
        return int(host), int(self._call("cuMemHostGetDevicePointer", host, 0))


def _import_bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendUnavailableError(
            f"the Python package cuda.bindings is not installed: {error}",
            hint=f"on a machine with an NVIDIA GPU and driver: {install_hint('cuda-python')}",
        ) from error
    return driver


@functools.cache
def load_driver() -> Driver:
    """The driver of this process. After a failure the next call tries again.

    Raises:
        BackendUnavailableError: See :class:`Driver`.
    """
    return Driver()
