"""Call sites: the place in the user's program that calls symmem."""

from __future__ import annotations

import os
import threading
from types import CodeType, FrameType
from typing import NamedTuple

import torch

__all__ = ["NOWHERE", "CallSite", "caller", "internal", "outside", "program_line", "submitted"]

_TORCH = os.path.dirname(torch.__file__) + os.sep

NOWHERE = (compile("", "<no caller>", "exec"), 0)


class CallSite(NamedTuple):
    """A place in the program: a code object, and the offset of an instruction in it."""

    code: CodeType
    instruction: int

    @property
    def line(self) -> int:
        """Line number. Computed on demand, because that takes longer than an allocation."""
        found = self.code.co_firstlineno
        for start, end, line in self.code.co_lines():
            if start <= self.instruction < end and line is not None:
                found = line
        return found

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.line} in {self.code.co_name}"


class _Submitted(threading.local):
    """See :data:`submitted`."""

    at: CallSite | None = None


submitted = _Submitted()
"""``submitted.at`` is the place in the program that submitted the call of this thread, if another thread did."""


class _Internal(dict[str, bool]):
    def __missing__(self, module: str) -> bool:
        package = "symmem."
        inside = module.startswith(package) and not module.startswith(f"{package}tools.")
        self[module] = known = inside or module == "contextlib"
        return known


internal = _Internal()
"""Whether a module, by name, belongs to symmem, or is ``contextlib``; ``symmem.tools`` does not count."""


def outside(frame: FrameType | None) -> FrameType | None:
    """The first frame outside of symmem, from ``frame`` outwards; ``symmem.tools`` counts as outside.

    Frames of ``contextlib`` are skipped, because symmem calls itself through them.
    """
    while frame is not None and internal[frame.f_globals.get("__name__", "")]:
        frame = frame.f_back
    return frame


def caller(frame: FrameType | None) -> CallSite:
    """The place of :func:`outside`."""
    frame = outside(frame)
    return CallSite(frame.f_code, frame.f_lasti) if frame is not None else CallSite(*NOWHERE)


def program_line(frame: FrameType | None) -> CallSite:
    """The first frame outside of torch and symmem, or the place that submitted the call."""
    if submitted.at is not None:
        return submitted.at
    while frame is not None and (
        internal[frame.f_globals.get("__name__", "")]
        or frame.f_globals.get("__name__", "").startswith("torch.")
        or frame.f_code.co_filename.startswith(_TORCH)  # code that torch generates has no module
    ):
        frame = frame.f_back
    return caller(frame)
