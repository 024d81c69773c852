"""Memory of GPUs that torch allocated, and what the C++ file needs to launch signals. Imported at the first use."""

from __future__ import annotations

import ctypes

import torch

from symmem.backends import get_backend
from symmem.backends.cuda_signals import CudaSignals
from symmem.backends.native import NativeAllocation, NativeBackend
from symmem.backends.vmm import MemoryHandle

__all__ = ["AdoptedGpuAllocation", "CudaSignals", "signal_words"]


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


class SignalWords(ctypes.Structure):
    """The struct ``Signals`` of the C++ file."""

    _fields_ = (
        ("kernels", ctypes.c_void_p * 3),
        ("status", ctypes.c_uint64),
        ("stopped", ctypes.c_void_p),
        ("given_up", ctypes.c_void_p),
        ("timeout", ctypes.c_uint64),
        ("group", ctypes.c_uint64),
    )


def signal_words(signals: CudaSignals) -> SignalWords:
    """The words of signals in that layout."""
    barrier, put, wait, *rest = signals.words()
    return SignalWords((ctypes.c_void_p * 3)(barrier, put, wait), *rest)
