"""``symmem bench compare``: find what became slower from one file of figures to another."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import NamedTuple, TypeAlias

from symmem.errors import InvalidArgumentError
from symmem.tools.bench.figures import UNITS, Figure
from symmem.tools.table import render

__all__ = ["FigureChange", "parse", "read", "run"]

_HINT = "a file must hold the output of `symmem bench SUITE --json`"
_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "figure": (str,),
    "backend": (str,),
    "world": (int,),
    "bytes": (int,),
    "value": _NUMBER,
    "unit": (str,),
    "peer": (str,),
    "peer_value": (*_NUMBER, NoneType),
    "ratio": (*_NUMBER, NoneType),
}
_MOST = 1e300  # a larger number is infinite, not a number at all, or a mistake

_Key: TypeAlias = tuple[str, str, int, int, str, str]


class FigureChange(NamedTuple):
    """A figure that both files have."""

    old: Figure
    new: Figure

    @property
    def ratio(self) -> float | None:
        """The new value over the old one; None if the old one is 0 or less."""
        return self.new.value / self.old.value if self.old.value > 0 else None

    @property
    def slowdown(self) -> float:
        """How many times worse the new value is: above 1 for more time or memory, or for less bandwidth."""
        better, worse = self.old.value, self.new.value
        if UNITS[self.old.unit]:
            better, worse = worse, better
        if better > 0:
            return worse / better
        return math.inf if worse > 0 else 1.0


def parse(line: str) -> Figure:
    """Read the figure of one JSON line.

    Raises:
        InvalidArgumentError: The line is no figure; the text says why.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"not JSON: {error}", hint=_HINT) from error
    if not isinstance(found, dict) or found.keys() != _TYPES.keys():
        raise InvalidArgumentError(f"expected the keys {', '.join(_TYPES)}, got {line.strip()[:60]!r}", hint=_HINT)
    for key, types in _TYPES.items():
        value = found[key]
        if type(value) not in types or (isinstance(value, _NUMBER) and not abs(value) < _MOST):
            raise InvalidArgumentError(f"{key!r} has a wrong value: {str(value)[:60]!r}", hint=_HINT)
    if found["unit"] not in UNITS:
        raise InvalidArgumentError(f"'unit' must be one of {', '.join(UNITS)}, not {found['unit']!r}", hint=_HINT)
    del found["ratio"]
    return Figure(**found)


def read(file: Path) -> list[Figure]:
    """Read the figures of a file, one per line.

    Raises:
        InvalidArgumentError: The file cannot be read, or a line is no figure or repeats one; names file and line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{file}: cannot be read: {error}", hint=_HINT) from error
    figures: dict[_Key, Figure] = {}
    for number, line in enumerate(lines, 1):
        try:
            figure = parse(line)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{file}, line {number}: {error.what}", hint=_HINT) from error
        if _key(figure) in figures:
            what = f"{file}, line {number}: the same figure as in an earlier line"
            raise InvalidArgumentError(what, hint="compare files of one run each")
        figures[_key(figure)] = figure
    return list(figures.values())


def _key(f: Figure) -> _Key:
    return f.figure, f.backend, f.world, f.bytes, f.peer, f.unit


def run(old: Path, new: Path, limit: float) -> tuple[str, bool]:
    """Compare two files.

    Returns:
        The text to print, and whether a figure became more than ``limit`` times worse.

    Raises:
        InvalidArgumentError: See :func:`read`.
    """
    before, after = ({_key(figure): figure for figure in read(file)} for file in (old, new))
    changes = [FigureChange(figure, after[key]) for key, figure in before.items() if key in after]
    header = ("figure", "backend", "world", "bytes", "peer", "old", "new", "ratio", "over the peer")
    parts = [render(header, [_row(change) for change in changes])]
    for file, mine, others in ((old, before, after), (new, after, before)):
        if names := _names([figure for key, figure in mine.items() if key not in others]):
            parts.append(f"Only in {file}:\n" + "\n".join(names))
    worse = [change for change in changes if change.slowdown > limit]
    lines = dict.fromkeys(f"  {change.slowdown:.2f} times: {_name(change.new)}" for change in worse)  # one per figure
    parts.append("\n".join([f"Worse by more than {limit:g} times:{'' if worse else ' nothing.'}", *lines]))
    return "\n\n".join(parts), bool(worse)


def _row(change: FigureChange) -> tuple[str, ...]:
    old, new = change
    values = f"{old.value:.2f}", f"{new.value:.2f} {new.unit}", _decimal(change.ratio)
    over_peer = f"{_decimal(old.ratio)} -> {_decimal(new.ratio)}"
    return old.figure, old.backend, str(old.world), str(old.bytes), old.peer or "-", *values, over_peer


def _decimal(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _names(figures: Sequence[Figure]) -> list[str]:
    return list(dict.fromkeys(f"  {_name(figure)}" for figure in figures))


def _name(f: Figure) -> str:
    return f"{f.figure}, {f.backend}, {f.world} ranks, {f.bytes} bytes"
