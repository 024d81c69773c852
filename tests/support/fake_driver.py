"""A fake of the CUDA driver over host memory: real processes, real descriptors, real mappings, no GPU.

Physical memory is a memory file, and a handle is a number for it. An export duplicates its descriptor. A range is
reserved address space in which files are mapped; it is inaccessible until access is set. Calls that the driver would
refuse or leave undefined raise AssertionError: a double release, freeing a range that is still mapped, a size that is
not a multiple of the granularity, unmapping before the device was synchronised.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from symmem.backends import get_backend, multicast, native
from symmem.backends.driver import Driver
from symmem.backends.driver_errors import driver_error
from symmem.backends.signals import SharedSignals

GRANULARITY = 1 << 16
PRIVATE, SHARED, FIXED, ANONYMOUS, NORESERVE = 0x02, 0x01, 0x10, 0x20, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _mmap(address: int | None, nbytes: int, flags: int, descriptor: int) -> int:
    result = _libc.mmap(address, nbytes, 0, flags, descriptor, 0)
    assert result != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    return int(result)


class FakeDriver(Driver):
    """A :class:`Driver` for a machine with one "GPU" per rank.

    Args:
        rank: The GPU of this process.
        world: Number of GPUs.
        p2p: Whether GPUs can access each other's memory.
        fabric: ``"absent"``, ``"works"``, or ``"refused"``: advertised, but not permitted.
        multicast: Whether the GPUs support it.
        shared_gpu: Whether all ranks use GPU 0.

    Attributes:
        calls: Names of the methods that were called, in order.
        faults: By method: the error (name of a CUresult, or a function to call), and its call; 0 is the next call.
        capturing: Whether a stream capture is in progress.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        *,
        p2p: bool = True,
        fabric: str = "absent",
        multicast: bool = False,
        shared_gpu: bool = False,
    ) -> None:
        self.mine = 0 if shared_gpu else rank
        self.world, self.p2p, self.fabric, self.multicast = world, p2p, fabric, multicast
        self.calls: list[str] = []
        self.faults: dict[str, tuple[str | Callable[[], None], int]] = {}
        self.capturing = False
        self.handles: dict[int, int] = {}
        self.reservations: dict[int, int] = {}
        self.mappings: dict[int, int] = {}
        self._mapped: dict[int, int] = {}  # by address of a mapping: its handle
        self.bound: set[int] = set()
        self._access: dict[int, set[int]] = {}  # by address of a mapping: GPUs
        self._next = 1000
        self._quiet = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_") or name == "on" or not callable(value):
            return value

        def recorded(*arguments: Any) -> Any:
            self._before(name)
            return value(*arguments)

        return recorded

    def _before(self, name: str) -> None:
        """Record a call, and let it fail on request."""
        self.calls.append(name)
        fault, when = self.faults.get(name, ("", -1))
        if when > 0:
            self.faults[name] = (fault, when - 1)
        elif when == 0:
            del self.faults[name]
            if callable(fault):
                fault()
            else:
                raise driver_error(fault, f"{name}: {fault}")

    def access_to(self, address: int) -> set[int]:
        """The GPUs that may access the mapping that holds an address."""
        (start,) = (start for start, nbytes in self.mappings.items() if start <= address < start + nbytes)
        return self._access[start]

    @property
    def live(self) -> tuple[int, int, int, int]:
        """The number of handles, reservations, mappings and bound multicast objects."""
        return len(self.handles), len(self.reservations), len(self.mappings), len(self.bound)

    # Devices.

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def ordinal(self, device: torch.device) -> int:
        return self.mine

    def identities(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{ordinal:032x}" for ordinal in range(self.world))

    def name(self, ordinal: int) -> str:  # type: ignore[override]
        return f"Fake {ordinal}"

    def attribute(self, ordinal: int, name: str) -> int:  # type: ignore[override]
        return {"HANDLE_TYPE_FABRIC_SUPPORTED": self.fabric != "absent", "MULTICAST_SUPPORTED": self.multicast}[name]

    def can_access_peer(self, ordinal: int, peer: int) -> bool:  # type: ignore[override]
        return self.p2p

    @contextlib.contextmanager
    def on(self, ordinal: int) -> Iterator[None]:
        assert 0 <= ordinal < self.world
        yield

    def quiesce(self, ordinal: int) -> bool:
        self._quiet = not self.capturing
        return self._quiet

    # Memory.

    def granularity(self, ordinal: int, fabric: bool) -> int:
        return GRANULARITY

    def create(self, ordinal: int, nbytes: int, fabric: bool) -> int:
        assert nbytes > 0
        assert nbytes % GRANULARITY == 0
        if fabric and self.fabric != "works":
            raise driver_error("CUDA_ERROR_NOT_PERMITTED", "create: CUDA_ERROR_NOT_PERMITTED")
        descriptor = os.memfd_create("symmem-fake", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, nbytes)
        for start in range(0, nbytes, GRANULARITY):  # the driver does not promise zeros
            os.pwrite(descriptor, b"\xa5" * mmap.PAGESIZE, start)
        return self._enter(descriptor)

    def _enter(self, descriptor: int) -> int:
        self._next += 1
        self.handles[self._next] = descriptor
        return self._next

    def release(self, handle: int) -> None:
        os.close(self.handles.pop(handle))

    def export_descriptor(self, handle: int) -> int:
        return os.dup(self.handles[handle])

    def import_descriptor(self, descriptor: int) -> int:
        return self._enter(os.dup(descriptor))

    def export_fabric(self, handle: int) -> bytes:
        assert self.fabric == "works"
        return f"/proc/{os.getpid()}/fd/{self.handles[handle]}".encode().ljust(64, b"\0")

    def import_fabric(self, exported: bytes) -> int:
        assert len(exported) == 64
        return self._enter(os.open(exported.rstrip(b"\0"), os.O_RDWR | os.O_CLOEXEC))

    def reserve(self, nbytes: int, alignment: int) -> int:
        assert nbytes % alignment == 0
        assert alignment % mmap.PAGESIZE == 0
        address = _mmap(None, nbytes, PRIVATE | ANONYMOUS | NORESERVE, -1)
        self.reservations[address] = nbytes
        return address

    def unreserve(self, address: int, nbytes: int) -> None:
        assert self.reservations.pop(address) == nbytes
        assert not any(address <= mapped < address + nbytes for mapped in self.mappings), "still mapped"
        assert _libc.munmap(address, nbytes) == 0
        self._quiet = False

    def map(self, address: int, nbytes: int, handle: int) -> None:
        assert nbytes == os.fstat(self.handles[handle]).st_size
        assert any(start <= address and address + nbytes <= start + n for start, n in self.reservations.items())
        assert not any(start < address + nbytes and address < start + n for start, n in self.mappings.items())
        _mmap(address, nbytes, SHARED | FIXED, self.handles[handle])
        self.mappings[address], self._mapped[address] = nbytes, handle

    def range_of(self, address: int) -> tuple[int, int]:
        """Like the driver's: for any address within a mapping."""
        for start, nbytes in self.mappings.items():
            if start <= address < start + nbytes:
                return start, nbytes
        raise driver_error("CUDA_ERROR_NOT_FOUND", "range_of: CUDA_ERROR_NOT_FOUND")

    def retain(self, address: int) -> int:
        """Like the driver's, but only while the handle that was mapped is not released."""
        return self._enter(os.dup(self.handles[self._mapped[address]]))

    def unmap(self, address: int, nbytes: int) -> None:
        assert self._quiet, "unmapped while kernels may run"
        assert self.mappings.pop(address) == nbytes
        self._access.pop(address, None)
        _mmap(address, nbytes, PRIVATE | FIXED | ANONYMOUS | NORESERVE, -1)

    def allow(self, ordinal: int, address: int, nbytes: int) -> None:
        covered = {start: n for start, n in self.mappings.items() if address <= start < address + nbytes}
        assert sum(covered.values()) == nbytes, "access to a range that is not fully mapped"
        for start in covered:
            self._access.setdefault(start, set()).add(ordinal)
        assert _libc.mprotect(address, nbytes, 3) == 0

    def zero(self, ordinal: int, address: int, nbytes: int) -> None:
        if (address | nbytes) % mmap.PAGESIZE:
            ctypes.memset(address, 0, nbytes)
        else:  # the file gives its pages back, which then read as zeros: an arena's would take long to write
            assert _libc.madvise(address, nbytes, mmap.MADV_REMOVE) == 0, os.strerror(ctypes.get_errno())

    # Multicast: a separate file, which shows the order of calls; stores do not reach the ranks.

    def multicast_granularity(self, ordinal: int) -> int:
        return 2 * GRANULARITY

    def multicast_create(self, nbytes: int, devices: int, fabric: bool) -> int:
        assert nbytes % (2 * GRANULARITY) == 0
        assert devices == self.world
        return self.create(self.mine, nbytes, False)

    def multicast_add(self, multicast: int, ordinal: int) -> None:
        assert multicast in self.handles

    def multicast_bind(self, multicast: int, memory: int, nbytes: int) -> None:
        assert nbytes == os.fstat(self.handles[memory]).st_size
        self.bound.add(multicast)

    def multicast_unbind(self, multicast: int, ordinal: int, nbytes: int) -> None:
        self.bound.remove(multicast)


class FakeSignals(SharedSignals):
    """Signals like :class:`CudaSignals`, on the CPU."""

    def __init__(self, group: Any, device: torch.device, pads: tuple[int, ...]) -> None:
        super().__init__(group, pads, None)


def install(rank: int, world: int, **options: Any) -> FakeDriver:
    """Make the backend ``native`` of this process use a new fake."""
    backend: Any = get_backend("native")
    backend.driver = FakeDriver(rank, world, **options)
    backend.device_type = "cpu"
    type(backend).has_fabric.cache_clear()
    type(backend)._granularity.cache_clear()
    backend.pads.clear()
    vars(native)["CudaSignals"] = FakeSignals
    # Variables that forbid multicast on this machine concern its GPUs. The settings still count.
    vars(multicast)["multicast_blocker"] = lambda: None
    return backend.driver


def descriptors() -> int:
    """Number of open file descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))
