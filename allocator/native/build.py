"""Compile and load C and C++ code at its first use. Results are cached beside the compiled kernels."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symmem.backends.kernel_cache import cache_directory, cached, key_of
from symmem.config.owned_files import private_folder

__all__ = ["load_extension", "load_library"]

# Python fills this dictionary without a lock, so a second thread could read None from it. An import holds a lock.
sysconfig.get_config_vars()


def load_extension(name: str, source: Path) -> Any:
    """Compile a C file and load it as the module ``name``. Local. Takes a second the first time on a machine.

    Raises:
        OSError: There is no C compiler, or it fails, or other users can change its output. The text says why.
        ImportError: The module cannot be loaded, or this Python has no global interpreter lock.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise ImportError("this Python has no global interpreter lock, and the module would enable it again")
    parts = [source.read_text(), sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_path("include")]
    options = ["-O2", "-I", sysconfig.get_path("include")]
    code = cached(
        key_of(parts),
        lambda: _compile(_compiler("CC", "C", ("cc", "gcc", "clang")), source, options),
        cache_directory(),
    )
    with private_folder() as folder:
        file = folder / f"{name}.so"
        file.write_bytes(code)
        loader = importlib.machinery.ExtensionFileLoader(name, str(file))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    return module


def load_library(
    source: Path, options: Sequence[str], libraries: Sequence[str], version: str, headers: Sequence[Path] = ()
) -> ctypes.CDLL:
    """Compile a C++ file and load it as a library. Local. Takes seconds the first time on a machine.

    Args:
        source: The file.
        options: For the compiler, before the file.
        libraries: For the linker, after the file.
        version: The version of what the file includes and links; a library serves this version only.
        headers: The files beside it that it includes.

    Raises:
        OSError: There is no C++ compiler, or it fails, or other users can change its output. The text says why.
    """
    compiler = _compiler("CXX", "C++", ("c++", "g++", "clang++"))
    identity = _run([*compiler, "--version"])
    parts = [*(file.read_text() for file in (source, *headers)), version, *compiler, identity, *options, *libraries]
    code = cached(key_of(parts), lambda: _compile(compiler, source, options, libraries), cache_directory())
    with private_folder() as folder:
        file = folder / f"{source.stem}.so"
        file.write_bytes(code)
        return ctypes.CDLL(str(file))


def _compiler(variable: str, language: str, names: Sequence[str]) -> list[str]:
    try:
        command = shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise OSError(f"the variable {variable} is not a command: {error}") from error
    if not command:
        command = [found for name in names if (found := shutil.which(name))][:1]
    if not command:
        raise OSError(f"there is no {language} compiler")
    return command


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise OSError(f"{shlex.join(command[:1])} fails: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")


def _compile(compiler: Sequence[str], source: Path, options: Sequence[str], libraries: Sequence[str] = ()) -> bytes:
    with private_folder() as folder:
        out = folder / "extension.so"
        _run([*compiler, "-shared", "-fPIC", *options, "-o", str(out), str(source), *libraries])
        return out.read_bytes()
