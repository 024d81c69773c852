"""The answers of the inspection server; see :mod:`symmem.service.server`.

Other threads keep running meanwhile, or hang while they hold locks. So this module copies data in one step, or reads it
again if it changed. It waits for no lock: if an arena's lock is taken, for example during a reclaim round, it reads the
arena without the lock.
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
"""The maximum number of live tensors in an answer."""

_MOST_FRAMES = 100  # per thread; the innermost frames
_ATTEMPTS = 20  # to read data that other threads change


def answer(parts: Sequence[str]) -> dict[str, Any]:
    """Return the requested parts as plain data. Local.

    Args:
        parts: Some of :data:`symmem.service.socket_paths.PARTS`.

    Returns:
        Always ``version`` (of the protocol), ``symmem``, ``job``, ``host``, ``pid``, ``rank`` and ``world`` (of the
        job, from the environment, or None), ``program`` and ``time``. ``groups``: a list of :meth:`Group.status`, plus
        ``signals`` (waits for signals, in the form of a ``round``; waits on a GPU have a ``device``) and ``arenas``
        (:func:`symmem.memory_stats` per arena; if the arena is ``busy``, the figures may be of different moments).
        ``tensors``: per live tensor ``name``, ``shape``, ``dtype``, ``nbytes``, ``site``, ``group``, ``groups`` (with a
        rendezvous for it), ``backend``, ``device``; and ``tensors_left_out``, a number. ``stacks``: per Python thread
        ``name``, ``thread`` (its number) and ``frames``, the innermost last. ``snapshot``:
        :func:`symmem.memory_snapshot`.
    """
    result: dict[str, Any] = {
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
        result["stacks"] = _stacks()
    if "groups" in parts:
        # GPU waits come first, because they may take a moment; all other data is of one moment.
        waiting = [*gpu_waits(), *_steady(waits)]
        result["groups"] = _steady(lambda: [_group(group, waiting) for group in _groups()])
    if "tensors" in parts:
        rows = _steady(lambda: list(islice(_tensors(), MOST_TENSORS + 1)))
        result["tensors"] = rows[:MOST_TENSORS]
        more = len(rows) > MOST_TENSORS
        result["tensors_left_out"] = _steady(lambda: sum(1 for _ in _tensors())) - MOST_TENSORS if more else 0
    if "snapshot" in parts:
        result["snapshot"] = _steady(memory_snapshot)
    return result


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _steady(read: Callable[[], T]) -> T:
    """Call a function that iterates over shared data; call it again if the data changed meanwhile."""
    for _ in range(_ATTEMPTS):
        try:
            return read()
        except RuntimeError:  # "changed size during iteration", or "mutated"
            time.sleep(0.001)
    return read()


def _groups() -> list[Group]:
    """The groups of this process that may be inspected. A forked child skips the groups of its parent."""
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
    return {
        **group.status(),
        "signals": signals,
        "arenas": [_arena(log) for arena in arenas_of(group) for log in arena.logs],
    }


def _arena(log: AllocationLog) -> dict[str, Any]:
    with quiet(log) as held:
        return {"backend": log.backend.name, "device": str(log.device), "busy": not held, **figures([log])}


def _tensors() -> Iterator[dict[str, Any]]:
    for group in _groups():
        for arena in arenas_of(group):
            for log in arena.logs:
                yield from _in_arena(log)
    for each in outside_of_arenas():
        yield {**each, "group": None}


def _in_arena(log: AllocationLog) -> Iterator[dict[str, Any]]:
    with quiet(log):
        records, blocks = list(log.records), list(log.blocks)
        dropped = set(slots_of(masks_of(log.slot_marks)[0]))
    text_of = functools.cache(str)  # there are few call sites
    backend, device, group = log.backend.name, str(log.device), log.group.name
    for slot, (raw, reference) in enumerate(zip(records, blocks, strict=False)):
        if raw is None or slot in dropped:
            continue
        record, block = AllocationRecord.of(raw), reference() if reference else None
        yield {
            "name": record.name,
            **layout_of(record.layout),
            "nbytes": record.layout.nbytes,
            "site": text_of(record.site),
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
