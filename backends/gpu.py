"""Uses of ``torch.cuda`` by backends, and the packages that they need."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from symmem.backends.kernel_status import named
from symmem.errors import BackendUnavailableError, InvalidArgumentError

__all__ = [
    "check_device",
    "current_stream",
    "finish_stream",
    "free_memory",
    "idle",
    "install_hint",
    "on_device",
    "require_gpu",
    "synchronize",
]


def require_gpu(backend: str) -> None:
    """Return if torch can use a GPU in this process.

    Raises:
        BackendUnavailableError: It cannot; the text says whether torch, the driver or the machine is the reason.
    """
    if torch.version.cuda is None:
        raise BackendUnavailableError(
            f"the backend {backend!r} needs NVIDIA GPUs, and this torch {torch.__version__} is built without CUDA",
            hint="on a machine with GPUs, install a CUDA build of torch (https://pytorch.org/get-started)",
        )
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"the backend {backend!r} needs NVIDIA GPUs, and torch finds no usable GPU",
            hint="check with `nvidia-smi` for a GPU and a driver, and that CUDA_VISIBLE_DEVICES is not empty",
        )


_PACKAGES_FOR_CUDA_12 = {
    "cuda-python": "'cuda-python>=12.9,<13' cuda-core",
    "nvshmem4py": "nvshmem4py-cu12",
    "nvshmem": "nvidia-nvshmem-cu12",
}
_PACKAGES = {
    "cuda-python": "'cuda-python>=13' cuda-core",
    "nvshmem4py": "nvshmem4py-cu13",
    "nvshmem": "nvidia-nvshmem-cu13",
}


def install_hint(name: str) -> str:
    """The command that installs a package for the CUDA version of torch; CUDA 13 if torch is built without CUDA."""
    packages = _PACKAGES_FOR_CUDA_12 if (torch.version.cuda or "").startswith("12.") else _PACKAGES
    return f"pip install {packages[name]}"


def check_device(backend: str, device: torch.device) -> torch.device:
    """The device, with its index filled in.

    Raises:
        InvalidArgumentError: It is not a CUDA device.
    """
    if device.type != "cuda":
        raise InvalidArgumentError(f"the backend {backend!r} has memory on CUDA devices only, not on {device}")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which ``device`` is the current device."""
    return torch.cuda.device(device)


def synchronize(device: torch.device) -> None:
    """Wait for all work on all streams of a device. Raises the error of a kernel that stopped."""
    with named:
        torch.cuda.synchronize(device)


def finish_stream(device: torch.device) -> None:
    """Wait for the work on the current stream of a device. Raises the error of a kernel that stopped."""
    with named:
        torch.cuda.current_stream(device).synchronize()


def idle(device: torch.device, timeout: float) -> bool:
    """Whether the work on the current stream ends within ``timeout`` seconds. It never blocks for longer.

    Raises the error of a kernel that stopped.
    """
    deadline = time.monotonic() + timeout
    with named:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        while not event.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
    return True


def current_stream(device: torch.device) -> int:
    """The current stream as a ``cudaStream_t``."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def free_memory(device: torch.device) -> int:
    """Free bytes of the device."""
    return torch.cuda.mem_get_info(device)[0]
