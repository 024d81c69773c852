"""PyTorch's own registry, behind ``torch.library.Library.register_symm_mem_args`` (torch 2.13 and later).

It maps the qualified name of an op to argument names, without any checks. With an older torch, the functions of this
module find and do nothing.
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
    """Upstream's registry, or None if this torch has none."""
    if not hasattr(torch.library.Library, "register_symm_mem_args"):
        return None
    from torch._library.simple_registry import singleton

    return singleton


def _holder(registry: Any, name: str) -> Any:
    return getattr(registry.get(name), "symm_mem_args", None)


def args_of(name: str) -> tuple[str, ...] | None:
    """The arguments that upstream knows for an op, or None."""
    registry = _registry()
    holder = None if registry is None else _holder(registry, name)
    found = None if holder is None else holder.get()
    return None if found is None else tuple(found)


def all_args() -> dict[str, tuple[str, ...]]:
    """The arguments that upstream knows for all ops, by qualified name."""
    entries: dict[str, Any] = getattr(_registry(), "_data", {})
    known = [(name, entry.symm_mem_args.get()) for name, entry in list(entries.items())]
    return {name: tuple(args) for name, args in known if args is not None}


def put(name: str, args: Sequence[str]) -> None:
    """Register an op upstream, in place of an earlier registration.

    Inductor reads this registration when it lowers an op without another lowering. It then places arguments on any
    device, but this raises for CPU arguments (torch 2.13 to 2.15). So the registration is hidden for CPU arguments.
    """
    registry = _registry()
    if registry is not None:
        remove(name)  # otherwise upstream logs a warning that it overwrites
        holder = registry.find(name).symm_mem_args
        holder.register(list(args))
        holder.is_registered = functools.partial(_is_visible, holder)


def _is_visible(holder: Any) -> bool:
    return holder.get() is not None and not _lowers_on_the_cpu()


def _lowers_on_the_cpu() -> bool:
    """Whether Inductor is lowering an op now, and the tensors that this op takes are on the CPU."""
    virtualized = sys.modules.get("torch._inductor.virtualized")  # if it is not loaded, Inductor does not run
    node = getattr(virtualized.V.graph, "current_node", None) if virtualized is not None else None
    values = () if node is None else (argument.meta.get("val") for argument in node.all_input_nodes)
    return {value.device.type for value in values if isinstance(value, torch.Tensor)} == {"cpu"}


def remove(name: str) -> None:
    """Remove the registration of an op upstream."""
    registry = _registry()
    holder = None if registry is None else _holder(registry, name)
    if holder is not None:
        holder._symm_mem_args = None
