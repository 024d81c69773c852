"""What ``symmem bench compile`` compiles: its operators, the functions with them, and what these must return."""

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
    "anew",
    "compare",
    "eager_chain",
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

_EXACT = 16  # bfloat16 has the sum of whole numbers up to this, one of each of 16 ranks, exactly
_LIBRARY: Any = symmem.ops.Library("symmem_bench", "DEF")  # type: ignore[no-untyped-call]  # so are its methods


def _total_out(x: torch.Tensor, group_name: str, *, out: torch.Tensor) -> None:
    """The sum over all ranks, read where it lies with each of them."""
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
for _suffix in ("", "_any"):  # the latter are not registered, and take any memory
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


def anew(function: Function) -> Function:
    """The same function with code of its own: what is compiled for others of the code costs a look at each call."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


# Ways to sum over all ranks.


def own() -> Reduce:
    """symmem's operator, which takes any memory."""
    name = group()
    return lambda x: symmem.ops.all_reduce(x, name)


def total(device_type: str) -> Reduce:
    """An operator whose argument must be symmetric memory: torch's for CUDA, on the CPU one of this benchmark."""
    name = group()
    if device_type == "cuda":
        op = torch.ops.symm_mem.one_shot_all_reduce
        return lambda x: op(x, "sum", name)
    return lambda x: BENCH.total(x, name)


def stock() -> Reduce:
    """torch's functional all-reduce, by NCCL or gloo, in any memory."""
    name: Any = group()
    return lambda x: functional.all_reduce(x, "sum", name)


def _in_place(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x


# Functions.


def layers(reduce: Reduce) -> Function:
    """``f(x, weights)``: for each weight a product and a sum over all ranks."""

    def chain(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        for weight in weights:
            x = reduce(x @ weight)
        return x

    return anew(chain)


def eager_chain() -> Function:
    """As eager code has it: each product is summed in place."""
    return layers(_in_place)


def intermediates(op: Any) -> Function:
    """``f(xs)``: an operator takes tensors that are computed, one of each of the caller's."""
    name = group()
    return anew(lambda xs: op([x @ x for x in xs], name))


def inputs(op: Any) -> Function:
    """``f(xs)``: an operator takes tensors of the caller."""
    name = group()
    return anew(lambda xs: op(list(xs), name))


def norms(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Layers without a registered operator."""
    for weight in weights:
        x = x + torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, x.shape[-1:]) @ weight)
    return x


def numbers(batch: int, hidden: int, step: int, rank: int) -> torch.Tensor:
    """[batch, hidden] whole numbers, other ones for each rank and step."""
    values = torch.arange(batch * hidden) * 7 + rank * 13 + step * 31
    return (values % (2 * _EXACT + 1) - _EXACT).to(torch.bfloat16).view(batch, hidden)


class Chain:
    """Data for :func:`layers` whose result is known to the bit, of any number of ranks.

    Each layer permutes columns. A rank's weight has the part of the permutation for every ``world``-th column, so that
    the sum over all ranks has all of them.

    Args:
        count: Layers.
        hidden: Columns.
        batch: Rows.
        device: Where.
        rank: Whose data.
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
            torch._dynamo.mark_static_address(self.weights[-1])  # like parameters, which CUDA graphs read in place
            # Whose column, and which, each column of the result is.
            if index == 0:
                self._owner, self._order = columns % world, source
            else:
                self._owner, self._order = self._owner[source], self._order[source]

    def x(self, step: int, rank: int | None = None) -> torch.Tensor:
        """What a rank, this one unless another is named, puts in: [batch, hidden]."""
        return numbers(self._batch, self._hidden, step, self._rank if rank is None else rank).to(self._device)

    def expected(self, step: int) -> torch.Tensor:
        """What all ranks get out."""
        everyone = torch.stack([self.x(step, rank) for rank in range(self._world)])
        return everyone[self._owner.to(self._device), :, self._order.to(self._device)].T


def compare(name: str, result: torch.Tensor, wanted: torch.Tensor) -> None:
    """Compare each bit.

    Raises:
        WrongResultError: They differ.
    """
    wrong = (result != wanted).view(-1).nonzero()
    if len(wrong):
        raise WrongResultError(
            f"{name} has {len(wrong)} of {wanted.numel()} elements wrong, the first at {int(wrong[0])}",
            hint="its time would mean nothing",
            rank=dist.get_rank(),
        )
