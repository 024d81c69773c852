"""System calls that Python's standard library lacks, or makes in a way that an interrupt can leave things open.

Mappings at a fixed address, futexes, membarrier, and file descriptors that have an owner from the start.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import platform
import resource
import select
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from symmem.errors import BackendUnavailableError, OutOfMemoryError, ResourceLimitError, SymmemError

__all__ = [
    "PAGE",
    "Descriptor",
    "Inbox",
    "Region",
    "available_memory",
    "close_all",
    "duplicate",
    "fence",
    "full_fence",
    "futex_wait",
    "futex_wake",
    "is_limit",
    "limit_error",
    "memory_limits",
    "require_signals",
    "round_up",
]

PAGE: int = os.sysconf("SC_PAGESIZE")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.syscall.restype = ctypes.c_long
_libc.recvmsg.restype = ctypes.c_ssize_t

_PROT_NONE, _PROT_READ_WRITE = 0, 3
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_INT = ctypes.sizeof(ctypes.c_int)

# The numbers of the system calls futex(2) and membarrier(2) for 64-bit processes.
_SYSCALLS = {"x86_64": (202, 324), "aarch64": (98, 283), "riscv64": (98, 283), "loongarch64": (98, 283)}
_FUTEX, _MEMBARRIER = _SYSCALLS.get(platform.machine(), (-1, -1))  # -1 is not a system call and fails with ENOSYS
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_MEMBARRIER_GLOBAL_EXPEDITED, _MEMBARRIER_REGISTER_GLOBAL_EXPEDITED = 2, 4


def round_up(nbytes: int, granularity: int) -> int:
    """The smallest multiple of ``granularity`` that is at least ``nbytes``."""
    return -(-nbytes // granularity) * granularity


def available_memory() -> int:
    """Bytes that this process can use before the machine or a limit of its control groups runs out of memory.

    Only limits of control groups version 2 that are visible in /sys/fs/cgroup count.

    Raises:
        ResourceLimitError: This process cannot open the files with this information.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text()
        available = int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
        for limit in memory_limits():
            if (text := limit.read_text().strip()) != "max":
                used = int(limit.with_name("memory.current").read_text())
                available = min(available, max(int(text) - used, 0))
    except OSError as error:
        raise limit_error(error, "cannot read how much memory is available") from error
    return available


def memory_limits() -> list[Path]:
    """The files with the memory limits of this process's control group and its parents.

    Each has a number of bytes, or "max". The file ``memory.current`` beside it has the bytes in use.
    """
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    lines = own.read_text().splitlines() if own.exists() else []
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / path.lstrip("/")
    # A group outside of this namespace is shown as /../..; then only the root of the namespace is known.
    groups = [group, *group.parents] if ".." not in group.parts else [root]
    files = [folder / "memory.max" for folder in groups if folder.is_relative_to(root)]
    return [file for file in files if file.exists()]


def is_limit(error: BaseException) -> bool:
    """Whether an exception reports that a limit of the system or this process was reached."""
    limits = (errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.ENOMEM, errno.ENOSPC, errno.ETOOMANYREFS)
    return isinstance(error, OSError) and error.errno in limits


class Descriptor(int):
    """A file descriptor that this process owns. It is closed with the last reference, or by :meth:`close`.

    The owner is an object of C, which closes a descriptor of any kind. So no exception of a signal handler can come
    before the descriptor is closed, and none is lost in a finalizer.
    """

    _owner: select.epoll

    def __new__(cls, owner: select.epoll) -> Descriptor:
        """Use :meth:`of` or :meth:`from_call`."""
        descriptor = super().__new__(cls, owner.fileno())
        descriptor._owner = owner
        return descriptor

    @classmethod
    def of(cls, number: int) -> Descriptor:
        """Own a descriptor."""
        return cls(select.epoll.fromfd(number))

    @classmethod
    def from_call(cls, function: Callable[..., int], *arguments: object) -> Descriptor:
        """Own the descriptor that a function of C returns, in a single step."""
        (owner,) = map(select.epoll.fromfd, map(function, *zip(arguments)))
        return cls(owner)

    def close(self) -> None:
        """Close it. May be called again."""
        self._owner.close()


def close_all(descriptors: Iterable[int]) -> None:
    """Close those that this process owns: every :class:`Descriptor`. Other numbers belong to the caller."""
    for descriptor in descriptors:
        if isinstance(descriptor, Descriptor):
            descriptor.close()


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """`struct msghdr` of recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_nbytes", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_Vector)),
        ("number_of_vectors", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_nbytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_CONTROL = struct.Struct("Nii")  # `struct cmsghdr`: bytes with this header, level, type


class Inbox:
    """Room for one byte and the descriptors that accompany it. Descriptors that nobody takes are closed with it.

    The system writes them into memory of this object. So none is lost if an exception ends the call that receives, as
    would be possible with ``socket.recvmsg``, which returns them as numbers. All calls can then be made again. The byte
    must be 0.
    """

    def __init__(self, number: int) -> None:
        self._byte = ctypes.create_string_buffer(b"\1", 1)
        self._taken: list[select.epoll] = []
        self._control = ctypes.create_string_buffer(socket.CMSG_SPACE(number * _INT))
        self._vector = _Vector(ctypes.addressof(self._byte), 1)
        control = ctypes.addressof(self._control)
        self._message = _Message(None, 0, ctypes.pointer(self._vector), 1, control, len(self._control), 0)

    def receive(self, sock: socket.socket) -> bool:
        """Receive from a socket that has data. Returns False if the peer closed the connection.

        Raises:
            BlockingIOError: Nothing has come.
            OSError: The peer is gone.
        """
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT  # programs that this process starts inherit none
        received: int = _libc.recvmsg(sock.fileno(), ctypes.byref(self._message), flags)
        if received < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return received > 0

    @property
    def has_come(self) -> bool:
        """Whether the byte has come."""
        return self._byte.raw == b"\0"

    @property
    def is_truncated(self) -> bool:
        """Whether more descriptors came than this process may have."""
        return bool(self._message.flags & socket.MSG_CTRUNC)

    def take(self) -> list[Descriptor]:
        """The descriptors that have come. They are closed with the last reference."""
        self._own()
        return list(map(Descriptor, self._taken))

    def _own(self) -> None:
        nbytes, level, kind = _CONTROL.unpack_from(self._control)
        if not self._taken and (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i", self._control.raw[_CONTROL.size : nbytes])
            self._taken.extend(map(select.epoll.fromfd, numbers))  # a single step, so that no number is closed twice

    def __del__(self) -> None:
        self._own()


def duplicate(descriptors: Sequence[int]) -> tuple[Descriptor, ...]:
    """Duplicate all descriptors, or none.

    Raises:
        ResourceLimitError: This process may not have so many.
    """
    try:
        return tuple(Descriptor.from_call(os.dup, descriptor) for descriptor in descriptors)
    except OSError as error:
        raise limit_error(error, f"cannot duplicate {len(descriptors)} file descriptors") from error


def _setting(path: str) -> str:
    """The content of a file in /proc/sys, or "so many" if it cannot be opened because no more files may be open."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "so many"


def limit_error(error: OSError, what: str) -> SymmemError:
    """The named error for a system call that reached a limit, with the current value of the limit."""
    code = error.errno
    if code == errno.EMFILE:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return ResourceLimitError(
            f"{what}: this process may have {soft} open files (RLIMIT_NOFILE)",
            hint="raise it (`ulimit -n`), or hold fewer symmetric tensors at a time",
        )
    if code == errno.ENFILE:
        limit = _setting("/proc/sys/fs/file-max")
        return ResourceLimitError(
            f"{what}: this machine may have {limit} open files", hint="raise /proc/sys/fs/file-max"
        )
    if code == errno.EFBIG:
        soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return ResourceLimitError(
            f"{what}: this process may make files of {soft} bytes (RLIMIT_FSIZE)",
            hint="raise it (`ulimit -f`)",
        )
    if code == errno.ENOMEM:
        space = resource.getrlimit(resource.RLIMIT_AS)[0]
        maps = _setting("/proc/sys/vm/max_map_count")
        available: int | str = "unknown"
        with contextlib.suppress(SymmemError):
            available = available_memory()
        return OutOfMemoryError(
            f"{what}: no memory, address space or mappings left (available {available} bytes, RLIMIT_AS "
            f"{'unlimited' if space < 0 else space}, at most {maps} mappings)",
            hint="free tensors, raise `ulimit -v` or /proc/sys/vm/max_map_count, or allocate less",
        )
    return ResourceLimitError(f"{what}: {error}", hint="see the system call's manual page for this error")


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, descriptor: int) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, descriptor, 0)
    if result == _MAP_FAILED:
        code = ctypes.get_errno()
        raise limit_error(OSError(code, os.strerror(code)), f"cannot map {nbytes} bytes")
    return int(result)


class Region:
    """A reserved range of addresses. It is unmapped with its last reference.

    Args:
        nbytes: A multiple of the page size.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = _mmap(None, nbytes, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        # Not at the interpreter's exit: a thread or a tensor may still use the memory. The kernel unmaps it later.
        weakref.finalize(self, _libc.munmap, self.address, nbytes).atexit = False

    def place(self, offset: int, descriptor: int, nbytes: int) -> int:
        """Map the first ``nbytes`` of a file at ``offset``, shared and writable; returns the address."""
        flags = _MAP_SHARED | _MAP_FIXED
        return _mmap(self.address + offset, nbytes, _PROT_READ_WRITE, flags, descriptor)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def futex_wait(address: int, expected: int, timeout: float) -> None:
    """Sleep while the uint32 at ``address`` is ``expected``, at most ``timeout`` seconds. It may wake early."""
    spec = _Timespec(int(timeout), int(timeout % 1 * 1e9))
    _libc.syscall(
        ctypes.c_long(_FUTEX),
        ctypes.c_void_p(address),
        ctypes.c_int(_FUTEX_WAIT),
        ctypes.c_uint32(expected),
        ctypes.byref(spec),
        None,
        ctypes.c_int(0),
    )


def futex_wake(address: int) -> None:
    """Wake all threads, in any process, that sleep on the uint32 at ``address``."""
    _libc.syscall(
        ctypes.c_long(_FUTEX),
        ctypes.c_void_p(address),
        ctypes.c_int(_FUTEX_WAKE),
        ctypes.c_int(0x7FFFFFFF),
        None,
        None,
        ctypes.c_int(0),
    )


def _membarrier(command: int) -> None:
    if _libc.syscall(ctypes.c_long(_MEMBARRIER), ctypes.c_int(command), ctypes.c_uint(0), ctypes.c_int(0)) != 0:
        code = ctypes.get_errno()
        raise BackendUnavailableError(
            f"signals between processes need membarrier(2), and its command {command} failed: {os.strerror(code)}",
            hint="use Linux 4.16 or newer; a sandbox may forbid the call: check its policy",
        )


def _fence_by_hardware() -> None:
    """Order this thread's earlier loads and stores before its later ones, as other processes see them.

    On x86-64 there is nothing to do: the hardware keeps the order of loads and the order of stores, and a flag protocol
    needs no more (Intel SDM 3A, 8.2.2).
    """


def _fence_by_kernel() -> None:
    """The same by membarrier(2), which makes a full barrier on the calling thread.

    It uses the global expedited command, because the private one returns at once in a process with one thread.
    """
    _membarrier(_MEMBARRIER_GLOBAL_EXPEDITED)


fence = _fence_by_hardware if platform.machine() == "x86_64" else _fence_by_kernel


def full_fence() -> None:
    """Order stores before loads too: to take a lock is an atomic exchange, a full fence on x86-64.

    The lock is new, because a signal handler may come here while this thread is here.
    """
    threading.Lock().acquire()
    fence()


def require_signals() -> None:
    """Return if :func:`fence` and the futex functions work on this machine.

    Raises:
        BackendUnavailableError: They do not work; the text says why.
    """
    machine = platform.machine()
    if machine not in _SYSCALLS or sys.maxsize < 2**32:
        raise BackendUnavailableError(
            f"signals between processes support {', '.join(_SYSCALLS)} (64 bits), not {machine!r}",
            hint="use a supported machine, or add the numbers of its system calls to symmem/backends/libc.py",
        )
    if machine != "x86_64":
        _membarrier(_MEMBARRIER_REGISTER_GLOBAL_EXPEDITED)
        fence()
