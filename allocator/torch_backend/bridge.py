"""The Python side of ``native/torch_backend.cpp``: the first rendezvous of a block, and signals."""

from __future__ import annotations

import _thread
import atexit
import ctypes
import functools
import itertools
import os
import struct
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from symmem import native
from symmem.backends import get_backend, signal_kernels
from symmem.backends.base import Allocation
from symmem.backends.host import HostAllocation, HostBackend
from symmem.backends.libc import memory_limits
from symmem.errors import ForkedError, UnsupportedError, from_wire
from symmem.group.group import Group
from symmem.group.resolve import resolve_group
from symmem.memory.block import Block
from symmem.memory.layout import Layout
from symmem.memory.registry import block_at, register
from symmem.tensor.tensor import SymmetricTensor

if TYPE_CHECKING:
    from symmem.backends.cuda_signals import CudaSignals

__all__ = ["enable", "is_symmetric", "last_error"]

_NOT_SYMMETRIC = 2

_Rendezvous = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_char_p)
_Signal = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_uint64)
_Check = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)
_Holds = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)
_Drop = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _Functions(ctypes.Structure):
    """The struct ``Python`` of the C++ file."""

    _fields_ = (
        ("rendezvous", _Rendezvous),
        ("signal", _Signal),
        ("check", _Check),
        ("holds", _Holds),
        ("drop", _Drop),
        ("add_pending_call", ctypes.c_void_p),
        ("memory_limits", ctypes.c_char_p),
    )


class _Owner:
    """A reference to memory of the C++ file. The last one frees the memory."""

    def __init__(self, library: ctypes.CDLL, owner: int) -> None:
        # Not at exit: a thread or a tensor may still use the memory. The kernel frees it later.
        weakref.finalize(self, library.symmem_release, ctypes.c_void_p(owner)).atexit = False


_lock = threading.Lock()
_enabled: tuple[int, ctypes.CDLL, _Functions] | None = None  # with the process that enabled it
# What the handles of torch keep, by token. On the CPU, signals are methods of the tensor.
_handles: dict[int, tuple[SymmetricTensor, Group, CudaSignals | None]] = {}
_tokens = itertools.count(1)
_errors = threading.local()


def enable() -> None:
    """Register the allocator with torch; see :func:`symmem.torch_backend.enable`."""
    global _enabled
    with _lock:
        if _enabled is not None:
            if _enabled[0] != os.getpid():
                raise ForkedError(
                    "torch's symmetric memory was enabled before this process was forked; the child is not a rank",
                    hint="start the child with the method spawn, and enable it there",
                    step="enable",
                )
            return
        get_backend("host").probe()
        if not dist.is_available():
            raise UnsupportedError(
                "this build of torch has no torch.distributed", hint="install another build of torch"
            )
        library = native.torch_library()
        dropped = ctypes.PyDLL(None, handle=library._handle).symmem_dropped  # keeps the GIL: it is short
        functions = _Functions(
            _Rendezvous(_guarded(functools.partial(_rendezvous, library), library)),
            _Signal(_guarded(_signal, library)),
            _Check(_guarded(_check, library)),
            _Holds(lambda address: block_at(address) is not None),
            _Drop(lambda _argument: _drop(dropped)),
            ctypes.cast(ctypes.pythonapi.Py_AddPendingCall, ctypes.c_void_p),
            b"".join(os.fsencode(path) + b"\n" for path in memory_limits()),
        )
        library.symmem_release.restype = None
        library.symmem_failure.restype = ctypes.c_char_p
        library.symmem_enable(ctypes.byref(functions))
        signal_kernels.for_torch = True  # only if nothing failed, because pads must be the same on all ranks
        atexit.register(library.symmem_exit)
        _enabled = os.getpid(), library, functions


def is_symmetric(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor is in memory that torch's symmetric memory or symmem allocated. Local."""
    if _enabled is None:
        return False
    return bool(_enabled[1].symmem_holds(ctypes.c_uint64(tensor.untyped_storage().data_ptr())))


def last_error() -> BaseException | None:
    """The error behind the last RuntimeError of torch's symmetric memory on this thread that is symmem's. Local.

    Torch reports an error of its backend as a RuntimeError with the text alone. This has the class, and the attributes
    that are known: an allocation, a free and a signal on CUDA fail without Python, so their errors have a text only.

    Returns:
        A SymmemError, or the exception of another library that symmem called, or a KeyboardInterrupt; None if there was
        no error.
    """
    text = "" if _enabled is None else _enabled[1].symmem_failure().decode(errors="replace")
    last: tuple[str, BaseException | None] = getattr(_errors, "last", ("", None))
    if text != last[0]:  # from C++, later than the last one from Python
        _symmem, kind, what = text.split(": ", 2)
        _errors.last = last = text, from_wire({"type": kind, "what": what})
    return last[1]


def _guarded(function: Callable[..., int | None], library: ctypes.CDLL) -> Callable[..., int]:
    """Report an exception to the C++ file, which raises it as torch's error. Without one, None is 0."""

    def call(*arguments: Any) -> int:
        try:
            return function(*arguments) or 0
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # their variables keep memory
            text = f"symmem: {type(error).__name__}: {error}"
            _errors.last = text, error
            library.symmem_fail(text.encode())
            if isinstance(error, KeyboardInterrupt):
                _thread.interrupt_main()  # raised again after torch's error, or in its place
            return 1

    return call


def _rendezvous(library: ctypes.CDLL, result: int, address: int, owner: int | None, name: bytes) -> int:
    keeper = None if owner is None else _Owner(library, owner)
    block = block_at(address)
    if block is None:
        if keeper is None or owner is None:
            return _NOT_SYMMETRIC
        block = _adopt(library, owner, keeper)
    offset = address - block.pointer
    layout = block.layout
    if offset:
        layout = Layout((block.nbytes - offset,), (1,), torch.uint8, offset)
    tensor = SymmetricTensor(block, layout)
    group = resolve_group(name.decode() or None)
    tensor.rendezvous(group)
    block.before_access(group)
    mapping = tensor._mapping("rendezvous", group)
    allocation = block.allocation
    pads: Sequence[int] = [0] * group.size
    pad_nbytes = allocation.pad_nbytes
    pointers = [pointer + block.offset if pointer else 0 for pointer in mapping.pointers]
    if pad_nbytes:
        pads = [pointer + allocation.pad if pointer else 0 for pointer in mapping.pointers]
    signals = words = None
    if allocation.device.type == "cuda":
        from symmem.torch_backend import gpu

        signals, words = gpu.signals_of(group, allocation.device)
        if not pad_nbytes:
            pads, pad_nbytes = signals.torch_pads(block.pads(mapping))
    token = next(_tokens)
    _handles[token] = tensor, group, signals
    values = token, group.rank, group.size, block.nbytes, offset, pad_nbytes, *pointers, *pads
    library.symmem_fill(
        ctypes.c_void_p(result),
        struct.pack(f"{len(values)}q", *values),
        _global_ranks(group),
        words,
        -1 if words is None else allocation.device.index,
    )
    return 0


class _Ranks(list[Any]):
    """The global ranks of a group as a C array, once it was asked for."""


def _global_ranks(group: Group) -> Any:
    known = group.extension(_Ranks)
    if not known:
        job = group.process_group
        known.append(
            (ctypes.c_int * group.size)(*(range(group.size) if job is None else dist.get_process_group_ranks(job)))
        )
    return known[0]


class AdoptedAllocation(HostAllocation):
    """A memory file that torch allocated, with a signal pad of torch behind the data."""

    def __init__(self, values: list[int], keeper: _Owner) -> None:
        backend = get_backend("host")
        assert isinstance(backend, HostBackend)
        pointer, nbytes, extent, self.pad, self.pad_nbytes, descriptor, _ordinal, _fabric = values
        super().__init__(backend, nbytes, pointer, descriptor, extent, keeper)


_adopting = threading.Lock()  # two threads may rendezvous one block in two groups


def _adopt(library: ctypes.CDLL, owner: int, keeper: _Owner) -> Block:
    values = (ctypes.c_int64 * 8)()
    library.symmem_describe(ctypes.c_void_p(owner), values)
    if values[6] < 0:
        allocation: Allocation = AdoptedAllocation(list(values), keeper)
    else:
        from symmem.torch_backend.gpu import AdoptedGpuAllocation

        allocation = AdoptedGpuAllocation(list(values), keeper)
    with _adopting:
        block = block_at(allocation.pointer)
        if block is None:
            block = Block(allocation, Layout((allocation.nbytes,), (1,), torch.uint8))
            register(block)
        return block


def _signal(token: int, kind: int, peer: int, channel: int, timeout_ms: int) -> None:
    tensor, group, _signals = _handles[token]
    timeout = timeout_ms / 1000 if timeout_ms else None
    if kind == 0:
        tensor.barrier(channel, timeout, group=group)
    elif kind == 1:
        tensor.put_signal(peer, channel, timeout, group=group)
    else:
        tensor.wait_signal(peer, channel, timeout, group=group)


def _check(token: int) -> None:
    signals = _handles[token][2]
    assert signals is not None, "the C++ file asks for memory of GPUs only"
    signals.check_usable()


def _drop(dropped: Callable[[Any, int], int]) -> int:
    """Forget the handles that torch has destroyed."""
    tokens = (ctypes.c_int64 * 64)()
    while count := dropped(tokens, len(tokens)):
        for token in tokens[:count]:
            del _handles[token]
    return 0
