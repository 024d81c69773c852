"""``symmem memory-map``: an HTML page that shows arenas over time, from snapshots as JSON."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from symmem.errors import InvalidArgumentError
from symmem.tools import display
from symmem.tools import memory_page as html
from symmem.tools.memory_history import SnapshotArena, outside, read
from symmem.tools.memory_picture import now, over_time

__all__ = ["render", "run"]

_OTHER = len(display.PALETTE) - 1  # the colour of all remaining call sites
_BOXES = 8000  # per page, so that it stays below 2 MB
_SITES = 20  # per legend
_OPEN = 8  # arenas that are unfolded when the page opens


def render(*snapshots: Mapping[str, Any]) -> str:
    """Make a self-contained HTML page, which is also well-formed XML.

    Args:
        snapshots: Results of ``symmem.memory_snapshot()``, of one or several ranks.

    Raises:
        InvalidArgumentError: One is no snapshot; the text names the wrong place.
    """
    arenas = [arena for snapshot in snapshots for arena in read(snapshot)]
    colours = _colours(arenas)
    budget = max(100, _BOXES // max(1, len(arenas)))
    body = [_overview(arenas)] if len(arenas) > 1 else []
    for number, arena in enumerate(arenas):
        parts = [_figures(arena), now(arena, colours, budget // 4), over_time(arena, colours, budget * 3 // 4)]
        unfolded = ' open="open"' if number < _OPEN else ""
        summary = f"<summary>{_name(arena)}</summary>"
        body.append(f'<details id="a{number}"{unfolded}>{summary}{"".join(parts)}{_legend(arena, colours)}</details>')
    if not arenas:
        body.append("<p>No arenas: the snapshot was made before the first allocation from one.</p>")
    subtitle = f"{display.counted(len(arenas), 'arena')} of {display.counted(len(snapshots), 'snapshot')}"
    made = [time for snapshot in snapshots if isinstance(time := snapshot.get("time"), int | float) and 0 < time < 1e11]
    if made:
        subtitle += f", {datetime.fromtimestamp(max(made), timezone.utc):%Y-%m-%d %H:%M UTC}"
    return html.page(subtitle, "\n".join([*body, *_outside(snapshots)]))


def run(files: Sequence[Path], output: Path) -> int:
    """Write the page of the snapshots in ``files`` to ``output``; returns the exit code.

    Raises:
        InvalidArgumentError: A file cannot be read or written, is not JSON, or is no snapshot; the text names it.
    """
    page = render(*[_load(file) for file in files])
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{output}: cannot be written: {error.strerror}") from error
    print(f"{output}: the map of {display.counted(len(files), 'snapshot')}")
    return 0


def _load(file: Path) -> dict[str, Any]:
    hint = "pass files with the result of symmem.memory_snapshot() as JSON"
    try:
        snapshot: dict[str, Any] = json.loads(file.read_bytes())
        render(snapshot)
    except OSError as error:
        raise InvalidArgumentError(f"{file}: cannot be read: {error.strerror}") from error
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{file}: {error.what}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{file}: not JSON: {error}", hint=hint) from error
    return snapshot


def _colours(arenas: Iterable[SnapshotArena]) -> dict[str, int]:
    """Colours by call site. The sites that cover most of the pictures get a separate colour.

    A colour follows from the name, so that it is the same in other snapshots, except where two sites collide.
    """
    weights: Counter[str] = Counter()
    for arena in arenas:
        for block in arena.blocks:
            until = arena.seconds if block.end is None else block.end
            lasted = (until - (block.start or 0.0)) / arena.seconds if arena.seconds else 1.0
            weights[block.site] += math.ceil(block.nbytes * lasted)
    colours = dict.fromkeys(["", *weights], _OTHER)
    taken: set[int] = set()
    own = sorted(set(weights) - {""}, key=lambda site: (-weights[site], site))[:_OTHER]
    for site in own:
        wanted = zlib.crc32(site.encode(errors="replace"))
        colours[site] = next(each % _OTHER for each in range(wanted, wanted + _OTHER) if each % _OTHER not in taken)
        taken.add(colours[site])
    return colours


def _overview(arenas: Sequence[SnapshotArena]) -> str:
    head = '<tr><th>arena</th><th>process</th><th class="n">live</th><th class="n">peak</th>'
    head += '<th class="n">reserved</th><th class="w">of the largest</th></tr>'
    largest = max(arena.stats["reserved_bytes"] for arena in arenas)
    rows = []
    for number, arena in enumerate(arenas):
        live, peak, reserved = (arena.stats[key] for key in ("live_bytes", "peak_live_bytes", "reserved_bytes"))
        bar = _bar([("empty", reserved), ("h8", live + arena.stats["quarantined_bytes"]), ("solid", live)], largest)
        figures = "".join(f'<td class="n">{display.nbytes(value)}</td>' for value in (live, peak, reserved))
        process = html.text(f"{arena.place['host']}, {arena.place['pid']}")
        link = f'<a href="#a{number}">{_name(arena)}</a>'
        rows.append(f'<tr><td>{link}</td><td>{process}</td>{figures}<td class="w">{bar}</td></tr>')
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _name(arena: SnapshotArena) -> str:
    place = arena.place
    rank = f"rank {place['rank']} of {place['world']}"
    return html.text(f"{place['backend']} on {place['device']}, group {place['group']}, {rank}")


def _figures(arena: SnapshotArena) -> str:
    stats = arena.stats
    shown = {
        "live": (display.nbytes(stats["live_bytes"]), display.counted(stats["live_blocks"], "block")),
        "peak": (display.nbytes(stats["peak_live_bytes"]), display.counted(stats["allocations"], "allocation")),
        "quarantined": (
            display.nbytes(stats["quarantined_bytes"]),
            display.counted(stats["quarantined_blocks"], "block"),
        ),
        "free": (display.nbytes(stats["free_bytes"]), f"largest {display.nbytes(stats['largest_free_bytes'])}"),
        "fragmentation": (f"{stats['fragmentation']:.0%}", "of free bytes"),
        "reserved": (display.nbytes(stats["reserved_bytes"]), display.counted(stats["segments"], "segment")),
        "process": (html.text(arena.place["pid"]), html.text(arena.place["host"])),
    }
    items = (f"<div><span>{name}</span><b>{big}</b><span>{small}</span></div>" for name, (big, small) in shown.items())
    return f'<div class="figures">{"".join(items)}</div>'


def _legend(arena: SnapshotArena, colours: Mapping[str, int]) -> str:
    """List the call sites by live bytes; sites without live blocks come last."""
    live: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    for block in arena.blocks:
        here = block.end is None and block.dropped is None
        live[block.site] += block.nbytes * here
        blocks[block.site] += here
    if not live:
        return ""
    sites = sorted(live, key=lambda site: (-live[site], site))
    rows = [_site(site, colours[site], live[site], blocks[site], live[sites[0]]) for site in sites[:_SITES]]
    if rest := sites[_SITES:]:
        more = f"{len(rest)} more, {display.nbytes(sum(live[site] for site in rest))} live"
        rows.append(f'<tr><td></td><td></td><td></td><td></td><td class="w faint">{more}</td></tr>')
    head = '<tr><th></th><th></th><th class="n">live</th><th class="n">blocks</th><th class="w">allocated at</th></tr>'
    return f"<h2>Call sites</h2><table>{head}{''.join(rows)}</table>"


def _site(site: str, colour: int, live: int, blocks: int, largest: int) -> str:
    key = f'<svg class="key" viewBox="0 0 14 14"><rect class="c{colour}" width="14" height="14"/></svg>'
    bar = _bar([(f"c{colour}", live)], largest)
    figures = f'<td class="n">{display.nbytes(live)}</td><td class="n">{blocks:,}</td>'
    name = html.text(site) if site else "<i>not recorded</i>"
    return f'<tr data-c="{colour}"><td>{key}</td><td>{bar}</td>{figures}<td class="w">{name}</td></tr>'


def _bar(parts: Iterable[tuple[str, float]], largest: float) -> str:
    """Draw bars on top of each other, by style and length; the full width stands for ``largest``."""
    widths = ((style, 150 * min(1.0, length / largest) if largest else 0.0) for style, length in parts)
    rects = "".join(f'<rect class="{style}" width="{width:.1f}" height="12"/>' for style, width in widths)
    return f'<svg class="bar" viewBox="0 0 150 12">{rects}</svg>'


def _outside(snapshots: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line about tensors outside of arenas, if there are any."""
    sizes = [nbytes for snapshot in snapshots for nbytes in outside(snapshot)]
    if not sizes:
        return []
    return [f"<p>Outside of arenas: {display.counted(len(sizes), 'tensor')}, {display.nbytes(sum(sizes))}.</p>"]
