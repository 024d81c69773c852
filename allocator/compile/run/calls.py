"""Functions that generated Python calls, and operators that generated C++ calls.

A graph contains the operators, so that the compiler orders them with the other nodes. Generated Python calls the
functions here, and the methods of :class:`symmem.compile.run.graph.Graph`, instead of the operators.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from symmem.compile.records import ArgumentRecord
from symmem.compile.run.current_graph import running
from symmem.compile.run.graph import Graph
from symmem.errors import GroupError, InvalidArgumentError
from symmem.group.resolve import group_named
from symmem.ops import eager
from symmem.ops.collectives import KINDS, _plain
from symmem.ops.engines.select import engine_for

__all__ = ["LIBRARY", "collective", "write_back"]

LIBRARY: Any = torch.library.Library("symmem", "FRAGMENT")  # type: ignore[no-untyped-call]


def write_back(originals: Sequence[torch.Tensor], placed: Sequence[torch.Tensor], op: str) -> None:
    """Copy results from the copies of mutated arguments back to the arguments.

    Args:
        originals: The mutated arguments that the caller passed.
        placed: The tensors that the operator got instead.
        op: Name of the operator.

    Raises:
        InvalidArgumentError: Arguments share memory and one of them was copied, so no copy has all the results.
            Nothing is written back.
    """
    pairs = [(x, y) for x, y in zip(originals, placed, strict=True) if x.data_ptr() != y.data_ptr()]
    if pairs and len(originals) > 1:
        _check_no_overlap(originals, placed, op)
    for original, copy in pairs:
        original.copy_(copy)


def _check_no_overlap(originals: Sequence[torch.Tensor], placed: Sequence[torch.Tensor], op: str) -> None:
    spans = sorted({(x.data_ptr(), _end(x), y.data_ptr()) for x, y in zip(originals, placed, strict=True)})
    for (_begin, end, _place), (begin, _its_end, _its_place) in itertools.pairwise(spans):
        if begin < end:
            raise InvalidArgumentError(
                f"{op} writes to several arguments that share memory in this call, and at least one of them was copied "
                "to symmetric memory: writing one back would overwrite the other, so nothing was written back",
                hint="pass tensors that do not overlap, or pass all of them in symmetric memory",
                step=op,
            )


def _end(tensor: torch.Tensor) -> int:
    """The address after the last element."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (steps + 1) * tensor.element_size() if tensor.numel() else tensor.data_ptr()


def collective(operation: str, group_name: str, world: int, *options: Any) -> Callable[..., None]:
    """Return ``call(x, out)``, which runs a collective operator of symmem from compiled code.

    The call goes straight to the engine, because shapes, dtypes, devices and options were checked at compile time.

    Args:
        operation: ``"all_reduce"``, for example.
        group_name: Name of the group.
        world: The number of ranks that the graph was compiled for.
        options: Arguments of the operator between the tensor and the group.

    Raises:
        GroupError: From ``call``: there is no such group any more, or its number of ranks changed.
    """
    operator, kind = getattr(torch.ops.symmem, f"{operation}_out").default, KINDS[operation]
    option = options[0] if options else None

    def call(x: torch.Tensor, out: torch.Tensor) -> None:
        if eager.run(kind, x, group_name, option, out) is not None:
            return
        if _is_profiling():  # the profiler sees only operators that go through the dispatcher
            operator(x, *options, group_name, out=out)
            return
        group = group_named(group_name)
        if group.size != world and operation != "all_reduce":  # its shapes do not depend on the number of ranks
            raise GroupError(
                f"symmem::{operation} was compiled for the group {group_name!r} of {world} ranks, but the "
                f"group has {group.size} ranks now",
                hint="call torch._dynamo.reset() to recompile the function",
                rank=group.rank,
            )
        getattr(engine_for(group, x.device), operation)(_plain(x), out, *options)
        eager.learn(kind, group, x, option, out, out)

    return call


_is_profiling = torch._C._autograd._profiler_enabled


def _graph(name: str) -> Graph:
    """The graph of generated C++."""
    known = running.here.of_cpp
    if name not in known:
        known[name] = Graph()
    graph = known[name]
    graph.begin()
    return graph


def _place(
    x: torch.Tensor, name: str, number: int, group: str, backend: str | None, policy: str, keep: bool, op: str
) -> torch.Tensor:
    placed = _graph(name).place(ArgumentRecord(number, group, backend, policy, keep, op), x, x.shape, x.stride())
    return x.view_as(x) if placed is x else placed


def _finish(tensors: Sequence[torch.Tensor], name: str, number: int, group: str) -> None:
    _graph(name).finish(number, tensors, group)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"symmem::{name}", fake, lib=LIBRARY)


_define(
    "_place(Tensor(a) x, str name, int number, str group, str? backend, str policy, bool keep, str op) -> Tensor(a)",
    _place,
    lambda x, *rest: x.view_as(x),
)
_define(
    "_write_back(Tensor(a!)[] originals, Tensor[] placed, str op) -> ()", write_back, lambda originals, placed, op: None
)
_define(
    "_finish(Tensor(a!)[] tensors, str name, int number, str group) -> ()",
    _finish,
    lambda tensors, name, number, group: None,
)
