"""What is remembered of each allocation from an arena, and where in the program it was made."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple, TypeAlias

from symmem.layout import Layout

__all__ = ["Entry", "Record", "Site", "nbytes_of"]


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
        return cls(*entry[:7], Site(*entry[7]), entry[8])

    def __str__(self) -> str:
        layout, named = self.layout, f" named {self.name!r}" if self.name else ""
        usual = layout.strides == Layout.make(layout.sizes, layout.dtype, None).strides
        strides = "" if usual else f" with strides {list(layout.strides)}"
        return f"{list(layout.sizes)} of {layout.dtype}{strides}{named}, {self.nbytes} bytes, at {self.site}"


Entry: TypeAlias = tuple[int, int, float, int, int, int, Layout, tuple[CodeType, int], "str | None"]
"""A :class:`Record` that nobody has looked at yet."""

nbytes_of: Callable[[Entry], int] = operator.itemgetter(5)
"""Bytes of an entry."""
