"""The methods of a process group that symmem's operators serve: one table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from symmem.errors import InvalidArgumentError
from symmem.group.group import Group
from symmem.ops.collectives import is_reduced
from symmem.ops.refusals import refusing

__all__ = ["FUNCTIONAL", "METHODS", "OTHER_REDUCTION", "REDUCING", "REDUCTIONS", "Method"]

Tensors = Sequence[torch.Tensor]
Lists = Sequence[Tensors]

_ReduceOp: Any = dist.ReduceOp
REDUCTIONS = {hash(_ReduceOp(getattr(_ReduceOp, name.upper()))): name for name in ("sum", "avg", "min", "max")}
"""The reductions by torch's number for them, which is the hash: looking up the object itself takes a microsecond."""

REDUCING = ("all_reduce", "reduce_scatter")
"""The operators with a reduction."""

OTHER_REDUCTION = "a reduction other than sum, avg, min and max"

_CLASSES = (torch.Tensor, torch.nn.Parameter)

_MOST_ON_CUDA = {"all_gather": 32 << 20}
"""Bytes of a tensor on CUDA, by operator, beyond which NCCL is quicker. On two H200s, all_gather takes 0.8 of NCCL's
time for a result of 16 MiB, and 1.14 for 64 MiB."""


class Method(NamedTuple):
    """How an operator serves a method. The functions take the method's arguments, with the options last.

    Attributes:
        operator: The operator.
        run: Calls the operator. Takes the functions of the operators, the group, and the reduction, if there is one,
            before the arguments.
        tensors: The tensors of a call.
        special: Why the operator cannot serve a call, apart from the tensors; empty if it can.
        options: Makes the options, where torch leaves them out.
        layout: How C reads the arguments to repeat a call on CUDA, see :func:`symmem.ops.eager.method`; None if it
            cannot.
        operands: The operator's argument and result. Takes the group before the arguments.
    """

    operator: str
    run: Callable[..., None]
    tensors: Callable[..., Tensors]
    special: Callable[..., str]
    options: Callable[[], Any] | None = None
    layout: int | None = None
    operands: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None

    def obstacle(
        self, reduction: str | None, device: str, dtype: torch.dtype, nbytes: int, is_async: bool = False
    ) -> str:
        """Why the operator cannot serve a dense tensor of a call; empty if it can."""
        if device != "cpu" and (device != "cuda" or is_async):
            return f"asynchronous calls on {device}"
        if device == "cuda" and nbytes > _MOST_ON_CUDA.get(self.operator, nbytes):
            return f"tensors of more than {_MOST_ON_CUDA[self.operator] >> 20} MiB on cuda"
        if reduction is not None and not is_reduced(device, dtype, reduction):
            return f"{reduction} of {dtype} on {device}"
        return ""

    def plan(self, functions: Any, group: Group, arguments: Sequence[Any]) -> Callable[[], None] | str:
        """Return what makes a call, or why the operator cannot. For matching calls, all ranks get the same answer.

        Args:
            functions: :mod:`symmem.ops.functions`, or functions of the same names and arguments.
            group: The group.
            arguments: The arguments of the method.
        """
        options, reduction = arguments[-1], None
        if self.operator in REDUCING:
            reduction = REDUCTIONS.get(hash(options.reduceOp))
            if reduction is None:
                return OTHER_REDUCTION
        is_protected = False
        for x in self.tensors(*arguments):
            if type(x) not in _CLASSES or x.layout is not torch.strided or x.is_quantized or x.is_nested:
                return "a tensor that is not dense"
            if obstacle := self.obstacle(reduction, x.device.type, x.dtype, x.nbytes, options.asyncOp):
                return obstacle
            is_protected = is_protected or x.requires_grad or x.is_inference()
        if obstacle := self.special(*arguments):
            return obstacle
        call = functools.partial(self.run, functions, group, reduction, *arguments)
        return functools.partial(_in_inference_mode, call) if is_protected else call


def _in_inference_mode(call: Callable[[], None]) -> None:
    """Make a call that may write to any tensor, as torch's backends do: to parameters, and to tensors of this mode."""
    with torch.inference_mode():
        call()


def _all_reduce(ops: Any, group: Group, reduction: str, tensors: Tensors, options: Any) -> None:
    for x in tensors:
        ops.all_reduce(x, group, reduction, x)


def _broadcast(ops: Any, group: Group, reduction: None, tensors: Tensors, options: Any) -> None:
    for x in tensors:
        ops.broadcast(x, group, options.rootRank, x)


def _all_gather(ops: Any, group: Group, reduction: None, out: torch.Tensor, x: torch.Tensor, options: Any) -> None:
    ops.all_gather(x, group, _rows("all_gather", out, group, x.shape))


def _all_gather_lists(ops: Any, group: Group, reduction: None, lists: Lists, inputs: Tensors, options: Any) -> None:
    for outs, x in zip(lists, inputs, strict=True):
        for out, row in zip(outs, ops.all_gather(x, group), strict=True):
            out.copy_(row.view(out.shape))


def _reduce_scatter(ops: Any, group: Group, reduction: str, out: torch.Tensor, x: torch.Tensor, options: Any) -> None:
    ops.reduce_scatter(_rows("reduce_scatter", x, group, out.shape), group, reduction, out)


def _reduce_scatter_lists(ops: Any, group: Group, reduction: str, outs: Tensors, lists: Lists, options: Any) -> None:
    for out, parts in zip(outs, lists, strict=True):
        _reduce_scatter(ops, group, reduction, out, torch.stack(tuple(parts)), options)


def _all_to_all(
    ops: Any, group: Group, reduction: None, out: torch.Tensor, x: torch.Tensor, outs: Any, ins: Any, options: Any
) -> None:
    shape = _part(x, group)
    ops.all_to_all(_rows("all_to_all", x, group, shape), group, _rows("all_to_all", out, group, shape))


def _part(x: torch.Tensor, group: Group) -> Sequence[int]:
    """The shape of a rank's part of a tensor in all_to_all."""
    return (x.shape[0] // group.size, *x.shape[1:]) if x.dim() else x.shape


def _rows(operator: str, tensor: torch.Tensor, group: Group, shape: Sequence[int]) -> torch.Tensor:
    """View a tensor as one row per rank. If that is impossible, the matching call fails on all ranks."""
    with refusing(group, tensor.device, operator):
        try:
            return tensor.view(group.size, *shape)
        except RuntimeError:
            raise InvalidArgumentError(
                f"a tensor of shape {list(tensor.shape)} and strides {list(tensor.stride())} has no contiguous part of "
                f"shape {list(shape)} for each of the {group.size} ranks",
                hint="pass one contiguous tensor of equal parts",
                step=operator,
            ) from None


def _each(run: Callable[..., None]) -> Callable[..., None]:
    """The coalesced form of a method with two tensors."""

    def run_each(ops: Any, group: Group, reduction: str | None, outs: Tensors, inputs: Tensors, options: Any) -> None:
        for out, x in zip(outs, inputs, strict=True):
            run(ops, group, reduction, out, x, options)

    return run_each


def _nothing_special(*arguments: Any) -> str:
    return ""


def _pairs(outs: Tensors, inputs: Tensors, options: Any) -> str:
    return "" if len(outs) == len(inputs) else "more results than tensors, or fewer"


def _one_tensor(tensors: Tensors, options: Any) -> str:
    return "" if len(tensors) == 1 else "several tensors in one call"


def _even(outs: Any, inputs: Any, options: Any) -> str:
    several = _one_tensor(inputs, options) or _one_tensor(outs, options)
    if several:
        return several
    (parts,), (part,) = (outs, inputs) if isinstance(outs[0], Sequence) else (inputs, outs)
    return (
        ""
        if all(x.shape == part.shape and x.dtype == part.dtype for x in parts)
        else "parts of different shapes or dtypes"
    )


def _in_place(group: Group, tensors: Tensors, options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[0], tensors[0]


def _no_sizes(out: torch.Tensor, x: torch.Tensor, outs: Any, ins: Any, options: Any) -> str:
    return "sizes of parts" if outs or ins else ""


_gather_lists = Method(
    "all_gather", _all_gather_lists, lambda lists, xs, options: [*xs, *(x for each in lists for x in each)], _even
)
_gather = Method(
    *("all_gather", _all_gather, lambda out, x, options: (x, out), _nothing_special),
    layout=1,
    operands=lambda group, out, x, options: (x, out),
)
_gather_each = Method(
    "all_gather",
    _each(_all_gather),
    lambda outs, xs, options: [*xs, *outs],
    _pairs,
    torch._C._distributed_c10d.AllgatherOptions,  # torch 2.11
)
_scatter = Method(
    *("reduce_scatter", _reduce_scatter, lambda out, x, options: (x, out), _nothing_special),
    layout=1,
    operands=lambda group, out, x, options: (x.view(group.size, *out.shape), out),
)
_scatter_each = Method("reduce_scatter", _each(_reduce_scatter), lambda outs, xs, options: [*xs, *outs], _pairs)
_exchange = Method(
    *("all_to_all", _all_to_all, lambda out, x, outs, ins, options: (x, out), _no_sizes),
    layout=2,
    operands=lambda group, out, x, *rest: (x.view(group.size, *_part(x, group)), out),
)

METHODS = {
    "allreduce": Method("all_reduce", _all_reduce, lambda xs, options: xs, _one_tensor, None, 0, _in_place),
    "allreduce_coalesced": Method("all_reduce", _all_reduce, lambda xs, options: xs, _nothing_special),
    "broadcast": Method("broadcast", _broadcast, lambda xs, options: xs, _one_tensor, None, 0, _in_place),
    "allgather": _gather_lists,
    "reduce_scatter": Method(
        "reduce_scatter",
        _reduce_scatter_lists,
        lambda outs, lists, options: [*outs, *(x for each in lists for x in each)],
        _even,
    ),
    # Torch calls the second name up to 2.12.
    "all_gather_single": _gather,
    "_allgather_base": _gather,
    "all_gather_single_coalesced": _gather_each,
    "allgather_into_tensor_coalesced": _gather_each,
    "reduce_scatter_single": _scatter,
    "_reduce_scatter_base": _scatter,
    "reduce_scatter_single_coalesced": _scatter_each,
    "reduce_scatter_tensor_coalesced": _scatter_each,
    "all_to_all_single": _exchange,
    "alltoall_base": _exchange,
}
"""By the name of the method. The base class has the other methods: they use the inner process group."""


def _reduce(ops: Any, group: Group, reduction: str, out: torch.Tensor, x: torch.Tensor, options: Any) -> None:
    ops.all_reduce(x, group, reduction, out)


def _send(ops: Any, group: Group, reduction: None, out: torch.Tensor, x: torch.Tensor, options: Any) -> None:
    ops.broadcast(x, group, options.rootRank, out)


def _exchange_parts(ops: Any, group: Group, reduction: None, out: torch.Tensor, x: torch.Tensor, options: Any) -> None:
    _all_to_all(ops, group, reduction, out, x, (), (), options)


FUNCTIONAL = {
    "all_reduce": _gather._replace(operator="all_reduce", run=_reduce),
    "all_gather_into_tensor": _gather,
    "reduce_scatter_tensor": _scatter,
    "all_to_all_single": _gather._replace(operator="all_to_all", run=_exchange_parts),
    "broadcast": _gather._replace(operator="broadcast", run=_send),
}
"""The functional collectives ``torch.ops._c10d_functional``, by name without ``_coalesced``, ``_`` and ``_out``.

The arguments are the result, which is ``x`` if the call works in place, then ``x`` and the options.
"""
