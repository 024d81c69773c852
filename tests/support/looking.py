"""A job that hangs, looked at from outside until it is as expected."""

from __future__ import annotations

import time
from collections.abc import Callable

from patience import LONG

from symmem.tools.live.processes import ask_all
from symmem.tools.live.waiting import Analysis, analyse


def seen(job: str, until: Callable[[Analysis], bool]) -> Analysis:
    """The job, once it is as expected."""
    deadline = time.monotonic() + LONG
    while True:
        found = analyse(ask_all(["groups"], job))
        if until(found):
            return found
        assert time.monotonic() < deadline, found.waits
        time.sleep(0.02)


def stuck(waiting: int) -> Callable[[Analysis], bool]:
    """Whether so many processes wait for others."""
    return lambda found: len({wait.process for wait in found.waits if wait.peers}) == waiting
