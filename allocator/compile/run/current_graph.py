"""The graph that generated code uses: the graph of the compiled function that runs on this thread."""

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
from symmem.errors import RendezvousError, UnsupportedError
from symmem.group.sync_points import is_of_sync_point

__all__ = ["bound", "running"]


class _ThreadGraphs:
    """The graphs that generated code on this thread uses.

    Torch loads the same code from a cache as one module, and never unloads the module. So every compiled function
    has a separate graph, and the module has none. If functions shared a graph, its lifetime would depend on when the
    garbage collector runs on a rank, and ranks would allocate differently.

    Attributes:
        graph: The graph of the running function.
        of_cpp: Graphs of generated C++ by name. Torch runs that code without :func:`bound`.
    """

    __slots__ = ("graph", "of_cpp")

    def __init__(self) -> None:
        self.graph = Graph()  # for calls from outside of compiled functions
        self.of_cpp: dict[str, Graph] = {}


class _Running(threading.local):
    """``here`` has the graphs of a thread. It is a single object, because every access to a thread-local takes time."""

    def __init__(self) -> None:
        self.here = _ThreadGraphs()


running = _Running()

_function_graphs: WeakSet[_FunctionGraph] = WeakSet()


class _FunctionGraph(Graph):
    """The graph of one compiled function. Threads take turns to run the function.

    A thread takes the turn by deleting ``idle``, because only one thread can succeed. A lock would take as long as
    all other work per call. A thread that ends its turn puts an item into ``given_back``. That is a single step, so
    a signal handler cannot interrupt it halfway.

    Attributes:
        idle: Exists while no thread runs the function.
        outer: The graph that the running thread used before it called the function.
        waiting: One object per call that waits for its turn.
        given_back: Queue that wakes a waiting call.
    """

    idle: bool

    def __init__(self) -> None:
        super().__init__()
        self.idle = True
        self.outer: Graph | None = None
        self.waiting: set[object] = set()
        self.given_back: SimpleQueue[None] = SimpleQueue()
        _function_graphs.add(self)

    def has_passed(self, call: int, waits: bool) -> bool:
        """See :meth:`symmem.group.sync_points.Stateful.has_passed`."""
        if self._begins or hasattr(self, "idle"):
            return super().has_passed(call, waits)
        return waits and self in _running_graphs()

    def wait(self) -> None:
        """Wait until another thread ends its turn.

        Raises:
            UnsupportedError: This thread itself runs the function.
        """
        if self in _running_graphs():
            raise UnsupportedError(
                "a compiled function with registered operators is called within its own call, and would overwrite "
                "its buffers in symmetric memory",
                hint="let the operator call another function that is compiled separately",
            )
        me = object()
        try:
            self.waiting.add(me)
            while not hasattr(self, "idle"):
                self.given_back.get()
        finally:  # this call may fail before it takes its turn, so wake another one
            self.waiting.discard(me)
            if self.waiting:
                self.given_back.put(None)


def _running_graphs() -> list[Graph]:
    """The graphs of the functions that this thread runs, innermost first."""
    found: list[Graph] = []
    graph: Graph | None = running.here.graph
    while isinstance(graph, _FunctionGraph):
        found.append(graph)
        graph = graph.outer
    return found


def _give_back_in_child() -> None:
    """In a forked child, take back the turns of the parent's other threads, which do not exist here."""
    mine = _running_graphs()
    for graph in list(_function_graphs):
        graph.waiting, graph.given_back = set(), SimpleQueue()
        if graph not in mine:
            graph.outer, graph.idle = None, True


os.register_at_fork(after_in_child=_give_back_in_child)


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a compiled function so that it runs with its own graph and keeps the graph alive.

    Args:
        function: The function that generated code defines.

    Returns:
        The wrapped function; its attribute ``graph`` is the graph.

    Raises:
        DivergenceError: From the call: see :meth:`Graph.place` and :meth:`Graph.buffer`.
        UnsupportedError: From the call: an operator within the function calls the function.
        SymmemError: From the call: a kernel of symmem stopped, and torch can no longer use the GPU. Says why.
    """
    graph = _FunctionGraph()

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
        # No call happens before the `try`, so a signal handler cannot raise here and leave the turn taken.
        graph.outer, here.graph = before, graph
        try:
            graph.begin()
            try:
                return function(inputs)
            except RendezvousError as error:
                if not is_of_sync_point(error):
                    graph.forget()  # other ranks may know other addresses or sizes now
                raise
            except RuntimeError as error:  # CUDA's error does not say why a kernel stopped
                raise_failure(error)
                raise
        finally:
            graph.outer, here.graph, graph.idle = None, before, True
            if graph.waiting:
                graph.given_back.put(None)

    call.graph = graph  # type: ignore[attr-defined]
    return call
