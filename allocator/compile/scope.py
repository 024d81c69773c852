"""Whether what is compiled now is ours to place, and who is told of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from symmem.compile.report import GraphReport

__all__ = ["is_on", "listeners", "seen", "turn", "within"]

listeners: list[Callable[[GraphReport], None]] = []
"""Are told of each graph with registered operators, when it was compiled or came out of a cache."""

seen: set[str] = set()
"""Names of the operators in graphs that were compiled while the hook was on."""

_state = threading.local()
_everywhere = False


def is_on() -> bool:
    """Whether what is compiled now, on this thread, is ours to place."""
    return _everywhere or getattr(_state, "depth", 0) > 0


def turn(on: bool) -> None:
    """Switch it on or off for all threads."""
    global _everywhere
    _everywhere = on


@contextlib.contextmanager
def within() -> Iterator[None]:
    """Switched on, on this thread."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1
