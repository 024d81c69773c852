"""Exceptions of signal handlers and of other threads, held back while an operation must not be cut short."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # the functions of `signal` convert to enums, and take 10 times as long
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from symmem.errors import SymmemError

__all__ = ["held_back", "to_the_end"]

_SIGNALS = tuple(
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""The signals for which programs have handlers that raise."""

_MOST_TRIES = 8


def to_the_end(step: Callable[[], object]) -> BaseException | None:
    """Call a step again after every exception that comes from outside, until it has ended.

    Python code can raise an exception in another thread (``PyThreadState_SetAsyncExc``), between any two instructions.

    Args:
        step: It raises OSError, EOFError and SymmemError itself. After another exception, it goes on where it was.

    Returns:
        The last exception from outside, for the caller to raise; None if none came.
    """
    interrupt = None
    for tries in range(_MOST_TRIES):
        try:
            step()
            break
        except (OSError, EOFError, SymmemError):
            raise
        except BaseException as error:
            if tries == _MOST_TRIES - 1:
                raise
            interrupt = error
    return interrupt


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Call the handlers of signals that come in the block after the block. It must not take long.

    Python runs handlers in the main thread alone, so other threads need nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handlers = {number: handler for number in _SIGNALS if callable(handler := _signal.getsignal(number))}
    try:
        with contextlib.ExitStack() as restore:  # it restores all, although a handler may raise meanwhile
            for number, handler in handlers.items():
                restore.callback(_signal.signal, number, handler)
                _signal.signal(number, lambda number, frame: came.append((number, frame)))
            yield
    finally:
        for number, frame in came:
            handlers[number](number, frame)
