"""Which threads of this process wait for another rank's signal: for whoever looks from outside."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from symmem.backends.base import Group

__all__ = ["Wait", "forget", "note", "waits"]


class Wait(NamedTuple):
    """A thread that waits, or a kernel.

    Attributes:
        group: Of whose ranks.
        step: Names what for.
        missing: Ranks that it waits for, at the moment; any thread may ask.
        began: When it was noted, by ``time.monotonic``.
        deadline: When it gives up.
        thread: Its ``threading.get_ident()``; 0 if a kernel waits.
        device: The GPU, if a kernel waits there.
    """

    group: Group
    step: str
    missing: Callable[[], tuple[int, ...]]
    began: float
    deadline: float
    thread: int
    device: str | None = None


_waits: dict[int, Wait] = {}  # by identity: a signal handler may wait within a wait


def note(group: Group, step: str, missing: Callable[[], tuple[int, ...]], deadline: float) -> Wait:
    """Enter a wait of this thread; :func:`forget` must follow."""
    wait = Wait(group, step, missing, time.monotonic(), deadline, threading.get_ident())
    _waits[id(wait)] = wait
    return wait


def forget(wait: Wait) -> None:
    """It is over."""
    _waits.pop(id(wait), None)  # in a forked child it is gone already


def waits() -> list[Wait]:
    """All threads that wait. Takes no lock."""
    return list(_waits.values())


os.register_at_fork(after_in_child=_waits.clear)
