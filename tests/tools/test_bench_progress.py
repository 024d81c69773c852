"""How far ``symmem bench`` is: what a terminal shows, and that each suite knows how many steps it has (mission F4)."""

from __future__ import annotations

import fcntl
import importlib
import io
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from typing import Any, TextIO

import pytest
import torch

from symmem.tools import cli
from symmem.tools.bench import p2p
from symmem.tools.bench.compile import PARTS
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.progress import Progress
from symmem.tools.commands.bench import SUITES

BARRIER = Figure("barrier", "host", 2, 0, 12.0, "us", "gloo", 300.0)


# What is shown.


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, TextIO]]:
    """A terminal of 72 columns: the end that shows what was written, and the one to write to."""
    monkeypatch.setenv("TERM", "xterm")
    screen, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 72, 0, 0))
    with os.fdopen(end, "w") as stream:
        yield screen, stream
    os.close(screen)


def shown(terminal: tuple[int, TextIO]) -> list[str]:
    """All lines that were drawn in one place, with times left out; first what came before them."""
    screen, stream = terminal
    print("END", end="", file=stream, flush=True)
    text = ""
    while not text.endswith("END"):  # a terminal passes on what it has
        text += os.read(screen, 1 << 16).decode()
    return re.sub(r"\d+ s", "N s", text.removesuffix("END")).split("\r\x1b[K")


def test_a_bar_shows_the_share_what_is_measured_and_the_time(terminal: tuple[int, TextIO]) -> None:
    progress = Progress("p2p", terminal[1])
    progress.expect(4)
    for step in ("one", "two", "a third whose name is too long for what is left of a line"):
        progress.step(step)
    progress.hide()
    assert shown(terminal) == [
        "",
        "p2p [----------] 0%, N s: starting",
        "p2p [----------] 0%, N s: one",
        "p2p [##--------] 25%, N s, N s left: two",
        "p2p [#####-----] 50%, N s, N s left: a third whose name is too long for what is left of"[:71],
        "",
    ]


def test_figures_are_printed_on_an_empty_line(
    terminal: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(progress: Progress, **options: object) -> Iterator[Figure]:
        progress.expect(2)
        for name in ("first", "second"):
            progress.step(name)
            yield BARRIER

    monkeypatch.setattr(p2p, "run", run)
    monkeypatch.setattr("sys.stderr", terminal[1])
    assert cli.main(["bench", "p2p", "--json"]) == 0
    assert capsys.readouterr().out == f"{BARRIER.json()}\n" * 2
    _before, *lines = shown(terminal)
    starting, first, *rest, last = (line.partition(": ")[2] for line in lines)
    assert (starting, first, rest, last) == ("starting", "first", ["", "first", "second", "", "second"], "")
    assert (lines[2], lines[5], lines[-1]) == ("", "", "")


def test_a_failure_leaves_an_empty_line(terminal: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(progress: Progress, **options: object) -> Iterator[Figure]:
        progress.step("first")
        raise KeyboardInterrupt

    monkeypatch.setattr(p2p, "run", run)
    monkeypatch.setattr("sys.stderr", terminal[1])
    assert cli.main(["bench", "p2p"]) == 130
    *_, last = shown(terminal)
    assert last == "symmem: interrupted\r\n"


def test_only_a_terminal_that_can_draw_it_gets_a_bar(
    terminal: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    plain = io.StringIO()
    for each in (plain, terminal[1]):
        progress = Progress("p2p", each)
        progress.step("one")
        progress.hide()
    assert shown(terminal) == [plain.getvalue()] == [""]


# What the suites tell.

_TIMES = {("", "symmem"): [1.0], ("", "gloo"): [1.0]}
_ANSWERS: dict[tuple[str, str], Any] = {
    ("host", "_barrier"): (1.0, 1.0),
    ("host", "_fresh"): (1.0, 1.0, 1.0),
    ("host", "_copies"): [(1.0, 1.0), (1.0, 1.0)],
    ("gpu", "_copies"): [1.0] * 8,
    ("gpu", "_barrier"): [1.0] * 4,
    ("gpu", "fresh"): [1.0] * 2,
    ("p2p", "_on_rank"): {("p2p_pull_alone", 1): (1.0, 1.0)},
    ("alloc", "_theirs"): 1.0,
    ("alloc", "_warm"): 1.0,
    ("alloc", "_reclaim"): (1.0, 1.0, 2),
    ("alloc", "_long_run"): (1, 1, 1),
    ("collectives", "_on_rank"): _TIMES,
    **{("compile", part): dict[str, object]() for part in ("overhead", "compiling", "chain", "graph_input")},
}
"""Of a rank, by suite and what it is asked to do."""


_CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("host", 6, {"ranks": [1, 2]}),
    ("gpu", 20, {"backend": "native", "peers": ("cuda", "nccl"), "ranks": 2}),
    ("p2p", 2, {"backend": "host", "ranks": None, "nbytes": None}),
    ("alloc", 8, {"backend": "host", "peers": None, "ranks": [2, 4], "pairs": 10}),
    ("alloc", 6, {"backend": "native", "peers": ("cuda", "nvshmem"), "ranks": [2], "pairs": 10}),
    ("collectives", 28, {"backend": "host", "ranks": None, "sizes": (), "operators": ("all_reduce", "broadcast")}),
    ("collectives", 6, {"backend": "native", "ranks": [2, 4], "sizes": (64, 80, 96), "operators": ("broadcast",)}),
    ("compile", 4, {"backend": "host", "ranks": None, "hidden": 8, "parts": PARTS, "rounds": 1}),
    ("compile", 3, {"backend": "native", "ranks": [2], "hidden": 8, "parts": ("compile", "chain"), "rounds": 1}),
    ("scale", 5, {"ranks": 5, "group_size": 2, "report": None}),
]
"""Suite, number of steps, and options."""


class Told(Progress):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.expected, self.steps = 0, list[str]()

    def expect(self, steps: int) -> None:
        self.expected += steps

    def step(self, what: str) -> None:
        self.steps.append(what)


@pytest.mark.parametrize(("suite", "count", "options"), _CASES)
def test_suites_take_as_many_steps_as_they_expect(
    suite: str, count: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ranks:
        """They answer at once."""

        def __init__(self, size: int, **options: Any) -> None:
            self.size = size

        def __enter__(self) -> Ranks:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def run(self, function: Any, *args: Any, **options: Any) -> list[Any]:
            name = args[1] if suite == "compile" else function.__name__
            return [_ANSWERS[suite, name]] * self.size

    module = importlib.import_module(f"symmem.tools.bench.{suite}")
    monkeypatch.setattr(module, "RankPool", Ranks, raising=suite != "scale")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    told = Told()
    list(module.run(**options, progress=told))
    assert told.expected == len(told.steps) == count
    assert len(set(told.steps)) > count / 2  # two sides of one thing have one name


def test_every_suite_is_asked() -> None:
    assert {suite for suite, _count, _options in _CASES} == set(SUITES)
