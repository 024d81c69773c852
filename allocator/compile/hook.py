"""Where symmem comes into torch.compile: nine functions of Inductor are wrapped while the hook is on.

================================================== ================================================================
wrapped                                            for
================================================== ================================================================
GraphLowering.call_function                        operators with registered arguments
GraphLowering.output                               what a graph returns
AllocateLine._codegen_comm_buffer                  the code that allocates a buffer
PythonWrapperCodegen.can_reuse                     no reuse in place, into or out of symmetric memory
FallbackKernel._maybe_realize_symm_mem_args        torch 2.13 and later: its own placement, which ours replaces
Scheduler.should_partition, compile_fx.cudagraphify CUDA graphs: what is captured, and what stays where it is
FxGraphHashDetails.__init__                        the key of compiled code in torch's caches
CompiledFxGraph.post_compile                       the lifetime of a graph's memory, and reports
================================================== ================================================================

Graphs without a registered operator cost a look-up for each of their nodes, and no more.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch

from symmem.compile import scope as compile_scope
from symmem.compile.plan import mutable_ops
from symmem.compile.wrappers import OPTIONAL, WRAPPED
from symmem.errors import UnsupportedError
from symmem.ops.registry import registry
from symmem.ops.registry.schema import find_op, known_op

__all__ = ["install", "off", "on", "scope", "uninstall"]

log = logging.getLogger("symmem.compile")

_originals: dict[tuple[Any, str], Any] = {}
_lock = threading.RLock()


def on() -> None:
    """Place from now on, whatever is compiled on any thread."""
    install()
    _prepare()
    compile_scope.turn(on=True)


def off() -> None:
    """Undo :func:`on`."""
    compile_scope.turn(on=False)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Place what is compiled within, on this thread."""
    install()
    _prepare()
    with compile_scope.within():
        yield


def _prepare() -> None:
    """Let torch trace what is registered."""
    for known in registry.registered():
        mutable_ops.prepare(find_op(known.op))


def _changed(name: str) -> None:
    """What is registered for an operator has changed: what was compiled with it is not right any more."""
    if not _originals:
        return
    op = known_op(name)
    if op is not None:
        mutable_ops.prepare(op)
    if name in compile_scope.seen:
        log.debug("%s is registered otherwise than when it was compiled: compiled functions are compiled anew", name)
        torch._dynamo.reset()


registry.listeners.append(_changed)


def install() -> None:
    """Wrap Inductor's functions, once; they do what they always did while the hook is off."""
    with _lock:
        if _originals:
            return
        for owner, name, parameters, _made in WRAPPED:
            known = getattr(owner, name, None)
            found = tuple(inspect.signature(known).parameters) if known is not None else None
            if found != parameters:
                raise UnsupportedError(
                    f"symmem.compile does not know torch {torch.__version__}: {owner.__name__}.{name} takes "
                    f"{found or 'nothing: there is none'}, not {parameters}",
                    hint="use a torch from 2.11 to 2.15, or a newer symmem; without the hook, wrap calls of registered "
                    "operators in symmem.ops.checked('copy')",
                )
        for owner, name, _parameters, made in WRAPPED:
            _originals[owner, name] = owner.__dict__[name]
            setattr(owner, name, made(owner.__dict__[name]))
        for owner, name, made in OPTIONAL:
            if name in owner.__dict__:
                _originals[owner, name] = owner.__dict__[name]
                setattr(owner, name, made(owner.__dict__[name]))


def uninstall() -> None:
    """Give Inductor its functions back."""
    with _lock:
        for (owner, name), original in _originals.items():
            setattr(owner, name, original)
        _originals.clear()
