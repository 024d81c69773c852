"""The kernels of the collective operations, loaded once per GPU and set of macros."""

from __future__ import annotations

import threading

from symmem.backends.cuda_compile import CompiledKernels
from symmem.backends.cuda_signals import Device
from symmem.ops.engines.collective_kernels import KERNELS, SOURCE

__all__ = ["program"]

_programs: dict[tuple[int, str, tuple[tuple[str, str], ...]], CompiledKernels] = {}
_programs_lock = threading.Lock()


def program(device: Device, kind: str, macros: dict[str, str]) -> CompiledKernels:
    """The kernels of a kind for a GPU, compiled with these macros. They are loaded once per process.

    Raises:
        UnsupportedError: cuda.core is missing, or the GPU is too old; the text says which.
    """
    key = (device.ordinal, kind, tuple(macros.items()))
    with _programs_lock:
        if key not in _programs:
            _programs[key] = CompiledKernels(
                device.driver,
                device.ordinal,
                SOURCE,
                KERNELS[kind],
                macros,
                purpose="collective operations",
                needs="8.0 (8.9 for float8)",
            )
        return _programs[key]
