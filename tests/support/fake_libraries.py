"""Fakes of NVSHMEM and of torch's symmetric memory over host memory: real processes, real sharing, no GPU.

The fakes check the rules of the libraries. If not all ranks make the same collective call, an AssertionError is raised
(or it hangs until gloo gives up). This includes calls in the garbage collector.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fake_driver import FakeDriver, FakeSignals

from symmem.backends import cuda_signals, driver, get_backend, gpu, nvshmem, torch_transport
from symmem.backends.libc import PAGE, Region, round_up

HEAP = 1 << 27
SHARED = Path("/dev/shm")


_mapped: list[Region] = []  # never unmapped: an address may still be in use


def map_file(name: str, nbytes: int) -> int:
    """The address of the shared file with this name. It is made if it does not exist."""
    descriptor = os.open(SHARED / name, os.O_RDWR | os.O_CREAT, 0o600)
    nbytes = round_up(nbytes, PAGE)
    os.ftruncate(descriptor, nbytes)
    _mapped.append(Region(nbytes))
    address = _mapped[-1].place(0, descriptor, nbytes)
    os.close(descriptor)
    return address


_mremap = ctypes.CDLL(None, use_errno=True).mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
MAYMOVE, TO_AN_ADDRESS = 1, 2


class LibrariesDriver(FakeDriver):
    """A fake driver for memory of :func:`map_file`; the handle of memory is its address."""

    def granularity(self, ordinal: int, fabric: bool) -> int:
        return PAGE

    def range_of(self, address: int) -> tuple[int, int]:
        (found,) = (each for each in _mapped if each.address <= address < each.address + each.nbytes)
        return found.address, found.nbytes

    def retain(self, address: int) -> int:
        assert any(each.address == address for each in _mapped)
        return address

    def release(self, handle: int) -> None:
        """There is nothing to release."""

    def map(self, address: int, nbytes: int, handle: int) -> None:
        # With an old size of 0, Linux maps shared memory a second time.
        result = _mremap(handle, 0, nbytes, MAYMOVE | TO_AN_ADDRESS, address)
        assert result == address, os.strerror(ctypes.get_errno())
        self.mappings[address] = nbytes


def agree(what: int, *values: int, group: Any = None) -> list[list[int]]:
    """All ranks call this with the same ``what``; returns the values of all."""
    mine = torch.tensor([what, *values])
    all_of_them = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, mine, group=group)
    assert all(int(theirs[0]) == what for theirs in all_of_them), f"ranks make different calls: {all_of_them}"
    return [theirs[1:].tolist() for theirs in all_of_them]


INIT, MALLOC, FREE, FINALIZE, MEET = range(5)


class FakeNvshmem:
    """A fake :class:`NvshmemLibrary`; the PE is the global rank.

    Attributes:
        calls: Names of the collective calls, in order.
        unreachable: PEs that are not load/store reachable.
        limit: Bytes of the heap.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.unreachable: set[int] = set()
        self.multicast = 0
        self.limit = HEAP
        self.initialized = False
        self.bases: list[int] = []
        self.taken: dict[int, int] = {}  # offset -> bytes

    def unique_id(self) -> bytes:
        return os.urandom(8)

    def initialize(self, device_index: int | None, unique_id: bytes, pe: int, n_pes: int) -> None:
        assert (pe, n_pes) == (dist.get_rank(), dist.get_world_size())
        self.calls.append("initialize")
        agree(INIT)
        self.bases = [map_file(f"symmem-fake-{unique_id.hex()}-{other}", HEAP) for other in range(n_pes)]
        agree(INIT)
        (SHARED / f"symmem-fake-{unique_id.hex()}-{pe}").unlink()
        self.initialized = True

    def finalize(self) -> None:
        self.calls.append("finalize")
        agree(FINALIZE)
        self.initialized = False

    def pe(self) -> int:
        return dist.get_rank()

    def n_pes(self) -> int:
        return len(self.bases)

    def malloc(self, nbytes: int) -> int:
        self.calls.append("malloc")
        sizes = agree(MALLOC, nbytes)
        assert all(size == [nbytes] for size in sizes), f"different sizes: {sizes}"
        at = 0
        for offset, size in sorted(self.taken.items()):
            if at + nbytes <= offset:
                break
            at = offset + size
        if at + nbytes > self.limit:
            return 0
        self.taken[at] = -(-nbytes // 256) * 256
        ctypes.memset(self.bases[self.pe()] + at, 0xA5, nbytes)  # dirty, like memory that was used before
        return self.bases[self.pe()] + at

    def free(self, pointer: int) -> None:
        self.calls.append("free")
        offset = pointer - self.bases[self.pe()]
        offsets = agree(FREE, offset)
        assert all(other == [offset] for other in offsets), f"freed in another order: {offsets}"
        del self.taken[offset]

    def peer_pointer(self, pointer: int, pe: int) -> int:
        return 0 if pe in self.unreachable else pointer - self.bases[self.pe()] + self.bases[pe]

    def multicast_pointer(self, pointer: int) -> int:
        return self.multicast

    def put(self, to: int, source: int, nbytes: int, pe: int, stream: int) -> None:
        ctypes.memmove(to - self.bases[self.pe()] + self.bases[pe], source, nbytes)

    def get(self, to: int, source: int, nbytes: int, pe: int, stream: int) -> None:
        ctypes.memmove(to, source - self.bases[self.pe()] + self.bases[pe], nbytes)


class _Handle:
    def __init__(self, pointers: list[int], multicast_ptr: int = 0) -> None:
        self.buffer_ptrs, self.multicast_ptr = pointers, multicast_ptr


class FakeTorch:
    """A fake of torch's ``_SymmetricMemory``, with the behaviour of 2.11.

    Attributes:
        active: The transport.
        heap: NVSHMEM, shared with the backend ``nvshmem`` in some tests.
        rendezvoused: Names of the groups with a rendezvous, in order.
        frees: Number of tensors that torch has freed.
    """

    def __init__(self, heap: FakeNvshmem) -> None:
        self.active: str | None = "CUDA"
        self.available = {"NCCL", "NVSHMEM"}
        self.in_use = False
        self.heap = heap
        self.rendezvoused: list[str] = []
        self.frees = 0
        self.fault: BaseException | None = None
        self._files: dict[int, tuple[int, int]] = {}  # address -> number and bytes
        self._number = 0

    def get_backend(self, device: torch.device) -> str | None:
        return self.active

    def set_backend(self, name: str) -> None:
        if name not in self.available:
            raise RuntimeError(f"SymmetricMemory does not find allocation backend {name}\nException raised from")
        if self.in_use and name != self.active:
            raise RuntimeError("Backend can not be changed after use.\nException raised from")
        self.active = name

    def empty_strided_p2p(
        self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        assert (len(size), stride, dtype) == (1, (1,), torch.uint8)
        self.in_use = True
        address = self._nvshmem(size[0]) if self.active == "NVSHMEM" else self._local(size[0])
        memory: Any = (ctypes.c_ubyte * size[0]).from_address(address)
        weakref.finalize(memory, self._free, address).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _local(self, nbytes: int) -> int:
        self._number += 1
        address = map_file(f"symmem-fake-torch-{os.getpid()}-{self._number}", nbytes)
        self._files[address] = self._number, nbytes
        return address

    def _nvshmem(self, nbytes: int) -> int:
        if not self.heap.initialized:
            unique_id = agree(INIT, int.from_bytes(os.urandom(4), "big"))[0][0]
            self.heap.initialize(None, unique_id.to_bytes(8, "big"), dist.get_rank(), dist.get_world_size())
        address = self.heap.malloc(nbytes)
        if not address:
            raise RuntimeError("nvshmem_malloc failed")
        return address

    def _free(self, address: int) -> None:
        self.frees += 1
        if address in self._files:
            number, _nbytes = self._files.pop(address)
            (SHARED / f"symmem-fake-torch-{os.getpid()}-{number}").unlink()
        else:
            self.heap.free(address)

    def rendezvous(self, memory: torch.Tensor, group_name: str) -> _Handle:
        if self.fault:
            raise self.fault
        group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type, attr-defined]
        self.rendezvoused.append(group_name)
        address = memory.data_ptr()
        if self.active == "NVSHMEM":
            assert dist.get_world_size(group) > 1, "torch makes no team of one"
            self.heap.malloc(9216)  # torch's pad, over all PEs, never freed
            ranks = dist.get_process_group_ranks(group)
            return _Handle([self.heap.peer_pointer(address, rank) for rank in ranks], self.heap.multicast)
        if self.active == "NCCL":
            assert group in torch_transport._connected, "no communicator"
        number, nbytes = self._files[address]
        files = agree(MEET, os.getpid(), number, nbytes, group=group)
        pointers = [map_file(f"symmem-fake-torch-{pid}-{theirs}", nbytes) for pid, theirs, _ in files]
        if self.active == "CUDA":  # NCCL's window has a separate address, even for the own memory
            pointers[dist.get_rank(group)] = address
        return _Handle(pointers)


def install() -> tuple[FakeNvshmem, FakeTorch]:
    """Let the four backends of this process use new fakes, on CPU memory."""
    library = FakeNvshmem()
    symm = FakeTorch(library)
    for name, value in {
        "require_gpu": lambda backend: None,
        "check_device": lambda backend, device: device,
        "on_device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "finish_stream": lambda device: None,
        "current_stream": lambda device: 0,
        "idle": lambda device, timeout: True,
        "free_memory": lambda device: 1 << 40,
    }.items():
        setattr(gpu, name, value)
    vars(cuda_signals)["CudaSignals"] = FakeSignals
    vars(torch_transport)["_symmetric_memory"] = lambda: symm
    vars(torch_transport)["backend_of"] = lambda group, device: "nccl"
    vars(torch_transport)["_lack_of_nccl"] = vars(torch_transport)["_lack_of_nvshmem"] = lambda: None
    vars(nvshmem)["NvshmemLibrary"] = lambda: library
    libraries_driver = LibrariesDriver()
    vars(driver)["load_driver"] = lambda: libraries_driver
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    for name in ("nvshmem", "pytorch_cuda", "pytorch_nccl", "pytorch_nvshmem"):
        backend: Any = get_backend(name)
        backend.__init__(name)
        vars(backend).pop("library", None)
        backend.device_type = "cpu"
    return library, symm
