"""Stream captures: what may not happen amid one, and memory that a captured CUDA graph goes on using.

A graph holds addresses. Replaying it does not pass through the allocator, so a block whose last tensor went during the
capture, or after it, must not be handed out again while the graph lives. CUDA tells when a graph and all its
executables are gone by releasing the user objects that it retains (CUDA driver API, "Graph Management",
cuUserObjectCreate; NCCL learns of it in the same way). The callback for that runs on a thread of the driver, on which
Python must not run: it is the C library's sem_post, and the semaphore is looked at whenever ranks meet.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from symmem.backends.driver import load_driver
from symmem.backends.gpu import finish_stream
from symmem.backends.kernel_words import raise_failure
from symmem.errors import UnsupportedError

if TYPE_CHECKING:
    from symmem.memory.registry import Block

__all__ = ["apart", "forget_ended", "is_capturing", "is_capturing_cuda", "keep", "kept", "refuse"]

T = TypeVar("T")

_SEM_T = 32  # bytes of a sem_t on 64-bit Linux


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of this thread is being captured into a CUDA graph.

    Raises:
        SymmemError: Why a kernel has stopped, if one has.
    """
    return device.type == "cuda" and is_capturing_cuda()


def is_capturing_cuda() -> bool:
    """The same, where the device is known to be one of CUDA."""
    try:
        return torch._C._cuda_isCurrentStreamCapturing()
    except RuntimeError as error:
        raise_failure(error)
        raise


def refuse(device: torch.device, what: str) -> None:
    """Raise if a capture is under way.

    Raises:
        UnsupportedError: It is; ``what`` would wait for other ranks, and map memory, in the middle of it.
    """
    if is_capturing(device):
        raise UnsupportedError(
            f"{what} during the capture of a CUDA graph: ranks would meet, and memory be mapped, amid the capture",
            hint="run the captured code once before (warm up), so that its tensors have rendezvoused and the arena is "
            "large enough; or set a larger arena_size",
        )


def apart(device: torch.device, what: str, function: Callable[[], T]) -> T:
    """Run what makes lasting memory, outside of the pool that this thread's allocations may go to now.

    While a CUDA graph is warmed up or captured, torch gives all memory of the thread from the graph's pool, and takes
    what stays there for the graph's. So on CUDA it runs on a thread of its own, and has finished, on its stream, when
    this returns.

    Raises:
        UnsupportedError: A capture is under way; ``what`` is named.
    """
    if device.type != "cuda":
        return function()
    refuse(device, what)
    mode, results = torch.is_inference_mode_enabled(), []

    def run() -> None:
        with torch.inference_mode(mode), torch.cuda.device(device):
            results.append(function())
            finish_stream(device)

    with ThreadPoolExecutor(1, "symmem-apart") as thread:
        thread.submit(run).result()
    return results[0]


class _Kept:
    """The blocks that one graph uses, and whether it has ended."""

    def __init__(self, graph: int) -> None:
        self.blocks: set[Block] = set()
        self._libc = _libc()
        self._semaphore = ctypes.create_string_buffer(_SEM_T)
        self._libc.sem_init(self._semaphore, 0, 0)
        post = ctypes.cast(self._libc.sem_post, ctypes.c_void_p).value or 0
        load_driver().retain_in_graph(graph, post, ctypes.addressof(self._semaphore))

    def ended(self) -> bool:
        value = ctypes.c_int()
        self._libc.sem_getvalue(self._semaphore, ctypes.byref(value))
        return value.value > 0


_graphs: dict[int, _Kept] = {}  # by the number that the driver gives a capture
_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child: the thread that held the lock at the fork is not there to release it."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def keep(block: Block) -> None:
    """Keep a block for as long as the graph lives that the current stream is being captured into."""
    number, graph = load_driver().capture_of(torch.cuda.current_stream(block.allocation.device).cuda_stream)
    with _lock:
        if number not in _graphs:
            _graphs[number] = _Kept(graph)
        _graphs[number].blocks.add(block)


def kept() -> dict[int, int]:
    """Blocks kept for each graph that lives, by the number of its capture."""
    with _lock:
        return {number: len(entry.blocks) for number, entry in _graphs.items()}


def forget_ended() -> None:
    """Let go of the blocks of graphs that have ended."""
    with _lock:
        for number in [number for number, entry in _graphs.items() if entry.ended()]:
            del _graphs[number]
