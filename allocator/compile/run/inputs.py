"""Arguments of compiled code in memory that the compiler did not allocate.

An argument is used in place at every address on which all ranks have agreed. Otherwise it is copied.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from symmem.compile.records import Usage
from symmem.config.settings import load_settings
from symmem.group.group import Group
from symmem.group.sync_points import SyncPoints
from symmem.memory.block import Block
from symmem.memory.registry import block_at

__all__ = ["MAX_ADDRESS_CHANGES", "Input", "PersistentBuffer", "block_of", "dead_reference"]

log = logging.getLogger("symmem.compile")

MAX_ADDRESS_CHANGES = 32
"""An input in symmetric memory is copied, until the ranks compare again, if more calls in a row pass new addresses."""

MAX_ADDRESSES = 32
"""Addresses that are remembered per input."""


class PersistentBuffer(NamedTuple):
    """A persistent buffer of a graph, with the shape of the last call.

    Attributes:
        sizes: Sizes of the tensor.
        strides: Strides of the tensor, in elements.
        tensor: The tensor.
        capacity: Number of elements that fit into its memory.
        keep: Whether outgrown memory stays allocated: see :class:`symmem.compile.records.BufferRecord`.
    """

    sizes: Sequence[int]
    strides: Sequence[int]
    tensor: torch.Tensor
    capacity: int
    keep: bool


class Input:
    """An argument of a graph in memory that the compiler did not allocate.

    Attributes:
        copying: Whether the argument is copied: always, or until the ranks agree when they compare again.
        always: Whether it is always copied.
        copy: The buffer for the copy, once nothing has to be checked before copying.
        address: The only address on which all ranks agreed. An argument at this address is used in place. 0 if there
            are several addresses, or none.
        block: Weak reference to the block at that address. It is dead if the ranks compare at every call.
        agreed: All addresses on which the ranks agreed, oldest first: weak references to the blocks, and numbers that
            are the same on all ranks.
        points: The synchronisation points of the group; None before the ranks agreed first, or on several hosts.
        usage: Counts how often it was used in place and copied.
        changes: In how many calls in a row the ranks have compared.
        compare_always: Whether the ranks compare at every call.
    """

    __slots__ = (
        "address",
        "agreed",
        "always",
        "block",
        "changes",
        "compare_always",
        "copy",
        "copying",
        "count",
        "points",
        "usage",
    )

    def __init__(self, group: Group, copying: bool, usage: Usage) -> None:
        self.usage = usage
        self.copying = self.always = copying
        self.address = self.changes = self.count = 0
        self.agreed: dict[int, tuple[Callable[[], object], int]] = {}
        self.points: SyncPoints | None = None
        self.copy: PersistentBuffer | None = None
        self.block: Callable[[], object] = dead_reference
        self.compare_always = load_settings(group=group.name).allocation_check == "each"

    def agree(self, tensor: torch.Tensor, group: Group, label: str) -> bool:
        """Whether the argument is the same piece of symmetric memory on all ranks. Collective over the group."""
        block = block_of(tensor, group)
        identity = repr(_identity(block, tensor, group)).encode()
        with group.collective(label) as collective:
            received = [answer.payload for answer in collective.exchange("position of the argument", identity)]
        self.changes = 1 if self.copying else self.changes + 1
        same = block is not None and len(set(received)) == 1
        if not same or (self.changes > MAX_ADDRESS_CHANGES and not self.compare_always):
            self.copying, self.address, self.block = True, 0, dead_reference
            self.agreed.clear()
            why = "its address keeps changing" if same else "it is not the same on all ranks"
            log.debug("%s: copied until the ranks compare again, because %s", label, why)
            return False
        assert block is not None
        self.copying, self.copy = False, None
        if not self.compare_always:
            self.points = group.sync_points
            self._remember(tensor.data_ptr(), weakref.ref(block))
        return True

    def _remember(self, address: int, block: Callable[[], object]) -> None:
        """Remember an address. Ranks that cannot compare without a message remember only one."""
        if self.points is None:
            self.agreed.clear()
        self.agreed.pop(address, None)
        self.count += 1
        self.agreed[address] = block, self.count
        if len(self.agreed) > MAX_ADDRESSES:
            del self.agreed[next(iter(self.agreed))]
        self.address, self.block = (address, block) if len(self.agreed) == 1 else (0, dead_reference)


def dead_reference() -> None:
    """Stands for a weak reference to a deleted object."""


def block_of(tensor: torch.Tensor, group: Group) -> Block | None:
    """The block that holds a tensor; None if the tensor is not in symmetric memory with a rendezvous for the group."""
    block = block_at(tensor.data_ptr())
    if block is None or block.closed or block.allocation.device != tensor.device or not block.mapping_for(group):
        return None
    return block


def _identity(block: Block | None, tensor: torch.Tensor, group: Group) -> Any:
    """A value that is the same on all ranks only if the tensor is the same piece of symmetric memory."""
    if block is None:
        return None
    mapping = block.mapping_for(group)
    assert mapping is not None
    offset = tensor.data_ptr() - block.allocation.pointer
    return mapping.serial, offset, tuple(tensor.shape), tensor.stride(), str(tensor.dtype)
