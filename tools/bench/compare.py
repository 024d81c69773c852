"""``symmem bench compare``: what became slower from one file of figures to another."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from symmem.errors import InvalidArgumentError
from symmem.tools.bench.figures import UNITS, Figure
from symmem.tools.table import render

__all__ = ["Change", "Comparison", "compare", "parse", "read", "run"]

_HINT = "a file holds what `symmem bench SUITE --json` printed"
_KEYS = [field.name for field in fields(Figure)] + ["ratio"]


class _Key(NamedTuple):
    """What a figure is of: two with the same one are the same, measured twice."""

    figure: str
    backend: str
    world: int
    bytes: int
    peer: str
    unit: str


@dataclass(frozen=True)
class Change:
    """One figure in both files.

    Attributes:
        old: In the first file.
        new: In the second one.
    """

    old: Figure
    new: Figure

    @property
    def ratio(self) -> float | None:
        """The new value over the old one; None if that is 0 or less."""
        return self.new.value / self.old.value if self.old.value > 0 else None

    @property
    def slowdown(self) -> float:
        """How many times worse: above 1 for more time, memory or requests, or for less of what is better if more."""
        better, worse = self.old.value, self.new.value
        if UNITS[self.old.unit]:
            better, worse = worse, better
        if better > 0:
            return worse / better
        return math.inf if worse > 0 else 1.0


@dataclass(frozen=True)
class Comparison:
    """Two files of figures.

    Attributes:
        both: What is in both, in the order of the first.
        gone: What is in the first only.
        added: What is in the second only.
    """

    both: list[Change]
    gone: list[Figure]
    added: list[Figure]


def parse(line: str) -> Figure:
    """The figure of one JSON line.

    Raises:
        InvalidArgumentError: It is none; says what is wrong with it.
    """
    try:
        found = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _wrong(f"expected a JSON object, got {line.strip()[:60]!r}")
    if sorted(found) != sorted(_KEYS):
        missing, unknown = sorted(set(_KEYS) - set(found)), sorted(set(found) - set(_KEYS))
        raise _wrong(f"keys are missing: {missing}; and there are unknown ones: {unknown}")
    for key in ("figure", "backend", "unit", "peer"):
        _expect(isinstance(found[key], str), key, "a string", found)
    _expect(found["figure"] != "", "figure", "a name", found)
    _expect(found["unit"] in UNITS, "unit", f"one of {', '.join(UNITS)}", found)
    for key, least in (("world", 1), ("bytes", 0)):
        _expect(type(found[key]) is int and found[key] >= least, key, f"a whole number from {least}", found)
    _expect(_is_number(found["value"]), "value", "a number", found)
    _expect(found["peer_value"] is None or _is_number(found["peer_value"]), "peer_value", "a number or null", found)
    _expect((found["peer"] == "") == (found["peer_value"] is None), "peer_value", "one, if and only if a peer", found)
    ratio = found.pop("ratio")
    figure = Figure(**found)
    expected = figure.ratio
    right = ratio is None if expected is None else _is_number(ratio) and math.isclose(ratio, expected, rel_tol=1e-6)
    _expect(right, "ratio", f"value over peer_value, {expected}", {"ratio": ratio})
    return figure


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _is_number(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _expect(holds: bool, key: str, what: str, found: dict[str, Any]) -> None:
    if not holds:
        raise _wrong(f"{key!r} must be {what}, not {str(found[key])[:60]!r}")


def _wrong(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(what, hint=_HINT)


def read(file: Path) -> list[Figure]:
    """The figures of a file, one a line; as a list they are in the order of the file.

    Raises:
        InvalidArgumentError: It cannot be read, or a line is no figure or one that was there before; names file and
            line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{file}: cannot be read: {error}", hint=_HINT) from error
    figures: dict[_Key, Figure] = {}
    for number, line in enumerate(lines, 1):
        try:
            figure = parse(line)
            if _key(figure) in figures:
                raise _wrong("this figure was there before: one file is of one run")
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{file}, line {number}: {error.what}", hint=error.hint) from error
        figures[_key(figure)] = figure
    return list(figures.values())


def _key(figure: Figure) -> _Key:
    return _Key(*(getattr(figure, name) for name in _Key._fields))


def compare(old: Sequence[Figure], new: Sequence[Figure]) -> Comparison:
    """Find each figure of two files in the other one."""
    before, after = ({_key(figure): figure for figure in figures} for figures in (old, new))
    both = [Change(figure, after[key]) for key, figure in before.items() if key in after]
    gone = [figure for key, figure in before.items() if key not in after]
    return Comparison(both, gone, [figure for key, figure in after.items() if key not in before])


def run(old: Path, new: Path, limit: float) -> tuple[str, bool]:
    """What to print, and whether something became more than ``limit`` times worse.

    Raises:
        InvalidArgumentError: See :func:`read`.
    """
    found = compare(read(old), read(new))
    header = ("figure", "backend", "world", "bytes", "peer", "old", "new", "ratio", "over the peer")
    parts = [render(header, [_row(change) for change in found.both])]
    parts += [
        f"Only in {file}:\n" + "\n".join(dict.fromkeys(f"  {_named(figure)}" for figure in figures))
        for file, figures in ((old, found.gone), (new, found.added))
        if figures
    ]
    # What was compared with several peers is told once.
    worse = dict.fromkeys(f"  {c.slowdown:.2f} times: {_named(c.new)}" for c in found.both if c.slowdown > limit)
    parts.append("\n".join([f"Worse by more than {limit:g} times:{'' if worse else ' nothing.'}", *worse]))
    return "\n\n".join(parts), bool(worse)


def _row(change: Change) -> tuple[str, ...]:
    old, new = change.old, change.new
    ratio = "-" if change.ratio is None else f"{change.ratio:.3f}"
    values = (f"{old.value:.2f}", f"{new.value:.2f} {new.unit}", ratio, f"{_ratio(old)} -> {_ratio(new)}")
    return (old.figure, old.backend, str(old.world), str(old.bytes), old.peer or "-", *values)


def _ratio(figure: Figure) -> str:
    return "-" if figure.ratio is None else f"{figure.ratio:.3f}"


def _named(figure: Figure) -> str:
    return f"{figure.figure}, {figure.backend}, {figure.world} ranks, {figure.bytes} bytes"
