"""CUDA graphs: refuse steps that a stream capture forbids, and keep memory that a captured graph still uses.

A graph holds addresses. A replay does not pass through the allocator. So a block must not be reused while a graph
lives that uses it, even if its last tensor was dropped during the capture or later. When a graph and all its
executables are destroyed, CUDA releases the user objects that the graph retains (CUDA driver API, "Graph Management",
cuUserObjectCreate; NCCL uses the same mechanism). The driver calls the callback on a thread that must not run Python.
So the callback is the C library's sem_post, and every reclaim round looks at the semaphore.
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

from symmem.backends.kernel_status import raise_failure
from symmem.errors import UnsupportedError

if TYPE_CHECKING:
    from symmem.backends.driver import Driver
    from symmem.memory.block import Block

__all__ = ["apart", "forget_ended", "is_capturing", "is_capturing_cuda", "keep", "kept", "refuse"]

T = TypeVar("T")

_SEM_T = 32  # bytes of a sem_t on 64-bit Linux


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of this thread is being captured into a CUDA graph.

    Raises:
        SymmemError: A kernel has stopped; the error says why.
    """
    return device.type == "cuda" and is_capturing_cuda()


def is_capturing_cuda() -> bool:
    """The same as :func:`is_capturing`, for a caller that knows that its device is a CUDA device."""
    try:
        return torch._C._cuda_isCurrentStreamCapturing()
    except RuntimeError as error:
        raise_failure(error)
        raise


def refuse(device: torch.device, refusal: str) -> None:
    """Raise if a capture is in progress.

    Args:
        device: The device of the step.
        refusal: Begins the message, for example ``"an arena cannot grow"``.

    Raises:
        UnsupportedError: A capture is in progress. The step would wait for other ranks and map memory during it.
    """
    if is_capturing(device):
        raise UnsupportedError(
            f"{refusal} during the capture of a CUDA graph, because it waits for other ranks and maps memory",
            hint="run the code once before the capture (warm up), so that its tensors have rendezvoused and the arena "
            "is large enough; or set a larger arena_size",
        )


def apart(device: torch.device, refusal: str, function: Callable[[], T]) -> T:
    """Run a function that allocates lasting memory, outside of the memory pool that this thread may be using.

    While a CUDA graph is warmed up or captured, torch takes all memory of the thread from the graph's pool, and treats
    memory that stays allocated there as the graph's. So on CUDA the function runs on a separate thread. Its work on
    its stream is complete when this returns.

    Raises:
        UnsupportedError: A capture is in progress; see :func:`refuse` for ``refusal``.
    """
    if device.type != "cuda":
        return function()
    refuse(device, refusal)
    from symmem.backends.gpu import finish_stream

    mode, results = torch.is_inference_mode_enabled(), []

    def run() -> None:
        with torch.inference_mode(mode), torch.cuda.device(device):
            results.append(function())
            finish_stream(device)

    with ThreadPoolExecutor(1, "symmem-apart") as thread:
        thread.submit(run).result()
    return results[0]


class _Kept:
    """The blocks that one graph uses, and whether the graph still exists."""

    def __init__(self, graph: int) -> None:
        self.blocks: set[Block] = set()
        self._libc = _libc()
        self._semaphore = ctypes.create_string_buffer(_SEM_T)
        self._libc.sem_init(self._semaphore, 0, 0)
        post = ctypes.cast(self._libc.sem_post, ctypes.c_void_p).value or 0
        _driver().retain_in_graph(graph, post, ctypes.addressof(self._semaphore))

    def ended(self) -> bool:
        value = ctypes.c_int()
        self._libc.sem_getvalue(self._semaphore, ctypes.byref(value))
        return value.value > 0


_graphs: dict[int, _Kept] = {}  # by the driver's number of the capture
_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child, replace the lock: the child lacks the thread that may have held it at the fork."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def _driver() -> Driver:
    from symmem.backends.driver import load_driver

    return load_driver()


def keep(block: Block) -> None:
    """Keep a block alive as long as the graph that the current stream is being captured into."""
    number, graph = _driver().capture_of(torch.cuda.current_stream(block.allocation.device).cuda_stream)
    with _lock:
        if number not in _graphs:
            _graphs[number] = _Kept(graph)
        _graphs[number].blocks.add(block)


def kept() -> dict[int, int]:
    """How many blocks are kept, per live graph, by the number of its capture."""
    with _lock:
        return {number: len(entry.blocks) for number, entry in _graphs.items()}


def forget_ended() -> None:
    """Release the blocks of graphs that were destroyed."""
    with _lock:
        for number in [number for number, entry in _graphs.items() if entry.ended()]:
            del _graphs[number]
