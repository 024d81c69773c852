"""Exceptions of signal handlers, held back while an operation must not be cut short."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["held_back"]

_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""The signals for which programs have handlers that raise."""


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Call the handlers of signals that come in the block after the block. It must not take long.

    Python runs handlers in the main thread alone, so other threads need nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handlers = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        with contextlib.ExitStack() as restore:  # it restores all, although a handler may raise meanwhile
            for number, handler in handlers.items():
                restore.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, frame: came.append((number, frame)))
            yield
    finally:
        for number, frame in came:
            handlers[signal.Signals(number)](number, frame)
