"""Anonymous memory files that processes share by their descriptors."""

from __future__ import annotations

import fcntl
import os

from symmem.backends.libc import Descriptor, limit_error
from symmem.errors import RendezvousError

__all__ = ["check_memory_file", "make_memory_file"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""The size of a memory file is final: whoever holds a descriptor could end the other ranks by SIGBUS otherwise."""


def make_memory_file(nbytes: int) -> Descriptor:
    """Make an anonymous file of ``nbytes`` zeros. The kernel makes a page at its first access.

    Raises:
        ResourceLimitError: This process may have no more descriptors, or no file of this size.
    """
    try:
        file = Descriptor.from_call(os.memfd_create, "symmem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, nbytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise limit_error(error, f"cannot make a memory file of {nbytes} bytes") from error
    return file


def check_memory_file(descriptor: int, nbytes: int, rank: int) -> None:
    """Check that a received file has ``nbytes`` bytes, and keeps them: an access behind the end is a SIGBUS.

    Raises:
        RendezvousError: It is shorter, can be shortened, or is not a memory file.
    """
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        sealed = 0
    if not sealed or os.fstat(descriptor).st_size < nbytes:
        raise RendezvousError(
            f"rank {rank} sent a memory file that is shorter than {nbytes} bytes, or not sealed against shrinking",
            hint="use the same version of symmem on all ranks",
            peers=(rank,),
        )
