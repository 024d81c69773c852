"""Checks of the arguments that methods of a symmetric tensor and operators have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from symmem.backends.base import SIGNAL_CHANNELS
from symmem.errors import InvalidArgumentError, RankError
from symmem.memory.layout import Layout, integer
from symmem.tensor.block_handle import BlockHandle

if TYPE_CHECKING:
    from symmem.backends.base import Mapping, RankGroup

__all__ = [
    "check_channel",
    "check_dense",
    "check_flag",
    "check_integer",
    "check_like",
    "check_memory",
    "check_name",
    "check_rank",
    "check_tensor",
    "check_written",
]


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


def check_channel(channel: Any, group: RankGroup, operation: str) -> int:
    """Return ``channel`` as an integer; raise InvalidArgumentError unless signal pads have it."""
    checked = _index(channel, SIGNAL_CHANNELS)
    if checked is not None:
        return checked
    raise InvalidArgumentError(
        f"channel must be in range({SIGNAL_CHANNELS}), not {channel!r}",
        rank=group.rank,
        group=group.name,
        step=operation,
    )


def check_tensor(value: object, operation: str) -> None:
    """Raise InvalidArgumentError unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise InvalidArgumentError(
            f"{operation} needs a torch.Tensor, not a {type(value).__name__}", hint=_instead_of(value), step=operation
        )


def check_dense(value: object, operation: str) -> None:
    """Raise InvalidArgumentError unless ``value`` is a tensor with one plain memory, for example not a DTensor."""
    check_tensor(value, operation)
    tensor: Any = value
    if hasattr(tensor, "to_local"):
        kind, hint = f"a {type(tensor).__name__}", "pass its to_local(), the part of this rank"
    elif tensor.is_nested:
        kind, hint = "a nested tensor", "pass its values(), or a padded tensor"
    elif tensor.is_quantized:
        kind, hint = f"a quantized tensor of {tensor.dtype}", "pass its int_repr(), or dequantize() it"
    elif tensor.layout is not torch.strided:
        kind, hint = f"a tensor of {tensor.layout}", "pass its to_dense()"
    else:
        return
    raise InvalidArgumentError(f"{operation} needs a dense tensor, not {kind}", hint=hint, step=operation)


def check_written(tensor: torch.Tensor, name: str) -> None:
    """Raise InvalidArgumentError if elements of a tensor to be written share memory."""
    if not tensor.is_contiguous() and Layout.of(tensor, 0).overlaps:
        raise InvalidArgumentError(
            f"elements of {name} share memory, so results would overwrite one another",
            hint="pass a tensor that was not expanded",
        )


def check_memory(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor with a storage that was freed, because a kernel would read or write address 0.

    Raises:
        InvalidArgumentError: It is such a tensor.
    """
    if not tensor.data_ptr() and tensor.numel():
        raise InvalidArgumentError(
            f"{name} has no memory, because its storage was resized to 0 bytes",
            hint="FSDP frees parameters like this: make the call while they are gathered",
        )


def _instead_of(value: object) -> str:
    """Return the hint for a value that is given where a tensor is expected; empty if there is none."""
    kind = type(value)
    if isinstance(value, BlockHandle):
        return "pass its .tensor"
    if kind.__module__.partition(".")[0] == "numpy":
        return "pass torch.from_numpy(array)"
    if isinstance(value, list | tuple | int | float | complex):
        return "pass torch.tensor(...) of it"
    if kind.__name__ in ("Group", "ProcessGroup", "DeviceMesh"):
        return "pass the group by its keyword, group="
    return ""


def check_flag(value: object, name: str, operation: str) -> bool:
    """Return ``value``; raise InvalidArgumentError unless it is True or False."""
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} must be True, False or None, not {value!r}", step=operation)
    return value


def check_name(value: object, name: str, operation: str) -> None:
    """Raise InvalidArgumentError unless ``value`` is a text."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a str, not {value!r}", step=operation)


def check_integer(value: Any, name: str, operation: str) -> None:
    """Raise InvalidArgumentError unless ``value`` is an integer; a symbolic one passes."""
    try:
        integer(value) if not isinstance(value, torch.SymInt) else None
    except TypeError:
        raise InvalidArgumentError(f"{name} must be an integer, not {value!r}", step=operation) from None


def check_like(other: torch.Tensor, tensor: torch.Tensor, operation: str) -> None:
    """Raise InvalidArgumentError unless ``other`` has the shape, dtype and device of ``tensor``."""
    if type(other) is not torch.Tensor:
        check_dense(other, operation)
    try:
        same = other.shape == tensor.shape and other.dtype == tensor.dtype and other.device == tensor.device
    except RuntimeError:  # a nested tensor has no shape
        check_dense(other, operation)
        raise
    if not same:
        check_dense(other, operation)
        text = "shape {}, dtype {}, device {}"
        expected, actual = ((t.shape, t.dtype, t.device) for t in (tensor, other))
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
