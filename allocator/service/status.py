"""What a process says of itself to who asks from outside; see :mod:`symmem.service.server`.

Other threads go on meanwhile, or hang with any lock of theirs held: what is read here is copied in one step, or read
again if it changed; and a lock that is not to be had at once, such as an arena's whose ranks meet, is done without.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import FrameType
from typing import Any, TypeVar

from symmem.arena.allocation_log import AllocationLog, AllocationRecord
from symmem.arena.arena import arenas_of
from symmem.arena.slot_mask import masks_of, slots_of
from symmem.arena.statistics import figures, layout_of, memory_snapshot, outside_of_arenas, quiet
from symmem.backends.kernel_status import gpu_waits
from symmem.backends.pending_waits import Wait, waits
from symmem.group.group import Group, known_groups
from symmem.service.socket_paths import VERSION, job_id
from symmem.version import VERSION as SYMMEM

__all__ = ["answer"]

T = TypeVar("T")

MOST_TENSORS = 100_000
"""How many live tensors are told of at most."""

_MOST_FRAMES = 100  # of a thread; the innermost
_AGAIN = 20  # times that is read what changes meanwhile


def answer(parts: Sequence[str]) -> dict[str, Any]:
    """What is asked for, as plain data. Local.

    Args:
        parts: Some of :data:`symmem.service.socket_paths.PARTS`.

    Returns:
        Always ``version`` (of the protocol), ``symmem``, ``job``, ``host``, ``pid``, ``rank`` and ``world`` (of the
        job, as the environment says, or None), ``program`` and ``time``. ``groups``: see :meth:`Group.status`; with
        ``signals`` (waits for signals, in the form of a ``round``; with ``device``, of those on a GPU), and ``arenas``
        (:func:`symmem.memory_stats` of each; those of a ``busy`` one may be of different moments). ``tensors``: of each
        live one its ``name``, ``shape``, ``dtype``, ``nbytes``, ``site``, ``group``, ``groups`` (that have rendezvoused
        it), ``backend``, ``device``; and ``tensors_left_out``, a number. ``stacks``: each Python thread's ``name``,
        ``thread`` (its number) and ``frames``, the innermost last. ``snapshot``: :func:`symmem.memory_snapshot`.
    """
    said: dict[str, Any] = {
        "version": VERSION,
        "symmem": SYMMEM,
        "job": job_id(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "rank": _number("RANK"),
        "world": _number("WORLD_SIZE"),
        "program": " ".join(sys.argv)[:200],
        "time": time.time(),
    }
    if "stacks" in parts:
        said["stacks"] = _stacks()
    if "groups" in parts:
        waiting = [*gpu_waits(), *_steady(waits)]  # the first may take a moment: all else is of the same one
        said["groups"] = _steady(lambda: [_group(group, waiting) for group in _groups()])
    if "tensors" in parts:
        rows = _steady(lambda: list(islice(_tensors(), MOST_TENSORS + 1)))
        said["tensors"] = rows[:MOST_TENSORS]
        more = len(rows) > MOST_TENSORS
        said["tensors_left_out"] = _steady(lambda: sum(1 for _ in _tensors())) - MOST_TENSORS if more else 0
    if "snapshot" in parts:
        said["snapshot"] = _steady(memory_snapshot)
    return said


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _steady(read: Callable[[], T]) -> T:
    """The result of a function that fails if what it goes through is changed meanwhile."""
    for _ in range(_AGAIN):
        try:
            return read()
        except RuntimeError:  # "changed size during iteration", or "mutated"
            time.sleep(0.001)
    return read()


def _groups() -> list[Group]:
    """Those that may be told of; a forked child has also those of its parent."""
    return [group for group in known_groups() if group.settings.inspection == "on" and group.process == os.getpid()]


def _group(group: Group, waiting: Sequence[Wait]) -> dict[str, Any]:
    now = time.monotonic()
    signals = [
        {
            "step": wait.step,
            "seconds": now - wait.began,
            "seconds_left": wait.deadline - now,
            "waits_for": list(wait.missing()),
            "thread": wait.thread,
            "device": wait.device,
        }
        for wait in waiting
        if wait.group is group
    ]
    return {**group.status(), "signals": signals, "arenas": [_arena(arena.log) for arena in arenas_of(group)]}


def _arena(log: AllocationLog) -> dict[str, Any]:
    with quiet(log) as held:
        return {"backend": log.backend.name, "device": str(log.device), "busy": not held, **figures([log])}


def _tensors() -> Iterator[dict[str, Any]]:
    for group in _groups():
        for arena in arenas_of(group):
            yield from _in_arena(arena.log)
    for each in outside_of_arenas():
        yield {**each, "group": None}


def _in_arena(log: AllocationLog) -> Iterator[dict[str, Any]]:
    with quiet(log):
        entries, blocks = list(log.records), list(log.blocks)
        gone = set(slots_of(masks_of(log.slot_marks)[0]))
    named = functools.cache(str)  # call sites are few
    backend, device, group = log.backend.name, str(log.device), log.group.name
    for slot, (entry, known) in enumerate(zip(entries, blocks, strict=False)):
        if entry is None or slot in gone:
            continue
        record, block = AllocationRecord.of(entry), known() if known else None
        yield {
            "name": record.name,
            **layout_of(record.layout),
            "nbytes": record.layout.nbytes,
            "site": named(record.site),
            "group": group,
            "groups": [each.name for each in block.groups] if block else [],
            "backend": backend,
            "device": device,
        }


def _stacks() -> list[dict[str, Any]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    this = threading.get_ident()
    return [
        {"name": names.get(thread, "?"), "thread": thread, "frames": _frames(frame)}
        for thread, frame in sys._current_frames().items()
        if thread != this
    ]


def _frames(frame: FrameType) -> list[str]:
    innermost = islice(traceback.walk_stack(frame), _MOST_FRAMES)
    summary = traceback.StackSummary.extract(innermost, lookup_lines=True)
    texts = [f"{each.filename}:{each.lineno} in {each.name}{f': {each.line}' if each.line else ''}" for each in summary]
    return texts[::-1]
