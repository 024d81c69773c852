"""The registry of operator arguments that must be in symmetric memory.

It combines four sources: registrations made here, registrations by C++ libraries (see :mod:`.from_cpp`), PyTorch's own
registry (see :mod:`.upstream`), and the built-in registrations for torch.ops.symm_mem and torch.ops.symmem (see
:mod:`.built_in`). Registrations by C++ libraries and the built-in ones are entered when they are first looked up.
Registrations made here are copied to PyTorch's registry. Built-in ones are not, because upstream has its own lowerings
for torch.ops.symm_mem. If both registries know an op, the later registration is used. For built-in ops, this registry
is used.

A registration belongs to an op with its current schema. It ends when the op is removed or gets another schema.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch._ops import OpOverload

from symmem.errors import InvalidArgumentError
from symmem.ops.registry import from_cpp, upstream
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
    "requires_symmetric_memory",
    "unregister",
    "version",
]

T = TypeVar("T")

log = logging.getLogger("symmem.ops")

FROM_SCHEMA: Any = type("FromSchema", (), {"__repr__": lambda self: "FROM_SCHEMA"})()
"""The default of ``group_arg``: find the argument by the schema."""

_lock = threading.RLock()
_entries: dict[str, Registration] = {}
_version = 0
_seen_upstream: dict[str, tuple[str, ...]] = {}
_has_built_in = False
_read_from_cpp = 0  # records
_from_cpp: list[from_cpp.Record] = []  # that are not entered yet, or do not fit their operator
listeners: list[Callable[[str], None]] = []
"""Called with the name of an operator when its registration was made or removed here."""


@overload
def register_symm_mem_args(
    op: OpLike,
    arg_names: Iterable[str | int],
    *,
    group_arg: str | None = ...,
    exit_barrier: bool = ...,
    one_sided: bool = ...,
    replace: bool = ...,
) -> Registration: ...


@overload
def register_symm_mem_args(
    op: list[str | int] | tuple[str | int, ...],
    *,
    group_arg: str | None = ...,
    exit_barrier: bool = ...,
    one_sided: bool = ...,
    replace: bool = ...,
) -> Callable[[T], T]: ...


def register_symm_mem_args(
    op: Any,
    arg_names: Iterable[str | int] | None = None,
    *,
    group_arg: str | None = FROM_SCHEMA,
    exit_barrier: bool = False,
    one_sided: bool = False,
    replace: bool = False,
) -> Any:
    """Register the arguments of an operator that must be in symmetric memory. Local. Do the same on all ranks.

        symmem.register_symm_mem_args("lib::op", ["x"], group_arg="tp")

        @symmem.register_symm_mem_args(["x"])
        @torch.library.custom_op("lib::op", mutates_args=())
        def op(x: torch.Tensor, group_name: str) -> torch.Tensor: ...

    The op must be defined, in C++ or Python. Its kernels may follow later. For the method of a Library see
    :class:`symmem.ops.Library`.

    With torch 2.13 and later, the op is also registered upstream. Then ``torch.compile`` places the arguments of ops
    with an argument ``group_name`` if nothing else does. It uses torch's own symmetric memory, on CUDA only.

    Args:
        op: ``"lib::op"``, ``"lib::op.overload"``, a member of ``torch.ops``, or a ``torch.library.custom_op``. Without
            an overload, the default or only overload is used. Omitted in the form of a decorator.
        arg_names: Names, or positions from 0, of arguments that are tensors or hold tensors: ``Tensor``, ``Tensor?``,
            ``Tensor[]``, ...
        group_arg: Name of the argument that carries the group, as a process group or its name (``str``, ``str?``,
            ``Any``). If None, the op uses the default process group. By default, the schema decides: a single argument
            that is a process group, or a string or ``Any`` with a name such as ``group_name``, carries the group. An op
            without strings and process groups uses the default process group. In all other cases ``group_arg`` is
            required.
        exit_barrier: Whether peers no longer read or write these arguments when the op completes on its stream.
        one_sided: Whether a single rank calls the op. Plain memory is then never copied.
        replace: Whether to replace an earlier registration.

    Returns:
        The registration; as a decorator, the decorated object.

    Raises:
        InvalidArgumentError: There is no such op, overload or argument. The argument holds no tensors, or cannot carry
            a group. The schema does not tell which argument carries the group. Or the op is registered already.
    """
    if arg_names is None:
        if isinstance(op, str) or not isinstance(op, Iterable):
            raise InvalidArgumentError(
                f"register_symm_mem_args({op!r}) names no arguments",
                hint='pass the op and the names, ("lib::op", ["x"]), or as a decorator the names, (["x"])',
            )
        names, source = list(op), caller_line()

        def decorate(target: T) -> T:
            made = described(find_op(target), names, group_arg, exit_barrier, one_sided, source)
            enter(made, replace=replace)
            return target

        return decorate
    made = described(find_op(op), arg_names, group_arg, exit_barrier, one_sided, caller_line())
    enter(made, replace=replace)
    return made


def requires_symmetric_memory(op: OpLike, input: str | int | Iterable[str | int] = 0, **options: Any) -> Registration:
    """:func:`register_symm_mem_args` for one input, by name or by position.

        symmem.requires_symmetric_memory(torch.ops.lib.op)
        symmem.requires_symmetric_memory("lib::op", input="x", group_arg="tp")

    Args:
        op: See :func:`register_symm_mem_args`.
        input: The name or the position of an argument, or several; default the first one.
        options: The keyword arguments of :func:`register_symm_mem_args`.

    Returns:
        The registration.

    Raises:
        InvalidArgumentError: See :func:`register_symm_mem_args`.
    """
    made: Registration = register_symm_mem_args(op, [input] if isinstance(input, str | int) else input, **options)
    return made


def caller_line() -> str:
    frame = caller()
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"


def described(
    op: OpOverload,
    arg_names: Iterable[str | int],
    group_arg: str | None,
    exit_barrier: bool,
    one_sided: bool,
    source: str,
) -> Registration:
    """Make a registration and check it against the schema, without entering it. See :func:`register_symm_mem_args`."""
    return described_by(op._name, op._schema, arg_names, group_arg, exit_barrier, one_sided, source)


def described_by(
    op: str,
    schema: Any,
    arg_names: Iterable[str | int],
    group_arg: str | None,
    exit_barrier: bool,
    one_sided: bool,
    source: str,
) -> Registration:
    """:func:`described` for an operator that may not be defined yet."""
    known = parameters(schema)
    args = _tensor_arguments(op, schema, arg_names, known)
    if group_arg is FROM_SCHEMA:
        group_arg, unclear = find_group(known)
        if unclear:
            raise InvalidArgumentError(
                f"{op}: the schema does not tell which argument carries the group, of {_listed(unclear)}",
                hint=f"pass group_arg={unclear[0]!r}, or group_arg=None if it uses the default process group",
            )
    elif group_arg is not None:
        _check_group(op, schema, group_arg, known)
    return Registration(op, args, group_arg, exit_barrier, one_sided, source, (), schema, known)


def _tensor_arguments(
    op: str, schema: Any, names: Iterable[str | int], known: Mapping[str, Parameter]
) -> tuple[str, ...]:
    if isinstance(names, str):
        raise InvalidArgumentError(f"{op}: the arguments must be a list of names", hint=f"pass [{names!r}]")
    args = tuple(_name_at(op, schema, each, list(known)) if isinstance(each, int) else each for each in names)
    tensors = [parameter.name for parameter in known.values() if parameter.tensor]
    hint = f"arguments that hold tensors: {_listed(tensors)}"
    if not args:
        raise InvalidArgumentError(f"{op}: no arguments are named", hint=hint)
    for name in args:
        if name not in known:
            raise InvalidArgumentError(f"{op} has no argument {name!r}: {schema}", hint=hint)
        if not known[name].tensor:
            what = f"is of type {known[name].type}"
            raise InvalidArgumentError(f"{op}: the argument {name!r} {what}, not a tensor", hint=hint)
        if args.count(name) > 1:
            raise InvalidArgumentError(f"{op}: the argument {name!r} is named twice", hint="name it once")
    return args


def _name_at(op: str, schema: Any, position: int, names: Sequence[str]) -> str:
    if isinstance(position, bool) or not 0 <= position < len(names):
        raise InvalidArgumentError(f"{op} has no argument {position!r}: {schema}", hint="count from 0")
    return names[position]


def _check_group(op: str, schema: Any, name: str, known: Mapping[str, Parameter]) -> None:
    hint = f"arguments that can: {_listed(parameter.name for parameter in known.values() if is_group(parameter))}"
    if name not in known:
        raise InvalidArgumentError(f"{op} has no argument {name!r} to carry the group: {schema}", hint=hint)
    if not is_group(known[name]):
        what = f"is of type {known[name].type}"
        raise InvalidArgumentError(f"{op}: the argument {name!r} {what} and cannot carry the group", hint=hint)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def enter(made: Registration, *, replace: bool) -> None:
    """Enter a registration, here and upstream.

    Raises:
        InvalidArgumentError: The op is registered already, and ``replace`` is False.
    """
    with _lock:
        op = find_op(made.op)
        if replace:
            _take_from_cpp(op)
        ours, theirs = _known(op)
        if not replace and (ours or theirs):
            by, args = (ours.source, ours.args) if ours else (UPSTREAM, theirs or ())
            raise InvalidArgumentError(
                f"{made.op} is registered already, with {_listed(args)}, by {by}",
                hint="register it once, or pass replace=True",
            )
        _entries[made.op] = made
        upstream.put(made.op, made.args)
        _changed(made.op)
    if torch._C._dispatch_has_kernel_for_dispatch_key(made.op, "CompositeImplicitAutograd"):
        log.warning(
            "%s is a composition of other ops, and torch decomposes it before checked() or a compiler sees it; "
            "register a kernel for a device, or for CompositeExplicitAutograd",
            made.op,
        )


def _known(op: OpOverload) -> tuple[Registration | None, tuple[str, ...] | None]:
    """The registration of an op made here, and the arguments registered upstream if they differ."""
    if op.namespace in (NAMESPACE, OWN_NAMESPACE):
        _enter_built_in()
    _enter_from_cpp(op)
    ours, theirs = _entries.get(op._name), upstream.args_of(op._name)
    if ours is None:
        return None, theirs
    if theirs is not None and set(theirs) == set(ours.args):
        theirs = None
    # Another op of this name was defined in the meantime.
    stale = ours.schema is not op._schema and str(ours.schema) != str(op._schema)
    return None if stale else ours, theirs


def lookup(op: OpOverload) -> Registration | None:
    """The registration of an overload, or None. Quick.

    Raises:
        InvalidArgumentError: A registration made upstream or in C++ does not match the op's schema.
    """
    ours, theirs = _known(op)
    if theirs is None or (ours is not None and ours.source == BUILT_IN):
        return ours
    return _from_upstream(op, theirs, ours)


def _from_upstream(op: OpOverload, args: tuple[str, ...], ours: Registration | None) -> Registration:
    """Make a registration from upstream's. Upstream checks nothing, and finds groups only by the name `group_name`."""
    if ours is not None:
        return dataclasses.replace(
            ours, args=_tensor_arguments(op._name, op._schema, args, ours.parameters), source=UPSTREAM
        )
    try:
        made = described(op, args, None, False, False, UPSTREAM)
    except InvalidArgumentError as error:
        error.what = f"a call of torch.library.Library.register_symm_mem_args does not match the op: {error.what}"
        raise
    group, unclear = find_group(made.parameters)
    name = made.parameters.get("group_name")
    if name is not None and is_group(name):
        group, unclear = "group_name", ()
    return dataclasses.replace(made, group_arg=group, unclear_group=unclear)


def registration(op: OpLike) -> Registration | None:
    """The registration of an operator; None if there is none, or no such op.

    Raises:
        InvalidArgumentError: ``op`` is not an operator, or a registration made upstream or in C++ does not match it.
    """
    found = known_op(op) if isinstance(op, str) else find_op(op)
    return None if found is None else lookup(found)


def registered() -> tuple[Registration, ...]:
    """The registrations of all existing ops, by name. Logs and omits registrations that do not match their op."""
    with _lock:
        _enter_built_in()
        _read()
        names = {*_entries, *upstream.all_args(), *(record.op for record in _from_cpp)}
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
    """Remove the registration of an operator, here and upstream, and return it.

    Raises:
        InvalidArgumentError: The operator is not registered.
    """
    with _lock:
        found = find_op(op)
        known = lookup(found)
        if known is None:
            raise InvalidArgumentError(
                f"{found._name} is not registered", hint="`symmem ops list` shows the registered ops"
            )
        _forget(known.op)
        return known


def restore(made: Registration, before: Registration | None) -> None:
    """Undo ``made``: restore ``before``, the earlier result of ``lookup``, or None."""
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
    """Remove a registration if it is still current. The op may no longer exist."""
    with _lock:
        if _entries.get(made.op) is made:
            _forget(made.op)


def _forget(name: str) -> None:
    _entries.pop(name, None)
    upstream.remove(name)
    _changed(name)


def fingerprint() -> str:
    """A hash of all registrations, 64 hexadecimal digits. Processes with the same registrations have the same hash.

    It depends on schemas and registered arguments, but not on the order or source of the registrations.
    """
    lines = [
        [
            str(known.schema),
            sorted(known.args),
            known.group_arg,
            known.exit_barrier,
            known.one_sided,
            known.unclear_group,
        ]
        for known in registered()
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def version() -> int:
    """A number that grows when a registration is made, replaced or removed, here or upstream."""
    with _lock:
        _read()
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
    """Enter the built-in registrations at the first call."""
    global _has_built_in
    if _has_built_in:
        return
    with _lock:
        if _has_built_in:
            return
        if dist.is_available():
            importlib.import_module("torch.distributed._symmetric_memory")  # defines some of the ops
        importlib.import_module("symmem.ops.one_sided")  # defines symmem's
        qualified = {f"{NAMESPACE}::{name}": need for name, need in NEED.items()}
        qualified |= {f"{OWN_NAMESPACE}::{name}": need for name, need in OWN.items()}
        for name, need in qualified.items():
            op = known_op(name)
            if op is None:
                continue
            try:
                made = described(op, need.args, FROM_SCHEMA, need.exit_barrier, need.one_sided, BUILT_IN)
            except InvalidArgumentError as error:
                log.warning("the schema of %s in this torch is unknown to symmem: %s", op._name, error.what)
            else:
                _entries[made.op] = made
        _has_built_in = True


def _read() -> None:
    """Read the records of C++ libraries that were loaded since the last call. Quick if there are none."""
    global _read_from_cpp
    while (record := from_cpp.read(_read_from_cpp)) is not None:
        with _lock:
            if record == from_cpp.read(_read_from_cpp):  # no other thread has read it
                _read_from_cpp += 1
                _from_cpp.append(record)
                _changed(record.op)


def _take_from_cpp(op: OpOverload) -> list[from_cpp.Record]:
    """Remove the records of an op from those that are not entered, and return them."""
    taken = [record for record in _from_cpp if known_op(record.op) is op]
    for record in taken:
        _from_cpp.remove(record)
    return taken


def _enter_from_cpp(op: OpOverload) -> None:
    """Enter what C++ libraries registered for an op.

    Raises:
        InvalidArgumentError: It does not match the op, or the op is registered already. The text names the line
            of the C++ code. Raised at every lookup of this op, until it is registered with ``replace=True``.
    """
    _read()
    if not _from_cpp:
        return
    with _lock:
        records = _take_from_cpp(op)
        while records:
            record = records[0]
            group = None if record.default_group else record.group_arg or FROM_SCHEMA
            try:
                made = described(op, record.args, group, record.exit_barrier, record.one_sided, record.source)
                enter(made, replace=False)
            except InvalidArgumentError as error:
                _from_cpp.extend(records)
                error.what = f"the registration at {record.source} is wrong: {error.what}"
                raise
            del records[0]
