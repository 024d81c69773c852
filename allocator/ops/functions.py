"""The operators as functions that take any group, for example ``symmem.ops.all_reduce(x, group)``.

They do the same as ``torch.ops.symmem.*``, but an ordinary eager call bypasses the dispatcher (see
:mod:`symmem.ops.dispatch`). For shapes, dtypes and errors see :mod:`symmem.ops.collectives` and
:mod:`symmem.ops.one_sided`. In compiled code, a group that was made from a store breaks the graph; its name does not.
"""

from __future__ import annotations

from typing import Any

import torch

import symmem.ops.one_sided  # noqa: F401  # defines operators
from symmem.backends.kernel_status import raise_failure
from symmem.backends.neutral import in_fake_mode
from symmem.backends.untraced import untraced
from symmem.errors import InvalidArgumentError
from symmem.group.group import Group
from symmem.group.resolve import GroupLike, name_of, open_group
from symmem.ops import eager
from symmem.ops.collectives import KINDS, OperatorKind, begun, functional, in_place, into
from symmem.ops.dispatch import is_usual
from symmem.ops.engines.select import engine_for
from symmem.ops.refusals import refuse_in
from symmem.tensor.arguments import check_channel, check_dense, check_integer

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "get",
    "put",
    "put_signal",
    "reduce_scatter",
    "wait_signal",
]

_CPU = torch.device("cpu")
_OPERATORS = {
    name: tuple(
        getattr(torch.ops.symmem, f"{name}{form}").default for form in ("", "" if kind.is_tree else "_", "_out")
    )
    for name, kind in KINDS.items()
}
"""The three forms of the operators. Trees have none in place, and do not look it up."""

_ALL_REDUCE, _ALL_GATHER, _REDUCE_SCATTER, _ALL_TO_ALL, _BROADCAST = (
    KINDS[name] for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
)


def _name(group: GroupLike) -> str:
    if isinstance(group, str):
        return group
    if isinstance(group, Group):
        return _name_from_now_on(group) if group.made_from_store else group.name
    return _constant_name(group)


@untraced
def _name_from_now_on(group: Group) -> str:
    return name_of(group)


def _constant_name(group: GroupLike) -> str:
    return name_of(group)


# The same as torch.compiler.assume_constant_result, but without importing the compiler, which takes a second.
_constant_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


_is_compiling = torch.compiler.is_dynamo_compiling  # looked up once


def _call(
    kind: OperatorKind, x: torch.Tensor, group: GroupLike, out: torch.Tensor | None, option: str | int | None = None
) -> torch.Tensor:
    """Choose the form. In an ordinary eager call run its kernel directly, else call the operator."""
    if _is_compiling():  # comes first, because a compiler cannot trace the rest
        _check_kinds(kind, x, out, option)
        return _dispatched(kind, x, group, out, option)
    try:
        try:
            made: torch.Tensor | None = eager.run(kind, x, group, option, out)
            resolved = open_group(group) if made is None and is_usual(x, out) else None
        except BaseException as error:  # it has launched nothing
            refuse_in(group, kind.name, error, x, out)
            raise
        if resolved is not None:
            options = (option,) if kind.option else ()
            if out is None:
                made = functional(kind, resolved, x, options)
            elif out is x and kind.like_x:
                in_place(kind, resolved, x, options)
                made = out
            else:
                into(kind, resolved, x, options, out)
                made = out
            eager.learn(kind, resolved, x, option, out, made)
    except RuntimeError as error:  # from torch: its allocator calls CUDA
        raise_failure(error)
        raise
    if made is not None:
        return made
    begun.kernels = 0
    try:
        _check_kinds(kind, x, out, option)
        return _dispatched(kind, x, group, out, option)
    except BaseException as error:
        if not begun.kernels:  # a kernel reports its own errors
            refuse_in(group, kind.name, error, x, out)
        raise


def _in_order(
    kind: OperatorKind, order: object, group: GroupLike, x: torch.Tensor, out: torch.Tensor | None
) -> OperatorKind:
    """The operation in an order other than that of ranks."""
    if order == "tree":
        return KINDS[f"{kind.name}_tree"]
    error = InvalidArgumentError(f"order must be 'ranks' or 'tree', not {order!r}")
    refuse_in(group, kind.name, error, x, out)
    raise error


def _check_kinds(kind: OperatorKind, x: object, out: object, option: object) -> None:
    """Raise if an argument is of a wrong kind. The dispatcher's own errors would name neither argument nor remedy."""
    check_dense(x, kind.name)
    if out is not None:
        check_dense(out, f"out of {kind.name}")
    kind.check_option(option)


def _dispatched(
    kind: OperatorKind, x: torch.Tensor, group: GroupLike, out: torch.Tensor | None, option: str | int | None
) -> torch.Tensor:
    """Call the operator through the dispatcher."""
    rest = (option, _name(group)) if kind.option else (_name(group),)
    form, form_in_place, form_into = _OPERATORS[kind.name]
    if out is None:
        made: torch.Tensor = form(x, *rest)
        return made
    if out is x and kind.like_x:
        form_in_place(x, *rest)
    else:
        form_into(x, *rest, out=out)
    return out


def all_reduce(
    x: torch.Tensor,
    group: GroupLike = None,
    reduction: str = "sum",
    out: torch.Tensor | None = None,
    order: str = "ranks",
) -> torch.Tensor:
    """Combine all ranks' tensors, element by element. Collective over the group.

    Args:
        x: Of any shape; the same shape and dtype on all ranks. For the order ``"tree"`` [leaves of this rank, ...].
        group: As for :func:`symmem.resolve_group`. By default, the default process group.
        reduction: ``"sum"``, ``"avg"``, ``"min"`` or ``"max"``; ``"sum"`` or ``"avg"`` for the order ``"tree"``.
        out: Receives the result. Has the shape and dtype of x, and may be x itself. There is no gradient then. For the
            order ``"tree"`` it has the shape of ``x[0]``, and must not overlap with x.
        order: ``"ranks"`` combines in the order of ranks, so the bits depend on the number of ranks. ``"tree"`` adds
            all ranks' leaves as one fixed tree, in float32 (float64 for float64), and rounds once. So the bits are the
            same for every number of ranks that shares the same leaves. Rank r has leaves r * k to r * k + k - 1, where
            k and the number of ranks are powers of two.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    kind = _ALL_REDUCE if order == "ranks" else _in_order(_ALL_REDUCE, order, group, x, out)
    return _call(kind, x, group, out, reduction)


def all_gather(x: torch.Tensor, group: GroupLike = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """All ranks' tensors, in rank order: [world, *x.shape]. Collective over the group.

    Args:
        x: Of any shape; the same shape and dtype on all ranks.
        group: See :func:`all_reduce`.
        out: Receives the result. x may be ``out[rank]``, but must not overlap with it otherwise. There is no gradient
            then.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    return _call(_ALL_GATHER, x, group, out)


def reduce_scatter(
    x: torch.Tensor,
    group: GroupLike = None,
    reduction: str = "sum",
    out: torch.Tensor | None = None,
    order: str = "ranks",
) -> torch.Tensor:
    """Combine all ranks' ``x[rank]``, for this rank. Collective over the group.

    Args:
        x: [world, ...]; the same shape and dtype on all ranks. For the order ``"tree"``
            [leaves of this rank, world, ...].
        group: See :func:`all_reduce`.
        reduction: See :func:`all_reduce`.
        out: Receives the result. Has the shape of ``x[0]``. May be ``x[rank]``, but must not overlap with x otherwise.
            There is no gradient then. For the order ``"tree"`` it has the shape of ``x[0, 0]``, and must not overlap.
        order: See :func:`all_reduce`.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    kind = _REDUCE_SCATTER if order == "ranks" else _in_order(_REDUCE_SCATTER, order, group, x, out)
    return _call(kind, x, group, out, reduction)


def all_to_all(x: torch.Tensor, group: GroupLike = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return rank r's ``x[rank]`` in row r. The result has the shape of x. Collective over the group.

    Args:
        x: [world, ...]; the same shape and dtype on all ranks.
        group: See :func:`all_reduce`.
        out: Receives the result. May be x itself, but must not overlap with it otherwise. There is no gradient then.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    return _call(_ALL_TO_ALL, x, group, out)


def broadcast(x: torch.Tensor, group: GroupLike = None, root: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return rank ``root``'s tensor. Collective over the group.

    Args:
        x: The same shape and dtype on all ranks. Its values are used on ``root`` only.
        group: See :func:`all_reduce`.
        root: A rank of the group.
        out: Receives the result. May be x itself. There is no gradient then.

    Returns:
        ``out``, or a new tensor.

    Raises:
        RankError: ``root`` is not a rank of the group.
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    return _call(_BROADCAST, x, group, out, root)


def _check_one_sided(operation: str, *tensors: object, **integers: object) -> None:
    """Raise InvalidArgumentError for arguments of wrong types. The dispatcher's own errors name no remedy."""
    for tensor in tensors:
        check_dense(tensor, operation)
    for name, value in integers.items():
        check_integer(value, name, operation)


def barrier(x: torch.Tensor | None = None, group: GroupLike = None, channel: int = 0) -> None:
    """Wait for all ranks. Collective over the group. On CUDA, work on the current stream.

    Args:
        x: A tensor in symmetric memory. Stores that ranks made into it before the barrier are visible afterwards. None
            for a barrier on the CPU that orders no memory.
        group: See :func:`all_reduce`.
        channel: ``0 <= channel < 64``, a channel of x. Without x, all ranks must give the same one.

    Raises:
        PeerTimeoutError, PeerLostError: A rank did not come, or died. Names the rank.
    """
    if x is None:
        _barrier_of_no_tensor(group, channel)
    else:
        _check_one_sided("barrier", x, channel=channel)
        torch.ops.symmem.barrier(x, channel, _name(group))


@untraced  # the compiler would leave it out, because no result is used
def _barrier_of_no_tensor(group: GroupLike, channel: int) -> None:
    if in_fake_mode():  # as for fake tensors: the call is local
        return
    try:
        resolved = open_group(group)
        number = check_channel(channel, resolved, "barrier")
    except BaseException as error:
        refuse_in(group, "barrier", error)
        raise
    engine: Any = engine_for(resolved, _CPU)
    engine.barrier(number)


def put(x: torch.Tensor, source: torch.Tensor, peer: int, group: GroupLike = None) -> None:
    """Copy ``source`` to a peer's x. The peer makes no call. See :meth:`symmem.SymmetricTensor.put`."""
    _check_one_sided("put", x, source, peer=peer)
    torch.ops.symmem.put(x, source, peer, _name(group))


def get(x: torch.Tensor, peer: int, group: GroupLike = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Copy a peer's x, to ``out`` if given. The peer makes no call. See :meth:`symmem.SymmetricTensor.get`."""
    _check_one_sided("get", x, *(() if out is None else (out,)), peer=peer)
    name = _name(group)
    if out is None:
        made: torch.Tensor = torch.ops.symmem.get(x, peer, name)
        return made
    torch.ops.symmem.get_out(x, peer, name, out=out)
    return out


def put_signal(x: torch.Tensor, peer: int, channel: int = 0, group: GroupLike = None) -> None:
    """Set this rank's flag at a peer. See :meth:`symmem.SymmetricTensor.put_signal`."""
    _check_one_sided("put_signal", x, peer=peer, channel=channel)
    torch.ops.symmem.put_signal(x, peer, channel, _name(group))


def wait_signal(x: torch.Tensor, peer: int, channel: int = 0, group: GroupLike = None) -> None:
    """Wait for a peer's flag and take it. See :meth:`symmem.SymmetricTensor.wait_signal`."""
    _check_one_sided("wait_signal", x, peer=peer, channel=channel)
    torch.ops.symmem.wait_signal(x, peer, channel, _name(group))
