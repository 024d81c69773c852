"""Choose kernel and number of blocks for a collective operation on CUDA, by number of ranks and bytes.

The tables were measured on 2 and 4 H200s with NVLink (NV18), without multicast. For more ranks they are estimated from
the traffic of a kernel. A kernel over landing zones (see :mod:`.collective_kernels`) costs one or two trips over the
links, plus the traffic. A kernel that meets costs two or more trips and fences, but stores nothing twice. These links
pass stores at 345 GB/s and loads at 300 GB/s, both from threads and from bulk copies (TMA), so large data is stored.
The setting ``algorithms`` names a file with other rows, as measured by `symmem tune`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from symmem.config.kernel_tables import MOST_BLOCKS, Row, read_algorithms
from symmem.config.kinds import BUILT_IN

__all__ = ["BLOCKS", "OPERATIONS", "Choice", "Row", "Table", "built_in", "grid", "table_for"]

BLOCKS = MOST_BLOCKS
"""Maximum number of blocks of any kernel."""


class Choice(NamedTuple):
    """A kernel, its threads per block, its maximum number of blocks, and the nanoseconds to sleep between two polls."""

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
"""For operations that only move bytes, by bytes from one rank to another."""


OPERATIONS = {"all_reduce": _ALL_REDUCE, "reduce_scatter": _REDUCE_SCATTER, "move": _MOVE}
"""The rows of every operation, for all numbers of ranks."""


class Table(NamedTuple):
    """The rows for groups of one size. The first row that fits is used."""

    all_reduce: tuple[Row, ...]
    reduce_scatter: tuple[Row, ...]
    move: tuple[Row, ...]

    def choose(self, nbytes: int) -> Choice:
        """Choose for an all-reduce of a tensor of ``nbytes``."""
        return _first(self.all_reduce, nbytes)

    def choose_reduce_scatter(self, nbytes: int) -> Choice:
        """Choose for a reduce-scatter with a result of ``nbytes``."""
        return _first(self.reduce_scatter, nbytes)

    def choose_move(self, nbytes: int, symmetric: bool = False) -> Choice:
        """Choose for an operation that moves bytes.

        Args:
            nbytes: Bytes from one rank to another.
            symmetric: Whether the result is in symmetric memory, with all parts at multiples of 16.
        """
        return _first(self.move, nbytes, symmetric)

    def symmetric_beyond(self) -> float:
        """The largest size with the same choice for symmetric and other memory; infinite if no row is symmetric."""
        most = 0
        for row in self.move:
            if row.symmetric:
                return most
            if row.nbytes is not None:
                most = row.nbytes
        return float("inf")

    def fingerprint(self) -> str:
        """A hash that is equal for tables with the same rows."""
        return hashlib.sha256(repr([[row[1:] for row in rows] for rows in self]).encode()).hexdigest()[:16]


def built_in(world: int) -> Table:
    """The built-in table for groups of ``world`` ranks."""
    return Table(*(_rows_for(world, rows) for rows in OPERATIONS.values()))


def _rows_for(world: int, rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows that can apply to ``world`` ranks."""
    found: list[Row] = []
    for row in rows:
        if world <= row.world and not (found and row.nbytes is not None and row.nbytes <= (found[-1].nbytes or 0)):
            found.append(row)
            if row.nbytes is None and not row.symmetric:
                break
    return tuple(found)


def table_for(world: int, file: str = BUILT_IN) -> Table:
    """The built-in table, with rows replaced by those in a file.

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
    raise AssertionError("the last row of a table fits every size")


def grid(choice: Choice, units: int) -> int:
    """Number of blocks for ``units`` pieces of work. A thread handles one or more."""
    return max(1, min(choice.blocks, -(-units // choice.threads)))
