"""Read an operator's schema: find the op for a name, its tensor arguments and its group argument."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from symmem.errors import InvalidArgumentError

__all__ = ["OpLike", "Parameter", "find_group", "find_op", "is_group", "known_op", "parameters"]

OpLike: TypeAlias = "str | OpOverload | OpOverloadPacket | CustomOpDef"
"""An operator: ``"lib::op"`` or ``"lib::op.overload"``, a member of ``torch.ops``, or a ``torch.library.custom_op``."""

_NAME = re.compile(r"(\w+)::(\w+)(?:\.(\w+))?")
_PROCESS_GROUP = "c10d.ProcessGroup"


@dataclass(frozen=True)
class Parameter:
    """One argument of a schema.

    Attributes:
        name: Its name.
        type: Its type in the syntax of schemas, such as ``"Tensor?[]"``.
        position: Its index. Keyword-only arguments come last.
        default: The default value; None also if there is no default.
        tensor: Whether it is a tensor, or holds tensors: ``Tensor``, ``Tensor?``, ``Tensor[]``, ``Tensor?[]``, ...
        mutated: Whether the op writes to it.
        text: Whether it is a string, or an optional string.
        process_group: Whether it is a process group, or an optional process group.
        anything: Whether it is of type ``Any``, as ``group_name`` of ``_c10d_functional`` since torch 2.13.
    """

    name: str
    type: str
    position: int
    default: Any
    tensor: bool
    mutated: bool
    text: bool
    process_group: bool
    anything: bool = False


def find_op(op: object) -> OpOverload:
    """Find the overload for ``op``. ``"lib::op"`` and ``torch.ops.lib.op`` mean the default or only overload.

    Raises:
        InvalidArgumentError: There is no such op or overload, or it has several overloads without a default.
    """
    if isinstance(op, OpOverload):
        return op
    if isinstance(op, CustomOpDef):
        return op._opoverload
    if isinstance(op, OpOverloadPacket):
        return _overload(op, None)
    if isinstance(op, str):
        return _named(op)
    raise InvalidArgumentError(
        f"a {type(op).__name__} is not an operator",
        hint='pass "lib::op", torch.ops.lib.op, or the result of torch.library.custom_op; '
        "as a decorator, write it above @torch.library.custom_op",
    )


def known_op(name: str) -> OpOverload | None:
    """:func:`find_op` for a name, but returns None if there is no such op."""
    try:
        return _named(name)
    except InvalidArgumentError:
        return None


def _named(name: str) -> OpOverload:
    match = _NAME.fullmatch(name)
    if match is None:
        raise InvalidArgumentError(
            f"{name!r} is not the name of an operator",
            hint='write "namespace::name", or "namespace::name.overload"',
        )
    namespace, op, overload = match.groups()
    packet = getattr(getattr(torch.ops, namespace, None), op, None)
    if isinstance(packet, OpOverloadPacket):
        return _overload(packet, overload)
    near = difflib.get_close_matches(f"{namespace}::{op}", _names_in(namespace), n=1)
    raise InvalidArgumentError(
        f"there is no operator {namespace}::{op}",
        hint="import the module or load the library that defines it first"
        + (f"; did you mean {near[0]!r}?" if near else ""),
    )


def _names_in(namespace: str) -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.partition(".")[0] for name in names if name.startswith(f"{namespace}::")}


def _overload(packet: OpOverloadPacket, name: str | None) -> OpOverload:
    names: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
    if name is None and "default" not in names and len(names) == 1:
        name = names[0]
    if (name or "default") in names:
        found: OpOverload = getattr(packet, name or "default")
        return found
    qualified = packet._qualified_op_name
    what = "no default overload" if name is None else f"no overload {name!r}"
    raise InvalidArgumentError(
        f"{qualified} has {what}",
        hint=f"name one of: {', '.join(f'{qualified}.{each}' for each in names)}",
    )


def parameters(schema: Any) -> dict[str, Parameter]:
    """The arguments of a ``torch.FunctionSchema`` by name, in order."""
    made: dict[str, Parameter] = {}
    for index, argument in enumerate(schema.arguments):
        kind, mutated = argument.type, argument.alias_info is not None and argument.alias_info.is_write
        element = kind.getElementType() if kind.kind() == "OptionalType" else kind
        made[argument.name] = Parameter(
            name=argument.name,
            type=_type_text(kind),
            position=index,
            default=argument.default_value if argument.has_default_value() else None,
            tensor=_holds_tensors(kind),
            mutated=mutated,
            text=element.kind() == "StringType",
            process_group=element.kind() == "ClassType" and str(element).endswith(_PROCESS_GROUP),
            anything=element.kind() == "AnyType",
        )
    return made


def _holds_tensors(kind: Any) -> bool:
    while kind.kind() in ("OptionalType", "ListType"):
        kind = kind.getElementType()
    return bool(kind.kind() == "TensorType")


def _type_text(kind: Any) -> str:
    if kind.kind() == "OptionalType":
        return f"{_type_text(kind.getElementType())}?"
    if kind.kind() == "ListType":
        return f"{_type_text(kind.getElementType())}[]"
    return str(kind)


def is_group(parameter: Parameter) -> bool:
    """Whether an argument can carry a group."""
    return parameter.text or parameter.process_group or parameter.anything


def find_group(known: Mapping[str, Parameter]) -> tuple[str | None, tuple[str, ...]]:
    """Return the argument that carries the group, or None and the candidates if the schema is ambiguous.

    An argument carries the group if it is a process group, or a string or ``Any`` with a name such as ``group_name``.
    Other strings may name a reduction, for example. If several arguments qualify, or there are only other strings, the
    caller who registers must choose.
    """
    carriers = [parameter for parameter in known.values() if is_group(parameter)]
    named = [carrier.name for carrier in carriers if carrier.process_group or _is_called_group(carrier.name)]
    if len(named) == 1:
        return named[0], ()
    return None, tuple(named or (carrier.name for carrier in carriers if not carrier.anything))


def _is_called_group(name: str) -> bool:
    return "group" in name.lower() or "pg" in name.lower().split("_")
