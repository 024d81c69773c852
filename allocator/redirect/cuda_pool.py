"""For CUDA: pools of torch's caching allocator that get their memory from an arena.

Every outermost ``use_symmetric_memory`` makes a new pool. Inside it, torch reuses memory by reference counts, and these
change in the same order on all ranks that run the same program. Torch must not reuse memory across pools, because the
garbage collector frees tensors at different times on different ranks. So a pool ends with its last tensor, and its
memory goes back to the arena's quarantine.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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

__all__ = ["ArenaPool", "is_pooled", "sweep"]


class _Torch:
    """The functions of torch's caching allocator that pools need; tests replace this class."""

    def __init__(self, alloc: Callable[[int, int, int | None], int]) -> None:
        if torch.cuda.get_allocator_backend() != "native":
            raise UnsupportedError(
                f"torch's allocator {torch.cuda.get_allocator_backend()!r} has no pools",
                hint="remove `backend` from PYTORCH_ALLOC_CONF",
            )
        _release_lock()
        self._alloc = _ALLOC(alloc)  # must outlive the allocator
        # Torch calls `free` while it holds its allocator's lock. Python code there could deadlock with a thread that
        # holds Python's lock and waits for the allocator's. `labs` of the C library has no side effects.
        free = ctypes.CDLL(None).labs
        self._allocator = torch._C._cuda_customAllocator(_address(self._alloc), _address(free))

    def pool(self, device: torch.device) -> Any:
        """Make a pool."""
        # Make the workspace of cuBLAS for this thread and stream now, because it is never freed. Otherwise it could be
        # allocated from this pool, and only on the ranks that have not used cuBLAS before.
        with torch.cuda.device(device):
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        return torch.cuda.MemPool(self._allocator)

    def begin(self, device: int, pool: Any) -> None:
        """Start to take this thread's allocations on a device from a pool."""
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool.id)

    def end(self, device: int, pool: Any) -> None:
        """Stop to take allocations from a pool."""
        torch._C._cuda_endAllocateToPool(device, pool.id)
        torch._C._cuda_releasePool(device, pool.id)

    def in_use(self, device: int, pool: Any) -> bool:
        """Whether a pool has live tensors."""
        # memory_snapshot(pool.id) crashed in torch 2.11 after some hundred pools.
        none_live: bool = torch._C._cuda_checkPoolLiveAllocations(device, pool.id, set())
        return not none_live


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_NAME = "torch's memory pool"
"""A name instead of lines: the line at which torch needs another piece depends on what each rank has freed."""
_ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


def _release_lock() -> None:
    """Let torch's allocator release its lock while it calls `_alloc`, which is Python; see :meth:`_Torch.__init__`."""
    wanted = "release_lock_on_cudamalloc:True"
    accelerator = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    put: Any = accelerator or torch._C._cuda_cudaCachingAllocator_set_allocator_settings  # type: ignore[attr-defined]
    if get := getattr(torch._C, "_accelerator_getAllocatorSettings", None):  # missing in torch 2.11
        known = get()
    else:
        known = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    # Torch may reset settings that are left out to their defaults.
    kept = [item for item in known.split(",") if item and not item.strip().startswith("release_lock_on_cudamalloc:")]
    put(",".join([*kept, wanted]))


_torch: _Torch | None = None
_lock = threading.RLock()
_left: list[ArenaPool] = []  # pools that no thread uses any more, but that may have live tensors
_sweeping = threading.Lock()
_pooled: weakref.WeakSet[Block] = weakref.WeakSet()


def _allocator() -> _Torch:
    global _torch
    with _lock:
        if _torch is None:
            _torch = _Torch(_alloc)
        return _torch


def _alloc(nbytes: int, device: int, stream: int | None) -> int:
    """Allocate for torch, on the thread that uses the pool; return 0 if there is no memory."""
    pool = _thread.active.get(device)
    return pool.take(nbytes) if pool is not None else 0


class _ActivePools(threading.local):
    """The pools that this thread's allocations come from, by index of the device."""

    def __init__(self) -> None:
        self.active: dict[int, ArenaPool] = {}


_thread = _ActivePools()


class ArenaPool:
    """A pool over an arena. One thread uses it; afterwards it lives until its tensors are gone."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._process, self._index = os.getpid(), arena.device.index
        self._blocks: list[Block] = []
        self._failed: BaseException | None = None
        self._backward = contextlib.ExitStack()
        sweep()
        self._torch = _allocator()
        self._pool = self._torch.pool(arena.device)

    def start(self) -> None:
        """Start on this thread."""
        self.resume()
        # backward() would run on a thread per device, and those threads use no pool.
        self._backward.enter_context(torch.autograd.set_multithreading_enabled(False))

    def stop(self) -> None:
        """Stop, on the thread that started."""
        self._backward.close()
        self.pause()
        _left.append(self)

    def pause(self) -> None:
        """Take no allocations until :meth:`resume`."""
        self._torch.end(self._index, self._pool)
        del _thread.active[self._index]

    def resume(self) -> None:
        """End a pause."""
        self._torch.begin(self._index, self._pool)
        _thread.active[self._index] = self

    def cause_of(self, error: BaseException | None) -> BaseException | None:
        """Return the error to raise at the end of the block: the cause of torch's OutOfMemoryError, or an interrupt."""
        failed, self._failed = self._failed, None
        while error is not None and not isinstance(error, torch.OutOfMemoryError):
            error = error.__context__  # for example, if the end of a capture raised too
        return failed if error is not None or not isinstance(failed, Exception) else None

    def take(self, nbytes: int) -> int:
        """Return the address of a piece of the arena for the pool; 0 if there is none, then torch asks once more."""
        try:
            if cuda_graphs.is_capturing(self.arena.device):
                raise UnsupportedError(
                    "a CUDA graph cannot be captured within use_symmetric_memory: torch would reuse the memory of its "
                    "tensors while the graph lives",
                    hint="capture it outside, with symmem.allocate for tensors that must be symmetric",
                )
            self.pause()  # the arena may allocate with torch when it grows
            try:
                block = self.arena.sub_allocate(Layout((nbytes,), (1,), torch.uint8), _NAME, caller())
            finally:
                self.resume()
        except BaseException as error:  # C cannot handle it
            self._failed = error
            return 0
        self._failed = None
        self._blocks.append(block)
        _pooled.add(block)
        return block.pointer

    def drop_if_unused(self) -> bool:
        """Drop the memory if the pool has no live tensors; return whether it was dropped.

        A forked child must not call CUDA for the pools of its parent, so it keeps them.
        """
        if self._process != os.getpid() or self._torch.in_use(self._index, self._pool):
            return False
        self._pool = None  # torch drops its pieces first; only then may the arena reuse them
        self._blocks.clear()
        return True


def is_pooled(block: Block) -> bool:
    """Whether torch's allocator places tensors in the block; their offsets may then differ among ranks."""
    return block in _pooled


def sweep() -> None:
    """Return the memory of pools without live tensors to the arenas. Local."""
    # Do not wait for the lock: the garbage collector may run in here, and a __del__ may call this again.
    if _sweeping.acquire(blocking=False):
        try:
            for pool in tuple(_left):
                if pool.drop_if_unused():
                    _left.remove(pool)
        finally:
            _sweeping.release()


def _at_garbage_collection(phase: str, info: dict[str, int]) -> None:
    """Sweep before a full collection. A pool keeps its group, and nothing else would end it if no other is made."""
    if _left and phase == "start" and info["generation"] == 2:
        sweep()


before_collecting.append(sweep)
gc.callbacks.append(_at_garbage_collection)
