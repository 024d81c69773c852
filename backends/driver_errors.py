"""The error of symmem for every result code of the CUDA driver."""

from __future__ import annotations

from symmem.backends.kernel_status import failure
from symmem.errors import (
    BackendUnavailableError,
    OutOfMemoryError,
    ResourceLimitError,
    SymmemError,
    UnsupportedError,
)

__all__ = ["driver_error"]

_ERRORS: dict[str, tuple[type[SymmemError], str]] = {
    "CUDA_ERROR_OUT_OF_MEMORY": (
        OutOfMemoryError,
        "free tensors, or let torch release its unused cache: torch.cuda.empty_cache()",
    ),
    "CUDA_ERROR_OPERATING_SYSTEM": (
        ResourceLimitError,
        "the operating system refused: check the limit on open files (`ulimit -n`) and `dmesg`",
    ),
    "CUDA_ERROR_NOT_PERMITTED": (UnsupportedError, "the driver forbids it in this process or container"),
    "CUDA_ERROR_NOT_SUPPORTED": (UnsupportedError, "choose another backend: `symmem doctor` lists them"),
    "CUDA_ERROR_NOT_INITIALIZED": (
        BackendUnavailableError,
        "a process that was forked after CUDA was used cannot use CUDA: start workers with 'spawn'",
    ),
    "CUDA_ERROR_NO_DEVICE": (
        BackendUnavailableError,
        "use a machine with an NVIDIA GPU, and check that CUDA_VISIBLE_DEVICES does not hide it",
    ),
    "CUDA_ERROR_SYSTEM_NOT_READY": (BackendUnavailableError, "check that nvidia-fabricmanager runs"),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": (BackendUnavailableError, "restart the machine after a driver update"),
    "CUDA_ERROR_DEVICE_UNAVAILABLE": (BackendUnavailableError, "another process has exclusive use of the GPU"),
}


def driver_error(name: str, what: str) -> SymmemError:
    """The error of symmem for a CUresult. If a kernel of symmem has stopped, it is that kernel's error.

    Args:
        name: The name of the code, such as ``CUDA_ERROR_OUT_OF_MEMORY``.
        what: The call that failed, and the driver's text.
    """
    if known := failure():
        return known
    kind, hint = _ERRORS.get(name, (SymmemError, "look in `dmesg` for Xid errors of the driver"))
    return kind(what, hint=hint)
