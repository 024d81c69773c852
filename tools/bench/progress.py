"""How far a suite is: a bar on a terminal, and nothing elsewhere.

    collectives [####------] 40%, 12 s, 18 s left: all_gather, 2 ranks, 65536 bytes

That is the share of the steps that are done, the time they took, that of the rest, and what is being measured.
"""

from __future__ import annotations

import os
import time
from typing import TextIO

__all__ = ["SILENT", "Progress"]

_BAR = 10  # characters
_COLUMNS = 80  # of a terminal that does not tell


class Progress:
    """What a suite tells of itself: how many steps it has, and what each of them measures.

    Steps take differently long, so the time that is left is a guess: that all take what those so far took on average.

    Args:
        name: Of the suite.
        stream: Where the bar is drawn, if that is a terminal that can draw it again in its place.
    """

    def __init__(self, name: str = "", stream: TextIO | None = None) -> None:
        able = stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._stream = stream if able else None
        self._name, self._begin = name, time.monotonic()
        self._steps = self._begun = 0
        self._what = "starting"
        self.show()

    def expect(self, steps: int) -> None:
        """So many calls of :meth:`step` will follow."""
        self._steps = steps

    def step(self, what: str) -> None:
        """The step before, if there was one, is done, and from now on this is measured."""
        self._begun, self._what = self._begun + 1, what
        self.show()

    def show(self) -> None:
        """Draw the bar."""
        if self._stream is not None:
            self._write(self._stream, self._text()[: _columns(self._stream) - 1])

    def hide(self) -> None:
        """Leave an empty line, for something else to be printed on the terminal."""
        if self._stream is not None:
            self._write(self._stream, "")

    def _write(self, stream: TextIO, text: str) -> None:
        stream.write(f"\r\x1b[K{text}")
        stream.flush()

    def _text(self) -> str:
        done, taken = max(0, self._begun - 1), time.monotonic() - self._begin
        share = done / self._steps if self._steps else 0.0
        filled = int(share * _BAR)
        left = f", {taken / share - taken:.0f} s left" if share else ""
        bar = f"[{'#' * filled}{'-' * (_BAR - filled)}] {share:.0%}"
        return f"{self._name} {bar}, {taken:.0f} s{left}: {self._what}"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except OSError:
        return _COLUMNS


SILENT = Progress()
"""Tells nobody."""
