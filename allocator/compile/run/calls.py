"""Functions that compiled code calls, and operators for code in C++, beside :class:`symmem.compile.run.graph.Graph`.

By the operators a graph says what it does with an argument, so that the compiler orders it with all else. Code in
Python calls functions and methods instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from symmem.compile.run.current_graph import running
from symmem.compile.run.graph import Argument, Graph
from symmem.errors import GroupError, InvalidArgumentError
from symmem.ops import eager
from symmem.ops.collectives import KINDS, _plain
from symmem.ops.engines.select import engine_for, group_named

__all__ = ["LIBRARY", "collective", "write_back"]

LIBRARY: Any = torch.library.Library("symmem", "FRAGMENT")  # type: ignore[no-untyped-call]  # so are its methods


def write_back(originals: Sequence[torch.Tensor], placed: Sequence[torch.Tensor], op: str) -> None:
    """Copy what an operator has written to the copies of arguments to the arguments themselves.

    Args:
        originals: What the caller passed for each argument that the operator writes to.
        placed: What the operator was given.
        op: Its name.

    Raises:
        InvalidArgumentError: Arguments share memory, and one of them was copied: then neither copy has all that was
            written. Nothing is written back.
    """
    pairs = [(x, y) for x, y in zip(originals, placed, strict=True) if x.data_ptr() != y.data_ptr()]
    if pairs and len(originals) > 1:
        _check_apart(originals, placed, op)
    for original, copy in pairs:
        original.copy_(copy)


def _check_apart(originals: Sequence[torch.Tensor], placed: Sequence[torch.Tensor], op: str) -> None:
    spans = sorted({(x.data_ptr(), _end(x), y.data_ptr()) for x, y in zip(originals, placed, strict=True)})
    for (_begin, end, _place), (begin, _its_end, _its_place) in itertools.pairwise(spans):
        if begin < end:
            raise InvalidArgumentError(
                f"{op} writes to several arguments, which share memory in this call, and at least one is copied to "
                "symmetric memory: what was written to one would overwrite the other, so nothing was written back",
                hint="pass tensors that do not overlap, or all of them in symmetric memory",
                step=op,
            )


def _end(tensor: torch.Tensor) -> int:
    """The address behind the last element."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (steps + 1) * tensor.element_size() if tensor.numel() else tensor.data_ptr()


def collective(operation: str, group_name: str, world: int, *options: Any) -> Callable[..., None]:
    """A collective operator of symmem, as a graph calls it: ``call(x, out)``.

    What the operator checks of a call was checked when it was compiled: shapes, dtypes, devices and options. So it goes
    straight to the engine.

    Args:
        operation: ``"all_reduce"``, ...
        group_name: Of the group.
        world: Its number of ranks, which the graph was compiled for.
        options: Between tensor and group.

    Raises:
        GroupError: By the call: there is no such group any more, or it has another number of ranks.
    """
    operator, kind = getattr(torch.ops.symmem, f"{operation}_out").default, KINDS[operation]
    option = options[0] if options else None

    def call(x: torch.Tensor, out: torch.Tensor) -> None:
        if eager.run(kind, x, group_name, option, out) is not None:
            return
        if _is_profiling():  # which is told of operators by the dispatcher
            operator(x, *options, group_name, out=out)
            return
        group = group_named(group_name)
        if group.size != world and operation != "all_reduce":  # whose shapes are the same for all
            raise GroupError(
                f"symmem::{operation} was compiled for the group {group_name!r} of {world} ranks, which has "
                f"{group.size} now",
                hint="call torch._dynamo.reset(), and the function is compiled anew",
                rank=group.rank,
            )
        getattr(engine_for(group, x.device), operation)(_plain(x), out, *options)
        eager.learn(kind, group, x, option, out, out)

    return call


_is_profiling = torch._C._autograd._profiler_enabled


def _graph(name: str) -> Graph:
    """The graph of code in C++."""
    known = running.here.of_cpp
    if name not in known:
        known[name] = Graph()
    graph = known[name]
    graph.begin()
    return graph


def _place(
    x: torch.Tensor, name: str, number: int, group: str, backend: str | None, way: str, keep: bool, op: str
) -> torch.Tensor:
    placed = _graph(name).place(Argument(number, group, backend, way, keep, op), x, x.shape, x.stride())
    return x.view_as(x) if placed is x else placed


def _finish(tensors: Sequence[torch.Tensor], name: str, number: int, group: str) -> None:
    _graph(name).finish(number, tensors, group)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"symmem::{name}", fake, lib=LIBRARY)


_define(
    "_place(Tensor(a) x, str name, int number, str group, str? backend, str way, bool keep, str op) -> Tensor(a)",
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
