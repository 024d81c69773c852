"""The collective operators as functions that take any group: ``symmem.ops.all_reduce(x, group)``.

They call ``torch.ops.symmem.*``; see :mod:`symmem.ops.collectives` and :mod:`symmem.ops.one_sided` for shapes, dtypes
and errors. In code that is compiled, name the group by a text, or leave it out.
"""

from __future__ import annotations

import torch

import symmem.ops.collectives
import symmem.ops.one_sided  # noqa: F401  # both define the operators
from symmem.group import GroupLike
from symmem.ops.engines import name_of

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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name(group: GroupLike) -> str:
    return group if isinstance(group, str) else name_of(group)


def all_reduce(
    x: torch.Tensor, group: GroupLike = None, reduction: str = "sum", out: torch.Tensor | None = None
) -> torch.Tensor:
    """Combine all ranks' tensors, element by element. Collective over the group.

    Args:
        x: Of any shape; the same shape and dtype on all ranks.
        group: As for :func:`symmem.resolve_group`; default the default process group.
        reduction: ``"sum"``, ``"avg"``, ``"min"`` or ``"max"``.
        out: Takes the result, of the shape and dtype of x; may be x itself. There is no gradient then.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    name = _name(group)
    if out is None:
        made: torch.Tensor = torch.ops.symmem.all_reduce(x, reduction, name)
        return made
    if out is x:
        torch.ops.symmem.all_reduce_(x, reduction, name)
    else:
        torch.ops.symmem.all_reduce_out(x, reduction, name, out=out)
    return out


def all_gather(x: torch.Tensor, group: GroupLike = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """All ranks' tensors, in rank order: [world, *x.shape]. Collective over the group.

    Args:
        x: Of any shape; the same shape and dtype on all ranks.
        group: See :func:`all_reduce`.
        out: Takes the result; must not share memory with x. There is no gradient then.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    name = _name(group)
    if out is None:
        made: torch.Tensor = torch.ops.symmem.all_gather(x, name)
        return made
    torch.ops.symmem.all_gather_out(x, name, out=out)
    return out


def reduce_scatter(
    x: torch.Tensor, group: GroupLike = None, reduction: str = "sum", out: torch.Tensor | None = None
) -> torch.Tensor:
    """Combine all ranks' ``x[rank]``, of this rank. Collective over the group.

    Args:
        x: [world, ...]; the same shape and dtype on all ranks.
        group: See :func:`all_reduce`.
        reduction: See :func:`all_reduce`.
        out: Takes the result, of the shape of ``x[0]``; must not share memory with x. There is no gradient then.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    name = _name(group)
    if out is None:
        made: torch.Tensor = torch.ops.symmem.reduce_scatter(x, reduction, name)
        return made
    torch.ops.symmem.reduce_scatter_out(x, reduction, name, out=out)
    return out


def all_to_all(x: torch.Tensor, group: GroupLike = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rank r's ``x[rank]`` as row r of the result, of the shape of x. Collective over the group.

    Args:
        x: [world, ...]; the same shape and dtype on all ranks.
        group: See :func:`all_reduce`.
        out: Takes the result; x itself, or apart from it. There is no gradient then.

    Returns:
        ``out``, or a new tensor.

    Raises:
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    name = _name(group)
    if out is None:
        made: torch.Tensor = torch.ops.symmem.all_to_all(x, name)
        return made
    if out is x:
        torch.ops.symmem.all_to_all_(x, name)
    else:
        torch.ops.symmem.all_to_all_out(x, name, out=out)
    return out


def broadcast(x: torch.Tensor, group: GroupLike = None, root: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rank ``root``'s tensor. Collective over the group.

    Args:
        x: The same shape and dtype on all ranks; what it holds counts on ``root`` only.
        group: See :func:`all_reduce`.
        root: A rank of the group.
        out: Takes the result; may be x itself. There is no gradient then.

    Returns:
        ``out``, or a new tensor.

    Raises:
        RankError: ``root`` is not a rank of the group.
        InvalidArgumentError, MismatchError, PeerTimeoutError, PeerLostError: See :mod:`symmem.ops.collectives`.
    """
    name = _name(group)
    if out is None:
        made: torch.Tensor = torch.ops.symmem.broadcast(x, root, name)
        return made
    if out is x:
        torch.ops.symmem.broadcast_(x, root, name)
    else:
        torch.ops.symmem.broadcast_out(x, root, name, out=out)
    return out


def barrier(x: torch.Tensor | None = None, group: GroupLike = None, channel: int = 0) -> None:
    """Wait for all ranks. Collective over the group. On CUDA, work on the current stream.

    Args:
        x: A tensor in symmetric memory, whose barrier it is: what ranks stored into it before is visible afterwards.
            None for a barrier that orders nothing but itself, on the CPU. In compiled code it must be given.
        group: See :func:`all_reduce`.
        channel: ``0 <= channel < 64``, of x.

    Raises:
        PeerTimeoutError, PeerLostError: Names the rank that did not come, or died.
    """
    name = _name(group)
    if x is None:
        torch.ops.symmem.all_reduce_(torch.zeros(1), "sum", name)
    else:
        torch.ops.symmem.barrier(x, channel, name)


def put(x: torch.Tensor, source: torch.Tensor, peer: int, group: GroupLike = None) -> None:
    """Copy ``source`` to a peer's x; the peer does nothing. See :meth:`symmem.SymmetricTensor.put`."""
    torch.ops.symmem.put(x, source, peer, _name(group))


def get(x: torch.Tensor, peer: int, group: GroupLike = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """A copy of a peer's x, in ``out`` if given; the peer does nothing. See :meth:`symmem.SymmetricTensor.get`."""
    name = _name(group)
    if out is None:
        made: torch.Tensor = torch.ops.symmem.get(x, peer, name)
        return made
    torch.ops.symmem.get_out(x, peer, name, out=out)
    return out


def put_signal(x: torch.Tensor, peer: int, channel: int = 0, group: GroupLike = None) -> None:
    """Set this rank's flag at a peer. See :meth:`symmem.SymmetricTensor.put_signal`."""
    torch.ops.symmem.put_signal(x, peer, channel, _name(group))


def wait_signal(x: torch.Tensor, peer: int, channel: int = 0, group: GroupLike = None) -> None:
    """Wait for a peer's flag and take it. See :meth:`symmem.SymmetricTensor.wait_signal`."""
    torch.ops.symmem.wait_signal(x, peer, channel, _name(group))
