"""Calls functions as soon as a watched process ends, from one thread of this process.

The thread begins with the first function. It exists for code that cannot ask :meth:`ProcessWatch.lost` itself,
such as kernels on the GPU.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

log = logging.getLogger("symmem.group")

__all__ = ["forget", "notify"]

_lock = threading.RLock()  # the garbage collector may call `forget` within
_epoll: select.epoll | None = None
_functions: dict[int, list[Callable[[], object]]] = {}  # by pidfd


def notify(descriptor: int, function: Callable[[], object]) -> None:
    """Call ``function()`` once when the process of a pidfd has ended. :func:`forget` must precede closing it."""
    global _epoll
    with _lock:
        if _epoll is None:
            _epoll = select.epoll()
            threading.Thread(target=_wait, args=(_epoll,), name="symmem-loss-notices", daemon=True).start()
        # Once it has fired, a descriptor stays registered, but fires again only after it is modified.
        change = _epoll.modify if descriptor in _functions else _epoll.register
        change(descriptor, select.EPOLLIN | select.EPOLLONESHOT)
        _functions.setdefault(descriptor, []).append(function)


def forget(descriptor: int) -> None:
    """Call no function for this descriptor any more. Does nothing if there is none."""
    with _lock:
        if _functions.pop(descriptor, None) is not None and _epoll is not None:
            _epoll.unregister(descriptor)


def _wait(epoll: select.epoll) -> None:
    while True:
        for descriptor, _event in epoll.poll():
            with _lock:
                if not _has_ended(descriptor):  # it was closed meanwhile, and its number is another process's now
                    continue
                functions = _functions.get(descriptor, [])
                called, functions[:] = list(functions), []
            for function in called:
                try:
                    function()
                except Exception:
                    log.exception("a callback for the end of a process failed")


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(event & select.POLLIN for _descriptor, event in poll.poll(0))


def _forget_in_child() -> None:
    """A forked child has no such thread. It must not change the parent's registrations, which it shares."""
    global _lock, _epoll
    _lock = threading.RLock()
    _functions.clear()
    if _epoll is not None:
        _epoll.close()
    _epoll = None


os.register_at_fork(after_in_child=_forget_in_child)
