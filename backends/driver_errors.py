"""What the CUDA driver's result codes are called in symmem."""

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
        "free tensors, or let torch give back what it holds in reserve: torch.cuda.empty_cache()",
    ),
    "CUDA_ERROR_OPERATING_SYSTEM": (
        ResourceLimitError,
        "the operating system refused: look at the limit on open files (`ulimit -n`) and at `dmesg`",
    ),
    "CUDA_ERROR_NOT_PERMITTED": (UnsupportedError, "the driver forbids it in this process or container"),
    "CUDA_ERROR_NOT_SUPPORTED": (UnsupportedError, "choose another backend: `symmem doctor` lists them"),
    "CUDA_ERROR_NOT_INITIALIZED": (
        BackendUnavailableError,
        "a process that was forked after CUDA was used cannot use it: start workers with 'spawn'",
    ),
    "CUDA_ERROR_NO_DEVICE": (
        BackendUnavailableError,
        "use a machine with an NVIDIA GPU, and see that CUDA_VISIBLE_DEVICES does not hide it",
    ),
    "CUDA_ERROR_SYSTEM_NOT_READY": (BackendUnavailableError, "see that nvidia-fabricmanager runs"),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": (BackendUnavailableError, "restart after the driver's update"),
    "CUDA_ERROR_DEVICE_UNAVAILABLE": (BackendUnavailableError, "another process has the GPU to itself"),
}


def driver_error(name: str, what: str) -> SymmemError:
    """The error of symmem for a CUresult: after a kernel has stopped, why it has, whatever the driver says.

    Args:
        name: Such as ``CUDA_ERROR_OUT_OF_MEMORY``.
        what: What was tried, and what the driver said.
    """
    if known := failure():
        return known
    kind, hint = _ERRORS.get(name, (SymmemError, "look at `dmesg` for what the driver reports (Xid)"))
    return kind(what, hint=hint)
