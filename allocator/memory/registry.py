"""The registry of live symmetric memory: finds the block that holds an address, for ``symmem.find``."""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from symmem.memory.block import Block

__all__ = ["AddressRange", "block_at", "live_ranges", "register", "tables"]


class AddressRange(Protocol):
    """A registered range of memory: a :class:`Block`, or an arena's segment that holds many blocks."""

    @property
    def pointer(self) -> int:
        """Address of the first byte."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    def at(self, address: int) -> Block | None:
        """The block that holds an address in the range."""


# The collector may run at any point below, also while this thread holds the lock. It may then call a `__del__` that
# looks up a tensor. So the lock is reentrant, and the registry is readable after every single step.
_lock = threading.RLock()
_pointers: list[int] = []  # sorted
_sizes: dict[int, int] = {}  # bytes of the ranges by pointer; C reads both, see eager.c
_ranges: dict[int, weakref.ref[AddressRange]] = {}
_collected: deque[tuple[int, weakref.ref[AddressRange]]] = deque()


def _renew_lock() -> None:
    """In a forked child, replace the lock: the child lacks the thread that may have held it at the fork."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def register(memory: AddressRange) -> None:
    """Register a range of memory. It is removed when it is garbage-collected."""
    pointer = memory.pointer
    # The callback only takes a note, because the collector may run in the middle of an insertion here.
    reference = weakref.ref(memory, lambda reference: _collected.append((pointer, reference)))
    with _lock:
        _remove_collected()
        known = pointer in _ranges
        _ranges[pointer], _sizes[pointer] = reference, max(memory.nbytes, 1)
        if not known:
            bisect.insort(_pointers, pointer)


def live_ranges() -> list[AddressRange]:
    """All registered ranges, by address."""
    with _lock:
        _remove_collected()
        found = (_ranges[pointer]() for pointer in _pointers)
        return [memory for memory in found if memory is not None]


def tables() -> tuple[list[int], dict[int, int]]:
    """The sorted pointers of all ranges, and the bytes of each by its pointer. They change, and must only be read."""
    return _pointers, _sizes


def block_at(address: int) -> Block | None:
    """The live block that holds the byte at ``address``. O(log n)."""
    with _lock:
        _remove_collected()
        index = bisect.bisect_right(_pointers, address) - 1
        memory = _ranges[_pointers[index]]() if index >= 0 else None
    if memory is None or address >= memory.pointer + max(memory.nbytes, 1):
        return None
    return memory.at(address)


def _remove_collected() -> None:
    while _collected:
        pointer, reference = _collected.popleft()
        if _ranges.get(pointer) is reference:  # otherwise the address is already in use again
            _pointers.remove(pointer)  # one step, because an index could become stale
            del _ranges[pointer], _sizes[pointer]
