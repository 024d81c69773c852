"""Which graph generated code means: that of the compiled function which is running on this thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from symmem.backends.kernel_words import raise_failure
from symmem.compile.runtime import Graph
from symmem.errors import UnsupportedError

__all__ = ["bound", "running"]


class _Running(threading.local):
    """For generated code.

    The same code may come out of a cache several times, and torch loads it as one module, which it never lets go. So
    the module has no graph, and each compiled function has one of its own: if they shared one, whether it is there
    still would depend on when the collector ran on a rank, and ranks would allocate differently.

    Attributes:
        graph: That of the function that is running.
        of_cpp: Of code in C++, by its name: torch loads it as it is, and no function of ours runs it.
    """

    def __init__(self) -> None:
        self.graph = Graph()  # for a call from outside of a compiled function
        self.of_cpp: dict[str, Graph] = {}


running = _Running()


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that runs with a graph of its own, and keeps it alive.

    Args:
        function: Of generated code.

    Raises:
        UnsupportedError: It is called by an operator that it calls itself.
        SymmemError: Why a kernel of ours has stopped, where torch finds that the GPU cannot be used any more.
    """
    graph, turn, owner = Graph(), threading.Lock(), 0

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
            owner, before = thread, running.graph
            running.graph = graph
            try:
                graph.begin()
                return function(inputs)
            except RuntimeError as error:  # of CUDA, which says only that a kernel has stopped
                raise_failure(error)
                raise
            finally:
                owner, running.graph = 0, before

    return call
