"""Switch the hook on and off, for all functions or for one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._ops import OpOverload

from symmem.compile import hook, scope
from symmem.errors import InvalidArgumentError, UnsupportedError
from symmem.ops.registry import registry
from symmem.ops.registry.eager_checks import checked

log = logging.getLogger("symmem.compile")

__all__ = ["backend", "disable", "enable", "enabled"]


def enable() -> None:
    """Let ``torch.compile`` place the registered arguments of operators in symmetric memory, in all functions.

    The call is local. Call it on all ranks before they compile. Functions that are already compiled are recompiled
    at their next call. A later registration recompiles the functions that call its operator.

    Arguments are registered with :func:`symmem.register_symm_mem_args`. The first call of a compiled function
    allocates memory, so it is collective over the operators' groups, in the order of the operators.

    Raises:
        UnsupportedError: The hook does not support this torch. Compiled code then places nothing, and operators get
            their arguments unchanged.
    """
    if not scope.is_on():
        hook.on()
        torch._dynamo.reset()


def disable() -> None:
    """Undo :func:`enable`. Functions are recompiled at their next call, without symmetric memory."""
    if scope.is_on():
        hook.off()
        torch._dynamo.reset()


def enabled() -> bool:
    """Whether :func:`enable` is in effect."""
    return scope.is_on()


def backend(
    gm: torch.fx.GraphModule,
    inputs: list[torch.Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(f, backend="symmem")``: Inductor with the hook on for this function and its backward pass.

    If the hook does not support this torch, Inductor compiles without it. Registered arguments in plain memory are then
    copied at every call, as in ``symmem.ops.checked("copy")``, without CUDA graphs. A warning is logged once.

    Args:
        gm: The graph to compile.
        inputs: Example inputs of the graph.
        mode: As for ``torch.compile``: ``"reduce-overhead"``, ...
        options: As for ``torch.compile``.

    Raises:
        InvalidArgumentError: Both a mode and options were given.
    """
    if mode is not None and options is not None:
        raise InvalidArgumentError("torch.compile takes a mode or options, not both", hint="pass only one")
    patches = options or (list_mode_options(mode) if mode is not None else None)
    try:
        hook.install()
    except UnsupportedError as error:
        return _without_hook(gm, inputs, patches, error)  # type: ignore[no-any-return]
    with hook.on_this_thread():
        compiled: Any = compile_fx(gm, inputs, inner_compile=_scoped(compile_fx_inner), config_patches=patches)
        return compiled  # type: ignore[no-any-return]


def _without_hook(gm: Any, inputs: Any, patches: dict[str, Any] | None, error: UnsupportedError) -> Any:
    patches = {**(patches or {}), "triton.cudagraphs": False}
    # A graph from this cache would not come to `_copying`.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(gm, inputs, inner_compile=_copying(compile_fx_inner, error), config_patches=patches)


def _copying(function: Callable[..., Any], error: UnsupportedError) -> Callable[..., Any]:
    """Let the registered operators of a compiled graph run on copies, in the backward pass too."""

    @functools.wraps(function)
    def copying(gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        targets = [node.target for module in gm.modules() for node in getattr(module, "graph", _EMPTY).nodes]
        made = function(gm, *args, **kwargs)
        if any(isinstance(op, OpOverload) and registry.lookup(op) is not None for op in targets):
            _warn_once(str(error))
            made.current_callable = checked("copy")(made.current_callable)
        return made

    return copying


_EMPTY = torch.fx.Graph()


@functools.cache
def _warn_once(why: str) -> None:
    log.warning("registered arguments in plain memory are copied at every call: %s", why)


def _scoped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Switch the hook on around a compile function. The backward pass is compiled later, outside :func:`backend`."""

    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with hook.on_this_thread():
            return function(*args, **kwargs)

    return scoped
