"""``symmem top``: all ranks of this user on this host, what memory they have, and what each is at."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from symmem.tools.live.processes import Process, ask_all
from symmem.tools.live.waiting import Wait, picture
from symmem.tools.memory_page import nbytes
from symmem.tools.memory_page import seconds as lasting
from symmem.tools.table import render

__all__ = ["now", "run", "table"]

_HEADER = ("job", "rank", "process", "group", "arenas", "live", "peak", "quarantined", "fragmented", "now")
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_CLEAR = "\x1b[2J"


def run(job: str | None, interval: float, once: bool) -> int:
    """Print the table, again and again until Ctrl-C, or once; in a terminal, in its place. Returns the exit code."""
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
    """A line for each rank of each group."""
    if not processes:
        return "No process of this user on this host can be inspected: none has made a group, or inspection is off."
    found = picture(processes)
    waits: dict[tuple[Process, str, int], Wait] = {}
    for wait in found.waits:
        waits.setdefault((wait.process, wait.group, wait.rank), wait)  # the longest
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


def now(group: dict[str, Any], wait: Wait | None) -> str:
    """What a rank of a group is at."""
    if wait is not None and wait.peers:
        for_whom = ", ".join(str(rank) for rank in wait.ranks[:8]) + ", ..." * (len(wait.ranks) > 8)
        return f"waits for rank {for_whom} in {wait.step!r}{wait.where}, {lasting(wait.seconds)}"
    if operation := group["operation"]:
        return f"in {operation['name']!r}, {lasting(operation['seconds'])}"
    if group["lost"]:
        return f"lost rank {', '.join(map(str, group['lost']))}"
    return "closed" if group["closed"] else f"{group['rounds']} rounds done"


def printable(text: str) -> str:
    """The text without what a terminal would act on."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def _fitted(text: str) -> str:
    """What is drawn over what was drawn before."""
    columns, lines = shutil.get_terminal_size()
    shown = text.split("\n")[: lines - 2]
    title = f"symmem top  {time.strftime('%H:%M:%S')}  Ctrl-C ends it"
    return _HOME + "".join(f"{line[:columns]}{_REST_OF_LINE}\n" for line in (title, *shown)) + _REST
