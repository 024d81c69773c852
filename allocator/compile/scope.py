"""Whether the hook is on, per thread and for all threads, and the listeners for reports."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from symmem.compile.report import GraphReport

__all__ = ["is_on", "listeners", "seen", "turn", "within"]

listeners: list[Callable[[GraphReport], None]] = []
"""Called with the report of every graph with registered operators, compiled or loaded from a cache."""

seen: set[str] = set()
"""Names of operators in the graphs that were compiled while the hook was on."""

_state = threading.local()
_everywhere = False


def is_on() -> bool:
    """Whether the hook is on for this thread."""
    return _everywhere or getattr(_state, "depth", 0) > 0


def turn(on: bool) -> None:
    """Switch the hook on or off for all threads."""
    global _everywhere
    _everywhere = on


@contextlib.contextmanager
def within() -> Iterator[None]:
    """Switch the hook on for this thread within the block."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1
