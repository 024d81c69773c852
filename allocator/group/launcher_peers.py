"""The other ranks' processes that the same launcher started on this host.

A launcher such as torchrun starts every rank as a child, with variables such as RANK. The kernel shows a process's
children, and the variables with which they began. So a rank knows its peers' processes before they have called symmem,
and notices their end.

Peers of other launchers, and peers that began without the variables, are not found.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from symmem.group.presence import RankProcess

__all__ = ["find", "lost"]

_SAME = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")

_found: dict[str, RankProcess] = {}  # by the variable RANK


def find() -> None:
    """Look for the processes of the peers that run now, and remember them."""
    with contextlib.suppress(OSError):  # the kernel does not show children, or hides the launcher
        own, peers = _variables("self"), {}
        if not {"RANK", "WORLD_SIZE", "MASTER_PORT"} <= own.keys():
            return
        for children in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
            for pid in map(int, children.read_text().split()):
                with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                    theirs = _variables(pid)
                    is_rank = theirs.get("RANK", "").isdecimal()
                    if is_rank and all(theirs.get(name) == own.get(name) for name in _SAME):
                        if theirs["RANK"] in peers:
                            return  # the launcher runs two jobs that look alike
                        peers[theirs["RANK"]] = RankProcess.of(pid)
        _found.update(peers)


def lost(size: int, rank: int) -> set[int]:
    """The ranks with a process that has ended, if ``rank`` of ``size`` is what the launcher called this process."""
    own = _variables("self") if _found else {}
    if (own.get("WORLD_SIZE"), own.get("RANK")) != (str(size), str(rank)):
        return set()
    return {int(peer) for peer, process in list(_found.items()) if process.has_ended()}


def _variables(pid: int | str) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
