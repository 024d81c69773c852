"""``torch.distributed._symmetric_memory`` over symmem: change the import, and the code runs on every backend.

    import symmem.torch_compat as symm_mem          # was: torch.distributed._symmetric_memory

    t = symm_mem.empty(1024, dtype=torch.float32, device="cpu")      # or "cuda"
    hdl = symm_mem.rendezvous(t, group=dist.group.WORLD)
    hdl.barrier(channel=0)
    peer = hdl.get_buffer((hdl.rank + 1) % hdl.world_size, t.shape, t.dtype)

Names, arguments and units are PyTorch's (2.11 and newer): timeouts are in milliseconds, storage offsets in elements,
``offset`` in bytes, and ``multicast_ptr`` is 0 if there is none. These differences are intended:

* A timeout of 0, PyTorch's default, is the setting ``signal_timeout``, not forever.
* Errors are classes of ``symmem.errors``. An unsupported request raises an error with the reason, instead of returning
  a null pointer.
* :func:`set_backend` applies to later allocations, and takes the names of all backends.
* ``torch.ops.symm_mem`` work on tensors from this module if their backend is one of PyTorch's transports.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from symmem.backends import get_backend as _named_backend
from symmem.backends import select_backend
from symmem.backends.neutral import neutral_mode
from symmem.backends.torch_transport import BACKENDS as _TORCH_NAMES
from symmem.backends.untraced import untraced
from symmem.config import load_settings
from symmem.errors import BackendUnavailableError, GroupError, InvalidArgumentError
from symmem.group.resolve import GroupLike, resolve_group
from symmem.tensor.tensor import SymmetricTensor, find
from symmem.tensor.torch_handle import TorchHandle as Handle
from symmem.tensor.torch_handle import reserve

__all__ = [
    "Handle",
    "empty",
    "enable_symm_mem_for_group",
    "get_backend",
    "get_signal_pad_size",
    "get_symm_mem_workspace",
    "is_nvshmem_available",
    "is_symm_mem_enabled_for_group",
    "is_symm_mem_tensor",
    "put_signal",
    "rendezvous",
    "set_backend",
    "set_signal_pad_size",
    "wait_signal",
]

_ALIGNMENT = 256  # bytes; for the signal pad behind a tensor

_backend: str | None = None
_pad_nbytes = 32 * 72 * 4  # PyTorch's default: 32 blocks, 72 ranks
_workspaces: dict[str, torch.Tensor] = {}


@untraced
def empty(*size: Any, dtype: torch.dtype | None = None, device: torch.device | str | int | None = None) -> torch.Tensor:
    """Allocate a tensor in symmetric memory, with a signal pad behind it. Zeroed.

    Local, unless the backend has ``COLLECTIVE_ALLOCATION``.

    Args:
        *size: Integers, or one sequence of them.
        dtype: Default ``torch.get_default_dtype()``.
        device: Default ``torch.get_default_device()``.

    Raises:
        SymmemError: See :meth:`SymmetricTensor.allocate`.
    """
    sizes = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else tuple(size)
    return _allocate(sizes, dtype, device, None)


def _allocate(
    sizes: Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
    group: GroupLike,
) -> torch.Tensor:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    device = torch.get_default_device() if device is None else device
    nbytes = math.prod(sizes) * dtype.itemsize
    begin = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    # Not from an arena: PyTorch's memory is zeroed, has no group yet, and any rank may allocate alone.
    whole = SymmetricTensor.allocate(
        begin + _pad_nbytes, torch.uint8, device, group=group, backend=_backend, arena=False
    )
    reserve(whole._block, begin, _pad_nbytes)
    with neutral_mode():  # the tensor outlives the caller's modes
        return whole.tensor[:nbytes].view(dtype).view(tuple(sizes))


@untraced
def rendezvous(tensor: torch.Tensor, group: GroupLike = None) -> Handle:
    """Let the ranks of a group reach each other's memory. Collective over the group, the first time.

    Args:
        tensor: From :func:`empty`, or any other tensor in symmetric memory; the same on all ranks.
        group: A process group or its name, or another group that :meth:`SymmetricTensor.rendezvous` takes.

    Raises:
        NotSymmetricError: The tensor is not in symmetric memory; says why.
        SymmemError: See :meth:`SymmetricTensor.rendezvous`.
    """
    handle = SymmetricTensor.wrap(tensor)
    handle.rendezvous(group)
    return Handle(handle, group)


@untraced
def put_signal(src: torch.Tensor, hdl: Handle, peer: int) -> None:
    """Copy ``src`` to the beginning of a peer's memory, then signal it on channel 0; work on the current stream."""
    hdl.get_remote_tensor(peer, src.shape, src.dtype).copy_(src)
    hdl.put_signal(peer)


@untraced
def wait_signal(hdl: Handle, peer: int) -> None:
    """Wait for a peer's :func:`put_signal`."""
    hdl.wait_signal(peer)


def is_symm_mem_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor or view is in symmetric memory. Local, O(log n)."""
    return find(tensor) is not None


def set_signal_pad_size(size: int) -> None:
    """Set the signal pads' bytes for later calls of :func:`empty`; must be the same on all ranks."""
    global _pad_nbytes
    if size < 1:
        raise InvalidArgumentError(f"a signal pad must have at least 1 byte, not {size!r}")
    _pad_nbytes = size


def get_signal_pad_size() -> int:
    """Bytes of the signal pads of tensors that :func:`empty` makes."""
    return _pad_nbytes


def set_backend(name: str) -> None:
    """Choose the backend for later calls of :func:`empty`, instead of the configuration's.

    Args:
        name: PyTorch's ``CUDA``, ``NCCL`` or ``NVSHMEM``, or a backend of symmem.

    Raises:
        ConfigError: There is no such backend.
    """
    global _backend
    name = _TORCH_NAMES.get(name, name)
    _named_backend(name)
    _backend = name


def get_backend(device: torch.device | str | int) -> str | None:
    """Return the backend that :func:`empty` uses for a device; None if none works. Probes it. Local.

    The name is PyTorch's if PyTorch has one.
    """
    order = (_backend,) if _backend else load_settings().backend
    try:
        name = select_backend(order, torch.device(device).type).name
    except BackendUnavailableError:
        return None
    return next((theirs for theirs, ours in _TORCH_NAMES.items() if ours == name), name)


def is_nvshmem_available() -> bool:
    """Whether a probe of the backend ``nvshmem`` or ``pytorch_nvshmem`` succeeds here."""
    for name in ("nvshmem", "pytorch_nvshmem"):
        with contextlib.suppress(BackendUnavailableError):
            _named_backend(name).probe()
            return True
    return False


def enable_symm_mem_for_group(group_name: str) -> None:
    """Do nothing: groups need not be enabled, as in PyTorch today."""


def is_symm_mem_enabled_for_group(group_name: str) -> bool:
    """Whether the group exists and this process is in it."""
    with contextlib.suppress(GroupError):
        resolve_group(group_name)
        return True
    return False


@untraced
def get_symm_mem_workspace(group_name: str, min_size: int) -> Handle:
    """Return a buffer of at least ``min_size`` bytes that all users of a group share.

    The first call, and calls that need a larger buffer, are collective over the group. The buffer is on the current
    CUDA device if there is one, else on the CPU.
    """
    tensor = _workspaces.get(group_name)
    if tensor is None or tensor.numel() < min_size:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        tensor = _allocate((min_size,), torch.uint8, device, group_name)
        _workspaces[group_name] = tensor
    return rendezvous(tensor, group_name)
