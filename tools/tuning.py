"""From measured times to a table of algorithms: which kernels to try, which row holds for which sizes, and the file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from symmem.config.kernel_tables import Row, Rows, parse_algorithms, read_algorithms
from symmem.config.kinds import SIZE
from symmem.errors import ConfigError

__all__ = ["Change", "Measure", "candidates", "changes", "check_output", "rows_from", "search", "write"]

Measure = Callable[[str, int, Sequence[Row]], Sequence[float]]
"""Seconds of an operation of so many bytes with each of some rows; of all ranks, the slowest counts."""

Times = Mapping[int, Mapping[Row, float]]
"""Seconds by bytes and row; rows are for any number of bytes."""

_WORTH = 0.98  # a row takes the place of another if it needs at most so much of the time: less is noise
_HOPELESS = 3.0  # what needs so many times the best, and falls behind as bytes grow, is not tried for more

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


class Change(NamedTuple):
    """What tuning changes for one size: bytes, the row before and now, and the seconds of each."""

    nbytes: int
    before: Row
    after: Row
    seconds_before: float
    seconds_after: float


def candidates(operation: str, world: int) -> list[Row]:
    """All rows that are worth a try."""
    return [
        Row(world, None, kernel, threads, blocks)
        for kernel, *sizes in _TRIED[operation]
        for threads, blocks in itertools.product(*sizes)
    ]


def _plain(row: Row, world: int) -> Row:
    """The same for any number of bytes: what is measured."""
    return row._replace(world=world, nbytes=None)


def _fitting(rows: Sequence[Row], nbytes: int, symmetric: bool) -> Row:
    """The row of a table that counts."""
    fitting = (row for row in rows if row.nbytes is None or nbytes <= row.nbytes)
    return next(row for row in fitting if symmetric or not row.symmetric)


def search(operation: str, world: int, known: Sequence[Row], sizes: Sequence[int], measure: Measure) -> Times:
    """Measure the candidates, and what a known table has, at each size.

    Args:
        operation: Of :data:`symmem.config.kernel_tables.KERNELS`.
        world: Ranks.
        known: The rows to compare with.
        sizes: Bytes, growing.
        measure: Takes the times.
    """
    times: dict[int, dict[Row, float]] = {}
    tried, ratios = candidates(operation, world), dict[Row, float]()
    for nbytes in sizes:
        before = [_plain(_fitting(known, nbytes, symmetric), world) for symmetric in (False, True)]
        rows = list(dict.fromkeys([*tried, *before]))
        times[nbytes] = dict(zip(rows, measure(operation, nbytes, rows), strict=True))
        best = min(seconds for row, seconds in times[nbytes].items() if not row.symmetric)
        before_that, ratios = ratios, {row: seconds / best for row, seconds in times[nbytes].items()}
        falling_behind = {row for row in tried if ratios[row] > before_that.get(row, ratios[row])}
        tried = [row for row in tried if ratios[row] <= _HOPELESS or row not in falling_behind]
    return times


def rows_from(times: Times) -> tuple[Row, ...]:
    """The rows of a table: at each size the quickest, up to the next size at which another is quicker.

    A row for symmetric memory comes in where it is quicker than the best for any memory.
    """
    plain: Row | None = None
    symmetric: Row | None = None
    found: list[tuple[int, Row, Row | None]] = []
    for nbytes, taken in sorted(times.items()):
        plain = _best({row: seconds for row, seconds in taken.items() if not row.symmetric}, plain)
        worth = {row: seconds for row, seconds in taken.items() if row.symmetric and seconds <= _WORTH * taken[plain]}
        symmetric = _best(worth, symmetric) if worth else None
        found.append((nbytes, plain, symmetric))
    rows: list[Row] = []
    for _, run in itertools.groupby(found, lambda each: each[1:]):
        nbytes, plain, symmetric = list(run)[-1]
        limit = None if nbytes == found[-1][0] else nbytes
        rows += [row._replace(nbytes=limit) for row in (symmetric, plain) if row is not None]
    return tuple(rows)


def _best(times: Mapping[Row, float], before: Row | None) -> Row:
    """The quickest row; the one of the size before if that is as quick, but for noise."""
    best = min(times, key=times.__getitem__)
    if before is not None and before in times and times[best] > _WORTH * times[before]:
        return before
    return best


def changes(times: Times, known: Sequence[Row], tuned: Sequence[Row]) -> list[Change]:
    """What a table changes at each measured size, for tensors in symmetric memory if any row is for such."""
    found = []
    for nbytes, taken in times.items():
        (world,) = {row.world for row in taken}
        before, after = (_plain(_fitting(rows, nbytes, symmetric=True), world) for rows in (known, tuned))
        found.append(Change(nbytes, before, after, taken[before], taken[after]))
    return found


def check_output(path: Path) -> Rows:
    """The rows that a file has, if there is one; before anything is measured that could not be written.

    Raises:
        ConfigError: It is no table, or its folder is not there.
    """
    if path.exists():
        return read_algorithms(str(path))
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {str(path.parent)!r} for a table of algorithms", hint="make it first")
    return {}


def write(path: Path, rows: Mapping[str, Sequence[Row]], world: int, about: Sequence[str]) -> Rows:
    """Write a table; rows that the file has for other operations and numbers of ranks stay, and so do its comments.

    Args:
        path: Of the file.
        rows: The new rows, by operation.
        world: Ranks that they are for.
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
    written = parse_algorithms(text, str(path))  # before the file is there
    path.write_text(text)
    return written


def _written(operation: str, row: Row) -> str:
    pairs = {"operation": operation, "world": row.world}
    if row.nbytes is not None:
        pairs["nbytes"] = SIZE.format(row.nbytes)
    pairs |= {"kernel": row.kernel, "threads": row.threads, "blocks": row.blocks}
    if row.nap:
        pairs["nap"] = row.nap
    return ", ".join(f"{key}: {value}" for key, value in pairs.items())
