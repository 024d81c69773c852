"""The paths of inspection sockets, and the protocol on them. Loads no torch.

Every process has one socket, in a directory that only its user may enter. The file name consists of the job, the
process id and a random part. A client connects, sends one line, ``{"version": 1, "parts": [...]}``, and receives one
line of JSON. Both sides check that the peer has the same user (SO_PEERCRED, see unix(7)).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from symmem.errors import InspectionError

__all__ = ["PARTS", "VERSION", "Name", "at", "directories", "job_id", "opened"]

VERSION = 1
"""The version of the protocol. Client and server must have the same version."""

PARTS = ("groups", "tensors", "stacks", "snapshot")
"""The parts that a client can request."""

_JOBS = ("SYMMEM_JOB_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
_SUFFIX = ".sock"


def job_id(environ: Mapping[str, str] | None = None) -> str:
    """Return an id that all processes of a job on this host share, and that other jobs do not have.

    It is SYMMEM_JOB_ID, else the Slurm job, else torchrun's ``--rdzv-id``, else MASTER_ADDR and MASTER_PORT, else the
    parent process.
    """
    environ = os.environ if environ is None else environ
    for name in _JOBS:
        if (value := environ.get(name, "").strip()) not in ("", "none"):  # torchrun's default
            return value[:200]
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    return f"{address}:{port}"[:200] if address and port else f"parent {os.getppid()}"


class Name(NamedTuple):
    """The file name of a socket: the job in characters that are safe in file names, the process id, a random part."""

    job: str
    pid: int
    chance: str

    @property
    def label(self) -> str:
        """The job as part of the file name."""
        return re.sub(r"[^A-Za-z0-9_-]", "_", self.job)[:60]

    def __str__(self) -> str:
        return f"{self.label}.{self.pid}.{self.chance}{_SUFFIX}"

    @classmethod
    def parse(cls, text: str) -> Name | None:
        """Parse a file name; None if it is not the name of a socket."""
        match = re.fullmatch(r"([A-Za-z0-9_-]{0,60})\.([0-9]{1,10})\.([0-9a-f]{8})" + re.escape(_SUFFIX), text)
        return cls(match[1], int(match[2]), match[3]) if match else None


def directories(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Return the possible directories of this user's sockets. A process uses the first that works.

    The tools look in all of them, because a job often has no XDG_RUNTIME_DIR while a login session has one.
    """
    environ = os.environ if environ is None else environ
    user, given = os.geteuid(), environ.get("XDG_RUNTIME_DIR", "")
    places = [f"{given}/symmem"] if given.startswith("/") else []
    return [Path(place) for place in dict.fromkeys([*places, f"/tmp/symmem-{user}", f"/run/user/{user}/symmem"])]


@contextlib.contextmanager
def opened(directory: Path, make: bool = False) -> Iterator[int]:
    """Open a directory that only this user may enter; yields a descriptor.

    Raises:
        InspectionError: Other users may enter it or own it.
        OSError: It cannot be opened or made, or it is a symbolic link.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise InspectionError(
                f"{directory} belongs to user {found.st_uid} and has mode {found.st_mode & 0o7777:o}; it must belong "
                f"to user {os.geteuid()} and have mode 700",
                hint="remove it, or set XDG_RUNTIME_DIR to a private directory",
            )
        yield descriptor
    finally:
        os.close(descriptor)


def at(directory: int, name: str) -> str:
    """Return the address of a socket in an open directory. It is short, and does not depend on the directory's path."""
    return f"/proc/self/fd/{directory}/{name}"
