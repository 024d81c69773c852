"""Reports of the kernels of this process: why one stopped, and which of them wait.

Every program loads this module. The reports themselves are read by :mod:`symmem.backends.kernel_words`, which only
programs that use CUDA load.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from symmem.errors import SymmemError

if TYPE_CHECKING:
    from symmem.backends.base import RankGroup
    from symmem.backends.pending_waits import Wait

__all__ = ["devices", "failure", "gpu_waits", "named", "raise_failure", "take_error"]


class Reports(Protocol):
    """The reports of the kernels on one GPU; see :class:`symmem.backends.kernel_words.KernelWords`."""

    def failure(self) -> SymmemError | None:
        """The error of the kernel that stopped, if one did."""

    def take_error_of(self, group: RankGroup) -> SymmemError | None:
        """The error of collective operations of a group that gave up; every error is returned once."""

    def waits(self) -> list[Wait]:
        """The waits in progress."""


devices: list[Reports] = []
"""The reports of every GPU that this process uses."""


def gpu_waits() -> list[Wait]:
    """The waits of this process on all its GPUs. Takes no lock."""
    return [wait for device in list(devices) for wait in device.waits()]


def failure() -> SymmemError | None:
    """The error of the kernel of this process that stopped, on any GPU, if one did."""
    return next((error for device in list(devices) if (error := device.failure())), None)


def take_error(group: RankGroup) -> SymmemError | None:
    """The error of collective operations of a group that gave up, on any GPU; every error is returned once."""
    return next((error for device in list(devices) if (error := device.take_error_of(group))), None)


def raise_failure(error: BaseException) -> None:
    """After a call of torch failed, raise the error of the kernel that stopped, if one did. CUDA gives no reason.

    Call it in an ``except RuntimeError`` that raises ``error`` itself if this returns. Errors of the driver do not
    need it, see :func:`symmem.backends.driver_errors.driver_error`.

    Raises:
        SymmemError: See :meth:`KernelWords.failure`; ``error`` is its cause.
    """
    if not isinstance(error, SymmemError) and (known := failure()):
        raise known from error


class _Named:
    """A context that calls :func:`raise_failure` on errors of torch."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise_failure(error)


named = _Named()
"""The context. It takes 0.1 microseconds; code that cannot afford them uses ``except RuntimeError``."""

os.register_at_fork(after_in_child=devices.clear)  # a child has no part in the parent's memory
