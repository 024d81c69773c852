"""The kernels of the collective operations as functions that can be launched: from the disk, or compiled by NVRTC."""

from __future__ import annotations

import functools
import threading

from symmem.backends.cuda_signals import Device
from symmem.backends.kernel_cache import cache_directory, cached, key_of
from symmem.errors import UnsupportedError
from symmem.ops.engines.collective_kernels import KERNELS, SOURCE

__all__ = ["Program", "program"]


class Program:
    """One module of kernels on one GPU, loaded: from the disk, or compiled in about a second."""

    def __init__(self, device: Device, kind: str, macros: dict[str, str]) -> None:
        try:
            from cuda.core import ObjectCode
        except ImportError as error:
            raise UnsupportedError(
                f"collective operations on CUDA need cuda.core to compile their kernels: {error}",
                hint="pip install 'symmem[cuda]'",
            ) from error
        capability = (f"COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR"))
        arch = "sm_" + "".join(str(device.driver.attribute(device.ordinal, name)) for name in capability)
        key = key_of([SOURCE, arch, _compiler_version(), *(f"{name}={value}" for name, value in macros.items())])
        code = cached(key, functools.partial(_compile, arch, macros), cache_directory())
        with device.driver.on(device.ordinal):  # loading now, not at the first launch, which may be captured
            self._code = ObjectCode.from_cubin(code)
            self.functions = {
                name: device.driver.function(int(self._code.get_kernel(name).handle)) for name in KERNELS[kind]
            }


def _compiler_version() -> str:
    from cuda.bindings import nvrtc

    _code, major, minor = nvrtc.nvrtcVersion()
    return f"nvrtc {major}.{minor}"


def _compile(arch: str, macros: dict[str, str]) -> bytes:
    from cuda.core import Program as Source
    from cuda.core import ProgramOptions

    try:
        options = ProgramOptions(arch=arch, define_macro=list(macros.items()))
        return bytes(Source(SOURCE, "c++", options).compile("cubin").code)
    except Exception as error:  # the compiler's library has errors of its own
        raise UnsupportedError(
            f"the kernels of collective operations cannot be compiled for {arch}: {type(error).__name__}: {error}",
            hint="they need compute capability 8.0, and 8.9 for float8; NVRTC comes with torch and the CUDA toolkit",
        ) from error


_programs: dict[tuple[int, str, tuple[tuple[str, str], ...]], Program] = {}
_programs_lock = threading.Lock()


def program(device: Device, kind: str, macros: dict[str, str]) -> Program:
    """The module of that kind, compiled with those macros, for a GPU; loaded once a process.

    Raises:
        UnsupportedError: cuda.core is missing, or the GPU is too old; says which.
    """
    key = (device.ordinal, kind, tuple(macros.items()))
    with _programs_lock:
        if key not in _programs:
            _programs[key] = Program(device, kind, macros)
        return _programs[key]
