"""One line on the terminal that says what a benchmark measures now."""

from __future__ import annotations

import os
import shutil
import time
from typing import TextIO

__all__ = ["SILENT", "Progress"]


class Progress:
    """Shows the current step on a terminal; the next step replaces it. Prints nothing if ``stream`` is no terminal.

    Args:
        suite: Name of the benchmark suite.
        stream: Where to print.
    """

    def __init__(self, suite: str = "", stream: TextIO | None = None) -> None:
        usable = stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._stream = stream if usable else None
        self._suite, self._begin = suite, time.monotonic()

    def step(self, name: str) -> None:
        """Show ``name`` as the current step."""
        self._draw(f"{self._suite}, {time.monotonic() - self._begin:.0f} s: {name}")

    def clear(self) -> None:
        """Erase the line, so that something else can be printed there."""
        self._draw("")

    def _draw(self, text: str) -> None:
        if self._stream is not None:
            columns = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{text[: columns - 1]}", end="", file=self._stream, flush=True)


SILENT = Progress()
"""Prints nothing."""
