"""The hook into torch.compile: it wraps the functions of Inductor that are listed here.

================================================== ================================================================
wrapped function                                   purpose
================================================== ================================================================
GraphLowering.call_function                        operators with registered arguments, functional collectives
GraphLowering.output                               results of a graph
AllocateLine._codegen_comm_buffer                  the code that allocates a buffer
PythonWrapperCodegen.can_reuse                     no reuse in place, into or out of symmetric memory
FallbackKernel._maybe_realize_symm_mem_args        the placement of torch 2.13 and later, replaced while the hook is on
Scheduler.should_partition                         CUDA graphs: run-time checks of arguments are not captured
Scheduler.get_graph_partition_signature            CUDA graphs: inputs that are checked outside are not captured
compile_fx.cudagraphify                            CUDA graphs: symmetric inputs keep their address
FxGraphHashDetails.__init__                        keys of torch's compile caches
CompiledFxGraph.post_compile                       lifetime of a graph's memory, and reports
================================================== ================================================================

A graph without registered operators costs one look-up per node.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch

from symmem.compile import scope
from symmem.compile.plan import mutable_ops
from symmem.errors import UnsupportedError
from symmem.ops.registry import registry
from symmem.ops.registry.schema import find_op, known_op

__all__ = ["install", "off", "on", "on_this_thread", "uninstall"]

log = logging.getLogger("symmem.compile")

_originals: dict[tuple[Any, str], Any] = {}
_lock = threading.RLock()


def on() -> None:
    """Place arguments in all functions that any thread compiles from now on."""
    install()
    _prepare()
    scope.turn(on=True)


def off() -> None:
    """Undo :func:`on`."""
    scope.turn(on=False)


@contextlib.contextmanager
def on_this_thread() -> Iterator[None]:
    """Place arguments in the functions that this thread compiles within the block."""
    install()
    _prepare()
    with scope.within():
        yield


def _prepare() -> None:
    """Let torch trace the registered operators."""
    for known in registry.registered():
        mutable_ops.prepare(find_op(known.op))


def _changed(name: str) -> None:
    """Reset Dynamo if a registration changed that compiled functions depend on."""
    if not _originals:
        return
    op = known_op(name)
    if op is not None:
        mutable_ops.prepare(op)
    if name in scope.seen:
        log.debug("the registration of %s changed after it was compiled: all functions are recompiled", name)
        torch._dynamo.reset()


registry.listeners.append(_changed)


def install() -> None:
    """Wrap Inductor's functions, once. While the hook is off, the wrappers only call the originals.

    Raises:
        UnsupportedError: Functions of this torch do not exist, or have other parameters than expected.
    """
    with _lock:
        if _originals:
            return
        try:
            from symmem.compile.wrappers import OPTIONAL, WRAPPED
        except (ImportError, AttributeError) as error:
            raise _unsupported(str(error)) from error
        for owner, name, parameters, _made in WRAPPED:
            known = getattr(owner, name, None)
            found = tuple(inspect.signature(known).parameters) if known is not None else None
            if found != parameters:
                differs = "does not exist" if found is None else f"takes {found}"
                raise _unsupported(f"{owner.__name__}.{name} {differs}, expected parameters {parameters}")
        for owner, name, _parameters, made in WRAPPED:
            _originals[owner, name] = owner.__dict__[name]
            setattr(owner, name, made(owner.__dict__[name]))
        for owner, name, made in OPTIONAL:
            if name in owner.__dict__:
                _originals[owner, name] = owner.__dict__[name]
                setattr(owner, name, made(owner.__dict__[name]))


def _unsupported(why: str) -> UnsupportedError:
    return UnsupportedError(
        f"symmem.compile does not support torch {torch.__version__}: {why}",
        hint="use torch 2.11 to 2.15 or a newer symmem; without the hook, wrap calls of registered operators in "
        "symmem.ops.checked('copy')",
    )


def uninstall() -> None:
    """Restore Inductor's own functions."""
    with _lock:
        for (owner, name), original in _originals.items():
            setattr(owner, name, original)
        _originals.clear()
