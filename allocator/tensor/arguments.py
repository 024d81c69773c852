"""Checks of the arguments that methods of a symmetric tensor have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from symmem.backends.base import SIGNAL_CHANNELS
from symmem.errors import InvalidArgumentError, RankError
from symmem.memory.layout import integer

if TYPE_CHECKING:
    from symmem.backends.base import Mapping

__all__ = ["check_channel", "check_like", "check_rank", "check_tensor"]


def check_rank(rank: Any, mapping: Mapping, operation: str) -> int:
    """Return ``rank`` as an integer; raise RankError unless it is a rank of the mapping's group."""
    checked = _index(rank, mapping.group.size)
    if checked is not None:
        return checked
    raise RankError(
        f"rank {rank!r} is not in range({mapping.group.size})",
        hint="ranks are numbered within the group that rendezvoused, not globally",
        rank=mapping.group.rank,
        group=mapping.group.name,
        step=operation,
    )


def check_channel(channel: Any, mapping: Mapping, operation: str) -> int:
    """Return ``channel`` as an integer; raise InvalidArgumentError unless the signal pads have it."""
    checked = _index(channel, SIGNAL_CHANNELS)
    if checked is not None:
        return checked
    raise InvalidArgumentError(
        f"channel must be in range({SIGNAL_CHANNELS}), not {channel!r}",
        rank=mapping.group.rank,
        group=mapping.group.name,
        step=operation,
    )


def check_tensor(value: object, operation: str) -> None:
    """Raise InvalidArgumentError unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise InvalidArgumentError(f"{operation} needs a torch.Tensor, not a {type(value).__name__}", step=operation)


def check_like(other: torch.Tensor, tensor: torch.Tensor, operation: str) -> None:
    """Raise InvalidArgumentError unless ``other`` has the shape, dtype and device of ``tensor``."""
    check_tensor(other, operation)
    expected, actual = ((t.shape, t.dtype, t.device) for t in (tensor, other))
    if expected != actual:
        text = "shape {}, dtype {}, device {}"
        raise InvalidArgumentError(
            f"{operation} needs {text.format(*expected)}, not {text.format(*actual)}", step=operation
        )


def _index(value: Any, size: int) -> int | None:
    """Return the value as an int if its type is an integer type and it is in range(size)."""
    try:
        index = integer(value)
    except TypeError:
        return None
    return index if 0 <= index < size else None
