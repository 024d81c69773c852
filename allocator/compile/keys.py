"""What compiled code depends on, beside what torch knows: for the keys of torch's caches."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from symmem.errors import GroupError
from symmem.ops import registry
from symmem.ops.built_in import OWN_NAMESPACE
from symmem.ops.engines import group_named

__all__ = ["key_of", "operators"]


def key_of(called: Iterable[tuple[OpOverload, torch.fx.Node]]) -> tuple[str, list[tuple[str, int]]]:
    """The registry and the code of this package, and the groups of our own operators, by what a graph calls."""
    return f"symmem {_fingerprint()} {registry.fingerprint()}", sorted(set(_worlds(called)))


@functools.cache
def _fingerprint() -> str:
    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def operators(gm: torch.nn.Module) -> Iterator[tuple[OpOverload, torch.fx.Node]]:
    """The operators that a graph calls, or may call."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if isinstance(node.target, OpOverload):
                yield node.target, node
            elif isinstance(node.target, OpOverloadPacket):
                names: Any = node.target.overloads
                yield from ((getattr(node.target, each), node) for each in names())


def _worlds(called: Iterable[tuple[OpOverload, torch.fx.Node]]) -> Iterator[tuple[str, int]]:
    """The groups of our own operators, and their numbers of ranks, on which shapes depend."""
    for op, node in called:
        if op.namespace == OWN_NAMESPACE:
            names = (each.name for each in op._schema.arguments)
            name = {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get("group_name")
            with contextlib.suppress(GroupError):  # which is told when it is lowered
                yield str(name), group_named(str(name)).size
