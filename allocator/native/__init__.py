"""C and C++ code for what Python is too slow for, or must not run. It is compiled and loaded at its first use.

- :func:`module`, from C: the ledger's comparison, barriers on the CPU, and eager launches on CUDA. If it cannot be
  used, a warning says why, and Python does the same more slowly.
- :func:`torch_library`, from C++: the allocator and handles of PyTorch's symmetric memory. It is separate because it
  includes PyTorch's headers: it takes ten seconds or more to compile, serves one version of PyTorch, and few programs
  need it. Python cannot do the same, so an error says why it cannot be used.
- :func:`operator_library`, from C++: kernels of the collective operators for PyTorch's dispatcher. It is separate for
  the same reasons, and takes five seconds. If it cannot be used, a warning says why.

Results are cached beside the compiled kernels (``symmem.backends.kernel_cache``). The name in the cache is a digest of
the sources, the options, a compiler named by ``CC`` or ``CXX``, and the versions of Python, the C library and PyTorch.
No compiler is started to find the result, so a machine without one can use what another one has compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from symmem.backends.kernel_cache import cache_directory, cached, key_of
from symmem.config.owned_files import private_folder
from symmem.errors import UnsupportedError

__all__ = ["load_module", "module", "operator_library", "torch_library"]

log = logging.getLogger("symmem.native")

_FOLDER = Path(__file__).parent

# Python fills this dictionary without a lock, so a second thread could read None from it. An import holds a lock.
sysconfig.get_config_vars()


@functools.cache
def module() -> Any:
    """The module in C, loaded once; None after a warning if it cannot be used. Local."""
    try:
        return load_module()
    except Exception as error:  # the caller has another way
        log.warning(
            "the module in C cannot be used, so allocations are compared, and operators are called, by slower code in "
            "Python: %s",
            error,
        )
        return None


def load_module() -> Any:
    """Load a new copy of the module in C. Local. Takes a second the first time on a machine.

    Raises:
        OSError: There is no C compiler, or it fails, or other users can change its output. The text says why.
        ImportError: The module cannot be loaded, or this Python has no global interpreter lock.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise ImportError("this Python has no global interpreter lock, and the module would enable it again")
    options = ["-O2", f"-I{sysconfig.get_path('include')}"]
    sources = ("module.c", "barrier.c", "ledger.c", "eager.c", "eager.h")
    with _built("CC", ("cc", "gcc", "clang"), sources, options) as file:
        loader = importlib.machinery.ExtensionFileLoader("_native", str(file))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        made = importlib.util.module_from_spec(spec)
        loader.exec_module(made)
    return made


def torch_library() -> ctypes.CDLL:
    """Load a new copy of the library for PyTorch's symmetric memory. Local. Takes seconds the first time on a machine.

    Raises:
        UnsupportedError: There is no C++ compiler, or it is too old, or other users can change its output.
    """
    import torch  # the module in C is used before a program needs it

    try:
        return _load_for_torch(("torch_backend.cpp", "cuda_memory.h"))
    except OSError as error:
        raise UnsupportedError(
            f"symmem cannot compile its backend for torch {torch.__version__}: {error}",
            hint="install g++ 11 or newer (or name a compiler in CXX); or use symmem.torch_compat, which needs none",
            step="enable",
        ) from error


def operator_library() -> ctypes.CDLL:
    """Load a new copy of the library with kernels for PyTorch's dispatcher. Local. Takes seconds as above.

    Raises:
        OSError: There is no C++ compiler, or it is too old, or other users can change its output. The text says why.
    """
    return _load_for_torch(("operators.cpp", "eager.h"))


def _load_for_torch(sources: Sequence[str]) -> ctypes.CDLL:
    import torch

    root = Path(torch.__file__).parent
    options = ["-std=c++20", "-O1", f"-I{root / 'include'}"]
    options.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    libraries = (f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")
    with _built("CXX", ("c++", "g++", "clang++"), sources, options, libraries, torch.__version__) as file:
        return ctypes.CDLL(str(file))


@contextlib.contextmanager
def _built(
    variable: str,
    usual: Sequence[str],
    sources: Sequence[str],
    options: Sequence[str],
    libraries: Sequence[str] = (),
    version: str = "",
) -> Iterator[Path]:
    """A file with the compiled code, for the time of the context. It may be deleted while the code is loaded.

    Args:
        variable: The environment variable that names a compiler.
        usual: The compilers to look for otherwise.
        sources: Files of this folder. Headers are not passed to the compiler.
        options: For the compiler, before the files.
        libraries: For the linker, after the files.
        version: Of what the files include and link, besides Python and the C library.
    """
    named, files = os.environ.get(variable, ""), [_FOLDER / name for name in sources]
    versions = [version, sysconfig.get_config_var("EXT_SUFFIX"), *platform.libc_ver()]
    key = key_of([*(file.read_text() for file in files), named, *options, *libraries, *versions])
    with private_folder() as folder:
        out = folder / "native.so"

        def compiled() -> bytes:
            command = [*_compiler(variable, named, usual), "-shared", "-fPIC", "-fvisibility=hidden", *options]
            inputs = [str(file) for file in files if file.suffix != ".h"]
            done = subprocess.run([*command, "-o", str(out), *inputs, *libraries], capture_output=True)
            if done.returncode:
                raise OSError(f"{shlex.join(command[:1])} fails: {done.stderr.decode(errors='replace').strip()}")
            return out.read_bytes()

        out.write_bytes(cached(key, compiled, cache_directory()))
        yield out


def _compiler(variable: str, named: str, usual: Sequence[str]) -> list[str]:
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise OSError(f"the variable {variable} is not a command: {error}") from error
    command = command or [found for name in usual if (found := shutil.which(name))][:1]
    if not command:
        raise OSError(f"there is no compiler: none of {', '.join(usual)}, and {variable} is not set")
    return command
