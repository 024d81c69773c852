"""Anonymous memory files that processes share by their descriptors."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable

from symmem.backends.libc import limit_error
from symmem.errors import RendezvousError

__all__ = ["OwnedFile", "check_memory_file"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""The size of a memory file is final: whoever holds a descriptor could end the other ranks by SIGBUS otherwise."""


class OwnedFile:
    """A new anonymous file of ``nbytes`` zeros. It is closed with the last reference, or by :meth:`close`.

    The kernel makes a page at its first access.

    Attributes:
        descriptor: The file's descriptor.
    """

    descriptor = -1

    def __init__(self, nbytes: int) -> None:
        try:
            self.descriptor = os.memfd_create("symmem", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise limit_error(error, "cannot make a memory file") from error
        try:
            os.ftruncate(self.descriptor, nbytes)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException as error:  # also an interrupt
            self.close()
            if isinstance(error, OSError):
                raise limit_error(error, f"cannot make a memory file of {nbytes} bytes") from error
            raise

    def close(self, _close: Callable[[int], None] = os.close) -> None:  # `os` may be gone at the interpreter's exit
        """Close the file. May be called again."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            _close(descriptor)

    def __del__(self) -> None:
        self.close()


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
