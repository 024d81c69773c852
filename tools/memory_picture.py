"""Draws an arena as SVG: its segments now, and over time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from symmem.tools import display
from symmem.tools import memory_page as html
from symmem.tools.memory_history import SnapshotArena, SnapshotBlock, SnapshotSegment, SnapshotState, states

__all__ = ["now", "over_time", "svg"]

_WIDTH, _LEFT, _RIGHT = 1000.0, 84.0, 992.0
_HEAD, _CURVE, _MAP = 18.0, 96.0, 340.0  # heights in the picture over time: labels of growths, the curve, all segments

_KEY = """<svg class="key" viewBox="0 0 14 14"><rect class="{}" width="14" height="14"/></svg> {}"""
_NOW_KEY = _KEY.format("c8", "live") + " \u2002 " + _KEY.format("h8", "quarantined") + " \u2002 "
_NOW_KEY += _KEY.format("empty", "free")
_TIME_KEY = _KEY.format("solid", "live") + " \u2002 " + _KEY.format("h8", "quarantined")
_TIME_KEY += """ \u2002 <svg class="key" viewBox="0 0 14 14"><path class="outline" d="M0 7H14"/></svg> reserved"""


@dataclass
class _Box:
    """A rectangle: one block, or ``count`` blocks that are too small to show one by one."""

    left: float
    top: float
    right: float
    bottom: float
    colour: int
    hatched: bool
    title: str
    label: str
    site: str
    nbytes: int
    count: int = 1


def now(arena: SnapshotArena, colours: Mapping[str, int], budget: int) -> str:
    """Draw the segments at the time of the snapshot. Addresses grow from left to right."""
    if not arena.now:
        return "<h2>Now</h2><p>No segments.</p>"
    height, step = (28.0, 36.0) if len(arena.now) <= 16 else (12.0, 15.0)
    extents, rows = _extents(arena.now, arena.blocks_now), {}
    parts, boxes = [], []
    for number, segment in enumerate(arena.now):
        rows[segment.index] = (number * step, extents[segment.index])
        parts += [_rect("empty", _LEFT, number * step, _RIGHT, number * step + height)]
        parts += [_segment_label(segment.index, segment.nbytes, number * step, height)]
    for block in arena.blocks_now:
        top, extent = rows[block.segment]
        left, right = (_LEFT + (_RIGHT - _LEFT) * at / extent for at in (block.offset, block.offset + block.nbytes))
        boxes.append(_box(block, colours, (left, top, right, top + height), block.dropped is not None))
    content = "".join([*parts, *_draw(boxes, budget)])
    return f"<h2>Now <small>{_NOW_KEY}</small></h2>{svg(step * len(arena.now), content)}"


def over_time(arena: SnapshotArena, colours: Mapping[str, int], budget: int) -> str:
    """Draw the record: the curve of bytes, and below it all blocks. Time runs to the right, addresses grow upwards."""
    if not arena.events:
        return "<h2>Over time</h2><p>No events were recorded.</p>"
    until = max(arena.seconds * 1.02, 1e-9) if arena.seconds else 1.0
    top = _HEAD + _CURVE + 14
    extents = _extents(arena.segments, arena.blocks)
    bands, bottom = _bands(extents, top)

    def across(time: float | None) -> float:
        return _LEFT + (_RIGHT - _LEFT) * min(1.0, (time or 0.0) / until)

    parts, boxes = [], []
    for segment in arena.segments:
        low, scale = bands[segment.index]
        right = _RIGHT if segment.end is None else across(segment.end)
        parts.append(_rect("empty", across(segment.start), low - segment.nbytes * scale, right, low))
    for block in arena.blocks:
        low, scale = bands[block.segment]
        high, low = low - (block.offset + block.nbytes) * scale, low - block.offset * scale
        right = _RIGHT if block.end is None else across(block.end)
        dropped = right if block.dropped is None else min(right, across(block.dropped))
        if dropped > across(block.start) or block.dropped is None:
            boxes.append(_box(block, colours, (across(block.start), high, dropped, low), False))
        if block.dropped is not None:
            boxes.append(_box(block, colours, (dropped, high, right, low), True))
    for index, (low, scale) in bands.items():
        height = extents[index] * scale
        parts.append(_segment_label(index, extents[index], low - height, height))
    parts += [
        *_draw(boxes, budget),
        *_curve(states(arena), across, max(1.0, _WIDTH / 2 / budget)),
        *_time_axis(until, across, bottom),
    ]
    parts += _marks(arena.segments, across, bottom)
    older = sum(block.start is None for block in arena.blocks)
    note = f"{display.counted(arena.events, 'event')} in {display.seconds(arena.seconds)}"
    note += f"; {display.counted(older, 'block')} allocated before the first one" if older else ""
    return f"<h2>Over time <small>{_TIME_KEY}</small></h2>{svg(bottom + 20, ''.join(parts))}<p>{note}.</p>"


def svg(height: float, content: str) -> str:
    """Wrap SVG elements into a picture. All pictures have the same width."""
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.1f}">{content}</svg>'


def _extents(segments: Iterable[SnapshotSegment], blocks: Iterable[SnapshotBlock]) -> dict[int, int]:
    """Bytes to draw for every segment, by index; enough for all its blocks."""
    extents: dict[int, int] = defaultdict(lambda: 1)
    for segment in segments:
        extents[segment.index] = max(extents[segment.index], segment.nbytes)
    for block in blocks:
        extents[block.segment] = max(extents[block.segment], block.offset + block.nbytes)
    return dict(sorted(extents.items()))


def _bands(extents: Mapping[int, int], top: float) -> tuple[dict[int, tuple[float, float]], float]:
    """By segment, the y of its first byte and the height of a byte; then the bottom of the picture."""
    least, gap = (18.0, 4.0) if len(extents) <= 16 else (_MAP / len(extents), 0.0)
    total = sum(extents.values())
    heights = {index: max(least, _MAP * extent / total) for index, extent in extents.items()}
    bottom = low = top + sum(heights.values()) + gap * len(heights)
    bands = {}
    for index, height in heights.items():
        bands[index] = (low, height / extents[index])
        low -= height + gap
    return bands, bottom


def _segment_label(index: int, nbytes: float, top: float, height: float) -> str:
    if height < 11:
        return ""
    size, middle = display.nbytes(nbytes), top + height / 2
    if height < 27:
        return _text(_LEFT - 8, middle + 4, f"{index} \u00b7 {size}", "end")
    return _text(_LEFT - 8, middle - 3, f"segment {index}", "end") + _text(_LEFT - 8, middle + 10, size, "end")


def _box(
    block: SnapshotBlock, colours: Mapping[str, int], edges: tuple[float, float, float, float], hatched: bool
) -> _Box:
    times = f"since {display.seconds(block.start)}" if block.start is not None else "allocated before the record"
    times += f", quarantined from {display.seconds(block.dropped)}" if block.dropped else ""
    times += f", reclaimed at {display.seconds(block.end)}" if block.end is not None else ""
    what = ", ".join(filter(None, (block.name, block.what, display.nbytes(block.nbytes))))
    place = f"segment {block.segment}, offset {block.offset:,}"
    lines = (what, block.site or "call site not recorded", place, times)
    title = "\n".join(html.cut(line, 160) for line in lines)
    return _Box(*edges, colours[block.site], hatched, title, block.name or block.site, block.site, block.nbytes)


def _draw(boxes: list[_Box], budget: int) -> list[str]:
    """Draw at most ``budget`` rectangles: merge boxes below a pixel, or below more pixels if there are too many."""
    pixel, shown = 1.0, _merged(boxes, 1.0)
    while len(shown) > budget and pixel < _WIDTH:
        pixel *= 1.5
        shown = _merged(boxes, pixel)
    return [part for box in shown for part in _rectangle(box)]


def _merged(boxes: Iterable[_Box], pixel: float) -> list[_Box]:
    """Merge boxes narrower or lower than ``pixel`` if they have the same colour and row, and touch."""
    shown: list[_Box] = []
    rows: dict[tuple[int, int, int, bool], list[_Box]] = defaultdict(list)
    for box in boxes:
        if box.right - box.left >= pixel and box.bottom - box.top >= pixel:
            shown.append(box)
        else:
            key = (math.floor(box.top / pixel), math.ceil(box.bottom / pixel), box.colour, box.hatched)
            rows[key].append(box)
    for row in rows.values():
        row.sort(key=lambda box: box.left)
        run = replace(row[0])
        shown.append(run)
        for box in row[1:]:
            if box.left - run.right < pixel:
                _join(run, box)
            else:
                run = replace(box)
                shown.append(run)
    return shown


def _join(run: _Box, box: _Box) -> None:
    run.right, run.top, run.bottom = max(run.right, box.right), min(run.top, box.top), max(run.bottom, box.bottom)
    run.count += 1
    run.nbytes = max(run.nbytes, box.nbytes)
    run.site = run.site if run.site == box.site else "several call sites"
    site = html.cut(run.site or "call site not recorded", 160)
    run.title = f"{display.counted(run.count, 'block')} of up to {display.nbytes(run.nbytes)}\n{site}"
    run.label = ""


def _rectangle(box: _Box) -> list[str]:
    left, top = min(box.left, _RIGHT - 0.8), box.top
    width, height = max(0.8, box.right - left), max(0.8, box.bottom - top)
    top = min(top, box.bottom - height) if box.bottom - box.top < 0.8 else top
    style = f"b {'h' if box.hatched else 'c'}{box.colour}{' edge' if min(width, height) > 3 else ''}"
    parts = [_rect(style, left, top, left + width, top + height, box.title)]
    if not box.hatched and box.label and height >= 14:
        room = int((width - 10) / 6)
        if room >= 6 and (len(box.label) <= room or room >= 14):
            parts.append(_text(left + 6, top + height / 2 + 4, html.cut(box.label, room), "on"))
    return parts


def _curve(found: Sequence[SnapshotState], across: Callable[[float], float], pixel: float) -> list[str]:
    """Draw live bytes, quarantined bytes on top of them, and a line of reserved bytes, in columns of ``pixel``."""
    base = _HEAD + _CURVE
    most = max(1, *(max(state.reserved, state.live + state.quarantined) for state in found))
    columns: dict[int, list[SnapshotState]] = {}
    for state in found:
        columns.setdefault(round(across(state.time) / pixel), []).append(state)
    kept = [  # the peak and the end of every column
        state
        for column in columns.values()
        for state in dict.fromkeys((max(column, key=lambda each: each.live + each.quarantined), column[-1]))
    ]

    def steps(values: Iterable[float]) -> str:
        points = zip(kept, values, strict=True)
        return "".join(f"H{across(state.time):.1f}V{base - _CURVE * value / most:.1f}" for state, value in points)

    parts = [_rule(base - _CURVE * value / most, display.nbytes(value)) for value in _byte_ticks(most)]
    last, peak = found[-1], max(state.live for state in found)
    live = f"live: {display.nbytes(last.live)}, at most {display.nbytes(peak)} in this record"
    areas = {
        "late": (
            [state.live + state.quarantined for state in kept],
            f"quarantined: {display.nbytes(last.quarantined)}",
        ),
        "solid": ([state.live for state in kept], live),
    }
    for style, (values, title) in areas.items():
        outline = f"M{_LEFT:.1f} {base:.1f}{steps(values)}H{_RIGHT:.1f}V{base:.1f}Z"
        parts.append(f'<path class="{style}" d="{outline}"><title>{title}</title></path>')
    line = steps([state.reserved for state in kept])
    parts.append(f'<path class="outline" d="M{_LEFT:.1f} {base:.1f}{line}H{_RIGHT:.1f}"/>')
    return parts


def _byte_ticks(most: int) -> list[int]:
    step = 1 << max(0, most.bit_length() - 2)
    return list(range(0, most + 1, step))


def _rule(y: float, label: str) -> str:
    return f'<path class="grid" d="M{_LEFT:.1f} {y:.1f}H{_RIGHT:.1f}"/>{_text(_LEFT - 8, y + 4, label, "end")}'


def _time_axis(until: float, across: Callable[[float], float], bottom: float) -> list[str]:
    raw = until / 8
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    parts = [f'<path class="grid" d="M{_LEFT:.1f} {bottom:.1f}H{_RIGHT:.1f}"/>']
    for number in range(int(until / step) + 1):
        x = across(number * step)
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom:.1f}V{bottom + 4:.1f}"/>')
        label = display.seconds(number * step, until) if number else "0"
        if x + 3.3 * len(label) < _WIDTH:
            parts.append(_text(x, bottom + 16, label, "mid"))
    return parts


def _marks(segments: Iterable[SnapshotSegment], across: Callable[[float | None], float], bottom: float) -> list[str]:
    """Draw a line at every growth and trim, with a label if it fits."""
    found = [(seg.start, "+", seg.nbytes) for seg in segments if seg.start is not None]
    found += [(seg.end, "\u2212", seg.nbytes) for seg in segments if seg.end is not None]
    columns: dict[int, str] = {}
    for time, sign, nbytes in sorted(found):
        columns.setdefault(round(across(time)), f"{sign}{display.nbytes(nbytes)}")
    parts, free = [], 0.0
    for x, label in columns.items():
        parts.append(f'<path class="grow" d="M{x} {_HEAD:.1f}V{bottom:.1f}"><title>{label}</title></path>')
        at = min(float(x), _RIGHT - 6.5 * len(label))
        if at >= free:
            parts.append(_text(at, _HEAD - 6, label, "mark"))
            free = at + 6.5 * len(label) + 8
    return parts


def _rect(style: str, left: float, top: float, right: float, bottom: float, title: str = "") -> str:
    place = f'x="{left:.1f}" y="{top:.1f}" width="{max(0.0, right - left):.1f}" height="{max(0.0, bottom - top):.1f}"'
    inside = f"><title>{html.text(title, 600)}</title></rect>" if title else "/>"
    return f'<rect class="{style}" {place}{inside}'


def _text(x: float, y: float, label: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{html.text(label)}</text>'
