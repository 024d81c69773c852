"""Pictures of figures, as PNG. Needs matplotlib: ``pip install matplotlib``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from symmem.errors import InvalidArgumentError, UnsupportedError
from symmem.tools.bench.figures import UNITS, Figure
from symmem.tools.bench.panels import OURS, Bars, Curves, Map, Panel, panels
from symmem.tools.display import PALETTE, nbytes

__all__ = ["check", "draw"]

_WIDTH, _HEIGHT = 5.0, 4.4  # inches of a panel
_COLUMNS = 3
_LABELS = 10  # at most, on an axis
_FAR = 5  # times: beyond, an axis is logarithmic
_PEER_COLOURS = [PALETTE[number] for number in (1, 2, 5, 6, 4, 8)]
_UNIT = {"us": "time of one call (\u00b5s)", "GB/s": "bandwidth (GB/s)", "count": "count", "bytes": "bytes"}
_GREY, _PALE = "#687080", "#dcdfe5"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _PALE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "figure.dpi": 130,
}


def check(file: Path) -> None:
    """Raise, before anything is measured, if :func:`draw` could not write the picture.

    Raises:
        InvalidArgumentError: The file is not named ``.png``, or its folder is not there.
        UnsupportedError: There is no matplotlib.
    """
    if file.suffix != ".png":
        raise InvalidArgumentError(f"{file}: pictures are PNG", hint="end the name of the file in .png")
    if not file.parent.is_dir():
        raise InvalidArgumentError(f"{file}: there is no folder {str(file.parent)!r}")
    _matplotlib()


def draw(figures: Sequence[Figure], title: str, file: Path) -> None:
    """Write a picture of all figures: see :mod:`symmem.tools.bench.panels`.

    Args:
        figures: One at least.
        title: Of the picture.
        file: Where to.

    Raises:
        InvalidArgumentError: The file cannot be written.
        UnsupportedError: There is no matplotlib.
    """
    matplotlib = _matplotlib()
    found = panels(figures)
    whose = dict.fromkeys(who for panel in found for who in _whose(panel) if who != OURS)
    colours = {who: _PEER_COLOURS[number % len(_PEER_COLOURS)] for number, who in enumerate(whose)}
    colours[OURS] = PALETTE[0]
    columns = _columns(found)
    rows = math.ceil(len(found) / columns)
    with matplotlib.rc_context(_STYLE):
        picture = matplotlib.figure.Figure(figsize=(_WIDTH * columns, _HEIGHT * rows + 0.5), layout="constrained")
        picture.suptitle(title, fontsize=12, x=0.01, ha="left")
        places = picture.subfigures(rows, columns, squeeze=False).flat
        for panel, place in zip(found, places, strict=False):
            if isinstance(panel, Curves):
                _draw_curves(place, panel, colours)
            elif isinstance(panel, Bars):
                _draw_bars(place, panel, colours)
            else:
                top = [cell for each in found if isinstance(each, Map) for row in each.cells for cell in row if cell]
                _draw_map(place, panel, max(top))
        try:
            picture.savefig(file)
        except OSError as error:
            raise InvalidArgumentError(f"{file}: cannot be written: {error.strerror}") from error


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise UnsupportedError(f"no picture without matplotlib: {error}", hint="pip install matplotlib") from error
    return matplotlib


def _columns(found: Sequence[Panel]) -> int:
    """All maps of one backend, world and owner stand in a row."""
    if all(isinstance(panel, Map) for panel in found):
        return len({panel.name for panel in found if isinstance(panel, Map)})
    return min(_COLUMNS, len(found))


def _whose(panel: Panel) -> Iterable[str]:
    if isinstance(panel, Curves):
        return panel.lines
    return (panel.who,) if isinstance(panel, Map) else (who for _, values in panel.rows for who in values)


def _style(who: str, colours: dict[str, str]) -> dict[str, Any]:
    return {"color": colours[who], "linewidth": 2.2 if who == OURS else 1.4, "zorder": 3 if who == OURS else 2}


def _draw_curves(place: Any, panel: Curves, colours: dict[str, str]) -> None:
    heights = (3, 1) if panel.ratios else (1,)
    axes = place.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights).flat
    top, bottom = axes[0], axes[-1]
    for who, points in panel.lines.items():
        top.plot(*zip(*points, strict=True), label=who, marker="o", markersize=3.5, **_style(who, colours))
    _scale(top, "y", [value for points in panel.lines.values() for _, value in points])
    top.set_title(panel.title, loc="left")
    top.set_ylabel(_UNIT[panel.unit])
    top.legend(frameon=False)
    if panel.ratios:
        bottom.plot(*zip(*panel.ratios, strict=True), marker="o", markersize=3.5, **_style(OURS, colours))
        bottom.axhline(1, color=_GREY, linewidth=1, linestyle="--")
        bottom.set_ylabel(f"ratio to\nbest peer\n({'more' if UNITS[panel.unit] else 'less'} is better)")
        bottom.set_ylim(0, max(1.2, 1.1 * max(ratio for _, ratio in panel.ratios)))
    at = sorted({x for points in panel.lines.values() for x, _ in points})
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(_apart(at))
    _plain_ticks(
        bottom.xaxis, lambda value, _: nbytes(value).replace(" ", "\n") if panel.axis == "bytes" else f"{value:g}"
    )
    bottom.set_xlabel("size" if panel.axis == "bytes" else "ranks")


def _apart(at: Sequence[int]) -> list[int]:
    """Those of ascending numbers that have room for a label on a logarithmic axis."""
    shown = [at[0]]
    for number in at[1:]:
        if (number / shown[-1]) ** _LABELS >= at[-1] / at[0]:
            shown.append(number)
    return shown


def _plain_ticks(axis: Any, text: Callable[[float, object], str]) -> None:
    axis.set_major_formatter(text)
    axis.set_minor_formatter("")


def _scale(axes: Any, which: str, values: Sequence[float]) -> None:
    """Logarithmic if the values are far apart, else from 0; with numbers as people write them."""
    least, most = min(values), max(values)
    axis = getattr(axes, f"{which}axis")
    if least > 0 and most > _FAR * least:
        axes.set(**{f"{which}scale": "log", f"{which}lim": (least / 1.5, most * 1.5)})
        if most < 100 * least:
            axis.set_major_locator(_matplotlib().ticker.LogLocator(subs=(1, 2, 5)))
    elif least >= 0:
        axes.set(**{f"{which}lim": (0, most * 1.15 or 1.0)})
    _plain_ticks(axis, lambda value, _: f"{value:,.10g}")


def _draw_map(place: Any, panel: Map, top: float) -> None:
    axes = place.subplots()
    nan = float("nan")
    shown = axes.imshow(
        [[nan if cell is None else cell for cell in row] for row in panel.cells], "viridis", vmin=0, vmax=top
    )
    for rank, row in enumerate(panel.cells):
        for peer, cell in enumerate(row):
            if cell is not None:
                colour = "black" if cell > 0.6 * top else "white"
                axes.text(peer, rank, f"{cell:.3g}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_title(f"{panel.name}: {panel.who}\n{panel.place}", loc="left")
    axes.set_xlabel("rank whose memory it is")
    axes.set_ylabel("rank that copies")
    axes.set_xticks(range(len(panel.cells)))
    axes.set_yticks(range(len(panel.cells)))
    axes.grid(False)
    place.colorbar(shown, ax=axes, label=_UNIT[panel.unit])


def _draw_bars(place: Any, panel: Bars, colours: dict[str, str]) -> None:
    axes = place.subplots()
    whose = list(dict.fromkeys(who for _, values in panel.rows for who in values))
    height = 0.8 / len(whose)
    for number, who in enumerate(whose):
        rows = [
            (row + height * (number - (len(whose) - 1) / 2), values[who])
            for row, (_, values) in enumerate(panel.rows)
            if who in values
        ]
        bars = axes.barh(*zip(*rows, strict=True), height=height, color=colours[who], label=who)
        axes.bar_label(bars, [_number(value) for _, value in rows], padding=3, fontsize=8)
    axes.set_yticks(range(len(panel.rows)), [label for label, _ in panel.rows])
    axes.invert_yaxis()
    _scale(axes, "x", [value for _, values in panel.rows for value in values.values()])
    axes.set_xlim(right=axes.get_xlim()[1] * 1.1)  # room for the numbers
    axes.grid(axis="y", visible=False)
    axes.set_title(panel.backend, loc="left")
    axes.set_xlabel(_UNIT[panel.unit])
    if len(whose) > 1:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(whose))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
