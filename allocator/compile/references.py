"""Which graph the generated code of a module means: that of the compiled function which is running on this thread."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from symmem.compile.runtime import Graph
from symmem.errors import UnsupportedError

__all__ = ["Reference", "bound", "reference"]


class Reference(threading.local):
    """For generated code: the graph that is running now, of those that were compiled to this code.

    The same code may come out of a cache several times, and torch loads it as one module. Each compiled function has a
    graph of its own all the same: if they shared one, whether it is there still would depend on when the collector ran
    on a rank, and ranks would allocate differently.

    Attributes:
        running: The graph.
    """

    def __init__(self) -> None:
        self.running = Graph()  # for a call from outside of a compiled function: nothing persists for long


# The module that was generated holds its reference, and so does a function that runs with it.
_references: weakref.WeakValueDictionary[str, Reference] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def reference(name: str) -> Reference:
    """The one reference of a name."""
    with _lock:
        return _references.setdefault(name, Reference())


def bound(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A compiled function that runs with a graph of its own, and keeps it alive.

    Args:
        function: Of generated code.
        name: By which that code calls its graph.

    Raises:
        UnsupportedError: It is called by an operator that it calls itself.
    """
    known, graph, turn, owner = reference(name), Graph(), threading.Lock(), 0

    @functools.wraps(function)
    def call(inputs: Any) -> Any:
        nonlocal owner
        thread = threading.get_ident()
        if owner == thread:
            raise UnsupportedError(
                "a compiled function with registered operators is called within its own call, and would overwrite "
                "its buffers in symmetric memory",
                hint="let the operator that calls it call another function, compiled by itself",
            )
        with turn:
            owner, before = thread, known.running
            known.running = graph
            try:
                return function(inputs)
            finally:
                owner, known.running = 0, before

    return call
