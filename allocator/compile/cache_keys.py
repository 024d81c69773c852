"""Keys for torch's compile caches: everything that compiled code depends on and torch does not know."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from symmem.compile.plan.mutable_ops import original_of
from symmem.compile.plan.symmetric_layout import is_part
from symmem.distributed import functional
from symmem.distributed.functional import group_asked
from symmem.errors import GroupError
from symmem.group.resolve import group_named
from symmem.ops.registry import registry
from symmem.ops.registry.built_in import OWN_NAMESPACE
from symmem.ops.registry.eager_checks import backend_of

__all__ = ["key_of", "operators"]


def key_of(called: Sequence[tuple[OpOverload, torch.fx.Node]]) -> Any:
    """The cache key of a graph, for the operators that it calls.

    The key covers the code of this package and the registry. It also covers the sizes of the groups of symmem's own
    operators, the pairs of groups where one contains the other, the backends that torch's operators need, and the
    groups that give their functional collectives to symmem. Tensor classes such as DTensor call those inside.
    """
    ours = [call for call in called if call[0].namespace == OWN_NAMESPACE or registry.lookup(call[0]) is not None]
    groups = [(op, name) for op, node in ours for name in _groups(node)]
    sizes = {(name, group_named(name).size) for op, name in groups if op.namespace == OWN_NAMESPACE}
    parts = [pair for pair in itertools.permutations(sorted({name for _op, name in groups}), 2) if is_part(*pair)]
    needs = [(op._name, backend_of(op.namespace, "cpu"), backend_of(op.namespace, "cuda")) for op, _node in ours]
    asked = sorted((group.name, group.size) for group in map(group_asked, _process_groups()) if group is not None)
    return f"symmem {_fingerprint()} {registry.fingerprint()}", sorted(sizes), parts, needs, asked


def _process_groups() -> list[str]:
    """Names of the process groups of this rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    return [group.group_name for group in dist.distributed_c10d._world.pg_map if dist.get_rank(group) >= 0]


@functools.cache
def _fingerprint() -> str:
    files = sorted(Path(__file__).parent.rglob("*.py"))
    texts = [file.read_bytes() for file in (*files, Path(functional.__file__))]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def operators(gm: torch.nn.Module) -> Iterator[tuple[OpOverload, torch.fx.Node]]:
    """The operators that a graph may call, in the order of its nodes; the original in place of a mutable-op wrapper.

    The number in the name of a wrapper differs between processes, so a key cannot contain it.
    """
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for target in (
                node.target,
                *node.args,
            ):  # before lowering, a mutable operator is an argument of another one
                yield from ((original_of(op), node) for op in _overloads(target))


def _overloads(target: Any) -> Iterator[OpOverload]:
    """The operators that a call of ``target`` may run."""
    if isinstance(target, OpOverload):
        yield target
    elif isinstance(target, OpOverloadPacket):
        names: Any = target.overloads
        yield from (getattr(target, name) for name in names())


def _groups(node: torch.fx.Node) -> Iterator[str]:
    """Names of the groups among the arguments of a node."""
    for value in pytree.tree_leaves((node.args, node.kwargs)):
        if isinstance(value, str):
            with contextlib.suppress(GroupError):  # another string; a missing group is reported later
                yield group_named(value).name
