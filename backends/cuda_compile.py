"""Compile CUDA source with NVRTC, keep the result on disk, and load its kernels on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from symmem.backends.driver import Driver
from symmem.backends.gpu import install_hint
from symmem.backends.kernel_cache import cache_directory, cached, key_of
from symmem.errors import UnsupportedError

__all__ = ["CompiledKernels"]


class CompiledKernels:
    """The kernels of one source, loaded on one GPU.

    A compilation takes 60 ms to 1 s. Its result is kept in the user's cache directory, see
    :mod:`symmem.backends.kernel_cache`.

    Args:
        driver: The driver.
        ordinal: The GPU.
        source: CUDA C++ that includes no header.
        names: The ``extern "C"`` kernels to load.
        macros: Macros to define.
        purpose: A plural for messages, such as "barrier and signals".
        needs: The compute capability that the source needs, for messages.

    Attributes:
        functions: The functions for ``cuLaunchKernel``, by name. They are valid while this object lives.

    Raises:
        UnsupportedError: cuda.core or NVRTC is missing, or the source does not compile for this GPU.
    """

    def __init__(
        self,
        driver: Driver,
        ordinal: int,
        source: str,
        names: Sequence[str],
        macros: Mapping[str, str],
        purpose: str,
        needs: str,
    ) -> None:
        try:
            from cuda.core import ObjectCode
        except ImportError as error:
            raise UnsupportedError(
                f"{purpose} on CUDA need cuda.core to compile their kernels: {error}", hint=install_hint("cuda-python")
            ) from error
        capability = (driver.attribute(ordinal, f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        arch = "sm_" + "".join(map(str, capability))
        try:
            key = key_of([source, arch, _compiler_version(), *(f"{name}={value}" for name, value in macros.items())])
            code = cached(key, functools.partial(_compile, source, arch, macros), cache_directory())
        except Exception as error:  # NVRTC and cuda.core raise classes of their own
            raise UnsupportedError(
                f"the kernels of {purpose} cannot be compiled for {arch}: {type(error).__name__}: {error}",
                hint=f"they need compute capability {needs} and NVRTC, which comes with torch; "
                "cuda-python must be made for the same major version of CUDA as torch",
            ) from error
        with driver.on(ordinal):  # load now: the first launch may be inside a stream capture
            self._code = ObjectCode.from_cubin(code)
            self.functions: dict[str, Any] = {
                name: driver.function(int(self._code.get_kernel(name).handle)) for name in names
            }


def _compiler_version() -> str:
    from cuda.bindings import nvrtc

    _code, major, minor = nvrtc.nvrtcVersion()
    return f"nvrtc {major}.{minor}"


def _compile(source: str, arch: str, macros: Mapping[str, str]) -> bytes:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=arch, define_macro=list(macros.items()))
    return bytes(Program(source, "c++", options).compile("cubin").code)
