"""Which graph generated code means: that of the compiled function which is running on this thread."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any
from weakref import WeakSet

from symmem.backends.kernel_status import raise_failure
from symmem.compile.run.graph import Graph
from symmem.errors import UnsupportedError

__all__ = ["bound", "running"]


class _Here:
    """What generated code of this thread means.

    The same code may come out of a cache several times, and torch loads it as one module, which it never lets go. So
    the module has no graph, and each compiled function has one of its own: if they shared one, whether it is there
    still would depend on when the collector ran on a rank, and ranks would allocate differently.

    Attributes:
        graph: That of the function that is running.
        of_cpp: Of code in C++, by its name: torch loads it as it is, and no function of ours runs it.
    """

    __slots__ = ("graph", "of_cpp")

    def __init__(self) -> None:
        self.graph = Graph()  # for a call from outside of a compiled function
        self.of_cpp: dict[str, Graph] = {}


class _Running(threading.local):
    """For generated code: ``here``, of each thread. It is one object, for each look at what a thread has costs."""

    def __init__(self) -> None:
        self.here = _Here()


running = _Running()


_owned: WeakSet[_Own] = WeakSet()


class _Own(Graph):
    """The graph of one compiled function, which threads run in turns.

    A turn is taken by removing ``idle``, which one thread alone can do: a lock would cost as much as all else that is
    done for a call. Who has to wait is told by ``given_back``: putting something there is one step, which no signal
    handler can divide.

    Attributes:
        idle: There is such an attribute while no thread runs the function.
        outer: What the thread that runs it ran when it called it.
        waiting: One object for each call that waits for its turn.
        given_back: Where those look whether the turn may be theirs.
    """

    idle: bool

    def __init__(self) -> None:
        super().__init__()
        self.idle = True
        self.outer: Graph | None = None
        self.waiting: set[object] = set()
        self.given_back: SimpleQueue[None] = SimpleQueue()
        _owned.add(self)

    def wait(self) -> None:
        """Until another thread has done.

        Raises:
            UnsupportedError: It is this thread that runs the function.
        """
        if self in _run_here():
            raise UnsupportedError(
                "a compiled function with registered operators is called within its own call, and would overwrite "
                "its buffers in symmetric memory",
                hint="let the operator that calls it call another function, compiled by itself",
            )
        me = object()
        try:
            self.waiting.add(me)
            while not hasattr(self, "idle"):
                self.given_back.get()
        finally:  # it may not come to take its turn; then another does
            self.waiting.discard(me)
            if self.waiting:
                self.given_back.put(None)


def _run_here() -> list[Graph]:
    """The graphs of the functions that this thread runs, the innermost first."""
    found: list[Graph] = []
    graph: Graph | None = running.here.graph
    while isinstance(graph, _Own):
        found.append(graph)
        graph = graph.outer
    return found


def _give_back_in_child() -> None:
    """In a forked child: the threads that ran or awaited a function at the fork are not there any more."""
    mine = _run_here()
    for graph in list(_owned):
        graph.waiting, graph.given_back = set(), SimpleQueue()
        if graph not in mine:
            graph.outer, graph.idle = None, True


os.register_at_fork(after_in_child=_give_back_in_child)


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that runs with a graph of its own, and keeps it alive.

    Args:
        function: Of generated code.

    Raises:
        UnsupportedError: It is called by an operator that it calls itself.
        SymmemError: Why a kernel of ours has stopped, where torch finds that the GPU cannot be used any more.
    """
    graph = _Own()

    @functools.wraps(function)
    def call(inputs: Any) -> Any:
        here = running.here
        before = here.graph
        while True:
            try:
                del graph.idle
                break
            except AttributeError:
                graph.wait()
        # Nothing is called before the `try`, so that no signal handler can raise and leave the turn taken.
        graph.outer, here.graph = before, graph
        try:
            graph.begin()
            return function(inputs)
        except RuntimeError as error:  # of CUDA, which says only that a kernel has stopped
            raise_failure(error)
            raise
        finally:
            graph.outer, here.graph, graph.idle = None, before, True
            if graph.waiting:
                graph.given_back.put(None)

    return call
