"""The content of a picture of figures: curves over bytes or ranks, maps of pairs, and bars.

:mod:`symmem.tools.bench.plot` draws it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from symmem.tools.bench.figures import Figure, Measurement, measurements, pair_of
from symmem.tools.display import nbytes

__all__ = ["OURS", "Bars", "Curves", "Map", "Panel", "Points", "maps", "panels"]

OURS = "symmem"

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curves:
    """One figure over sizes: a line for symmem and a line per peer.

    Attributes:
        title: Figure, backend and number of ranks.
        unit: Unit of the values.
        axis: ``bytes`` or ``ranks``, the meaning of the first number of a point.
        lines: Points by library, symmem first, in ascending order.
        ratios: symmem's value over the best peer's, in ascending order; empty without peers.
    """

    title: str
    unit: str
    axis: str
    lines: Mapping[str, Points]
    ratios: Points


@dataclass(frozen=True)
class Map:
    """One figure for all pairs of ranks.

    Attributes:
        name: Name of the figure.
        place: Backend and number of ranks.
        library: symmem or a peer.
        unit: Unit of the values.
        cells: Values as [rank][peer]; None if there is no figure.
    """

    name: str
    place: str
    library: str
    unit: str
    cells: list[list[float | None]]


@dataclass(frozen=True)
class Bars:
    """Figures of one size only, in one unit.

    Attributes:
        backend: symmem's backend.
        unit: Unit of the values.
        rows: A label, and values by library, symmem first.
    """

    backend: str
    unit: str
    rows: list[tuple[str, Mapping[str, float]]]


Panel = Curves | Map | Bars


def panels(figures: Sequence[Figure]) -> list[Panel]:
    """Choose the panels: maps of pairs, curves for several sizes or numbers of ranks, and bars for the rest."""
    found: list[Panel] = [*maps(figures)]
    bars: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    rest = measurements(figure for figure in figures if pair_of(figure.figure) is None)
    for group in _grouped(rest, lambda f: (f.figure, f.backend, f.unit)):
        lone: list[Measurement] = []
        for of_world in _grouped(group, lambda f: f.world):
            if len({each.first.bytes for each in of_world}) > 1:
                found.append(_curves(of_world, "bytes"))
            else:
                lone += of_world
        if len({each.first.world for each in lone}) > 2:
            found.append(_curves(lone, "ranks"))
        else:
            for each in lone:
                bars[each.first.backend, each.first.unit].append(each)
    return found + [Bars(backend, unit, [_bar(each) for each in lone]) for (backend, unit), lone in bars.items()]


def _grouped(found: Iterable[Measurement], key: Callable[[Figure], Hashable]) -> list[list[Measurement]]:
    groups: dict[Hashable, list[Measurement]] = defaultdict(list)
    for each in found:
        groups[key(each.first)].append(each)
    return list(groups.values())


def _curves(found: Sequence[Measurement], axis: str) -> Curves:
    first = found[0].first
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    ratios: dict[int, list[float]] = defaultdict(list)
    for each in found:
        at = each.first.bytes if axis == "bytes" else each.first.world
        lines[OURS][at].append(each.first.value)
        for line in each.lines:
            if line.peer_value is not None:
                lines[line.peer][at].append(line.peer_value)
        if each.best is not None and each.best.ratio is not None:
            ratios[at].append(each.best.ratio)
    title = f"{first.figure}, {first.backend}" + (f", {first.world} ranks" if axis == "bytes" else "")
    points = {library: _points(line) for library, line in lines.items()}
    return Curves(title, first.unit, axis, points, _points(ratios))


def _points(values: Mapping[int, Sequence[float]]) -> Points:
    """Take the median if a figure was measured several times, beside one peer after the other."""
    return [(at, statistics.median(values[at])) for at in sorted(values)]


def maps(figures: Iterable[Figure]) -> list[Map]:
    """The maps of all pairs: symmem's maps of a world size, then the peers'."""
    cells: dict[tuple[str, int, str, str, str], dict[tuple[int, int], float]] = defaultdict(dict)
    for f in figures:
        pair = pair_of(f.figure)
        if pair is not None:
            name, *at = pair
            cells[f.backend, f.world, OURS, name, f.unit][at[0], at[1]] = f.value
            if f.peer_value is not None:
                cells[f.backend, f.world, f.peer, name, f.unit][at[0], at[1]] = f.peer_value
    rows = list(dict.fromkeys(key[:3] for key in cells))
    return [
        Map(
            name,
            f"{backend}, {world} ranks",
            library,
            unit,
            [[of.get((a, b)) for b in range(world)] for a in range(world)],
        )
        for (backend, world, library, name, unit), of in sorted(cells.items(), key=lambda item: rows.index(item[0][:3]))
    ]


def _bar(each: Measurement) -> tuple[str, Mapping[str, float]]:
    f = each.first
    size = f", {nbytes(f.bytes)}" if f.bytes and f.unit != "bytes" else ""
    peers = {line.peer: line.peer_value for line in each.lines if line.peer_value is not None}
    return f"{f.figure}, {f.world} ranks{size}", {OURS: f.value, **peers}
