"""PyTorch's own registry, behind ``torch.library.Library.register_symm_mem_args`` (torch 2.13 and later).

It keeps, by the qualified name of an op, the names of its arguments, and checks nothing. With an older torch all of
this is empty, and does nothing.
"""

from __future__ import annotations

import logging
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
    known = [(name, entry.symm_mem_args) for name, entry in list(entries.items())]
    return {name: tuple(holder.get()) for name, holder in known if holder.is_registered()}


def put(name: str, args: Sequence[str]) -> None:
    """Let upstream know of an op, in the place of what it knew.

    Inductor reads it when it lowers an op that nobody else lowers, and places arguments whatever device they are on: of
    the CPU's that raises (torch 2.13). It cannot be told of one device only, nor later: it asks by the op's name.
    """
    registry = _registry()
    if registry is not None:
        remove(name)  # else upstream logs a warning about what it overwrites
        registry.find(name).symm_mem_args.register(list(args))


def remove(name: str) -> None:
    """Let upstream forget an op."""
    registry = _registry()
    holder = None if registry is None else _holder(registry, name)
    if holder is not None:
        holder._symm_mem_args = None
