"""Asking what the compiler did: for one function, and for all that a program compiles."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from symmem.compile import control, hook
from symmem.compile.report import GraphReport, Report

__all__ = ["explain", "reporting", "write_reports"]


@contextmanager
def reporting() -> Iterator[Report]:
    """Collect what is compiled, or comes out of a cache, within."""
    report = Report()
    hook.install()
    hook.listeners.append(report.graphs.append)
    try:
        yield report
    finally:
        hook.listeners.remove(report.graphs.append)


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
        compiled = torch.compile(fn, backend=lambda gm, inputs: control.backend(gm, inputs))
        compiled(*args, **kwargs)
    return report


def write_reports(path: str) -> None:
    """Append each report from here on to a file, as a line of JSON; its name gets ``.rankN`` behind if there are ranks.

    What ``SYMMEM_ENABLE=compile_report(path)`` does.
    """
    hook.listeners.append(lambda report: _append(path, report))


def _append(path: str, report: GraphReport) -> None:
    rank = os.environ.get("RANK")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = str(torch.distributed.get_rank())
    target = Path(path if rank is None else f"{path}.rank{rank}")
    with target.open("a", encoding="utf-8") as file:
        file.write(json.dumps(report.to_json()) + "\n")
