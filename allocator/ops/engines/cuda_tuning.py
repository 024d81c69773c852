"""Which kernel runs a collective operation on CUDA, in how many blocks: a table by number of ranks and bytes.

Chosen by measuring on 2 and 4 H200s with NVLink (NV18), no multicast; for more ranks, from the traffic that a kernel
makes. A kernel over landing zones (see :mod:`.collective_kernels`) costs one way over the links, or two, beside the
traffic; one that meets, two or more ways and fences, but nothing is stored twice. Over these links stores pass at 345
GB/s and loads at 300, by threads and by bulk copies (TMA) alike: so all that is large is stored. The setting
``algorithms`` names a file with other rows, as `symmem tune` measures them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from symmem.config.kernel_tables import MOST_BLOCKS, Row, read_algorithms
from symmem.config.kinds import BUILT_IN

__all__ = ["BLOCKS", "OPERATIONS", "Choice", "Row", "Table", "built_in", "grid", "table_for"]

BLOCKS = MOST_BLOCKS
"""Most blocks of any kernel."""


class Choice(NamedTuple):
    """What runs: the kernel, the most it is launched with, and how long its threads nap between two looks."""

    kernel: str
    threads: int
    blocks: int
    nap: int = 0


_Ki, _Mi, _MANY = 1 << 10, 1 << 20, 1 << 30

_ALL_REDUCE = (
    Row(2, 256 * _Ki, "one_shot", 128, 128),
    Row(2, 1 * _Mi, "one_shot", 256, 256),
    Row(2, 2 * _Mi, "one_shot", 512, 256),
    Row(2, None, "two_shot", 512, 256),
    Row(4, 256 * _Ki, "one_shot", 128, 128),
    Row(4, 512 * _Ki, "two_shot", 128, 128),
    Row(4, 4 * _Mi, "two_shot", 256, 256),
    Row(4, None, "two_shot", 512, 256),
    Row(8, 128 * _Ki, "one_shot", 128, 128),
    Row(8, 2 * _Mi, "two_shot", 128, 128),
    Row(8, 4 * _Mi, "two_shot", 256, 128),
    Row(8, None, "two_shot", 512, 256),
    Row(_MANY, 32 * _Ki, "one_shot", 128, 128),
    Row(_MANY, 4 * _Mi, "two_shot", 128, 128),
    Row(_MANY, None, "two_shot", 512, 256),
)
"""For all-reduce, by bytes of the tensor."""

_REDUCE_SCATTER = (
    Row(_MANY, 256 * _Ki, "reduce_scatter", 128, 128),
    Row(_MANY, None, "reduce_scatter", 512, 256),
)
"""For reduce-scatter, by bytes of the result."""

_MOVE = (
    Row(2, 512 * _Ki, "exchange", 256, 128),
    Row(4, 256 * _Ki, "exchange", 256, 128),
    Row(8, 128 * _Ki, "exchange", 256, 128),
    Row(_MANY, 32 * _Ki, "exchange", 256, 128),
    Row(_MANY, 1 * _Mi, "pull", 512, 64),
    Row(_MANY, None, "put", 512, 128),
    Row(_MANY, None, "pull", 512, 64),
)
"""For what only moves bytes, by bytes of what one rank gives to another."""


OPERATIONS = {"all_reduce": _ALL_REDUCE, "reduce_scatter": _REDUCE_SCATTER, "move": _MOVE}
"""What a table is about, and the rows for all numbers of ranks."""


class Table(NamedTuple):
    """What runs the operations of groups of one size. Of the rows, the first that fits counts."""

    all_reduce: tuple[Row, ...]
    reduce_scatter: tuple[Row, ...]
    move: tuple[Row, ...]

    def choose(self, nbytes: int) -> Choice:
        """What runs an all-reduce of a tensor of so many bytes."""
        return _first(self.all_reduce, nbytes)

    def choose_reduce_scatter(self, nbytes: int) -> Choice:
        """What runs a reduce-scatter with a result of so many bytes."""
        return _first(self.reduce_scatter, nbytes)

    def choose_move(self, nbytes: int, symmetric: bool = False) -> Choice:
        """What moves bytes.

        Args:
            nbytes: From each rank to each other one.
            symmetric: Whether the result lies in symmetric memory, and each part of it at a multiple of 16.
        """
        return _first(self.move, nbytes, symmetric)

    def symmetric_beyond(self) -> float:
        """The most bytes that are moved for which it does not matter where the result lies; infinite if never."""
        most = 0
        for row in self.move:
            if row.symmetric:
                return most
            if row.nbytes is not None:
                most = row.nbytes
        return float("inf")

    def fingerprint(self) -> str:
        """The same for tables that choose alike, and for no others."""
        return hashlib.sha256(repr([[row[1:] for row in rows] for rows in self]).encode()).hexdigest()[:16]


def built_in(world: int) -> Table:
    """The table of this module for groups of so many ranks."""
    return Table(*(_rows_for(world, rows) for rows in OPERATIONS.values()))


def _rows_for(world: int, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Those of the rows that can count for so many ranks."""
    found: list[Row] = []
    for row in rows:
        if world <= row.world and not (found and row.nbytes is not None and row.nbytes <= (found[-1].nbytes or 0)):
            found.append(row)
            if row.nbytes is None and not row.symmetric:
                break
    return tuple(found)


def table_for(world: int, file: str = BUILT_IN) -> Table:
    """The table of this module with, in their place, the rows that a file has for so many ranks.

    Args:
        world: Ranks of the group.
        file: The setting ``algorithms``.

    Raises:
        ConfigError: See :func:`symmem.config.kernel_tables.read_algorithms`.
    """
    known = built_in(world)
    if file == BUILT_IN:
        return known
    tuned = read_algorithms(file)
    return known._replace(**{name: tuned[name, world] for name in OPERATIONS if (name, world) in tuned})


def _first(rows: Sequence[Row], nbytes: int, symmetric: bool = False) -> Choice:
    for row in rows:
        if (row.nbytes is None or nbytes <= row.nbytes) and (symmetric or not row.symmetric):
            return Choice(row.kernel, row.threads, row.blocks, row.nap)
    raise AssertionError("a table ends with a row for everything")


def grid(choice: Choice, units: int) -> int:
    """Blocks for so many pieces of work, of which a thread does one or more."""
    return max(1, min(choice.blocks, -(-units // choice.threads)))
