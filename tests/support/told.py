"""The error that an operation raised on a rank, as plain data."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

from symmem.errors import SymmemError

Told = SimpleNamespace  # kind ("" for no error), text, rank, group, peers, took (seconds)


def told(operation: Callable[[], object]) -> Told:
    error, begin = None, time.monotonic()
    try:
        operation()
    except SymmemError as raised:
        error = raised
    took = time.monotonic() - begin
    if error is None:
        return Told(kind="", text="", rank=None, group=None, peers=(), took=took)
    return Told(
        kind=type(error).__name__, text=str(error), rank=error.rank, group=error.group, peers=error.peers, took=took
    )
