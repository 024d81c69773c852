"""``symmem top``: a table of all ranks of this user on this host, with their memory and current activity."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from symmem.tools.display import nbytes
from symmem.tools.display import seconds as lasting
from symmem.tools.live.processes import Process, ask_all
from symmem.tools.live.waiting import RankWait, analyse
from symmem.tools.table import render

__all__ = ["now", "run", "table"]

_HEADER = ("job", "rank", "process", "group", "arenas", "live", "peak", "quarantined", "fragmented", "now")
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_CLEAR = "\x1b[2J"


def run(job: str | None, interval: float, once: bool) -> int:
    """Print the table until Ctrl-C, or once. A terminal is redrawn in place. Returns the exit code."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    redraw = terminal and not once
    print(_CLEAR if redraw else "", end="")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            text = printable(table(ask_all(["groups"], job)))
            print(_fitted(text) if redraw else text, end="" if redraw else "\n", flush=True)
            if once:
                break
            time.sleep(interval)
    return 0


def table(processes: Sequence[Process]) -> str:
    """Make the table, with a line per rank and group."""
    if not processes:
        return (
            "No process of this user on this host can be inspected: no process has made a group, or inspection is off."
        )
    found = analyse(processes)
    waits: dict[tuple[Process, str, int], RankWait] = {}
    for wait in found.waits:
        waits.setdefault((wait.process, wait.group, wait.rank), wait)  # keep the longest
    rows: list[Sequence[object]] = []
    for process in processes:
        place = process.job, "-" if process.rank is None else process.rank, process.pid
        if process.answer is None:
            rows.append((*place, *["-"] * 6, process.problem))
            continue
        for group in process.answer["groups"]:
            doing = now(group, waits.get((process, group["name"], group["rank"])))
            rows.append((*place, f"{group['name']} {group['rank']}/{group['size']}", *_memory(group), doing))
        if not process.answer["groups"]:
            rows.append((*place, *["-"] * 6, "in no group"))
    return render(_HEADER, rows)


def _memory(group: dict[str, Any]) -> list[str]:
    arenas = group["arenas"]
    totals = [sum(arena[f"{name}_bytes"] for arena in arenas) for name in ("live", "peak_live", "quarantined")]
    worst = max((arena["fragmentation"] for arena in arenas), default=0.0)
    return [str(len(arenas)), *map(nbytes, totals), f"{worst:.0%}"]


def now(group: dict[str, Any], wait: RankWait | None) -> str:
    """Describe the current activity of a rank."""
    if wait is not None and wait.peers:
        ranks = ", ".join(str(rank) for rank in wait.ranks[:8]) + ", ..." * (len(wait.ranks) > 8)
        return f"waits for rank {ranks} in {wait.step!r}{wait.where}, {lasting(wait.seconds)}"
    if operation := group["operation"]:
        return f"in {operation['name']!r}, {lasting(operation['seconds'])}"
    if group["lost"]:
        return f"lost rank {', '.join(map(str, group['lost']))}"
    return "closed" if group["closed"] else f"{group['rounds']} rounds done"


def printable(text: str) -> str:
    """Replace the characters that a terminal would interpret."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def _fitted(text: str) -> str:
    """Cut the text to the terminal, and add the codes that redraw it in place."""
    columns, lines = shutil.get_terminal_size()
    shown = text.split("\n")[: lines - 2]
    title = f"symmem top  {time.strftime('%H:%M:%S')}  Ctrl-C quits"
    return _HOME + "".join(f"{line[:columns]}{_REST_OF_LINE}\n" for line in (title, *shown)) + _REST
