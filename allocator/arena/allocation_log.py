"""Allocation records: the log of an arena has one for every allocation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple, TypeAlias

from symmem.memory.call_site import CallSite
from symmem.memory.layout import Layout

__all__ = ["AllocationRecord", "RawRecord", "nbytes_of"]

RawRecord: TypeAlias = tuple[int, int, float, int, int, int, Layout, CodeType, int, "str | None"]
"""The fields of an :class:`AllocationRecord` as a plain tuple, which takes less time to make."""

nbytes_of: Callable[[RawRecord], int] = operator.itemgetter(5)
"""Bytes of a raw record."""


class AllocationRecord(NamedTuple):
    """One allocation from an arena. All ranks have equal records, except for the time and the call site."""

    number: int
    digest: int
    time: float
    segment: int
    offset: int
    nbytes: int
    layout: Layout
    site: CallSite
    name: str | None

    @classmethod
    def of(cls, raw: RawRecord) -> AllocationRecord:
        """The record with the fields of a raw record."""
        return cls(*raw[:7], CallSite(*raw[7:9]), raw[9])

    def __str__(self) -> str:
        layout, named = self.layout, f" named {self.name!r}" if self.name else ""
        usual = layout.strides == Layout.make(layout.sizes, layout.dtype, None).strides
        strides = "" if usual else f" with strides {list(layout.strides)}"
        return f"{list(layout.sizes)} of {layout.dtype}{strides}{named}, {self.nbytes} bytes, at {self.site}"
