"""Where the sockets are by which ranks can be inspected, and what is said on them.

Each process has one, in a directory that only its user may enter, under a name made of its job, its process and chance.
The protocol: a client connects, sends one line, ``{"version": 1, "parts": [...]}``, and gets one line, the answer, in
JSON. Both sides check that the other is of the same user (SO_PEERCRED, see unix(7)).

Nothing here imports torch.
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
"""Of the protocol; an answer of another one is not understood."""

PARTS = ("groups", "tensors", "stacks", "snapshot")
"""What can be asked for."""

_JOBS = ("SYMMEM_JOB_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
_SUFFIX = ".sock"


def job_id(environ: Mapping[str, str] | None = None) -> str:
    """What the processes of one job on a host have in common, and those of others have not.

    SYMMEM_JOB_ID, else Slurm's, else torchrun's ``--rdzv-id``, else where the ranks meet, else the process that started
    this one.
    """
    environ = os.environ if environ is None else environ
    for name in _JOBS:
        if (value := environ.get(name, "").strip()) not in ("", "none"):  # torchrun's, where none was given
            return value[:200]
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    return f"{address}:{port}"[:200] if address and port else f"parent {os.getppid()}"


class Name(NamedTuple):
    """The name of a socket's file: the job, as far as a file's name can have it, the process, and chance."""

    job: str
    pid: int
    chance: str

    @property
    def label(self) -> str:
        """The job as it is written there."""
        return re.sub(r"[^A-Za-z0-9_-]", "_", self.job)[:60]

    def __str__(self) -> str:
        return f"{self.label}.{self.pid}.{self.chance}{_SUFFIX}"

    @classmethod
    def parse(cls, text: str) -> Name | None:
        """The inverse of ``str``; None for the name of anything else."""
        match = re.fullmatch(r"([A-Za-z0-9_-]{0,60})\.([0-9]{1,10})\.([0-9a-f]{8})" + re.escape(_SUFFIX), text)
        return cls(match[1], int(match[2]), match[3]) if match else None


def directories(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Where sockets of this user may be; a process uses the first that it can.

    A job often has no XDG_RUNTIME_DIR where a login session has one, so who looks for processes looks everywhere.
    """
    environ = os.environ if environ is None else environ
    user, given = os.geteuid(), environ.get("XDG_RUNTIME_DIR", "")
    places = [f"{given}/symmem"] if given.startswith("/") else []
    return [Path(place) for place in dict.fromkeys([*places, f"/tmp/symmem-{user}", f"/run/user/{user}/symmem"])]


@contextlib.contextmanager
def opened(directory: Path, make: bool = False) -> Iterator[int]:
    """A descriptor of a directory that only this user may enter.

    Raises:
        InspectionError: Others may, or it is another user's, or a symbolic link.
        OSError: It cannot be opened, or made.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise InspectionError(
                f"{directory} is of user {found.st_uid} with mode {found.st_mode & 0o7777:o}; it must be of user "
                f"{os.geteuid()} with mode 700",
                hint="remove it, or set XDG_RUNTIME_DIR to a directory of your own",
            )
        yield descriptor
    finally:
        os.close(descriptor)


def at(directory: int, name: str) -> str:
    """The address of a socket in an open directory: short, as such an address must be, and of this very directory."""
    return f"/proc/self/fd/{directory}/{name}"
