"""The threads of this process that wait for a signal of another rank, for inspection from outside."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from symmem.backends.base import RankGroup
from symmem.errors import SymmemError

__all__ = ["Wait", "forget", "note", "waits"]


class Wait(NamedTuple):
    """A wait of a thread or a kernel.

    Attributes:
        group: The group.
        step: The operation that waits.
        missing: Returns the ranks that it waits for now. Any thread may call it.
        began: The time when it was recorded, by ``time.monotonic``.
        deadline: The time when it gives up.
        thread: ``threading.get_ident()`` of the thread; 0 for a kernel.
        device: The GPU of a kernel.
    """

    group: RankGroup
    step: str
    missing: Callable[[], tuple[int, ...]]
    began: float
    deadline: float
    thread: int
    device: str | None = None


publish: Callable[[Wait], Callable[[], None]] | None = None
"""Shows a wait to the other ranks, and returns the function that ends this; see :mod:`symmem.group.ledger`."""

told: Callable[[Wait], SymmemError | None] | None = None
"""Returns the error with which all ranks end a wait early, if there is one; see :mod:`symmem.group.sync_points`."""

_waits: dict[int, Wait] = {}  # by id of the wait: a signal handler may wait during a wait
_ends: dict[int, Callable[[], None]] = {}


def note(group: RankGroup, step: str, missing: Callable[[], tuple[int, ...]], deadline: float) -> Wait:
    """Record a wait of this thread. :func:`forget` must follow."""
    wait = Wait(group, step, missing, time.monotonic(), deadline, threading.get_ident())
    _waits[id(wait)] = wait
    if publish is not None:
        _ends[id(wait)] = publish(wait)
    return wait


def forget(wait: Wait) -> None:
    """Remove a wait that is over."""
    _waits.pop(id(wait), None)  # a fork may have cleared it
    if (end := _ends.pop(id(wait), None)) is not None:
        end()


def waits() -> list[Wait]:
    """The waits of all threads. Takes no lock."""
    return list(_waits.values())


os.register_at_fork(after_in_child=_waits.clear)
os.register_at_fork(after_in_child=_ends.clear)
