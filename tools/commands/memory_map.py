"""``symmem memory-map``: an HTML page of the arenas in snapshots, or a snapshot for PyTorch's memory viewer.

The page has no script and is also well-formed XML.
"""

from __future__ import annotations

import html
import json
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from symmem.arena.torch_snapshot import to_torch
from symmem.errors import InvalidArgumentError
from symmem.tools import display
from symmem.version import VERSION

__all__ = ["render", "run"]

_SITES = 50  # per arena
_STATES = ("live", "quarantined", "free", "unknown")
_STYLE = """
:root{color-scheme:light dark} body{font:14px/1.45 system-ui,sans-serif;max-width:1200px;margin:24px auto}
h1{font-size:22px} h2{font-size:16px;margin-top:32px} table{border-collapse:collapse;font-variant-numeric:tabular-nums}
table+table{margin-top:18px} th{font-weight:400;text-align:left;opacity:.7} td,th{padding:3px 14px 3px 0}
td{vertical-align:top;white-space:nowrap} .n{text-align:right} td.site{white-space:normal;overflow-wrap:anywhere}
.bar{display:flex;width:260px;height:12px;margin:4px 0;outline:1px solid #888} .key{display:inline-block;width:12px;
height:12px;margin:0 5px 0 14px;outline:1px solid #888} .live{background:#0072b2} .quarantined{background:#e69f00}
.unknown{background:repeating-linear-gradient(45deg,#888 0 3px,#8883 3px 6px)} i{display:block}
"""


_Row: TypeAlias = tuple[str, Mapping[str, Any]]
"""The process, and one of its arenas."""


def render(*snapshots: Mapping[str, Any]) -> str:
    """Make a self-contained page from results of ``symmem.memory_snapshot()``, of one or several ranks."""
    arenas: dict[str, list[_Row]] = defaultdict(list)
    for snapshot in snapshots:
        for arena in snapshot["arenas"]:
            name = f"{arena['backend']} on {arena['device'].partition(':')[0]}, group {arena['group']}"
            arenas[name].append((f"{snapshot['host']}, {snapshot['pid']}", arena))
    parts = "".join(f"<h2>{_text(name)}</h2>{_ranks(rows)}{_sites(rows)}" for name, rows in arenas.items())
    sizes = [tensor["nbytes"] for snapshot in snapshots for tensor in snapshot["tensors"]]
    summary = f"{display.counted(len(snapshots), 'snapshot')}, {display.counted(len(arenas), 'arena')}; "
    summary += f"{display.counted(len(sizes), 'tensor')} outside of arenas, {display.nbytes(sum(sizes))}."
    legend = "".join(f'<i class="key {state}"></i>{state}' for state in _STATES)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="generator" content="symmem {VERSION}"/>
<title>Memory map - symmem</title><style>{_STYLE}</style></head><body>
<h1>Memory map</h1><p>{summary}</p><p>Bars are segments; a reclaim round hides the blocks.{legend}</p>
{parts}</body></html>
"""


def run(files: Sequence[Path], output: Path | None, *, as_torch: bool) -> int:
    """Write the page, or torch's format with ``as_torch``; returns the exit code.

    Raises:
        InvalidArgumentError: A file cannot be read or written, is not JSON, or is no snapshot; the text names it. Or
            there are several files with ``as_torch``.
    """
    if as_torch and len(files) != 1:
        raise InvalidArgumentError(f"--torch converts one snapshot, not {len(files)}", hint="convert them one by one")
    output = output or Path("memory-map.pickle" if as_torch else "memory-map.html")
    read = [_read(file, to_torch if as_torch else render) for file in files]
    page = render(*[snapshot for snapshot, _ in read]).encode() if not as_torch else b""
    try:
        output.write_bytes(page or pickle.dumps(read[0][1], protocol=4))  # the viewer knows no protocol after 4
    except OSError as error:
        raise InvalidArgumentError(f"{output}: cannot be written: {error.strerror}") from error
    print(f"{output}: the map of {display.counted(len(files), 'snapshot')}")
    return 0


def _read(file: Path, convert: Callable[[Mapping[str, Any]], Any]) -> tuple[Mapping[str, Any], Any]:
    """The snapshot in a file, and the result of ``convert``."""
    try:
        snapshot = json.loads(file.read_bytes())
        return snapshot, convert(snapshot)
    except OSError as error:
        raise InvalidArgumentError(f"{file}: cannot be read: {error.strerror}") from error
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidArgumentError(
            f"{file}: no snapshot of symmem: {error!r}",
            hint="pass files with the result of symmem.memory_snapshot() as JSON",
        ) from error


def _ranks(rows: Sequence[_Row]) -> str:
    """A table with a row per rank."""
    largest = max((segment["nbytes"] for _, arena in rows for segment in arena["segments"]), default=0) or 1
    lines = [_line("th", ["rank", "process"], ["live", "quarantined", "free", "peak", "blocks"], "segments")]
    for process, arena in sorted(rows, key=lambda row: int(row[1]["rank"])):
        place, stats = [f"{arena['rank']} of {arena['world']}", f"{process}, {arena['device']}"], arena["stats"]
        figures = [display.nbytes(stats[f"{key}_bytes"]) for key in ("live", "quarantined", "free", "peak_live")]
        figures += [f"{stats['live_blocks']:,} live, {stats['quarantined_blocks']:,} quarantined"]
        lines.append(_line("td", place, figures, "".join(_bar(segment, largest) for segment in arena["segments"])))
    return f"<table>{''.join(lines)}</table>"


def _bar(segment: Mapping[str, Any], largest: int) -> str:
    nbytes, blocks = segment["nbytes"], segment["blocks"]
    sizes = {state: sum(block["nbytes"] for block in blocks if block["state"] == state) for state in _STATES}
    sizes["unknown"] = nbytes - sum(block["nbytes"] for block in blocks)
    parts = [f'<i class="{state}" style="width:{size / max(1, nbytes):.2%}"></i>' for state, size in sizes.items()]
    shown = ", ".join(f"{display.nbytes(size)} {state}" for state, size in sizes.items() if size)
    title = _text(f"segment {segment['index']}, {display.nbytes(nbytes)}: {shown}")
    return f'<div class="bar" style="width:{260 * nbytes / largest:.1f}px" title="{title}">{"".join(parts)}</div>'


def _sites(rows: Iterable[_Row]) -> str:
    """A table of call sites by live and quarantined bytes, summed over the ranks."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for _, arena in rows:
        found = [(site["site"], site["live_bytes"], site["live_blocks"], 0) for site in arena["sites"]]
        blocks = (block for segment in arena["segments"] for block in segment["blocks"])
        found += [(block["site"], 0, 0, block["nbytes"]) for block in blocks if block["state"] == "quarantined"]
        for site, *figures in found:
            sums[site] = [before + more for before, more in zip(sums[site], figures, strict=True)]
    ordered = sorted(sums.items(), key=lambda item: -item[1][0] - item[1][2])
    if rest := [figures for _, figures in ordered[_SITES:]]:
        ordered[_SITES:] = [(display.counted(len(rest), "more call site"), list(map(sum, zip(*rest, strict=True))))]
    lines = [_line("th", [], ["live", "blocks", "quarantined"], "allocated at")]
    for site, (live, count, quarantined) in ordered:
        lines.append(
            _line("td", [], [display.nbytes(live), f"{count:,}", display.nbytes(quarantined)], _text(site), "site")
        )
    return f"<table>{''.join(lines)}</table>" if ordered else ""


def _line(cell: str, texts: Iterable[object], figures: Iterable[object], last: str, style: str = "") -> str:
    """A line of a table; ``last`` is HTML."""
    cells = [f"<{cell}>{_text(text)}</{cell}>" for text in texts]
    cells += [f'<{cell} class="n">{_text(figure)}</{cell}>' for figure in figures]
    return f'<tr>{"".join(cells)}<{cell} class="{style}">{last}</{cell}></tr>'


def _text(value: object) -> str:
    """Escape ``value``, and replace characters that XML does not allow."""
    return html.escape("".join(each if each.isprintable() else "\ufffd" for each in str(value)))
