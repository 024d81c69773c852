"""Operators that refuse plain memory, and what tests of torch.compile share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import symmem
from symmem.compile.report import Report


class Part:
    """A module of symmem.compile that is imported when it is used: Inductor takes seconds, and only ranks need it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(f"symmem.compile.{self._name}"), name)


hook, runtime, explaining, control = Part("hook"), Part("runtime"), Part("explaining"), Part("control")

LIB = symmem.ops.Library("ct", "DEF")
POINTERS: list[int] = []  # of the arguments that operators were given


def handle_of(x: torch.Tensor) -> symmem.SymmetricTensor:
    if symmem.find(x) is None:
        raise AssertionError("plain memory")
    POINTERS.append(x.data_ptr())
    return symmem.SymmetricTensor.wrap(x)


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], args: list[str], **options: Any) -> None:
    LIB.define(schema)
    name = schema.partition("(")[0]
    LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ct::{name}", fake, lib=LIB)
    if args:
        LIB.register_symm_mem_args(name, args, **options)


def total(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum over all ranks. No rank waits for the others at its end: that is for the compiler to see to."""
    handle = handle_of(x)
    known = symmem.resolve_group(group)
    handle.barrier(group=known)
    return sum((handle.remote_tensor(rank, group=known) for rank in range(known.size)), torch.zeros_like(x))


def total_out(group: str, x: torch.Tensor, *, out: torch.Tensor) -> None:
    out.copy_(total(x, group))


def add_peer(x: torch.Tensor, group: str) -> torch.Tensor:
    handle = handle_of(x)
    known = symmem.resolve_group(group)
    handle.barrier(group=known)
    other = handle.remote_tensor((known.rank + 1) % known.size, group=known).clone()
    handle.barrier(group=known)
    return x.add_(other)


def add_peer_out(x: torch.Tensor, group: str) -> None:
    add_peer(x, group)


def totals(xs: list[torch.Tensor], y: torch.Tensor | None, group: str) -> list[torch.Tensor]:
    return [total(x, group) for x in [*xs, *([] if y is None else [y])]]


define("total(Tensor x, str group_name) -> Tensor", total, lambda x, g: torch.empty_like(x), ["x"])
# Its arguments come in another order; it is found by its schema.
LIB.define("total_out(str group_name, Tensor x, *, Tensor(a!) out) -> ()")
LIB.impl("total_out", total_out, "CompositeExplicitAutograd")
define("summed(Tensor x, str tp) -> Tensor", total, lambda x, g: torch.empty_like(x), ["x"], group_arg="tp")
define("add_peer_(Tensor(a!) x, str tp) -> ()", add_peer_out, lambda x, g: None, ["x"], group_arg="tp")
define("add_peer_back_(Tensor(a!) x, str tp) -> Tensor(a!)", add_peer, lambda x, g: x, ["x"], group_arg="tp")
define(
    "totals(Tensor[] xs, Tensor? y, str group_name) -> Tensor[]",
    totals,
    lambda xs, y, g: [torch.empty_like(x) for x in [*xs, *([] if y is None else [y])]],
    ["xs", "y"],
)
define(
    "mine(Tensor x, str group_name) -> Tensor",
    lambda x, g: handle_of(x).tensor.clone(),
    lambda x, g: torch.empty_like(x),
    ["x"],
    one_sided=True,
)
define("opaque(Tensor x) -> Tensor", lambda x: x * 2, lambda x: torch.empty_like(x), [])
define("scaled(Tensor x, float by) -> Tensor", lambda x, by: x * by, lambda x, by: torch.empty_like(x), [])
LIB.define("scaled.out(Tensor x, float by, *, Tensor(a!) out) -> Tensor(a!)")
LIB.impl("scaled.out", lambda x, by, *, out: torch.mul(x, by, out=out), "CompositeExplicitAutograd")

ct = torch.ops.ct


def group() -> str:
    return symmem.resolve_group().name


def summed(x: torch.Tensor) -> torch.Tensor:
    """What the operators should give, by gloo."""
    x = x.clone()
    dist.all_reduce(x)
    return x


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(17 * seed + dist.get_rank())
    return torch.randn(shape, generator=generator)


def compiled(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="symmem", **options)


def check(
    f: Callable[..., Any], make: Callable[[int], tuple[Any, ...]], expected: Callable[..., Any], **options: Any
) -> Report:
    """Run a compiled function three times on new values; each must give what is expected. Returns the report."""
    torch._dynamo.reset()
    POINTERS.clear()
    with explaining.reporting() as report:
        run = compiled(f, **options)
        for step in range(3):
            args = make(step)
            wanted = expected(*(each.clone() if isinstance(each, torch.Tensor) else each for each in args))
            torch.testing.assert_close(run(*args), wanted)
    return report


def outcomes(report: Report) -> list[str]:
    return [each.outcome for graph in report.graphs for each in graph.decisions]
