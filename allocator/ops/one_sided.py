"""One-sided copies and signals as operators, ``torch.ops.symmem.*``: of tensors in symmetric memory.

=========================================== =========================================================================
operator                                    what it does
=========================================== =========================================================================
put(x, source, peer, group_name)            copies ``source``, of the shape and dtype of x, to the peer's x
get(x, peer, group_name) -> Tensor          returns a copy of the peer's x
get_out(x, peer, group_name, *, out)        copies the peer's x to ``out``
put_signal(x, peer, channel, group_name)    what was put before is visible to the peer once it has waited for this
wait_signal(x, peer, channel, group_name)   waits for the peer's signal; what it put into x is visible afterwards
barrier(x, channel, group_name)             waits for all ranks; what each put anywhere is visible afterwards
=========================================== =========================================================================

``x`` is a tensor, or a view of one, that lies in symmetric memory and was rendezvoused with the group: its place on the
peer is the one that it has here. Each is :class:`symmem.SymmetricTensor`'s method of that name, which says what is
raised. On CUDA they are work on the current stream.

Where peers may write to ``x``, the schema says that the operator does: so compilers keep it in its place among those
that read x. Inductor passes x itself; a compiler that passes a copy of it, as ``aot_eager`` does, gets
NotSymmetricError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from symmem.ops.collectives import LIBRARY
from symmem.ops.engines.select import group_named
from symmem.ops.gradients import without_gradient
from symmem.tensor.tensor import SymmetricTensor

__all__ = ["OPERATORS"]


def _put(x: torch.Tensor, source: torch.Tensor, peer: int, group_name: str) -> None:
    SymmetricTensor.wrap(x).put(source, peer, group=group_named(group_name))


def _get(x: torch.Tensor, peer: int, group_name: str) -> torch.Tensor:
    return SymmetricTensor.wrap(x).get(peer, group=group_named(group_name))


def _get_out(x: torch.Tensor, peer: int, group_name: str, *, out: torch.Tensor) -> None:
    SymmetricTensor.wrap(x).get(peer, out, group=group_named(group_name))


def _put_signal(x: torch.Tensor, peer: int, channel: int, group_name: str) -> None:
    SymmetricTensor.wrap(x).put_signal(peer, channel, group=group_named(group_name))


def _wait_signal(x: torch.Tensor, peer: int, channel: int, group_name: str) -> None:
    SymmetricTensor.wrap(x).wait_signal(peer, channel, group=group_named(group_name))


def _barrier(x: torch.Tensor, channel: int, group_name: str) -> None:
    SymmetricTensor.wrap(x).barrier(channel, group=group_named(group_name))


def _fake_get(x: torch.Tensor, peer: int, group_name: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_nothing(*args: Any, **options: Any) -> None:
    """What an operator that returns nothing does with tensors that have no memory."""


OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "put": ("(Tensor(a!) x, Tensor source, int peer, str group_name) -> ()", _put),
    "get": ("(Tensor x, int peer, str group_name) -> Tensor", _get),
    "get_out": ("(Tensor x, int peer, str group_name, *, Tensor(a!) out) -> ()", _get_out),
    "put_signal": ("(Tensor(a!) x, int peer, int channel, str group_name) -> ()", _put_signal),
    "wait_signal": ("(Tensor(a!) x, int peer, int channel, str group_name) -> ()", _wait_signal),
    "barrier": ("(Tensor(a!) x, int channel, str group_name) -> ()", _barrier),
}
"""Schema and kernel, by name."""


def _define(name: str) -> None:
    schema, kernel = OPERATORS[name]
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    fake = _fake_get if name == "get" else _fake_nothing
    torch.library.register_fake(f"symmem::{name}", fake, lib=LIBRARY)
    without_gradient(LIBRARY, getattr(torch.ops.symmem, name).default, kernel)


for _name in OPERATORS:
    _define(_name)
