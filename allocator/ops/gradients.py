"""Autograd kernels of the operators: gradients, errors, and a shortcut for calls without gradients.

An operator has one kernel for all Autograd keys. If nothing requires a gradient and nothing intercepts the call (see
:mod:`symmem.ops.dispatch`), this kernel calls the device's kernel directly. So an ordinary eager call runs one Python
kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad

from symmem.backends.untraced import untraced
from symmem.errors import SymmemError, UnsupportedError
from symmem.group.resolve import group_named
from symmem.ops.dispatch import in_forward_mode, is_usual_keyset
from symmem.ops.refusals import refuse_in

__all__ = ["GRADIENTS", "with_gradient", "without_gradient"]


_has_transforms = torch._C._are_functorch_transforms_active


def _beneath(op: OpOverload, keyset: torch._C.DispatchKeySet, *args: Any, **options: Any) -> Any:
    """Continue the dispatch below Autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)


def _check_no_tangent(op: OpOverload, *values: Any) -> None:
    """Raise if a value has a tangent. Without this, derivatives in forward mode would be zeros."""
    for value in values:
        if not isinstance(value, torch.Tensor):
            continue
        if forward_ad.unpack_dual(value).tangent is not None:  # type: ignore[no-untyped-call]
            raise UnsupportedError(
                f"{op._name} has no derivative in forward mode",
                hint="use reverse mode: backward(), torch.func.grad or torch.func.vjp",
            )


@contextlib.contextmanager
def _refusing(op: OpOverload, *arguments: Any) -> Iterator[None]:
    """Report an error of the block to the other ranks. The last argument of an operator names its group."""
    try:
        yield
    except SymmemError as error:
        refuse_in(arguments[-1], op._opname, error, *arguments)
        raise


class _Rule:
    @staticmethod
    def forward(ctx: Any, op: OpOverload, keyset: torch._C.DispatchKeySet, x: torch.Tensor, *rest: Any) -> Any:
        ctx.op, ctx.shape, ctx.rest = op, x.shape, rest
        if not _has_transforms():
            return _beneath(op, keyset, x, *rest)
        # Autograd disabled both modes for this transform, but outer ones need them.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return _beneath(op, keyset, x, *rest)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, None, GRADIENTS[ctx.op._opname](ctx.shape, gradient, *ctx.rest), *(None for _ in ctx.rest)


class _WithGradient(_Rule, torch.autograd.Function):
    """Records the gradient of a call."""


class _WithinTransform(_Rule, torch.autograd.function._SingleLevelFunction):
    """Does so for the innermost transform, such as torch.func.grad. Outer ones are handled below Autograd."""


def with_gradient(op: OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Make the kernel for the Autograd keys of a functional operator. Its first argument must be its only tensor.

    The kernel takes the keys of the call and the arguments of the operator.

    Args:
        op: The operator.
        kernel: The device's kernel. Takes the arguments of the operator.
    """

    @untraced
    def run(keyset: torch._C.DispatchKeySet, x: torch.Tensor, *rest: Any) -> Any:
        if in_forward_mode():
            with _refusing(op, x, *rest):
                _check_no_tangent(op, x)
        if x.requires_grad and torch.is_grad_enabled():
            if not _has_transforms():
                return _WithGradient.apply(op, keyset, x, *rest)  # type: ignore[no-untyped-call]
            with enable_single_level_autograd_function():
                return _WithinTransform.apply(op, keyset, x, *rest)  # type: ignore[attr-defined]
        return kernel(x, *rest) if is_usual_keyset(keyset) else _beneath(op, keyset, x, *rest)

    return run


def without_gradient(op: OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The same for an operator that writes to its arguments. It raises if one requires a gradient."""
    several = sum(isinstance(argument.type, torch.TensorType) for argument in op._schema.arguments) > 1

    @untraced
    def run(keyset: torch._C.DispatchKeySet, x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if in_forward_mode():
            with _refusing(op, x, *options.values(), *rest):
                _check_no_tangent(op, x, *rest, *options.values())
        requires = torch._C._any_requires_grad(x, *rest, **options) if several else x.requires_grad
        if requires and torch.is_grad_enabled():
            with _refusing(op, x, *options.values(), *rest):
                raise UnsupportedError(
                    f"{op._name} writes to its arguments, and has no gradient",
                    hint="use the functional form; or call it under torch.no_grad()",
                )
        if is_usual_keyset(keyset):
            return kernel(x, *rest, **options)
        return _beneath(op, keyset, x, *rest, **options)

    return run


# The gradient of x is the gradient of the sum of all ranks' losses.


def _check_linear(name: str, reduction: str) -> None:
    if reduction not in ("sum", "avg"):
        raise UnsupportedError(
            f"symmem::{name} has no gradient for {reduction!r}",
            hint="use 'sum' or 'avg', or pass x.detach()",
            step=f"backward of {name}",
        )


def _all_reduce(shape: torch.Size, gradient: torch.Tensor, reduction: str, group_name: str) -> Any:
    _check_linear("all_reduce", reduction)
    return torch.ops.symmem.all_reduce(gradient, reduction, group_name)


def _all_gather(shape: torch.Size, gradient: torch.Tensor, group_name: str) -> Any:
    return torch.ops.symmem.reduce_scatter(gradient, "sum", group_name)


def _reduce_scatter(shape: torch.Size, gradient: torch.Tensor, reduction: str, group_name: str) -> Any:
    _check_linear("reduce_scatter", reduction)
    gathered = torch.ops.symmem.all_gather(gradient, group_name)
    return gathered / gathered.shape[0] if reduction == "avg" else gathered


def _all_to_all(shape: torch.Size, gradient: torch.Tensor, group_name: str) -> Any:
    return torch.ops.symmem.all_to_all(gradient, group_name)


def _broadcast(shape: torch.Size, gradient: torch.Tensor, root: int, group_name: str) -> Any:
    total = torch.ops.symmem.all_reduce(gradient, "sum", group_name)
    return total if group_named(group_name).rank == root else torch.zeros_like(total)


# All leaves have the same gradient. As a tree, the sum over equal ranks is exact.


def _of_every_leaf(shape: torch.Size, total: torch.Tensor, reduction: str, world: int) -> torch.Tensor:
    return (total / (shape[0] * world) if reduction == "avg" else total).expand(shape)


def _all_reduce_tree(shape: torch.Size, gradient: torch.Tensor, reduction: str, group_name: str) -> Any:
    total = torch.ops.symmem.all_reduce_tree(gradient.unsqueeze(0), "sum", group_name)
    return _of_every_leaf(shape, total, reduction, group_named(group_name).size)


def _reduce_scatter_tree(shape: torch.Size, gradient: torch.Tensor, reduction: str, group_name: str) -> Any:
    return _of_every_leaf(shape, torch.ops.symmem.all_gather(gradient, group_name), reduction, shape[1])


GRADIENTS: dict[str, Callable[..., Any]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "all_reduce_tree": _all_reduce_tree,
    "reduce_scatter_tree": _reduce_scatter_tree,
}
"""Functions by operator name. They take x's shape, the result's gradient and the other arguments, and return x's."""
