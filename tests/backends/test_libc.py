"""System calls and limits: an error names the limit, its value and how to raise it."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import threading
import time
from pathlib import Path

import pytest
from patience import LONG, SOON

from symmem.backends import libc
from symmem.backends.host import HostBackend
from symmem.errors import BackendUnavailableError, OutOfMemoryError, ResourceLimitError


@pytest.mark.parametrize(
    ("code", "kind", "texts"),
    [
        (errno.EMFILE, ResourceLimitError, ("RLIMIT_NOFILE", str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))),
        (errno.ENFILE, ResourceLimitError, (Path("/proc/sys/fs/file-max").read_text().strip(), "file-max")),
        (errno.EFBIG, ResourceLimitError, ("RLIMIT_FSIZE", "ulimit -f")),
        (errno.ENOMEM, OutOfMemoryError, ("max_map_count", "RLIMIT_AS unlimited", "available")),
        (errno.ENOSPC, ResourceLimitError, ("No space left", "manual page")),
    ],
)
def test_every_limit_is_named(code: int, kind: type[Exception], texts: tuple[str, ...]) -> None:
    error = OSError(code, os.strerror(code))
    assert libc.is_limit(error)
    named = libc.limit_error(error, "cannot do it")
    assert type(named) is kind
    assert named.hint
    assert all(text in str(named) for text in ("cannot do it", *texts)), str(named)


def test_other_errors_are_no_limits() -> None:
    assert not libc.is_limit(OSError(errno.EPERM, "no"))
    assert not libc.is_limit(MemoryError())


@pytest.mark.parametrize("code", [errno.ENFILE, errno.ENOMEM])
def test_a_limit_is_named_though_no_file_can_be_opened(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_text", full)
    assert "cannot do it" in str(libc.limit_error(OSError(code, ""), "cannot do it"))
    with pytest.raises(ResourceLimitError, match="how much memory is available"):
        libc.available_memory()


@pytest.mark.parametrize("room", [0, 2])
def test_descriptors_are_duplicated_all_or_none(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    dup = os.dup

    def limited(descriptor: int) -> int:
        if len(made) == room:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(dup(descriptor))
        return made[-1]

    monkeypatch.setattr(os, "dup", limited)
    with pytest.raises(ResourceLimitError, match="3 file descriptors"):
        libc.duplicate([0, 0, 0])
    assert len(made) == room
    for descriptor in made:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(descriptor)


def test_a_region_is_unmapped_with_its_last_reference() -> None:
    file = os.memfd_create("libc-test")
    os.ftruncate(file, 2 * libc.PAGE)
    region = libc.Region(4 * libc.PAGE)
    first, second = region.place(0, file, libc.PAGE), region.place(2 * libc.PAGE, file, 2 * libc.PAGE)
    os.close(file)
    assert (first, second) == (region.address, region.address + 2 * libc.PAGE)
    ctypes.c_ubyte.from_address(first).value = 9
    assert ctypes.c_ubyte.from_address(second).value == 9
    assert Path("/proc/self/maps").read_text().count("/memfd:libc-test") == 2
    del region
    gc.collect()
    assert "/memfd:libc-test" not in Path("/proc/self/maps").read_text()


def test_a_region_beyond_the_address_space_is_an_error_by_name() -> None:
    with pytest.raises(OutOfMemoryError, match="cannot map"):
        libc.Region(1 << 60)


def test_a_sleeper_wakes_by_another_a_changed_word_or_time() -> None:
    word = ctypes.c_uint32(0)
    address = ctypes.addressof(word)
    begin = time.monotonic()
    libc.futex_wait(address, 1, LONG)  # it is not 1
    assert time.monotonic() - begin < SOON
    libc.futex_wait(address, 0, 0.05)
    assert time.monotonic() - begin >= 0.05
    awake = threading.Event()

    def sleep() -> None:
        while word.value == 0:
            libc.futex_wait(address, 0, 10.0)
        awake.set()

    thread = threading.Thread(target=sleep)
    thread.start()
    word.value = 1
    libc.futex_wake(address)
    assert awake.wait(5)
    thread.join()


@pytest.mark.parametrize(
    ("nbytes", "rounded"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192), (2**50 + 1, 2**50 + 4096)]
)
def test_rounding_up(nbytes: int, rounded: int) -> None:
    assert libc.round_up(nbytes, 4096) == rounded


# Other machines.


class Kernel:
    """Replaces libc and records system calls."""

    def __init__(self, refused: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.refused = refused

    def syscall(self, number: ctypes.c_long, command: ctypes.c_int, *args: object) -> int:
        self.calls.append((number.value, command.value))
        if command.value != self.refused:
            return 0
        ctypes.set_errno(errno.EINVAL)
        return -1


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, kernel: Kernel) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(libc, "_MEMBARRIER", libc._SYSCALLS.get(machine, (-1, -1))[1])
    monkeypatch.setattr(libc, "fence", libc._fence_by_kernel)
    monkeypatch.setattr(libc, "_libc", kernel)


@pytest.mark.parametrize("machine", ["aarch64", "riscv64", "loongarch64"])
def test_elsewhere_the_kernel_fences(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The global expedited command: the private one does nothing in a process with one thread."""
    kernel = Kernel()
    pretend(monkeypatch, machine, kernel)
    libc.require_signals()
    assert kernel.calls == [(283, 4), (283, 2)]


@pytest.mark.parametrize("refused", [2, 4])
def test_a_kernel_without_membarrier_is_named(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "aarch64", Kernel(refused))
    with pytest.raises(BackendUnavailableError, match=rf"command {refused} failed: Invalid argument") as caught:
        HostBackend("host").probe()
    assert caught.value.hint


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    pretend(monkeypatch, "s390x", kernel)
    with pytest.raises(BackendUnavailableError, match=r"x86_64, aarch64.* not 's390x'"):
        HostBackend("host").probe()
    assert kernel.calls == []


def test_this_kernel_has_the_fence() -> None:
    libc._membarrier(4)
    libc._fence_by_kernel()


def test_limits_of_the_own_control_group_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, limit, used in (("", "max", 0), ("job", "9000", 4000), ("job/task", "max", 0)):
        folder = tmp_path / path
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    own = tmp_path / "own"
    own.write_text("1:cpu:/elsewhere\n0::/job/task\n")
    places = {"/sys/fs/cgroup": tmp_path, "/proc/self/cgroup": own}
    monkeypatch.setattr(libc, "Path", lambda path: places.get(path) or Path(path))
    assert libc.available_memory() == 5000
    own.write_text("0::/../job/task\n")  # a path of another namespace
    assert libc.memory_limits() == [tmp_path / "memory.max"]
