"""The operators and functions that ``symmem bench compile`` compiles, and their expected results."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

import symmem
from symmem.tools.bench.contenders import WrongResultError

__all__ = [
    "BENCH",
    "Chain",
    "compare",
    "eager_chain",
    "fresh_code",
    "group",
    "inputs",
    "intermediates",
    "layers",
    "norms",
    "numbers",
    "own",
    "stock",
    "total",
]

Reduce = Callable[[torch.Tensor], torch.Tensor]
Function = Callable[..., Any]

_EXACT = 16  # sums of whole numbers up to this over 16 ranks are exact in bfloat16
_LIBRARY: Any = symmem.ops.Library("symmem_bench", "DEF")  # type: ignore[no-untyped-call]  # its methods are untyped, too


def _total_out(x: torch.Tensor, group_name: str, *, out: torch.Tensor) -> None:
    """Sum over all ranks, by reading the peers' memory directly."""
    group = symmem.resolve_group(group_name)
    handle = symmem.SymmetricTensor.wrap(x)
    handle.barrier(group=group)
    first, *others = (handle.remote_tensor(rank, group=group) for rank in range(group.size))
    out.copy_(first)
    for other in others:
        out.add_(other)
    handle.barrier(group=group)


def _total(x: torch.Tensor, group_name: str) -> torch.Tensor:
    out = torch.empty_like(x)
    _total_out(x, group_name, out=out)
    return out


def _take(xs: Sequence[torch.Tensor], group_name: str) -> torch.Tensor:
    return xs[0].new_empty(1)


def _same_out(x: torch.Tensor, group_name: str, *, out: torch.Tensor) -> None:
    out.copy_(x)


def _define(schema: str, kernel: Function, fake: Function | None = None) -> None:
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"symmem_bench::{name}", fake, lib=_LIBRARY)


_define("total(Tensor x, str group_name) -> Tensor", _total, lambda x, group_name: torch.empty_like(x))
_define("total_out(Tensor x, str group_name, *, Tensor(a!) out) -> ()", _total_out)
for _suffix in ("", "_any"):  # operators with _any are not registered, and take any memory
    _define(
        f"same{_suffix}(Tensor x, str group_name) -> Tensor", lambda x, g: x.clone(), lambda x, g: torch.empty_like(x)
    )
    _define(f"same{_suffix}_out(Tensor x, str group_name, *, Tensor(a!) out) -> ()", _same_out)
    _define(f"take{_suffix}(Tensor[] xs, str group_name) -> Tensor", _take, _take)
_LIBRARY.register_symm_mem_args("total", ["x"], exit_barrier=True)
_LIBRARY.register_symm_mem_args("same", ["x"], exit_barrier=True)
_LIBRARY.register_symm_mem_args("take", ["xs"], exit_barrier=True)

BENCH: Any = torch.ops.symmem_bench


def group() -> str:
    """The name of the default process group."""
    return str(dist.distributed_c10d._get_default_group().group_name)


def fresh_code(function: Function) -> Function:
    """Copy a function with its code object, because torch checks all versions compiled from a code object per call."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


# Ways to sum over all ranks.


def own() -> Reduce:
    """symmem's operator. It takes any memory."""
    name = group()
    return lambda x: symmem.ops.all_reduce(x, name)


def total(device_type: str) -> Reduce:
    """An operator that needs a symmetric argument: torch's on CUDA, this benchmark's on the CPU."""
    name = group()
    if device_type == "cuda":
        op = torch.ops.symm_mem.one_shot_all_reduce
        return lambda x: op(x, "sum", name)
    return lambda x: BENCH.total(x, name)


def stock() -> Reduce:
    """torch's functional all-reduce over NCCL or gloo, in any memory."""
    name: Any = group()
    return lambda x: functional.all_reduce(x, "sum", name)


def _in_place(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x


# Functions.


def layers(reduce: Reduce) -> Function:
    """``f(x, weights)``: a product and a sum over all ranks per weight."""

    def chain(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        for weight in weights:
            x = reduce(x @ weight)
        return x

    return fresh_code(chain)


def eager_chain() -> Function:
    """The chain in eager code, which sums every product in place."""
    return layers(_in_place)


def intermediates(op: Any) -> Function:
    """``f(xs)``: an operator takes tensors computed from the caller's."""
    name = group()
    return fresh_code(lambda xs: op([x @ x for x in xs], name))


def inputs(op: Any) -> Function:
    """``f(xs)``: an operator takes the caller's tensors."""
    name = group()
    return fresh_code(lambda xs: op(list(xs), name))


def norms(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Layers without a registered operator."""
    for weight in weights:
        x = x + torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, x.shape[-1:]) @ weight)
    return x


def numbers(batch: int, hidden: int, step: int, rank: int) -> torch.Tensor:
    """Whole numbers of shape [batch, hidden] that differ between ranks and steps."""
    values = torch.arange(batch * hidden) * 7 + rank * 13 + step * 31
    return (values % (2 * _EXACT + 1) - _EXACT).to(torch.bfloat16).view(batch, hidden)


class Chain:
    """Data for :func:`layers` with an exactly known result, for any number of ranks.

    Every layer permutes columns. The weight of a rank has the part of the permutation for every ``world``-th column, so
    that the sum over all ranks has all columns.

    Args:
        count: Number of layers.
        hidden: Number of columns.
        batch: Number of rows.
        device: Device of the data.
        rank: This rank.
        world: Number of ranks.
    """

    def __init__(self, count: int, hidden: int, batch: int, device: str, rank: int, world: int) -> None:
        self._hidden, self._batch, self._device, self._rank, self._world = hidden, batch, device, rank, world
        columns = torch.arange(hidden)
        self.weights = []
        for index in range(count):
            source = torch.randperm(hidden, generator=torch.Generator().manual_seed(index))
            weight = torch.zeros(hidden, hidden, dtype=torch.bfloat16)
            mine = columns[rank::world]
            weight[source[mine], mine] = 1
            self.weights.append(weight.to(device))
            torch._dynamo.mark_static_address(
                self.weights[-1]
            )  # as for parameters, so that CUDA graphs read them in place
            # By column of the result: the rank and the column that it comes from.
            if index == 0:
                self._owner, self._order = columns % world, source
            else:
                self._owner, self._order = self._owner[source], self._order[source]

    def x(self, step: int, rank: int | None = None) -> torch.Tensor:
        """The input of a rank, by default this one, of shape [batch, hidden]."""
        return numbers(self._batch, self._hidden, step, self._rank if rank is None else rank).to(self._device)

    def expected(self, step: int) -> torch.Tensor:
        """The result on all ranks."""
        everyone = torch.stack([self.x(step, rank) for rank in range(self._world)])
        return everyone[self._owner.to(self._device), :, self._order.to(self._device)].T


def compare(name: str, result: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare all bits.

    Raises:
        WrongResultError: They differ.
    """
    wrong = (result != wanted).view(-1).nonzero()
    if len(wrong):
        raise WrongResultError(
            f"{name} has {len(wrong)} of {wanted.numel()} elements wrong, the first at {int(wrong[0])}",
            hint="a time of a wrong result means nothing",
            rank=dist.get_rank(),
        )
