"""What is remembered of each allocation from an arena, and where in the program it was made."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import CodeType, FrameType
from typing import NamedTuple, TypeAlias

from symmem.memory.layout import Layout

__all__ = ["NOWHERE", "Entry", "Record", "Site", "caller", "inside", "nbytes_of"]

NOWHERE = (compile("", "<no caller>", "exec"), 0)


class Site(NamedTuple):
    """Where in the program something was allocated: code, and the instruction in it."""

    code: CodeType
    instruction: int

    @property
    def line(self) -> int:
        """Number of the line; found when it is asked for, which takes longer than an allocation."""
        found = self.code.co_firstlineno
        for start, end, line in self.code.co_lines():
            if start <= self.instruction < end and line is not None:
                found = line
        return found

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.line} in {self.code.co_name}"


class _Inside(dict[str, bool]):
    def __missing__(self, module: str) -> bool:
        package = "symmem."
        self[module] = known = module.startswith(package) and not module.startswith(f"{package}tools.")
        return known


inside = _Inside()
"""Whether a module, by name, is of symmem, but for its tools."""


def caller(frame: FrameType | None) -> Site:
    """The first frame from ``frame`` outwards that is not of symmem, but for its tools."""
    while frame is not None and inside[frame.f_globals.get("__name__", "")]:
        frame = frame.f_back
    return Site(frame.f_code, frame.f_lasti) if frame is not None else Site(*NOWHERE)


class Record(NamedTuple):
    """One allocation, as all ranks must have made it; the site may differ."""

    number: int
    digest: int
    time: float
    segment: int
    offset: int
    nbytes: int
    layout: Layout
    site: Site
    name: str | None

    @classmethod
    def of(cls, entry: Entry) -> Record:
        """What an arena has noted."""
        return cls(*entry[:7], Site(*entry[7:9]), entry[9])

    def __str__(self) -> str:
        layout, named = self.layout, f" named {self.name!r}" if self.name else ""
        usual = layout.strides == Layout.make(layout.sizes, layout.dtype, None).strides
        strides = "" if usual else f" with strides {list(layout.strides)}"
        return f"{list(layout.sizes)} of {layout.dtype}{strides}{named}, {self.nbytes} bytes, at {self.site}"


Entry: TypeAlias = tuple[int, int, float, int, int, int, Layout, CodeType, int, "str | None"]
"""A :class:`Record` that nobody has looked at yet."""

nbytes_of: Callable[[Entry], int] = operator.itemgetter(5)
"""Bytes of an entry."""
