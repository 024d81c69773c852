"""C and C++ code is compiled once, and the cache knows what it depends on."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from symmem import native
from symmem.errors import UnsupportedError

COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="this machine has no C compiler")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "symmem" / "kernels"


def test_a_compiler_in_a_folder_with_a_blank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "my tools"
    folder.mkdir()
    (folder / "cc").symlink_to(str(COMPILER))
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    assert hasattr(native.load_module(), "run")


def test_what_was_compiled_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    native.load_module()
    monkeypatch.setenv("PATH", "/nowhere")
    assert hasattr(native.load_module(), "run")
    (file,) = cache.iterdir()
    file.write_bytes(b"something else")
    with pytest.raises(OSError, match="there is no compiler: none of cc, gcc, clang, and CC is not set"):
        native.load_module()


def test_a_compiler_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    native.load_module()
    monkeypatch.setenv("CC", "false")
    with pytest.raises(OSError, match="false fails"):
        native.load_module()
    monkeypatch.setenv("CC", f"{COMPILER} -g")
    native.load_module()
    assert len(list(cache.iterdir())) == 2


def test_one_warning_and_the_way_through_python(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 1)
    native.module.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.module() is None
            assert native.module() is None
    finally:
        native.module.cache_clear()
    (record,) = caplog.records
    assert "slower code in Python: this Python has no global interpreter lock" in record.getMessage()


def test_every_torch_has_its_own_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    """Versions share a folder. Nothing of torch is linked here: only the files in the cache count."""
    compiler = tmp_path / "g++"
    compiler.write_text(f"""#!/bin/sh
while [ "$1" != -o ]; do shift; done
exec {COMPILER} -shared -xc /dev/null -o "$2"
""")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler}")
    for version, files in (("1", 1), ("2", 2), ("1", 2)):
        monkeypatch.setattr(torch, "__version__", version)
        native.torch_library()
        assert len(list(cache.iterdir())) == files


def test_no_library_is_an_error_with_the_way_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for command, why in (
        ("/nowhere/g++", "No such file"),
        ("g++ '", "No closing quotation"),
        ("sh -c 'echo too old >&2; exit 1' sh", "too old"),
    ):
        monkeypatch.setenv("CXX", command)
        with pytest.raises(UnsupportedError, match=why) as caught:
            native.torch_library()
        assert "torch_compat" in str(caught.value)
