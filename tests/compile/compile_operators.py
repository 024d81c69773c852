"""Operators for the cases. They refuse plain memory, and most of them read a peer's memory.

Importing this module defines nothing. Ranks call :func:`define_operators`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

import symmem

__all__ = ["POINTERS", "define_operators", "handle_of"]

POINTERS: list[int] = []  # addresses of the arguments that operators got


def handle_of(x: torch.Tensor) -> symmem.SymmetricTensor:
    if symmem.find(x) is None:
        raise AssertionError("plain memory")
    POINTERS.append(x.data_ptr())
    return symmem.SymmetricTensor.wrap(x)


# Operators of compile_cases.py.


def total(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum over all ranks. It has no exit barrier, so compiled code must add one."""
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


def add_peer_(x: torch.Tensor, group: str) -> None:
    add_peer(x, group)


def heads(x: torch.Tensor, group: str) -> torch.Tensor:
    """The first two rows of every rank. The numbers of rows may differ."""
    handle, known = handle_of(x), symmem.resolve_group(group)
    handle.barrier(group=known)
    return torch.cat([handle.remote_tensor(rank, group=known)[:2] for rank in range(known.size)])


def totals(xs: list[torch.Tensor], y: torch.Tensor | None, group: str) -> list[torch.Tensor]:
    return [total(x, group) for x in [*xs, *([] if y is None else [y])]]


def mine(x: torch.Tensor, group: str) -> torch.Tensor:
    return handle_of(x).tensor.clone()


def pair_plus_(x: torch.Tensor, y: torch.Tensor, group: str) -> None:
    handle_of(x), handle_of(y)
    x.add_(1)
    y.add_(1)


def plus_one_(x: torch.Tensor) -> None:
    x.add_(1)


def scaled_out(x: torch.Tensor, by: float, *, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, by, out=out)


# Operators of fault_cases.py.


def echo(x: torch.Tensor, group: str) -> torch.Tensor:
    """The next rank's tensor, of any dtype."""
    handle, known = handle_of(x), symmem.resolve_group(group)
    handle.barrier(group=known)
    return handle.remote_tensor((known.rank + 1) % known.size, group=known).clone()


def echo_late(x: torch.Tensor, group: str) -> torch.Tensor:
    """Like ``echo``. Rank 1 reads its peer's memory late, when the peer may have gone on."""
    handle, known = handle_of(x), symmem.resolve_group(group)
    handle.barrier(group=known)
    if known.rank == 1:
        time.sleep(0.15)
    return handle.remote_tensor((known.rank + 1) % known.size, group=known).clone()


def echo_slowly(x: torch.Tensor, group: str) -> torch.Tensor:
    time.sleep(0.05)
    return echo(x, group)


def both(x: torch.Tensor, y: torch.Tensor, group: str) -> torch.Tensor:
    return echo(x, group) + echo(y, group)


def add_of_peer_(x: torch.Tensor, y: torch.Tensor, group: str) -> None:
    other = echo(y, group)
    handle_of(x).barrier(group=symmem.resolve_group(group))
    x.add_(other)


def pair(x: torch.Tensor, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    return echo(x, group), x.sum(0)


def dies(x: torch.Tensor, group: str) -> torch.Tensor:
    if symmem.resolve_group(group).rank == 1:
        os._exit(7)
    return echo(x, group)


# Fake kernels.


def like_x(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(x)


def nothing(*args: Any) -> None: ...


def like_all(xs: list[torch.Tensor], y: torch.Tensor | None, group: str) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in [*xs, *([] if y is None else [y])]]


def like_pair(x: torch.Tensor, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[1:])


def like_heads(x: torch.Tensor, group: str) -> torch.Tensor:
    return x.new_empty(2 * symmem.resolve_group(group).size, *x.shape[1:])


class Operator(NamedTuple):
    schema: str
    kernel: Callable[..., Any]
    fake: Callable[..., Any] | None
    args: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None


OPERATORS = (
    Operator("total(Tensor x, str group_name) -> Tensor", total, like_x, ("x",)),
    # Its arguments come in another order, so it is found by its schema.
    Operator("total_out(str group_name, Tensor x, *, Tensor(a!) out) -> ()", total_out, None),
    Operator("summed(Tensor x, str tp) -> Tensor", total, like_x, ("x",), {"group_arg": "tp"}),
    Operator("add_peer_(Tensor(a!) x, str tp) -> ()", add_peer_, nothing, ("x",), {"group_arg": "tp"}),
    Operator(
        "add_peer_back_(Tensor(a!) x, str tp) -> Tensor(a!)", add_peer, lambda x, g: x, ("x",), {"group_arg": "tp"}
    ),
    Operator("heads(Tensor x, str group_name) -> Tensor", heads, like_heads, ("x",)),
    Operator("totals(Tensor[] xs, Tensor? y, str group_name) -> Tensor[]", totals, like_all, ("xs", "y")),
    Operator("mine(Tensor x, str group_name) -> Tensor", mine, like_x, ("x",), {"one_sided": True}),
    Operator("pair_plus_(Tensor(a!) x, Tensor(b!) y, str group_name) -> ()", pair_plus_, nothing, ("x", "y")),
    Operator("plus_one_(Tensor(a!) x) -> ()", plus_one_, nothing),
    Operator("opaque(Tensor x) -> Tensor", lambda x: x * 2, like_x),
    Operator("scaled(Tensor x, float by) -> Tensor", lambda x, by: x * by, like_x),
    Operator("scaled.out(Tensor x, float by, *, Tensor(a!) out) -> Tensor(a!)", scaled_out, None),
    Operator("echo(Tensor x, str group_name) -> Tensor", echo, like_x, ("x",)),
    Operator("echo_late(Tensor x, str group_name) -> Tensor", echo_late, like_x, ("x",)),
    Operator("echo_slowly(Tensor x, str group_name) -> Tensor", echo_slowly, like_x, ("x",)),
    Operator("both(Tensor x, Tensor y, str group_name) -> Tensor", both, like_x, ("x", "y")),
    Operator("add_of_peer_(Tensor(a!) x, Tensor y, str group_name) -> ()", add_of_peer_, nothing, ("x", "y")),
    Operator("pair(Tensor x, str group_name) -> (Tensor, Tensor)", pair, like_pair, ("x",)),
    Operator("dies(Tensor x, str group_name) -> Tensor", dies, like_x, ("x",)),
)

_library: list[symmem.ops.Library] = []


def define_operators() -> None:
    """Define the operators ``ct::...`` in this process."""
    library = symmem.ops.Library("ct", "DEF")
    _library.append(library)
    for operator in OPERATORS:
        library.define(operator.schema)
        name = operator.schema.partition("(")[0]
        library.impl(name, operator.kernel, "CompositeExplicitAutograd")
        if operator.fake is not None:
            torch.library.register_fake(f"ct::{name}", operator.fake, lib=library)
        if operator.args:
            library.register_symm_mem_args(name, operator.args, **(operator.options or {}))
