"""The registry: which arguments of which operators must lie in symmetric memory.

Three sources are one view: what is registered here, PyTorch's own registry (see :mod:`.upstream`), and what
is built in (see :mod:`.built_in`), of torch.ops.symm_mem and torch.ops.symmem, which is entered when it is
first asked for. What is registered here is told to PyTorch's registry as well; what is built in is not, since upstream
has lowerings of its own for torch.ops.symm_mem. Where both know an op, the later one counts; of what is built in, this
registry does.

A registration is of one op with the schema that it has now: it ends when the op is taken away or gets another schema.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch._ops import OpOverload

from symmem.errors import InvalidArgumentError
from symmem.ops.registry import upstream
from symmem.ops.registry.built_in import NAMESPACE, NEED, OWN, OWN_NAMESPACE
from symmem.ops.registry.registration import BUILT_IN, UPSTREAM, Registration
from symmem.ops.registry.schema import OpLike, Parameter, find_group, find_op, is_group, known_op, parameters
from symmem.redirect.cpu_dispatch import caller

__all__ = [
    "FROM_SCHEMA",
    "fingerprint",
    "listeners",
    "lookup",
    "register_symm_mem_args",
    "registered",
    "registration",
    "unregister",
    "version",
]

T = TypeVar("T")

log = logging.getLogger("symmem.ops")

FROM_SCHEMA: Any = type("FromSchema", (), {"__repr__": lambda self: "FROM_SCHEMA"})()
"""As ``group_arg``: the argument that the schema shows to carry the group."""

_lock = threading.RLock()
_entries: dict[str, Registration] = {}
_version = 0
_seen_upstream: dict[str, tuple[str, ...]] = {}
_has_built_in = False
listeners: list[Callable[[str], None]] = []
"""Are told the name of each operator for which something was registered or removed here."""


@overload
def register_symm_mem_args(
    op: OpLike,
    arg_names: Iterable[str],
    *,
    group_arg: str | None = ...,
    exit_barrier: bool = ...,
    one_sided: bool = ...,
    replace: bool = ...,
) -> Registration: ...


@overload
def register_symm_mem_args(
    op: list[str] | tuple[str, ...],
    *,
    group_arg: str | None = ...,
    exit_barrier: bool = ...,
    one_sided: bool = ...,
    replace: bool = ...,
) -> Callable[[T], T]: ...


def register_symm_mem_args(
    op: Any,
    arg_names: Iterable[str] | None = None,
    *,
    group_arg: str | None = FROM_SCHEMA,
    exit_barrier: bool = False,
    one_sided: bool = False,
    replace: bool = False,
) -> Any:
    """Say which arguments of an operator must lie in symmetric memory. Local, and the same on all ranks.

        symmem.register_symm_mem_args("lib::op", ["x"], group_arg="tp")

        @symmem.register_symm_mem_args(["x"])
        @torch.library.custom_op("lib::op", mutates_args=())
        def op(x: torch.Tensor, group_name: str) -> torch.Tensor: ...

    The op may be written in C++ or Python, and may get its kernels later, but must be defined. For the method of a
    Library see :class:`symmem.ops.Library`.

    With torch 2.13 and later, upstream's registry learns of it too. Where nobody else places the arguments,
    ``torch.compile`` then does, for ops with an argument ``group_name``: in memory of torch's own, and on CUDA only.

    Args:
        op: ``"lib::op"``, ``"lib::op.overload"``, a member of ``torch.ops``, or a ``torch.library.custom_op``. Without
            an overload it is the default one, or the only one. Left out as a decorator.
        arg_names: Names of arguments that are tensors or hold tensors: ``Tensor``, ``Tensor?``, ``Tensor[]``, ...
        group_arg: Name of the argument that carries the group: the name of a process group (``str``, ``str?``) or a
            process group. None: the op works on the default process group. If not given, it is the one argument that
            is a process group or a text that is called a group; an op with no text works on the default group; where
            neither tells, it must be given.
        exit_barrier: Whether no peer reads or writes these arguments any more once the op is done on its stream.
        one_sided: Whether ranks call it alone; then no copy is made of what is not symmetric memory.
        replace: Whether to take the place of an earlier registration.

    Returns:
        The registration; as a decorator, what it was put on.

    Raises:
        InvalidArgumentError: There is no such op, overload or argument; it holds no tensor, or cannot carry a group;
            which one carries the group is not clear; or the op is registered already.
    """
    if arg_names is None:
        if isinstance(op, str) or not isinstance(op, Iterable):
            raise InvalidArgumentError(
                f"register_symm_mem_args({op!r}) names no arguments",
                hint='pass the op and the names, ("lib::op", ["x"]), or as a decorator the names, (["x"])',
            )
        names, source = list(op), _source()

        def decorate(target: T) -> T:
            made = described(find_op(target), names, group_arg, exit_barrier, one_sided, source)
            enter(made, replace=replace)
            return target

        return decorate
    made = described(find_op(op), arg_names, group_arg, exit_barrier, one_sided, _source())
    enter(made, replace=replace)
    return made


def _source() -> str:
    frame = caller()
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"


def described(
    op: OpOverload,
    arg_names: Iterable[str],
    group_arg: str | None,
    exit_barrier: bool,
    one_sided: bool,
    source: str,
) -> Registration:
    """Check a registration against the schema; see :func:`register_symm_mem_args`. Enters nothing."""
    known = parameters(op._schema)
    args = _tensor_arguments(op, arg_names, known)
    if group_arg is FROM_SCHEMA:
        group_arg, unclear = find_group(known)
        if unclear:
            raise InvalidArgumentError(
                f"{op._name}: the schema does not tell which argument carries the group, of {_listed(unclear)}",
                hint=f"pass group_arg={unclear[0]!r}, or group_arg=None if it works on the default process group",
            )
    elif group_arg is not None:
        _check_group(op, group_arg, known)
    return Registration(op._name, args, group_arg, exit_barrier, one_sided, source, (), op._schema, known)


def _tensor_arguments(op: OpOverload, names: Iterable[str], known: Mapping[str, Parameter]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise InvalidArgumentError(f"{op._name}: the arguments must be a list of names", hint=f"pass [{names!r}]")
    args = tuple(names)
    tensors = [each.name for each in known.values() if each.tensor]
    hint = f"arguments that hold tensors: {_listed(tensors)}"
    if not args:
        raise InvalidArgumentError(f"{op._name}: no arguments are named", hint=hint)
    for name in args:
        if name not in known:
            raise InvalidArgumentError(f"{op._name} has no argument {name!r}: {op._schema}", hint=hint)
        if not known[name].tensor:
            what = f"is of type {known[name].type}"
            raise InvalidArgumentError(f"{op._name}: the argument {name!r} {what}, not a tensor", hint=hint)
        if args.count(name) > 1:
            raise InvalidArgumentError(f"{op._name}: the argument {name!r} is named twice", hint="name each one once")
    return args


def _check_group(op: OpOverload, name: str, known: Mapping[str, Parameter]) -> None:
    hint = f"arguments that can: {_listed(each.name for each in known.values() if is_group(each))}"
    if name not in known:
        raise InvalidArgumentError(f"{op._name} has no argument {name!r} to carry the group: {op._schema}", hint=hint)
    if not is_group(known[name]):
        what = f"is of type {known[name].type}"
        raise InvalidArgumentError(f"{op._name}: the argument {name!r} {what} and cannot carry the group", hint=hint)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def enter(made: Registration, *, replace: bool) -> None:
    """Enter a registration, and tell upstream.

    Raises:
        InvalidArgumentError: There is one, and it is not to be replaced.
    """
    with _lock:
        op = find_op(made.op)
        ours, theirs = _known(op)
        if not replace and (ours or theirs):
            by, args = (ours.source, ours.args) if ours else (UPSTREAM, theirs or ())
            raise InvalidArgumentError(
                f"{made.op} is registered already, with {_listed(args)}, by {by}",
                hint="register it once; or pass replace=True to take its place",
            )
        _entries[made.op] = made
        upstream.put(made.op, made.args)
        _changed(made.op)
    if torch._C._dispatch_has_kernel_for_dispatch_key(made.op, "CompositeImplicitAutograd"):
        log.warning(
            "%s is a composition of other ops, which torch takes apart before checked() or a compiler sees it; "
            "give it a kernel for a device, or for CompositeExplicitAutograd",
            made.op,
        )


def _known(op: OpOverload) -> tuple[Registration | None, tuple[str, ...] | None]:
    """What is entered here for an op, and what upstream knows that it has not learnt from here."""
    if op.namespace in (NAMESPACE, OWN_NAMESPACE):
        _enter_built_in()
    ours, theirs = _entries.get(op._name), upstream.args_of(op._name)
    if ours is None:
        return None, theirs
    if theirs is not None and set(theirs) == set(ours.args):
        theirs = None
    # Another op of this name was defined in the meantime.
    stale = ours.schema is not op._schema and str(ours.schema) != str(op._schema)
    return None if stale else ours, theirs


def lookup(op: OpOverload) -> Registration | None:
    """What is registered for one overload, or None. Quick.

    Raises:
        InvalidArgumentError: What was registered through upstream does not fit the op.
    """
    ours, theirs = _known(op)
    if theirs is None or (ours is not None and ours.source == BUILT_IN):
        return ours
    return _honoured(op, theirs, ours)


def _honoured(op: OpOverload, args: tuple[str, ...], ours: Registration | None) -> Registration:
    """What was registered through upstream, which checks nothing and knows no group but one called group_name."""
    if ours is not None:
        return dataclasses.replace(ours, args=_tensor_arguments(op, args, ours.parameters), source=UPSTREAM)
    try:
        made = described(op, args, None, False, False, UPSTREAM)
    except InvalidArgumentError as error:
        error.what = f"what torch.library.Library.register_symm_mem_args was told does not fit: {error.what}"
        raise
    group, unclear = find_group(made.parameters)
    name = made.parameters.get("group_name")
    if name is not None and is_group(name):
        group, unclear = "group_name", ()
    return dataclasses.replace(made, group_arg=group, unclear_group=unclear)


def registration(op: OpLike) -> Registration | None:
    """What is registered for an operator; None if nothing, or if there is no such op.

    Raises:
        InvalidArgumentError: ``op`` is no operator; or what was registered through upstream does not fit it.
    """
    found = known_op(op) if isinstance(op, str) else find_op(op)
    return None if found is None else lookup(found)


def registered() -> tuple[Registration, ...]:
    """All registrations of ops that there are, by name. What does not fit its op is left out, and logged."""
    with _lock:
        _enter_built_in()
        names = {*_entries, *upstream.all_args()}
    found = []
    for name in sorted(names):
        try:
            known = registration(name)
        except InvalidArgumentError as error:
            log.warning("%s", error)
        else:
            found += [known] if known is not None else []
    return tuple(found)


def unregister(op: OpLike) -> Registration:
    """Remove what is registered for an operator, here and upstream; returns it.

    Raises:
        InvalidArgumentError: Nothing is.
    """
    with _lock:
        found = find_op(op)
        known = lookup(found)
        if known is None:
            raise InvalidArgumentError(
                f"{found._name} is not registered", hint="`symmem ops list` shows the ops that are"
            )
        _forget(known.op)
        return known


def restore(made: Registration, before: Registration | None) -> None:
    """Put back what was registered before ``made``, as it was: nothing, or what ``lookup`` gave then."""
    with _lock:
        _entries.pop(made.op, None)
        upstream.remove(made.op)
        if before is not None:
            if before.source != UPSTREAM:
                _entries[before.op] = before
            if before.source != BUILT_IN:
                upstream.put(before.op, before.args)
        _changed(made.op)


def withdraw(made: Registration) -> None:
    """Remove a registration if it still holds; the op may be gone."""
    with _lock:
        if _entries.get(made.op) is made:
            _forget(made.op)


def _forget(name: str) -> None:
    _entries.pop(name, None)
    upstream.remove(name)
    _changed(name)


def fingerprint() -> str:
    """A hash of all registrations, of 64 hexadecimal digits; the same in every process that has the same ones.

    It depends on what is registered for which schemas, and neither on the order nor on who registered.
    """
    lines = [
        [str(each.schema), sorted(each.args), each.group_arg, each.exit_barrier, each.one_sided, each.unclear_group]
        for each in registered()
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def version() -> int:
    """A number that grows whenever a registration was made, replaced or removed, here or upstream."""
    with _lock:
        if upstream.all_args() != _seen_upstream:
            _changed()
        return _version


def _changed(name: str | None = None) -> None:
    global _version, _seen_upstream
    _version += 1
    _seen_upstream = upstream.all_args()
    if name is not None:
        for listener in tuple(listeners):
            listener(name)


def _enter_built_in() -> None:
    """Enter what is built in, the first time."""
    global _has_built_in
    if _has_built_in:
        return
    with _lock:
        if _has_built_in:
            return
        if dist.is_available():
            importlib.import_module("torch.distributed._symmetric_memory")  # defines some of them
        importlib.import_module("symmem.ops.one_sided")  # as well
        qualified = {f"{NAMESPACE}::{name}": need for name, need in NEED.items()}
        qualified |= {f"{OWN_NAMESPACE}::{name}": need for name, need in OWN.items()}
        for name, need in qualified.items():
            op = known_op(name)
            if op is None:
                continue
            try:
                made = described(op, need.args, FROM_SCHEMA, need.exit_barrier, need.one_sided, BUILT_IN)
            except InvalidArgumentError as error:
                log.warning("this torch has another %s than symmem knows: %s", op._name, error.what)
            else:
                _entries[made.op] = made
        _has_built_in = True
