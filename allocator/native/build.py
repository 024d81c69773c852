"""Compile and load extension modules in C, at their first use. Results are cached beside the compiled kernels."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from symmem.backends.kernel_cache import cache_directory, cached, key_of
from symmem.config.owned_files import private_folder

__all__ = ["load_extension"]

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
    code = cached(key_of(parts), lambda: _compile(source), cache_directory())
    with private_folder() as folder:
        file = folder / f"{name}.so"
        file.write_bytes(code)
        loader = importlib.machinery.ExtensionFileLoader(name, str(file))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    return module


def _compile(source: Path) -> bytes:
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise OSError(f"the variable CC is not a command: {error}") from error
    if not command:
        command = [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))][:1]
    if not command:
        raise OSError("there is no C compiler")
    with private_folder() as folder:
        out = folder / "extension.so"
        options = ["-shared", "-fPIC", "-O2", "-I", sysconfig.get_path("include"), "-o", str(out)]
        done = subprocess.run([*command, *options, str(source)], capture_output=True)
        if done.returncode:
            raise OSError(f"{shlex.join(command)} fails: {done.stderr.decode(errors='replace').strip()}")
        return out.read_bytes()
