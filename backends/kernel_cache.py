"""A cache of compiled programs on disk: kernels and a module for the host, one file per program.

A file holds a digest of its content. A damaged file does not match its digest and is replaced. A new file is written
under a temporary name and then renamed, so another process sees the complete file or none. If the directory cannot be
used, or another user can change it, programs are compiled in every process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from symmem.config.owned_files import ADVICE, UntrustedFileError, make_folder, open_file

__all__ = ["cache_directory", "cached", "key_of"]

log = logging.getLogger("symmem.ops")

_MAGIC = b"symmem kernel 1\n"
_DIGEST = 32
# Seconds that a process waits while another one compiles the same program. C++ that includes torch's headers takes 12 s
# of a CPU, and minutes on a slow and busy machine.
_PATIENCE = 300.0


def cache_directory() -> Path | None:
    """``$XDG_CACHE_HOME/symmem/kernels``, by default in ``~/.cache``; None if the user has no home directory."""
    root = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):
        return (Path(root) if root else Path.home() / ".cache") / "symmem" / "kernels"
    return None


def key_of(parts: Sequence[str]) -> str:
    """The name of a program: a digest of everything that its compilation depends on."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def cached(key: str, compile_it: Callable[[], bytes], directory: Path | None) -> bytes:
    """The program with this key, from its file or newly compiled and stored. Local; safe with other processes.

    The ranks of a host begin at once, so one process compiles, and the others wait for it.
    """
    if directory is None or not _is_usable(directory):
        return compile_it()
    file = directory / f"{key}.bin"
    code = _read(file)
    if code is None:
        with _alone(file.with_suffix(".lock")):
            code = _read(file)
            if code is None:
                code = compile_it()
                _write(file, code)
    return code


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process compiles a program; at most _PATIENCE seconds, because it may be stopped."""
    with contextlib.ExitStack() as undo:
        deadline = time.monotonic() + _PATIENCE
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, descriptor)
            while not _take(descriptor) and time.monotonic() < deadline:
                time.sleep(0.05)
        except OSError as error:  # some file systems know no locks
            log.debug("%s cannot be locked: %s", lock, error)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_untrusted: set[str] = set()  # logged once


def _is_usable(directory: Path) -> bool:
    """Whether the directory exists, or can be made, and only this user and root can change it."""
    try:
        make_folder(directory)
    except UntrustedFileError as error:
        _warn(error)
        return False
    except OSError as error:
        log.debug("%s cannot be used: %s", directory, error)
        return False
    return True


def _warn(error: UntrustedFileError) -> None:
    if str(error) not in _untrusted:
        _untrusted.add(str(error))
        log.warning("compiled programs are not kept on disk: %s. %s", error, ADVICE)


def _read(file: Path) -> bytes | None:
    try:
        with open(open_file(file), "rb") as stream:
            content = stream.read()
    except FileNotFoundError:
        return None
    except UntrustedFileError as error:
        _warn(error)
        return None
    except OSError as error:
        log.debug("%s cannot be read: %s", file, error)
        return None
    start = len(_MAGIC) + _DIGEST
    code = content[start:]
    if code and content[:start] == _MAGIC + hashlib.sha256(code).digest():
        return code
    log.debug("%s is damaged; compiling again", file)
    return None


def _write(file: Path, code: bytes) -> None:
    try:
        descriptor, name = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as out:
                out.write(_MAGIC + hashlib.sha256(code).digest() + code)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        log.debug("%s cannot be written: %s", file, error)
