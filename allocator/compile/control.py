"""Switching the hook on and off, for all that is compiled or for one function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from symmem.compile import hook, scope
from symmem.errors import InvalidArgumentError

__all__ = ["backend", "disable", "enable", "enabled"]


def enable() -> None:
    """Let ``torch.compile`` place the registered arguments of operators in symmetric memory, whatever is compiled.

    Local, and the same on all ranks, before they compile. Functions that are compiled already are compiled anew at
    their next call. Registrations made later count: functions with the operators that they name are compiled anew.

    Placed are arguments of operators that are registered (:func:`symmem.register_symm_mem_args`). The first call of a
    compiled function allocates, and is then collective over the operators' groups, in the order of the operators.

    Raises:
        UnsupportedError: This torch is not one that the hook knows; compiled code then does not place, and operators
            get what they are given.
    """
    if not scope.is_on():
        hook.on()
        torch._dynamo.reset()


def disable() -> None:
    """Undo :func:`enable`. Functions are compiled anew at their next call, without symmetric memory."""
    if scope.is_on():
        hook.off()
        torch._dynamo.reset()


def enabled() -> bool:
    """Whether :func:`enable` counts."""
    return scope.is_on()


def backend(
    gm: torch.fx.GraphModule,
    inputs: list[torch.Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(f, backend="symmem")``: Inductor, with the hook on for this function alone, backward included.

    Args:
        gm: What is compiled.
        inputs: Of it.
        mode: As for ``torch.compile``: ``"reduce-overhead"``, ...
        options: As for ``torch.compile``.

    Raises:
        InvalidArgumentError: Both a mode and options are given.
        UnsupportedError: See :func:`enable`.
    """
    if mode is not None and options is not None:
        raise InvalidArgumentError("torch.compile takes a mode or options, not both", hint="give one of them")
    patches = options or (list_mode_options(mode) if mode is not None else None)
    with hook.scope():
        compiled: Any = compile_fx(gm, inputs, inner_compile=_scoped(compile_fx_inner), config_patches=patches)
        return compiled  # type: ignore[no-any-return]


def _scoped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that compiles, with the hook on: the backward pass is compiled later."""

    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with hook.scope():
            return function(*args, **kwargs)

    return scoped
