"""A group of one rank and its arena, for tests of arenas."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch

import symmem
from symmem.arena.allocation_log import AllocationLog
from symmem.arena.arena import arenas_of

__all__ = ["MIB", "Make", "Rank", "mapped", "span"]

MIB = 1 << 20


class Rank:
    """A group of one rank, and its arena of host memory."""

    def __init__(self, group: symmem.Group) -> None:
        self.group = group

    def allocate(self, sizes: Any = 8, dtype: Any = torch.uint8, **options: Any) -> symmem.SymmetricTensor:
        return symmem.allocate(sizes, dtype, group=self.group, backend="host", **options)

    def collect(self, **options: Any) -> int:
        return symmem.collect(self.group, **options)

    @property
    def log(self) -> AllocationLog:
        return arenas_of(self.group)[0].log

    @property
    def book(self) -> tuple[int, int]:
        """Live bytes, and bytes in quarantine."""
        self.log.count_drops()
        return self.log.live_bytes, self.log.quarantined_bytes

    @property
    def segments(self) -> list[int]:
        return [segment.nbytes for segment in self.log.segments]


Make = Callable[..., Rank]


def span(st: symmem.SymmetricTensor) -> tuple[int, int]:
    return st._block.pointer, st._block.pointer + max(st._block.nbytes, 1)


def mapped() -> tuple[int, int]:
    """Numbers of mapped memory files and of open files."""
    while gc.collect():  # a freed object may release others
        pass
    with open("/proc/self/maps") as maps:
        return maps.read().count("/memfd:symmem"), len(os.listdir("/proc/self/fd"))
