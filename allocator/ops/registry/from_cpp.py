"""Registrations by C++ operator libraries through ``symmem_registry.h``, which explains how they get here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

__all__ = ["Record", "read"]

_OPERATOR = "symmem_registry::registration"


class Record(NamedTuple):
    """A registration as the library made it. It may not fit the operator.

    Attributes:
        op: ``"lib::op"`` or ``"lib::op.overload"``.
        args: Names, or positions from 0.
        group_arg: The argument that carries the group; empty if the schema shows it.
        default_group: Whether the operator uses the default process group.
        exit_barrier: See :class:`symmem.ops.Registration`.
        one_sided: See :class:`symmem.ops.Registration`.
        source: ``"file:line"`` of the C++ code.
    """

    op: str
    args: tuple[str | int, ...]
    group_arg: str
    default_group: bool
    exit_barrier: bool
    one_sided: bool
    source: str


def read(number: int) -> Record | None:
    """The record with a number, if a library that is loaded has made so many. Quick if not."""
    exists = torch._C._dispatch_has_kernel(f"{_OPERATOR}.n{number}")  # despite its name, it needs no kernel
    if not exists:
        return None
    schema = torch._C._get_schema(_OPERATOR, f"n{number}")
    given: dict[str, Any] = {argument.name: argument.default_value for argument in schema.arguments}
    names = [name for name in given.pop("args").split(",") if name]
    return Record(args=tuple(int(name) if name.isdecimal() else name for name in names), **given)
