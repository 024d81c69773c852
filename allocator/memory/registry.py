"""Live symmetric memory: what is known of each piece, and which piece holds an address (``symmem.find``)."""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Protocol

from symmem.backends.base import tensor_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from symmem.backends.base import Allocation, Mapping, Signals
    from symmem.group.group import Group
    from symmem.memory.call_site import Site
    from symmem.memory.layout import Layout

__all__ = ["Block", "Piece", "block_at", "pieces", "record"]


class Block:
    """One piece of symmetric memory; its handles, and all tensors over it, refer to it and keep it alive.

    Args:
        allocation: The backend's memory that it lies in.
        layout: What was asked for; its offset counts from the beginning of the block, as all layouts do.
        offset: Bytes from the beginning of the allocation.
        nbytes: Bytes of the block; by default, of the whole allocation.
        site: Where in the program it was allocated; of a part of an arena, the arena knows, and so for ``name``.
        name: What the program calls it.

    Attributes:
        pointer: Address of its first byte in this process.
        mappings: Every rank's memory, by the group that rendezvoused.
        first: The group that has met for it first, which is the one that is meant where none is named; None before.
        compared: What all ranks of a group are known to share: the group, for the layout of the block itself, or the
            group and another layout.
        process: Where it was allocated; a forked child is no rank.
        closed: Whether a handle was closed.
    """

    __slots__ = (
        "__weakref__",
        "allocation",
        "closed",
        "compared",
        "first",
        "layout",
        "mappings",
        "name",
        "nbytes",
        "offset",
        "pointer",
        "process",
        "site",
    )

    def __init__(
        self,
        allocation: Allocation,
        layout: Layout,
        offset: int = 0,
        nbytes: int | None = None,
        site: Site | None = None,
        name: str | None = None,
    ) -> None:
        self.allocation, self.layout, self.offset = allocation, layout, offset
        self.site, self.name = site, name
        self.nbytes = allocation.nbytes if nbytes is None else nbytes
        self.pointer = allocation.pointer + offset
        # Both are replaced, never changed: blocks of an arena begin with the same ones.
        self.mappings: dict[Group, Mapping] = {}
        self.compared: frozenset[Group | tuple[Group, Layout]] = frozenset()
        self.first: Group | None = None
        self.process = _process
        self.closed = False

    @property
    def end(self) -> int:
        """Bytes from the beginning of the allocation to the end of the block."""
        return self.offset + self.nbytes

    @property
    def groups(self) -> list[Group]:
        """The groups that have rendezvoused it, the first one first; that of an arena has for all of its tensors."""
        return sorted(self.mappings, key=lambda group: group is not self.first)

    @property
    def inherited(self) -> bool:
        """Whether this process was forked after it was allocated."""
        return self.process != _process

    def at(self, address: int) -> Block | None:
        """The block that holds an address within this one: this."""
        return self

    def tensor(self) -> torch.Tensor:
        """Its memory on this rank as a uint8 tensor of shape [nbytes], which keeps it alive."""
        return tensor_at(self.pointer, self.nbytes, self.allocation.device, self)

    def part(self, memory: torch.Tensor) -> torch.Tensor:
        """Of a uint8 tensor over an allocation like this one's, the bytes of the block."""
        return memory[self.offset : self.end]

    def mapping_for(self, group: Group) -> Mapping | None:
        """Every rank's memory, if the group has met for it, or for memory that it is part of."""
        return self.mappings.get(group)

    @property
    def home(self) -> tuple[str, int, int] | None:
        """The group whose arena it is part of: its name, its size, and this rank in it; None for memory of its own."""
        return None

    def dropped_pads(self, group: Group) -> list[int] | None:
        """Slots of tensors that this rank has dropped, whose signal pads for a group are still taken.

        None if the group's signals have their pads from the mapping; then the two methods below are not called.
        """
        return None

    def free_pads(self, group: Group, slots: Sequence[int]) -> None:
        """Free the pads of tensors that all ranks of a group have dropped."""

    def pad_for(self, group: Group) -> int:
        """Offset of the signal pad that this rank provides for a group; taken when it is first asked for."""
        raise NotImplementedError

    def enter(self, group: Group, mapping: Mapping, pads: Sequence[int]) -> None:
        """A group has met; ``pads`` is what each rank provides, if anything."""
        self.mappings = {**self.mappings, group: mapping}

    def signals(self, mapping: Mapping) -> Signals:
        """Who signals for it, within the group of one of its mappings."""
        return mapping

    def key(self, group: Group, layout: Layout) -> Group | tuple[Group, Layout]:
        """How it is entered in ``compared``."""
        return group if layout is self.layout else (group, layout)

    def close(self) -> None:
        """Let go of peers' memory; the own memory goes with the last reference."""
        self.closed = True
        self.mappings, self.compared = {}, frozenset()


class Piece(Protocol):
    """What the book knows: a :class:`Block`, or a range of memory that holds many."""

    @property
    def pointer(self) -> int:
        """Address of its first byte."""

    @property
    def nbytes(self) -> int:
        """Bytes of it."""

    def at(self, address: int) -> Block | None:
        """The block that holds an address within it."""


_process = os.getpid()


# The collector may run anywhere, also in the middle of what is done here under the lock, and with it a `__del__` that
# looks up a tensor: thus a lock that its holder may take again, and an order of steps that leaves the book readable.
_lock = threading.RLock()
_pointers: list[int] = []  # sorted
_blocks: dict[int, weakref.ref[Piece]] = {}
_collected: deque[tuple[int, weakref.ref[Piece]]] = deque()


def _renew_lock() -> None:
    """In a forked child: the thread that held the lock at the fork is not there to release it."""
    global _lock, _process
    _lock, _process = threading.RLock(), os.getpid()


os.register_at_fork(after_in_child=_renew_lock)


def record(piece: Piece) -> None:
    """Enter a piece of memory into the book; it leaves by itself when it is collected."""
    pointer = piece.pointer
    # A note only: the collector may run in the middle of an insertion here.
    reference = weakref.ref(piece, lambda reference: _collected.append((pointer, reference)))
    with _lock:
        _drop_collected()
        known = pointer in _blocks
        _blocks[pointer] = reference
        if not known:
            bisect.insort(_pointers, pointer)


def pieces() -> list[Piece]:
    """All live pieces, by address."""
    with _lock:
        _drop_collected()
        found = (_blocks[pointer]() for pointer in _pointers)
        return [piece for piece in found if piece is not None]


def block_at(address: int) -> Block | None:
    """The live block that holds the byte at ``address``. O(log n)."""
    with _lock:
        _drop_collected()
        index = bisect.bisect_right(_pointers, address) - 1
        piece = _blocks[_pointers[index]]() if index >= 0 else None
    if piece is None or address >= piece.pointer + max(piece.nbytes, 1):
        return None
    return piece.at(address)


def _drop_collected() -> None:
    while _collected:
        pointer, reference = _collected.popleft()
        if _blocks.get(pointer) is reference:  # else the address is in use again already
            _pointers.remove(pointer)  # in one step: an index could be stale by the time it is used
            del _blocks[pointer]
