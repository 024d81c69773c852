"""Mutable-op wrappers and fake kernels, for operators that torch.compile cannot trace.

Torch cannot make ``op_(Tensor(a!) x) -> Tensor(a!)`` functional, because the result aliases an argument. The
mutable-op wrapper has the same arguments and returns nothing, so torch can make it functional. A traced call of the
operator becomes a call of the wrapper and returns the argument itself. Eager calls do not change.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import do_auto_functionalize_v2
from torch._ops import OpOverload

from symmem.ops.registry.built_in import NAMESPACE

__all__ = ["original_of", "prepare"]

_LIBRARY: Any = torch.library.Library("symmem_mutable", "FRAGMENT")  # type: ignore[no-untyped-call]
_BUILT_IN: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_originals: dict[OpOverload, OpOverload] = {}
_prepared: dict[str, OpOverload] = {}
_numbers = itertools.count()


def original_of(op: OpOverload) -> OpOverload:
    """The operator behind a mutable-op wrapper; any other operator is returned unchanged."""
    return _originals.get(op, op)


def prepare(op: OpOverload) -> None:
    """Let torch.compile trace an operator with registered arguments, if it cannot do so already."""
    if _prepared.get(op._name) is op:  # a new operator of the same name may have been defined
        return
    _prepared[op._name] = op
    if op.namespace == NAMESPACE:
        _register_fake(op)
    if _returned(op) is not None and not _is_functionalized(op):
        _register_wrapper(op)


def _returned(op: OpOverload) -> list[str] | None:
    """Names of the mutated arguments that an operator returns, in order; None if it returns any other value."""
    written = {}
    for argument in op._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.update(dict.fromkeys(argument.alias_info.before_set, argument.name))
    names: list[str] = []
    for returned in op._schema.returns:
        sets = returned.alias_info.before_set if returned.alias_info is not None else ()
        names += [name for name in (written.get(alias) for alias in sets) if name is not None][:1]
    return names if names and len(names) == len(op._schema.returns) else None


def _is_functionalized(op: OpOverload) -> bool:
    """Whether an operator has a functionalization rule already."""
    key = torch._C.DispatchKey.Functionalize
    return torch._C._dispatch_has_kernel_for_dispatch_key(op._name, "Functionalize") or key in op.py_kernels


def _register_fake(op: OpOverload) -> None:
    """Register a fake kernel for an operator of torch that has none.

    Such operators return their mutated arguments, nothing, or a tensor like the first argument.
    """
    keys = ("Meta", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    if any(torch._C._dispatch_has_kernel_for_dispatch_key(op._name, key) for key in keys):
        return
    returned, names = _returned(op), [argument.name for argument in op._schema.arguments]

    def fake(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if returned is not None:
            values = [given[name] for name in returned]
            return values[0] if len(values) == 1 else tuple(values)
        return torch.empty_like(given[names[0]]) if op._schema.returns else None

    torch.library.register_fake(op._name, fake, lib=_BUILT_IN)


def _register_wrapper(op: OpOverload) -> None:
    name = f"{op._opname}_{next(_numbers)}"
    arguments = str(op._schema).partition("(")[2].rpartition(") -> ")[0]
    _LIBRARY.define(f"{name}({arguments}) -> ()")

    def kernel(*args: Any, **kwargs: Any) -> None:
        op(*args, **kwargs)

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"symmem_mutable::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
    wrapper: OpOverload = getattr(torch.ops.symmem_mutable, name).default
    _originals[wrapper] = op
    returned, names = _returned(op), [argument.name for argument in op._schema.arguments]
    assert returned is not None

    def functionalize(context: Any, *args: Any, **kwargs: Any) -> Any:
        do_auto_functionalize_v2(context.mode, wrapper, args, kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        values = [given[name] for name in returned]
        return values[0] if len(values) == 1 else tuple(values)

    op.py_functionalize_impl(functionalize)
