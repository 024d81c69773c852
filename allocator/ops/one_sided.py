"""One-sided copies and signals as operators, ``torch.ops.symmem.*``, for tensors in symmetric memory.

=========================================== =========================================================================
operator                                    effect
=========================================== =========================================================================
put(x, source, peer, group_name)            copies ``source``, with the shape and dtype of x, to the peer's x
get(x, peer, group_name) -> Tensor          returns a copy of the peer's x
get_out(x, peer, group_name, *, out)        copies the peer's x to ``out``
put_signal(x, peer, channel, group_name)    signals the peer; it sees earlier puts after it has waited for the signal
wait_signal(x, peer, channel, group_name)   waits for the peer's signal; its earlier puts into x are visible afterwards
barrier(x, channel, group_name)             waits for all ranks; all their earlier puts are visible afterwards
=========================================== =========================================================================

``x`` is a tensor in symmetric memory, or a view of such a tensor, that the group has rendezvoused. On the peer it is at
the same offset. An operator does the same as the :class:`symmem.SymmetricTensor` method of this name, which documents
the errors. On CUDA the operators are work on the current stream.

If peers may write to ``x``, the schema declares that the operator writes to it. So compilers keep its order with
operators that read x. Inductor passes x itself. A compiler that passes a copy of x, such as ``aot_eager``, gets
NotSymmetricError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from symmem.backends.untraced import untraced
from symmem.group.resolve import group_named
from symmem.ops.collectives import LIBRARY
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
    """The fake kernel of an operator that returns nothing."""


OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "put": ("(Tensor(a!) x, Tensor source, int peer, str group_name) -> ()", _put),
    "get": ("(Tensor x, int peer, str group_name) -> Tensor", _get),
    "get_out": ("(Tensor x, int peer, str group_name, *, Tensor(a!) out) -> ()", _get_out),
    "put_signal": ("(Tensor(a!) x, int peer, int channel, str group_name) -> ()", _put_signal),
    "wait_signal": ("(Tensor(a!) x, int peer, int channel, str group_name) -> ()", _wait_signal),
    "barrier": ("(Tensor(a!) x, int channel, str group_name) -> ()", _barrier),
}
"""Schema and kernel by name."""


def _define(name: str) -> None:
    schema, kernel = OPERATORS[name]
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, untraced(kernel), "CompositeExplicitAutograd")
    fake = _fake_get if name == "get" else _fake_nothing
    torch.library.register_fake(f"symmem::{name}", fake, lib=LIBRARY)
    run = without_gradient(getattr(torch.ops.symmem, name).default, kernel)
    LIBRARY.impl(name, run, "Autograd", with_keyset=True)


for _name in OPERATORS:
    _define(_name)
