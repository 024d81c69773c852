"""Kernels for CPU tensors of ``torch.ops.symm_mem``, over symmem's own operators.

PyTorch has these operators for CUDA alone. The kernels here have the arguments, results and effects of PyTorch's. They
allow the reductions of :mod:`symmem.ops` (sum, avg, min and max), where PyTorch's allow sum, or sum and avg. Operators
that need multicast or another library (NVSHMEM, NCCL) have no meaning on the CPU, and no kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed import _symmetric_memory  # defines some of the operators

from symmem import ops
from symmem.backends.untraced import untraced
from symmem.errors import InvalidArgumentError, NotSymmetricError, SymmemError
from symmem.group.resolve import resolve_group
from symmem.ops.refusals import refuse_in
from symmem.tensor.torch_handle import fill_words
from symmem.torch_backend.bridge import is_symmetric

__all__ = ["register"]

F = TypeVar("F", bound=Callable[..., Any])

_symm_mem: Any = _symmetric_memory

# PyTorch's own definitions in terms of functional collectives and matmul. PyTorch traces with them.
_FUSED = (
    *("fused_all_gather_matmul", "fused_all_gather_scaled_matmul"),
    *("fused_matmul_reduce_scatter", "fused_scaled_matmul_reduce_scatter"),
)
_kernels: dict[str, Callable[..., Any]] = {name: getattr(_symm_mem, f"_{name}_fallback") for name in _FUSED}
_libraries: list[Any] = []  # their kernels go with them


def register() -> bool:
    """Give the operators kernels for CPU tensors. Later calls do nothing, and return False."""
    if _libraries:
        return False
    library: Any = torch.library.Library("symm_mem", "IMPL")  # type: ignore[no-untyped-call]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name, kernel in _kernels.items():
        if hasattr(torch.ops.symm_mem, name) and not has_kernel(f"symm_mem::{name}", "CPU"):
            library.impl(name, kernel, "CPU")
    _libraries.append(library)
    return True


def _kernel(function: F) -> F:
    """The kernel of the operator with the function's name."""
    _kernels[function.__name__] = untraced(function)
    return function


def _check_symmetric(operation: str, group: str, tensor: torch.Tensor, what: str) -> None:
    """Raise, on all ranks, unless a tensor is symmetric memory. PyTorch's kernels need it for their peers."""
    if is_symmetric(tensor):
        return
    error = NotSymmetricError(
        f"the argument {what!r} of symm_mem::{operation} is not symmetric memory",
        hint="allocate it with torch.distributed._symmetric_memory.empty, or with symmem.allocate",
        step=operation,
    )
    refuse_in(group, operation, error, tensor)
    raise error


@untraced
def _all_reduce(
    operation: str, input: torch.Tensor, reduce_op: str, group_name: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The reduction of all ranks' inputs, on every rank; into ``out`` if it is given."""
    _check_symmetric(operation, group_name, input, "input")
    return ops.all_reduce(input, group_name, reduce_op, out=out)


for _name in ("one_shot_all_reduce", "one_shot_all_reduce_out", "two_shot_all_reduce_out"):
    _kernels[_name] = functools.partial(_all_reduce, _name)


@_kernel
def two_shot_all_reduce_(input: torch.Tensor, reduce_op: str, group_name: str) -> torch.Tensor:
    """Replace every rank's input by the reduction of all."""
    return _all_reduce("two_shot_all_reduce_", input, reduce_op, group_name, input)


@_kernel
def one_shot_all_reduce_copy(
    symm_buffer: torch.Tensor, local_input: torch.Tensor, reduce_op: str, group_name: str
) -> torch.Tensor:
    """The reduction of any memory, which is copied into a symmetric buffer first."""
    out = torch.empty_like(local_input)
    return one_shot_all_reduce_copy_out(symm_buffer, local_input, reduce_op, group_name, out)


@_kernel
def one_shot_all_reduce_copy_out(
    symm_buffer: torch.Tensor, local_input: torch.Tensor, reduce_op: str, group_name: str, out: torch.Tensor
) -> torch.Tensor:
    """The same, into ``out``."""
    _check_symmetric("one_shot_all_reduce_copy_out", group_name, symm_buffer, "symm_buffer")
    try:
        part = symm_buffer.view(-1)[: local_input.numel()].view(local_input.shape)
    except RuntimeError as error:  # it is too small, or not contiguous
        refused = InvalidArgumentError(
            f"symm_buffer of shape {list(symm_buffer.shape)} cannot hold {list(local_input.shape)} contiguously",
            step="one_shot_all_reduce_copy_out",
        )
        refuse_in(group_name, "all_reduce", refused, symm_buffer)
        raise refused from error
    part.copy_(local_input)
    return ops.all_reduce(part, group_name, reduce_op, out=out)


@_kernel
def reduce_scatter_out(
    input: torch.Tensor, group_name: str, split_last_dim: bool, output: torch.Tensor
) -> torch.Tensor:
    """Sum all ranks' inputs, and store this rank's part of the first or the last dimension into ``output``."""
    _check_symmetric("reduce_scatter_out", group_name, input, "input")
    parts = _parts("reduce_scatter_out", group_name, input, -1 if split_last_dim else 0)
    return ops.reduce_scatter(parts, group_name, "sum", out=output)


@_kernel
def _low_contention_all_gather(tensor: torch.Tensor, group_name: str) -> torch.Tensor:
    """All ranks' tensors, one after the other along the first dimension."""
    return ops.all_gather(tensor, group_name).flatten(0, 1)


@_kernel
def _low_contention_reduce_scatter(tensor: torch.Tensor, reduce_op: str, group_name: str) -> torch.Tensor:
    """The reduction of all ranks' tensors: this rank's part along the first dimension."""
    parts = _parts("_low_contention_reduce_scatter", group_name, tensor, 0)
    return ops.reduce_scatter(parts, group_name, reduce_op)


@_kernel
def get_remote_tensors(x: torch.Tensor, group_name: str) -> list[torch.Tensor]:
    """All ranks' tensors as views of their memory, in rank order."""
    _check_symmetric("get_remote_tensors", group_name, x, "x")
    handle = _symm_mem.rendezvous(x, group_name)
    return [handle.get_remote_tensor(peer, x.size(), x.dtype) for peer in range(handle.world_size)]


@_kernel
def stream_write_value32_(input: torch.Tensor, offset: int, val: int) -> torch.Tensor:
    """Store a word. On the CPU there is no stream, so it is stored at once."""
    return fill_words(input, offset, val, 1, "symm_mem::stream_write_value32_")


@_kernel
def memset32_(input: torch.Tensor, offset: int, val: int, count: int = 1) -> torch.Tensor:
    """Store ``count`` equal words."""
    return fill_words(input, offset, val, count, "symm_mem::memset32_")


def _parts(operation: str, group: str, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A part of a dimension per rank: [world, ...]."""
    try:
        world = resolve_group(group).size
        if tensor.dim() == 0 or tensor.shape[dim] % world:
            raise InvalidArgumentError(
                f"dimension {dim} of shape {list(tensor.shape)} cannot be split among {world} ranks", step=operation
            )
    except SymmemError as error:
        refuse_in(group, "reduce_scatter", error, tensor)
        raise
    return torch.stack(tensor.chunk(world, dim)) if dim else tensor.view(world, -1, *tensor.shape[1:])
