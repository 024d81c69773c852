"""Figures as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from symmem.tools.bench.figures import Figure, measurements, pair_of
from symmem.tools.bench.panels import maps
from symmem.tools.table import render

__all__ = ["table"]


def table(figures: Sequence[Figure]) -> str:
    """A row per measurement with all its peers and the ratio to the best; a matrix for figures of pairs."""
    parts = []
    if rows := _rows([figure for figure in figures if pair_of(figure.figure) is None]):
        parts.append(render(("figure", "backend", "world", "bytes", "ours", "peers", "ratio"), rows))
    for each in maps(figures):
        ranks = range(len(each.cells))
        cells = [[rank, *("-" if cell is None else f"{cell:.1f}" for cell in each.cells[rank])] for rank in ranks]
        title = f"{each.name}, {each.place}, {each.library}: {each.unit} by rank (row) and owner of the memory (column)"
        parts.append(title + "\n" + render(("rank", *map(str, ranks)), cells))
    return "\n\n".join(parts)


def _rows(figures: Sequence[Figure]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for each in measurements(figures):
        f, best = each.first, each.best
        peers = ", ".join(f"{line.peer} {line.peer_value:.2f}" for line in each.lines if line.peer_value is not None)
        ratio = "-" if best is None or best.ratio is None else f"{best.ratio:.3f}"
        if best is not None and len(each.lines) > 1:
            ratio += f" of {best.peer}"
        rows.append((f.figure, f.backend, f.world, f.bytes, f"{f.value:.2f} {f.unit}", peers or "-", ratio))
    return rows
