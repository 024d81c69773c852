"""Operators that torch.compile cannot trace as they are: those that return what they write to, and those with no fake.

``op_(Tensor(a!) x) -> Tensor(a!)`` has no functional form in torch: what it returns aliases an argument. It gets a
twin that returns nothing, which torch does know how to make functional; where the operator is traced, the twin is
called, and the argument itself is what is returned. Callers see the operator as it always was, and so does eager code.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import do_auto_functionalize_v2
from torch._ops import OpOverload

from symmem.ops.registry.built_in import NAMESPACE

__all__ = ["original_of", "prepare"]

_LIBRARY: Any = torch.library.Library("symmem_twins", "FRAGMENT")  # type: ignore[no-untyped-call]  # so are its methods
_BUILT_IN: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_of_twins: dict[OpOverload, OpOverload] = {}
_prepared: dict[str, OpOverload] = {}
_numbers = itertools.count()


def original_of(op: OpOverload) -> OpOverload:
    """The operator that a twin stands for; any other is itself."""
    return _of_twins.get(op, op)


def prepare(op: OpOverload) -> None:
    """Let torch.compile trace an operator with registered arguments; nothing where it can already."""
    if _prepared.get(op._name) is op:  # another op of this name may have been defined in the meantime
        return
    _prepared[op._name] = op
    if op.namespace == NAMESPACE:
        _give_fake(op)
    if _returned(op) is not None and not _is_functionalized(op):
        _give_twin(op)


def _returned(op: OpOverload) -> list[str] | None:
    """For each value that an operator returns, the argument that it writes to and returns; None if any is another."""
    written = {}
    for each in op._schema.arguments:
        if each.alias_info is not None and each.alias_info.is_write:
            written.update(dict.fromkeys(each.alias_info.before_set, each.name))
    names = []
    for each in op._schema.returns:
        sets = each.alias_info.before_set if each.alias_info is not None else ()
        names += [name for name in (written.get(one) for one in sets) if name is not None][:1]
    return names if names and len(names) == len(op._schema.returns) else None


def _is_functionalized(op: OpOverload) -> bool:
    """Whether somebody has said already how to make an operator functional."""
    key = torch._C.DispatchKey.Functionalize
    return torch._C._dispatch_has_kernel_for_dispatch_key(op._name, "Functionalize") or key in op.py_kernels


def _give_fake(op: OpOverload) -> None:
    """Some of torch's own have no fake kernel: they return what they write to, nothing, or a tensor like the first."""
    keys = ("Meta", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    if any(torch._C._dispatch_has_kernel_for_dispatch_key(op._name, key) for key in keys):
        return
    returned, names = _returned(op), [each.name for each in op._schema.arguments]

    def fake(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if returned is not None:
            values = [given[name] for name in returned]
            return values[0] if len(values) == 1 else tuple(values)
        return torch.empty_like(given[names[0]]) if op._schema.returns else None

    torch.library.register_fake(op._name, fake, lib=_BUILT_IN)


def _give_twin(op: OpOverload) -> None:
    name = f"{op._opname}_{next(_numbers)}"
    arguments = str(op._schema).partition("(")[2].rpartition(") -> ")[0]
    _LIBRARY.define(f"{name}({arguments}) -> ()")

    def kernel(*args: Any, **kwargs: Any) -> None:
        op(*args, **kwargs)

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"symmem_twins::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
    twin: OpOverload = getattr(torch.ops.symmem_twins, name).default
    _of_twins[twin] = op
    returned, names = _returned(op), [each.name for each in op._schema.arguments]
    assert returned is not None

    def functionalize(context: Any, *args: Any, **kwargs: Any) -> Any:
        do_auto_functionalize_v2(context.mode, twin, args, kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        values = [given[name] for name in returned]
        return values[0] if len(values) == 1 else tuple(values)

    op.py_functionalize_impl(functionalize)
