"""From measured times to a kernel table: the kernels to try, the best row for every size, and the file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from symmem.config.kernel_tables import Row, Rows, parse_algorithms, read_algorithms
from symmem.config.kinds import SIZE
from symmem.errors import ConfigError

__all__ = ["Measure", "RowChange", "candidates", "changes", "check_output", "rows_from", "search", "write"]

Measure = Callable[[str, int, Sequence[Row]], Sequence[float]]
"""Measures an operation of some bytes with several rows; returns seconds of the slowest rank."""

Times = Mapping[int, Mapping[Row, float]]
"""Seconds by bytes and row. The rows are for any number of bytes."""

_WORTH = 0.98  # a row replaces another only if it needs at most this share of the time; less is noise
_HOPELESS = 3.0  # a row this many times slower than the best, and falling behind, is not tried for larger sizes

_TRIED: Mapping[str, Sequence[tuple[str, Sequence[int], Sequence[int]]]] = {
    "all_reduce": (
        ("one_shot", (128, 256, 512), (64, 128, 256)),
        ("two_shot", (128, 256, 512), (64, 128, 256)),
    ),
    "reduce_scatter": (("reduce_scatter", (128, 256, 512), (64, 128, 256)),),
    "move": (
        ("exchange", (128, 256, 512), (64, 128)),
        ("pull", (256, 512), (32, 64, 128)),
        ("put", (256, 512), (64, 128)),
    ),
}
"""Kernels, threads and blocks to try, by operation."""


class RowChange(NamedTuple):
    """The change that tuning makes for one size: bytes, the row before and after, and seconds with both."""

    nbytes: int
    before: Row
    after: Row
    seconds_before: float
    seconds_after: float


def candidates(operation: str, world: int) -> list[Row]:
    """The rows to try."""
    return [
        Row(world, None, kernel, threads, blocks)
        for kernel, *sizes in _TRIED[operation]
        for threads, blocks in itertools.product(*sizes)
    ]


def _row_for(rows: Sequence[Row], world: int, nbytes: int, symmetric: bool) -> Row:
    """The row of a table that applies to a size, made to be for any number of bytes, as the rows of :data:`Times`."""
    row = next(row for row in rows if (row.nbytes is None or nbytes <= row.nbytes) and (symmetric or not row.symmetric))
    return row._replace(world=world, nbytes=None)


def search(operation: str, world: int, known: Sequence[Row], sizes: Iterable[int], measure: Measure) -> Times:
    """Measure the candidates and the rows of a known table, at every size.

    Args:
        operation: One of :data:`symmem.config.kernel_tables.KERNELS`.
        world: Number of ranks.
        known: Rows of the known table.
        sizes: Bytes, in ascending order.
        measure: Takes the times.
    """
    times: dict[int, dict[Row, float]] = {}
    tried, ratios = candidates(operation, world), dict[Row, float]()
    for nbytes in sizes:
        rows = list(dict.fromkeys([*tried, *(_row_for(known, world, nbytes, each) for each in (False, True))]))
        times[nbytes] = dict(zip(rows, measure(operation, nbytes, rows), strict=True))
        best = min(seconds for row, seconds in times[nbytes].items() if not row.symmetric)
        before, ratios = ratios, {row: seconds / best for row, seconds in times[nbytes].items()}
        tried = [row for row in tried if ratios[row] <= max(_HOPELESS, before.get(row, ratios[row]))]
    return times


def rows_from(times: Times) -> tuple[Row, ...]:
    """Make the rows of a table: the fastest row of every size, up to the next size at which another row is faster.

    A row for symmetric memory is used where it is faster than the best row for any memory.
    """
    plain: Row | None = None
    symmetric: Row | None = None
    found: list[tuple[int, list[Row]]] = []
    for nbytes, taken in sorted(times.items()):
        plain = _best({row: seconds for row, seconds in taken.items() if not row.symmetric}, plain)
        faster = {row: seconds for row, seconds in taken.items() if row.symmetric and seconds <= _WORTH * taken[plain]}
        symmetric = _best(faster, symmetric) if faster else None
        found.append((nbytes, [row for row in (symmetric, plain) if row is not None]))
    rows: list[Row] = []
    for best, run in itertools.groupby(found, lambda each: each[1]):
        last = [nbytes for nbytes, _ in run][-1]
        rows += [row._replace(nbytes=None if last == found[-1][0] else last) for row in best]
    return tuple(rows)


def _best(times: Mapping[Row, float], before: Row | None) -> Row:
    """The fastest row; the row of the size before if it is as fast, except for noise."""
    best = min(times, key=times.__getitem__)
    if before is not None and before in times and times[best] > _WORTH * times[before]:
        return before
    return best


def changes(times: Times, world: int, known: Sequence[Row], tuned: Sequence[Row]) -> list[RowChange]:
    """Compare two tables at every measured size, for tensors in symmetric memory."""
    found = []
    for nbytes, taken in times.items():
        before, after = (_row_for(rows, world, nbytes, symmetric=True) for rows in (known, tuned))
        found.append(RowChange(nbytes, before, after, taken[before], taken[after]))
    return found


def check_output(path: Path) -> Rows:
    """Return the rows of the file, if it exists. Called before anything is measured.

    Raises:
        ConfigError: The file is no table, or its folder does not exist.
    """
    if path.exists():
        return read_algorithms(str(path))
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {str(path.parent)!r} for a table of algorithms", hint="make it first")
    return {}


def write(path: Path, rows: Mapping[str, Sequence[Row]], world: int, about: Sequence[str]) -> None:
    """Write a table. Rows of the file for other operations and numbers of ranks stay, and so do its comments.

    Args:
        path: The file.
        rows: The new rows, by operation.
        world: Number of ranks that the rows are for.
        about: Lines for the head of the file.

    Raises:
        ConfigError: See :func:`check_output`.
    """
    known = dict(check_output(path))
    old = [line for line in path.read_text().splitlines() if line.startswith("#")] if known else []
    known |= {(name, world): tuple(each) for name, each in rows.items()}
    lines = [*(f"# {line}" for line in about), *old, "version: 1", "rows:"]
    for (operation, ranks), each in sorted(known.items()):
        lines += [f"  - {{{_written(operation, row._replace(world=ranks))}}}" for row in each]
    text = "\n".join(lines) + "\n"
    parse_algorithms(text, str(path))  # check it before the file changes
    path.write_text(text)


def _written(operation: str, row: Row) -> str:
    pairs = {"operation": operation, "world": row.world}
    if row.nbytes is not None:
        pairs["nbytes"] = SIZE.format(row.nbytes)
    pairs |= {"kernel": row.kernel, "threads": row.threads, "blocks": row.blocks}
    if row.nap:
        pairs["nap"] = row.nap
    return ", ".join(f"{key}: {value}" for key, value in pairs.items())
