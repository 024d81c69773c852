"""Files and folders that only this user and root can change: the only ones that code and configuration come from.

Every folder on the way from the root of the file system is checked, through open descriptors, and so is every symbolic
link. OpenSSH and sudo check their files in the same way. In a folder with the sticky bit, such as ``/tmp``, only the
owner of an entry can replace it, so an entry of this user or root can be trusted.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

__all__ = ["ADVICE", "UntrustedFileError", "check_folder", "make_folder", "open_file", "private_folder"]

_MOST_LINKS = 40  # as in the kernel
_STEP = os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW

ADVICE = "let this user or root own it, and let nobody else write to it (chmod go-w)"
"""The hint for a file that another user can change."""


class UntrustedFileError(OSError):
    """Another user can change a file or folder. The text says which, with its owner and mode."""


def open_file(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading, if only this user and root can change it; returns a descriptor.

    Raises:
        UntrustedFileError: Another user can change the file, or a folder on the way to it.
        OSError: It cannot be opened, or is not a regular file.
    """
    return _walk(path, file=True)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Check that only this user and root can change a folder, and replace the entries that this user makes in it.

    Raises:
        UntrustedFileError: Another user can.
        OSError: There is no such folder.
    """
    os.close(_walk(path, file=False))


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents with mode 700, and check it.

    Raises:
        UntrustedFileError: Another user can change the folder.
        OSError: It cannot be made.
    """
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    check_folder(path)


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder that only this user and root can change.

    Raises:
        UntrustedFileError: Other users can replace files in the folder for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="symmem-") as folder:
        check_folder(folder)
        yield Path(folder)


def _walk(path: str | os.PathLike[str], file: bool) -> int:
    """Go down from the root of the file system and check every step; returns a descriptor of the last step."""
    text = os.fspath(path)
    todo = _steps(text if os.path.isabs(text) else os.path.join(os.getcwd(), text))
    folder, at, links = os.open("/", _STEP), "/", 0
    try:
        # In a user namespace, the number of the host's root can be that of any user of the host.
        trusted = everywhere = {0, os.geteuid(), os.fstat(folder).st_uid}
        while True:
            found = os.fstat(folder)
            if not todo:
                _check_kind(found, file)
            if _check(found, at, trusted, last=not todo):
                trusted = {0, os.geteuid()}
            if not todo:
                return os.open(f"/proc/self/fd/{folder}", os.O_RDONLY | os.O_CLOEXEC) if file else os.dup(folder)
            name = todo.pop()
            entry, place = os.open(name, _STEP, dir_fd=folder), os.path.normpath(os.path.join(at, name))
            found = os.fstat(entry)
            if not stat.S_ISLNK(found.st_mode):
                os.close(folder)
                folder, at = entry, place
                continue
            os.close(entry)
            _check(found, place, trusted, last=False)
            target, links = os.readlink(name, dir_fd=folder), links + 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            todo += _steps(target)
            if os.path.isabs(target):
                os.close(folder)
                folder, at, trusted = os.open("/", _STEP), "/", everywhere
    finally:
        os.close(folder)


def _steps(path: str) -> list[str]:
    """The names in a path, the first name last."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _check_kind(found: os.stat_result, file: bool) -> None:
    if file and stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if file and not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    if not file and not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _check(found: os.stat_result, at: str, trusted: set[int], last: bool) -> bool:
    """Check one step; returns whether it is a folder in which any user can make entries."""
    if found.st_uid not in trusted:
        raise _untrusted(found, at, "another user owns it")
    if stat.S_ISLNK(found.st_mode):
        return False
    writers = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if writers == stat.S_IWGRP and _is_private_group(found.st_gid, found.st_uid):
        return False
    if writers and (last or not found.st_mode & stat.S_ISVTX):
        raise _untrusted(found, at, "other users can write to it")
    return bool(writers)


def _untrusted(found: os.stat_result, at: str, reason: str) -> UntrustedFileError:
    mode = stat.S_IMODE(found.st_mode)
    return UntrustedFileError(f"{at} belongs to user {found.st_uid} and has mode {mode:o}: {reason}")


@lru_cache(maxsize=64)
def _is_private_group(group: int, user: int) -> bool:
    """Whether a group has this user alone. Many systems make such a group for every user, and let it write."""
    try:
        entry, owner = grp.getgrgid(group), pwd.getpwuid(user)
    except KeyError:
        return False
    same = entry.gr_name == owner.pw_name and owner.pw_gid == group
    return same and set(entry.gr_mem) <= {owner.pw_name}
