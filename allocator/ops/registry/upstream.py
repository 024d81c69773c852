"""PyTorch's own registry, behind ``torch.library.Library.register_symm_mem_args`` (torch 2.13 and later).

It keeps, by the qualified name of an op, the names of its arguments, and checks nothing. With an older torch all of
this is empty, and does nothing.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["all_args", "args_of", "put", "remove"]

log = logging.getLogger("symmem.ops")


def _registry() -> Any:
    """Upstream's registry; None if this torch has none."""
    if not hasattr(torch.library.Library, "register_symm_mem_args"):
        return None
    from torch._library.simple_registry import singleton

    return singleton


def _holder(registry: Any, name: str) -> Any:
    return getattr(registry.get(name), "symm_mem_args", None)


def args_of(name: str) -> tuple[str, ...] | None:
    """What upstream knows of an op; None for nothing."""
    registry = _registry()
    holder = None if registry is None else _holder(registry, name)
    found = None if holder is None else holder.get()
    return None if found is None else tuple(found)


def all_args() -> dict[str, tuple[str, ...]]:
    """What upstream knows of all ops, by their qualified names."""
    entries: dict[str, Any] = getattr(_registry(), "_data", {})
    known = [(name, entry.symm_mem_args.get()) for name, entry in list(entries.items())]
    return {name: tuple(args) for name, args in known if args is not None}


def put(name: str, args: Sequence[str]) -> None:
    """Let upstream know of an op, in the place of what it knew.

    Inductor asks for it when it lowers an op that nobody else lowers, and then places arguments whatever device they
    are on, which raises for those on the CPU (torch 2.13 to 2.15). So it is told only of other ones.
    """
    registry = _registry()
    if registry is not None:
        remove(name)  # else upstream logs a warning about what it overwrites
        holder = registry.find(name).symm_mem_args
        holder.register(list(args))
        holder.is_registered = functools.partial(_is_told, holder)


def _is_told(holder: Any) -> bool:
    return holder.get() is not None and not _lowers_on_the_cpu()


def _lowers_on_the_cpu() -> bool:
    """Whether Inductor asks, and what the op of the graph that it is at takes lies on the CPU."""
    virtualized = sys.modules.get("torch._inductor.virtualized")  # if nobody has imported it, it is not Inductor
    node = getattr(virtualized.V.graph, "current_node", None) if virtualized is not None else None
    values = () if node is None else (each.meta.get("val") for each in node.all_input_nodes)
    return {each.device.type for each in values if isinstance(each, torch.Tensor)} == {"cpu"}


def remove(name: str) -> None:
    """Let upstream forget an op."""
    registry = _registry()
    holder = None if registry is None else _holder(registry, name)
    if holder is not None:
        holder._symm_mem_args = None
