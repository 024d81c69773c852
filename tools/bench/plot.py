"""Draws figures as PNG. Needs matplotlib: ``pip install matplotlib``."""

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

_WIDTH, _HEIGHT = 5.0, 4.4  # inches of a panel of curves or a map
_BARS_WIDTH = 8.0  # inches of a panel with bars, which has long labels
_BAR, _BARS_MARGIN = 0.15, 1.2  # inches of a bar, and of title, axis and legend together
_GAP = 0.6  # between two groups of bars, in bars
_COLUMNS = 3
_LABELS = 10  # at most this many labels on an axis
_FAR = 5  # an axis of curves is logarithmic if its values differ by more times than this
_FAR_BARS = 50  # the same for bars
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
    """Check, before anything is measured, that :func:`draw` can write the picture.

    Raises:
        InvalidArgumentError: The file name does not end in ``.png``, or the folder does not exist.
        UnsupportedError: matplotlib is not installed.
    """
    if file.suffix != ".png":
        raise InvalidArgumentError(f"{file}: pictures are PNG", hint="end the name of the file in .png")
    if not file.parent.is_dir():
        raise InvalidArgumentError(f"{file}: there is no folder {str(file.parent)!r}")
    _matplotlib()


def draw(figures: Sequence[Figure], title: str, file: Path) -> None:
    """Write a picture of all figures, with the panels of :mod:`symmem.tools.bench.panels`.

    Args:
        figures: At least one figure.
        title: Title of the picture.
        file: The file to write.

    Raises:
        InvalidArgumentError: The file cannot be written.
        UnsupportedError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    found = panels(figures)
    peers = dict.fromkeys(name for panel in found for name in _libraries(panel) if name != OURS)
    colours = {name: _PEER_COLOURS[number % len(_PEER_COLOURS)] for number, name in enumerate(peers)}
    colours[OURS] = PALETTE[0]
    columns = _columns(found)
    heights = [max(map(_height, found[first : first + columns])) for first in range(0, len(found), columns)]
    width = _BARS_WIDTH if any(isinstance(panel, Bars) for panel in found) else _WIDTH
    with matplotlib.rc_context(_STYLE):
        size = width * columns, sum(heights) + 0.5
        picture = matplotlib.figure.Figure(figsize=size, layout="constrained")
        picture.suptitle(title, fontsize=12, x=0.01, ha="left")
        places = picture.subfigures(len(heights), columns, squeeze=False, height_ratios=heights).flat
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


def _height(panel: Panel) -> float:
    if not isinstance(panel, Bars):
        return _HEIGHT
    return _BARS_MARGIN + _BAR * (len([*_libraries(panel)]) + _GAP * len(panel.rows))


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise UnsupportedError(f"no picture without matplotlib: {error}", hint="pip install matplotlib") from error
    return matplotlib


def _columns(found: Sequence[Panel]) -> int:
    """The number of columns. The maps of one backend, world size and library share a row; bars have a row each."""
    if all(isinstance(panel, Map) for panel in found):
        return len({panel.name for panel in found if isinstance(panel, Map)})
    if all(isinstance(panel, Bars) for panel in found):
        return 1
    return min(_COLUMNS, len(found))


def _libraries(panel: Panel) -> Iterable[str]:
    if isinstance(panel, Curves):
        return panel.lines
    return (panel.library,) if isinstance(panel, Map) else (name for _, values in panel.rows for name in values)


def _style(name: str, colours: dict[str, str]) -> dict[str, Any]:
    return {"color": colours[name], "linewidth": 2.2 if name == OURS else 1.4, "zorder": 3 if name == OURS else 2}


def _draw_curves(place: Any, panel: Curves, colours: dict[str, str]) -> None:
    heights = (3, 1) if panel.ratios else (1,)
    axes = place.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights).flat
    top, bottom = axes[0], axes[-1]
    for name, points in panel.lines.items():
        top.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3.5, **_style(name, colours))
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
    """Choose the ascending numbers that have room for a label on a logarithmic axis."""
    shown = [at[0]]
    for number in at[1:]:
        if (number / shown[-1]) ** _LABELS >= at[-1] / at[0]:
            shown.append(number)
    return shown


def _plain_ticks(axis: Any, text: Callable[[float, object], str]) -> None:
    axis.set_major_formatter(text)
    axis.set_minor_formatter("")


def _scale(axes: Any, which: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic if its values are far apart, else start it at 0. Numbers are written in full."""
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
    axes.set_title(f"{panel.name}: {panel.library}\n{panel.place}", loc="left")
    axes.set_xlabel("owner of the memory (rank)")
    axes.set_ylabel("copying rank")
    axes.set_xticks(range(len(panel.cells)))
    axes.set_yticks(range(len(panel.cells)))
    axes.grid(False)
    place.colorbar(shown, ax=axes, label=_UNIT[panel.unit])


def _draw_bars(place: Any, panel: Bars, colours: dict[str, str]) -> None:
    axes = place.subplots()
    bars: dict[str, list[tuple[float, float]]] = {}  # position and value, by library
    middles, position = [], 0.0
    for _, row in panel.rows:
        middles.append(position + (len(row) - 1) / 2)
        for name, value in row.items():
            bars.setdefault(name, []).append((position, value))
            position += 1
        position += _GAP
    for name, found in bars.items():
        drawn = axes.barh(*zip(*found, strict=True), height=1, color=colours[name], label=name)
        axes.bar_label(drawn, [_number(value) for _, value in found], padding=3, fontsize=7)
    axes.set_yticks(middles, [label for label, _ in panel.rows])
    axes.set_ylim(position - 0.5, -0.5 - _GAP)
    _scale_bars(axes, [value for found in bars.values() for _, value in found])
    axes.grid(axis="y", visible=False)
    axes.set_title(panel.backend, loc="left")
    axes.set_xlabel(_UNIT[panel.unit])
    if len(bars) > 1:
        place.legend(frameon=False, loc="outside lower center", ncols=len(bars))


def _scale_bars(axes: Any, values: Sequence[float]) -> None:
    """Start at 0, with room for the numbers; logarithmic, also for negative values, if the values are far apart."""
    least, most = min(0.0, *values), max(0.0, *values)
    sizes = [abs(value) for value in values if value] or [1.0]
    far = max(sizes) > _FAR_BARS * min(sizes)
    if far:
        unit = 10.0 ** math.floor(math.log10(min(sizes)))
        powers = [unit * 10.0**power for power in range(1, 1 + math.ceil(math.log10(max(sizes) / unit)))]
        powers = powers[:: math.ceil(len(powers) / (_LABELS // 2))]
        axes.set_xscale("symlog", linthresh=min(sizes))
        axes.set_xticks([*(-power for power in powers if power < -least), 0, *powers])
    room = 20.0 if far else 1.2
    axes.set_xlim(room * least, room * most or 1.0)
    _plain_ticks(axes.xaxis, lambda value, _: f"{value:,.10g}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
