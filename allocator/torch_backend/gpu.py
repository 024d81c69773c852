"""Memory of GPUs that torch allocated, and what the C++ file needs to launch signals. Imported at the first use."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from symmem.backends import get_backend
from symmem.backends.cuda_signals import CudaSignals
from symmem.backends.native import NativeAllocation, NativeBackend
from symmem.backends.vmm import MemoryHandle

if TYPE_CHECKING:
    from symmem.group.group import Group

__all__ = ["AdoptedGpuAllocation", "signals_of"]


class AdoptedGpuAllocation(NativeAllocation):
    """Memory of a GPU that torch allocated, with a signal pad of torch behind the data.

    Args:
        values: As from the function ``symmem_describe`` of the C++ file.
        owner: Keeps the memory.
    """

    def __init__(self, values: list[int], owner: object) -> None:
        backend = get_backend("native")
        assert isinstance(backend, NativeBackend)
        pointer, nbytes, extent, self.pad, self.pad_nbytes, _descriptor, ordinal, fabric = values
        driver = backend.driver
        with driver.on(ordinal):
            handle = MemoryHandle(driver, driver.retain(pointer))
        super().__init__(backend, torch.device("cuda", ordinal), nbytes, pointer, handle, extent, bool(fabric), owner)


class _Words(ctypes.Structure):
    """The struct ``Signals`` of the C++ file."""

    _fields_ = (
        ("kernels", ctypes.c_void_p * 3),
        ("status", ctypes.c_uint64),
        ("stopped", ctypes.c_void_p),
        ("given_up", ctypes.c_void_p),
        ("timeout", ctypes.c_uint64),
        ("group", ctypes.c_uint64),
    )


class _Signals(dict[torch.device, tuple[CudaSignals, Any]]):
    """The results of :func:`signals_of` for one group."""


def signals_of(group: Group, device: torch.device) -> tuple[CudaSignals, Any]:
    """Signals that can tell whether kernels of the group have failed on a GPU, and a pointer to their words for C."""
    known = group.extension(_Signals)
    if device not in known:
        signals = CudaSignals(group, device, ())
        barrier, put, wait, *rest = signals.words()
        words = _Words((ctypes.c_void_p * 3)(barrier, put, wait), *rest)
        known[device] = signals, ctypes.pointer(words)
    return known[device]
