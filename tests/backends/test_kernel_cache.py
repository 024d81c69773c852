"""The cache of compiled programs on disk."""

from __future__ import annotations

import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from symmem.backends import kernel_cache
from symmem.errors import UnsupportedError


def test_compiled_kernels_are_kept(tmp_path: Path) -> None:
    made = []

    def compile_it() -> bytes:
        made.append(1)
        return b"code" * 100

    folder = tmp_path / "a" / "b"
    key = kernel_cache.key_of(["source", "sm_90"])
    for _ in range(3):
        assert kernel_cache.cached(key, compile_it, folder) == b"code" * 100
    assert len(made) == 1
    assert [file.name for file in folder.iterdir()] == [f"{key}.bin"]
    assert kernel_cache.cached(key, compile_it, None) == b"code" * 100
    assert len(made) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "other", "longer"])
def test_a_damaged_file_is_compiled_again(damage: str, tmp_path: Path) -> None:
    key = kernel_cache.key_of(["x"])
    kernel_cache.cached(key, lambda: b"good code", tmp_path)
    file = tmp_path / f"{key}.bin"
    content = file.read_bytes()
    changed = {
        "cut": content[:-1],
        "empty": b"",
        "changed": content[:-1] + b"?",
        "other": b"something else",
        "longer": content + b"!",
    }
    file.write_bytes(changed[damage])
    assert kernel_cache.cached(key, lambda: b"good code", tmp_path) == b"good code"
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_used_is_no_failure(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert kernel_cache.cached("key", lambda: b"code", blocked) == b"code"
    assert kernel_cache.cached("key", lambda: b"code", blocked / "below") == b"code"


def test_a_failed_compilation_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise UnsupportedError("no compiler")

    with pytest.raises(UnsupportedError):
        kernel_cache.cached("key", fail, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_keys_tell_programs_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert kernel_cache.key_of(["ab", "c"]) != kernel_cache.key_of(["a", "bc"])
    assert kernel_cache.key_of(["a"]) == kernel_cache.key_of(["a"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_cache.cache_directory() == tmp_path / "symmem" / "kernels"


@pytest.mark.parametrize("changed", ["folder", "file", "above"])
def test_what_another_user_can_change_is_not_used(
    changed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The program is compiled in every process instead, and one line of the log says why."""
    folder = tmp_path / "cache" / "kernels"
    assert kernel_cache.cached("key", lambda: b"kept", folder) == b"kept"
    path = {"folder": folder, "file": folder / "key.bin", "above": folder.parent}[changed]
    for _ in range(2):
        path.chmod(0o777)  # again, because an untrusted file is replaced
        assert kernel_cache.cached("key", lambda: b"compiled", folder) == b"compiled"
    (record,) = caplog.records
    assert f"{path} belongs to user {os.geteuid()} and has mode 777" in record.getMessage()
    assert "chmod go-w" in record.getMessage()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to plant a file as another user")
def test_a_file_that_another_user_planted_is_not_loaded(tmp_path: Path) -> None:
    """In a cache below a folder in which all users can make files, such as XDG_CACHE_HOME=/tmp."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    folder = shared / "symmem" / "kernels"
    assert kernel_cache.cached("key", lambda: b"planted", folder) == b"planted"
    for path in (folder / "key.bin", folder, folder.parent):
        os.chown(path, 65534, 65534)
        assert kernel_cache.cached("key", lambda: b"own", folder) == b"own"
        if path.is_file():  # the untrusted file was replaced
            assert path.stat().st_uid == 0


def test_one_of_many_compiles(tmp_path: Path) -> None:
    calls: list[int] = []

    def compile_it() -> bytes:
        calls.append(1)
        time.sleep(0.2)  # the others come meanwhile
        return b"code"

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: kernel_cache.cached("key", compile_it, tmp_path), range(4)))
    assert (found, calls) == ([b"code"] * 4, [1])
    assert [file.name for file in tmp_path.iterdir()] == ["key.bin"]


def test_a_process_that_holds_the_lock_for_too_long_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "_PATIENCE", 0.1)
    with open(tmp_path / "key.lock", "wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert kernel_cache.cached("key", lambda: b"code", tmp_path) == b"code"
