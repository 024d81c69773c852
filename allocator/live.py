"""Live symmetric memory: what is known of each piece, and which piece holds an address (``symmem.find``)."""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from symmem.backends.base import Allocation, Mapping
    from symmem.group import Group
    from symmem.layout import Layout

__all__ = ["Block", "block_at", "record"]


@dataclass(eq=False)
class Block:
    """One piece of symmetric memory; its handles, and all tensors over it, refer to it and keep it alive.

    Attributes:
        allocation: The memory.
        layout: What was asked for.
        mappings: Every rank's memory, by the group that rendezvoused, the first one first.
        compared: The layouts that all ranks of a group are known to share.
        process: Where it was allocated; a forked child is no rank.
        closed: Whether a handle was closed.
    """

    allocation: Allocation
    layout: Layout
    mappings: dict[Group, Mapping] = field(default_factory=dict)
    compared: set[tuple[Group, Layout]] = field(default_factory=set)
    process: int = field(default_factory=os.getpid)
    closed: bool = False

    def close(self) -> None:
        """Let go of peers' memory; the own memory goes with the last reference."""
        self.closed = True
        self.mappings.clear()
        self.compared.clear()


# The collector may run anywhere, also in the middle of what is done here under the lock, and with it a `__del__` that
# looks up a tensor: thus a lock that its holder may take again, and an order of steps that leaves the book readable.
_lock = threading.RLock()
_pointers: list[int] = []  # sorted
_blocks: dict[int, weakref.ref[Block]] = {}
_collected: deque[tuple[int, weakref.ref[Block]]] = deque()


def _renew_lock() -> None:
    """In a forked child: the thread that held the lock at the fork is not there to release it."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def record(block: Block) -> None:
    """Enter a block into the book; it leaves by itself when it is collected."""
    pointer = block.allocation.pointer
    # A note only: the collector may run in the middle of an insertion here.
    reference = weakref.ref(block, lambda reference: _collected.append((pointer, reference)))
    with _lock:
        _drop_collected()
        known = pointer in _blocks
        _blocks[pointer] = reference
        if not known:
            bisect.insort(_pointers, pointer)


def block_at(address: int) -> Block | None:
    """The live block that holds the byte at ``address``. O(log n)."""
    with _lock:
        _drop_collected()
        index = bisect.bisect_right(_pointers, address) - 1
        block = _blocks[_pointers[index]]() if index >= 0 else None
    if block is None or address >= block.allocation.pointer + max(block.allocation.nbytes, 1):
        return None
    return block


def _drop_collected() -> None:
    while _collected:
        pointer, reference = _collected.popleft()
        if _blocks.get(pointer) is reference:  # else the address is in use again already
            _pointers.remove(pointer)  # in one step: an index could be stale by the time it is used
            del _blocks[pointer]
