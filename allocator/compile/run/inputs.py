"""Arguments of compiled code in memory that the compiler does not own: which ones the ranks use where they lie.

What all ranks have agreed on is used as it is, for as long as its address stays; all else is copied.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from symmem.config.settings import load_settings
from symmem.group.group import Group
from symmem.memory.block import Block
from symmem.memory.registry import block_at

__all__ = ["CHANGES", "Input", "Made", "block_of", "nothing"]

log = logging.getLogger("symmem.compile")

CHANGES = 8
"""How often the address of an input in symmetric memory may change before it is copied from then on."""


class Made(NamedTuple):
    """One persistent buffer, as it was last asked for.

    Attributes:
        sizes: Of the tensor.
        strides: Of the tensor, in elements.
        tensor: The tensor itself.
        capacity: Elements of its memory.
        keep: Whether a CUDA graph may go on using it: see :class:`symmem.compile.run.graph.Buffer`.
    """

    sizes: Sequence[int]
    strides: Sequence[int]
    tensor: torch.Tensor
    capacity: int
    keep: bool


class Input:
    """One place in a graph where an argument comes from memory that the compiler does not own.

    Attributes:
        copying: Whether it is copied at each call: from the first one on that the ranks did not all come with the same
            piece of symmetric memory.
        copy: Where to, once nothing else is to be asked before.
        address: Of the argument that all ranks agreed on last; it is used as it is.
        block: The memory that it lies in, while it is there. None at all if the ranks compare at each call.
        changes: How often the ranks have agreed on an address.
        each: Whether the ranks compare at each call.
    """

    __slots__ = ("address", "block", "changes", "copy", "copying", "each")

    def __init__(self, group: Group, copying: bool) -> None:
        self.copying, self.address, self.changes = copying, 0, 0
        self.copy: Made | None = None
        self.block: Callable[[], object] = nothing
        self.each = load_settings(group=group.name).allocation_check == "each"

    def agree(self, tensor: torch.Tensor, group: Group, place: str) -> bool:
        """Whether the argument is the same piece of symmetric memory on all ranks. Collective over the group."""
        block = block_of(tensor, group)
        identity = repr(_identity(block, tensor, group)).encode()
        with group.collective(place) as collective:
            received = [each.payload for each in collective.exchange("where the argument lies", identity)]
        self.changes += 1
        alike = block is not None and len(set(received)) == 1
        if not alike or (self.changes > CHANGES and not self.each):
            self.copying, self.block = True, nothing
            log.debug("%s: copied from now on, %s", place, "its address changes" if alike else "not alike on all ranks")
            return False
        assert block is not None
        if not self.each:
            self.address, self.block = tensor.data_ptr(), weakref.ref(block)
        return True


def nothing() -> None:
    """What a weak reference says of something that is gone."""


def block_of(tensor: torch.Tensor, group: Group) -> Block | None:
    """The symmetric memory that a tensor lies in, if the group has met for it."""
    block = block_at(tensor.data_ptr())
    if block is None or block.closed or block.allocation.device != tensor.device or not block.mapping_for(group):
        return None
    return block


def _identity(block: Block | None, tensor: torch.Tensor, group: Group) -> Any:
    """What is the same on all ranks of symmetric memory, and of nothing else."""
    if block is None:
        return None
    mapping = block.mapping_for(group)
    assert mapping is not None
    within = tensor.data_ptr() - block.allocation.pointer
    return mapping.serial, within, tuple(tensor.shape), tensor.stride(), str(tensor.dtype)
