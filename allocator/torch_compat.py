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
* ``torch.ops.symm_mem`` work on tensors from this module if their backend is one of PyTorch's transports. PyTorch's
  implementations of these operators have no meaning for other memory, and raise UnsupportedError if called by name.
* Signals have 64 channels. A barrier uses words of its own, and not the signal pad.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from symmem.backends import get_backend as _named_backend
from symmem.backends.untraced import untraced
from symmem.errors import BackendUnavailableError, GroupError, UnsupportedError
from symmem.group.group import Group
from symmem.group.resolve import GroupLike, resolve_group
from symmem.memory import cuda_graphs
from symmem.tensor import torch_handle
from symmem.tensor.torch_handle import TorchHandle as Handle
from symmem.tensor.torch_memory import backend_name, set_backend, set_signal_pad_size
from symmem.tensor.torch_memory import signal_pad_size as get_signal_pad_size

__all__ = [
    "Handle",
    "empty",
    "enable_symm_mem_for_group",
    "get_backend",
    "get_mem_pool",
    "get_mempool_allocator",
    "get_signal_pad_size",
    "get_symm_mem_workspace",
    "is_nvshmem_available",
    "is_symm_mem_enabled_for_group",
    "is_symm_mem_tensor",
    "put_signal",
    "reduce_scatter_offset",
    "rendezvous",
    "set_backend",
    "set_signal_pad_size",
    "wait_signal",
]

_SymmetricMemory = Handle

_THEIRS = "torch.distributed._symmetric_memory"

# PyTorch's functions that use no symmetric memory. The other ones that this module lacks implement operators.
_INDEPENDENT = {
    *("Work", "_ScaleMode", "_check_and_verify_fp8_all_gather_scale_mode", "_maybe_convert_scalar_types_to_dtypes"),
    *("_fused_all_gather_matmul_fallback", "_fused_all_gather_scaled_matmul_fallback"),
    *("_fused_matmul_reduce_scatter_fallback", "_fused_scaled_matmul_reduce_scatter_fallback", "_test_mode"),
    *("_all_to_all_vdev_2d_meta", "_all_to_all_vdev_2d_offset_meta", "_get_remote_tensors_meta"),
    *("_low_contention_all_gather_meta", "_low_contention_reduce_scatter_meta", "make_contiguous_for_perm"),
    *("restride_A_for_fused_matmul_reduce_scatter", "restride_A_shard_for_fused_all_gather_matmul"),
}

_workspaces: dict[str, tuple[weakref.ref[Group], torch.Tensor]] = {}


def __getattr__(name: str) -> Any:
    """PyTorch's own functions, on first use: importing them takes long."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_THEIRS), name, None)
    if name in _INDEPENDENT and value is not None:
        return value
    if getattr(value, "__module__", None) == _THEIRS and callable(value):
        return _operator(name, value)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _operator(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise UnsupportedError(
            f"{name} is PyTorch's implementation of an operator on its own symmetric memory",
            hint="use symmem.ops; or torch.ops.symm_mem, with a backend of PyTorch or with symmem.torch_backend",
            step=name,
        )

    return refuse


@untraced
def empty(*size: Any, dtype: torch.dtype | None = None, device: torch.device | str | int | None = None) -> torch.Tensor:
    """Allocate a tensor in symmetric memory, with a signal pad behind it. Both are zeroed.

    Local, unless the backend has ``COLLECTIVE_ALLOCATION``.

    Args:
        *size: Integers, or one sequence of them; a size may be 0.
        dtype: Default ``torch.get_default_dtype()``.
        device: Default ``torch.get_default_device()``.

    Raises:
        SymmemError: See :meth:`SymmetricTensor.allocate`.
    """
    sizes = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else tuple(size)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return Handle.empty_strided_p2p(sizes, None, dtype, torch.get_default_device() if device is None else device)


@untraced
def rendezvous(tensor: torch.Tensor, group: GroupLike = None) -> Handle:
    """Let the ranks of a group reach each other's memory. Collective over the group, the first time.

    Views of one allocation share its rendezvous. Ranks compare the bytes of the allocation and of its signal pad.

    Args:
        tensor: From :func:`empty`, or any other tensor in symmetric memory; the same on all ranks.
        group: A process group or its name, or another group that :meth:`SymmetricTensor.rendezvous` takes. Default: the
            group that ``empty_strided_p2p`` named, else the default process group.

    Returns:
        The handle; None if the tensor is not in symmetric memory, as in PyTorch.

    Raises:
        SymmemError: See :meth:`SymmetricTensor.rendezvous`.
    """
    return torch_handle.rendezvous(tensor, group)


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
    """Whether a tensor or view, also an empty one, is in symmetric memory. Local, O(log n)."""
    return Handle.is_symm_mem_tensor(tensor)


def get_backend(device: torch.device | str | int) -> str | None:
    """Return the backend that :func:`empty` uses for a device; None if none works. Probes it. Local.

    The name is PyTorch's if PyTorch has one.
    """
    return backend_name(device)


def get_mempool_allocator(device: torch.device | str | int) -> NoReturn:
    """Raise UnsupportedError: a pool of PyTorch's cannot take memory from symmem's backends."""
    Handle.get_mempool_allocator(device)


def get_mem_pool(device: torch.device | str | int) -> NoReturn:
    """Raise UnsupportedError: a pool of PyTorch's cannot take memory from symmem's backends."""
    Handle.get_mempool_allocator(device)


def reduce_scatter_offset(
    input: torch.Tensor,
    out: list[torch.Tensor],
    group: str,
    *,
    dim: int,
    offsets: list[int] | None = None,
    dst_ranks: list[int] | None = None,
    red_op: str = "sum",
) -> NoReturn:
    """Raise UnsupportedError: PyTorch has it for its NCCL transport only."""
    raise UnsupportedError(
        "reduce_scatter_offset needs PyTorch's NCCL transport",
        hint="use symmem.ops.reduce_scatter, or PyTorch's module with its NCCL transport",
        group=str(group),
        step="reduce_scatter_offset",
    )


def _get_backend_stream(priority: int = 0) -> torch.cuda.Stream:
    """PyTorch's side stream of a priority, on CUDA.

    Raises:
        UnsupportedError: There is no CUDA.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("there are no streams without CUDA", step="_get_backend_stream")
    return importlib.import_module(_THEIRS)._get_backend_stream(priority)  # type: ignore[no-any-return]


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
    """Whether the group exists and this process is in it; within ``_test_mode``, as that says."""
    theirs = sys.modules.get(_THEIRS)
    if theirs is not None and theirs._is_test_mode:
        return theirs._mocked_group_names is None or group_name in theirs._mocked_group_names
    with contextlib.suppress(GroupError):
        resolve_group(group_name)
        return True
    return False


@untraced
def get_symm_mem_workspace(group_name: str, min_size: int) -> Handle:
    """Return a buffer of at least ``min_size`` bytes that all users of a group share.

    The first call, and calls that need a larger buffer, are collective over the group. The buffer is on the current
    CUDA device if there is one, else on the CPU. A group that is made again under the same name gets a new buffer.

    Raises:
        UnsupportedError: The buffer would have to grow during the capture of a CUDA graph.
        SymmemError: See :meth:`SymmetricTensor.allocate` and :meth:`SymmetricTensor.rendezvous`.
    """
    group = resolve_group(group_name)
    for name, (owner, _tensor) in list(_workspaces.items()):
        if not _is_named(name, owner()):
            _workspaces.pop(name, None)
    _owner, tensor = _workspaces.get(group.name, (None, None))
    if tensor is None or tensor.numel() < min_size:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        try:
            cuda_graphs.refuse(device, "the workspace of a group cannot grow")
            tensor = Handle.empty_strided_p2p((min_size,), (1,), torch.uint8, device, group_name)
        except Exception as error:
            group.fail("get_symm_mem_workspace", error)  # the other ranks would wait in the rendezvous
            raise
        _workspaces[group.name] = weakref.ref(group), tensor
    return rendezvous(tensor, group)


def _is_named(name: str, group: Group | None) -> bool:
    with contextlib.suppress(GroupError):
        return resolve_group(name) is group
    return False
