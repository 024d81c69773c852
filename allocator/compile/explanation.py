"""Asking what the compiler did with registered arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

from symmem.compile import control, hook, scope
from symmem.compile.report import Report

__all__ = ["explain", "reporting"]


@contextmanager
def reporting() -> Iterator[Report]:
    """Collect what is compiled, or comes out of a cache, within."""
    report = Report()
    hook.install()
    scope.listeners.append(report.graphs.append)
    try:
        yield report
    finally:
        scope.listeners.remove(report.graphs.append)


def _anew(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same and is new to torch.compile, which compiles each piece of code but a few times."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile a function, call it once, and tell what became of each registered argument, and why.

    All ranks must call it, since the function is run, its collective operators included. What was compiled before
    stays as it is. Of a function with gradients, call its ``backward()`` in ``fn`` to have that reported as well.

    Args:
        fn: As for ``torch.compile``; its own arguments follow.

    Returns:
        A report: ``str()`` of it is for people, ``to_json()`` for programs.
    """
    with reporting() as report:
        compiled = torch.compile(_anew(fn), backend=control.backend)
        compiled(*args, **kwargs)
    return report
