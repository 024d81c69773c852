"""Explain where the compiler put registered arguments, and why."""

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
    """Collect reports of the graphs that are compiled or loaded from a cache within the block."""
    report = Report()
    hook.install()
    scope.listeners.append(report.graphs.append)
    try:
        yield report
    finally:
        scope.listeners.remove(report.graphs.append)


def _copy_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same with a new code object, because torch.compile compiles a code object few times."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile a function, call it once, and report where its registered arguments are placed or copied, and why.

    The report also lists the functional collectives that symmem runs, or is asked to run and cannot.

    All ranks must call it, because it runs the function with its collective operators. Functions that are already
    compiled stay compiled. If ``fn`` calls ``backward()``, the backward graph is reported too.

    Args:
        fn: As for ``torch.compile``.
        *args: Arguments of ``fn``.
        **kwargs: Arguments of ``fn``.

    Returns:
        A report: ``str()`` shows it to people, ``to_json()`` returns it for programs.
    """
    with reporting() as report:
        compiled = torch.compile(_copy_of(fn), backend=control.backend)
        compiled(*args, **kwargs)
    return report
