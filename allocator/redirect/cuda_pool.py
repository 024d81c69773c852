"""On CUDA: pools of torch's caching allocator whose memory is an arena's.

Each outermost ``use_symmetric_memory`` has a pool of its own. Within it, torch reuses memory by reference counts, which
go alike on all ranks that run the same program. From one to the next it must not: torch would hand out what was freed
in between, and when the garbage collector frees something differs from rank to rank. So a pool ends with its last
tensor, and what it had goes back to the arena, into quarantine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from symmem.arena.collect import before_collecting
from symmem.errors import UnsupportedError
from symmem.memory import cuda_graphs
from symmem.memory.layout import Layout
from symmem.redirect.cpu_dispatch import caller

if TYPE_CHECKING:
    from symmem.arena.arena import Arena
    from symmem.memory.block import Block

__all__ = ["Pool", "is_pooled", "sweep"]


class _Torch:
    """What of torch's caching allocator is used; tests put another one here."""

    def __init__(self, alloc: Callable[[int, int, int | None], int]) -> None:
        if torch.cuda.get_allocator_backend() != "native":
            raise UnsupportedError(
                f"torch's allocator {torch.cuda.get_allocator_backend()!r} has no pools",
                hint="remove `backend` from PYTORCH_ALLOC_CONF",
            )
        _release_lock()
        self._alloc = _ALLOC(alloc)  # must outlive the allocator
        # Called under the lock of torch's allocator, for which another thread may wait that has Python's: so this
        # cannot be Python. It has nothing to do, and `labs` of the C library does nothing with what it is given.
        free = ctypes.CDLL(None).labs
        self._allocator = torch._C._cuda_customAllocator(_address(self._alloc), _address(free))

    def pool(self, device: torch.device) -> Any:
        """A new pool."""
        # Makes the workspace of cuBLAS, unless there is one for this thread and stream. It stays for ever; made later,
        # it would be in this pool, and only on the ranks that have not used cuBLAS before.
        with torch.cuda.device(device):
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        return torch.cuda.MemPool(self._allocator)

    def begin(self, device: int, pool: Any) -> None:
        """Let this thread's allocations on a device come from a pool."""
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool.id)

    def end(self, device: int, pool: Any) -> None:
        """No longer."""
        torch._C._cuda_endAllocateToPool(device, pool.id)
        torch._C._cuda_releasePool(device, pool.id)

    def in_use(self, device: int, pool: Any) -> bool:
        """Whether a tensor lives in a pool."""
        # Not memory_snapshot(pool.id): it has crashed, in torch 2.11, after some hundred pools.
        none_live: bool = torch._C._cuda_checkPoolLiveAllocations(device, pool.id, set())
        return not none_live


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


def _release_lock() -> None:
    """Let torch's allocator release its lock while it asks for memory: see :meth:`_Torch.__init__` for why."""
    wanted = "release_lock_on_cudamalloc:True"
    accelerator = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    put: Any = accelerator or torch._C._cuda_cudaCachingAllocator_set_allocator_settings  # type: ignore[attr-defined]
    if get := getattr(torch._C, "_accelerator_getAllocatorSettings", None):  # torch 2.11 does not tell them
        known = get()
    else:
        known = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    # Settings that are left out may go back to their defaults.
    kept = [each for each in known.split(",") if each and not each.strip().startswith("release_lock_on_cudamalloc:")]
    put(",".join([*kept, wanted]))


_torch: _Torch | None = None
_lock = threading.RLock()
_over: list[Pool] = []  # pools that no thread is in, whose tensors may live
_sweeping = threading.Lock()
_pooled: weakref.WeakSet[Block] = weakref.WeakSet()


def _allocator() -> _Torch:
    global _torch
    with _lock:
        if _torch is None:
            _torch = _Torch(_alloc)
        return _torch


def _alloc(nbytes: int, device: int, stream: int | None) -> int:
    """Called by torch, on the thread whose pool it is; 0 if there is no memory."""
    pool = _here.active.get(device)
    return pool.take(nbytes) if pool is not None else 0


class _Here(threading.local):
    """The pool from which this thread's allocations come, by index of the device."""

    def __init__(self) -> None:
        self.active: dict[int, Pool] = {}


_here = _Here()


class Pool:
    """A pool over an arena; of one thread while it is in it, and then until its tensors are gone."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._index = arena.device.index
        self._blocks: list[Block] = []
        self._failed: BaseException | None = None
        self._backward = contextlib.ExitStack()
        sweep()
        self._torch = _allocator()
        self._pool = self._torch.pool(arena.device)

    def start(self) -> None:
        """Begin, on this thread."""
        self.resume()
        # backward() has a thread for each device, which is in no pool.
        self._backward.enter_context(torch.autograd.set_multithreading_enabled(False))

    def stop(self) -> None:
        """End, on the thread that began."""
        self._backward.close()
        self.pause()
        _over.append(self)

    def pause(self) -> None:
        """Leave allocations alone for now."""
        self._torch.end(self._index, self._pool)
        del _here.active[self._index]

    def resume(self) -> None:
        """Go on."""
        self._torch.begin(self._index, self._pool)
        _here.active[self._index] = self

    def cause_of(self, error: BaseException | None) -> BaseException | None:
        """What to raise in the place of an error that left the block: why there was no memory, if that is it."""
        failed, self._failed = self._failed, None
        while error is not None and not isinstance(error, torch.OutOfMemoryError):
            error = error.__context__  # such as that of the end of a capture
        return failed if error is not None or not isinstance(failed, Exception) else None

    def take(self, nbytes: int) -> int:
        """Address of a piece of the arena for the pool; 0 if there is none, and then torch asks once more."""
        try:
            if cuda_graphs.is_capturing(self.arena.device):
                raise UnsupportedError(
                    "a CUDA graph cannot be captured within use_symmetric_memory: torch would give the memory of its "
                    "tensors to others while the graph lives",
                    hint="capture it outside, with symmem.allocate for what must be symmetric",
                )
            self.pause()  # what the arena itself makes with torch, to grow
            try:
                block = self.arena.carve(Layout((nbytes,), (1,), torch.uint8), None, caller())
            finally:
                self.resume()
        except BaseException as error:  # must not pass into C
            self._failed = error
            return 0
        self._failed = None
        self._blocks.append(block)
        _pooled.add(block)
        return block.pointer

    def over(self) -> bool:
        """Let go of the memory if nothing lives in it; whether that is so."""
        if self._torch.in_use(self._index, self._pool):
            return False
        self._pool = None  # torch gives up its pieces first: only then others may have them
        self._blocks.clear()
        return True


def is_pooled(block: Block) -> bool:
    """Whether it is a piece that torch's allocator gives tensors from: where one lies in it may differ among ranks."""
    return block in _pooled


def sweep() -> None:
    """Give back to the arenas the pools in which nothing lives any more. Local."""
    # Not waited for: the collector may run in the middle of this, and in it whatever has a __del__.
    if _sweeping.acquire(blocking=False):
        try:
            for pool in tuple(_over):
                if pool.over():
                    _over.remove(pool)
        finally:
            _sweeping.release()


before_collecting.append(sweep)
