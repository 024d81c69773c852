"""``symmem dump``: the snapshot of a job that hangs: who waits for whom, at which step, and where each thread is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from symmem.errors import InvalidArgumentError
from symmem.tools.live.processes import Process, ask_all
from symmem.tools.live.top import printable
from symmem.tools.live.waiting import Absent, Picture, Wait, picture
from symmem.tools.memory_page import seconds as lasting

__all__ = ["data", "report", "run"]

_SHOWN = 12  # frames of a thread
_STACKS = 4  # processes of which all stacks are shown; the file has all


def run(job: str | None, output: Path, timeout: float) -> int:
    """Ask all processes, print what keeps them, write all to ``output``; returns the exit code: 1 if none was found.

    Raises:
        InvalidArgumentError: The file cannot be written.
    """
    found = ask_all(["groups", "tensors", "stacks"], job, timeout)
    try:
        output.write_text(json.dumps(data(found)) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{output}: cannot be written: {error.strerror}") from error
    for name in dict.fromkeys(process.job for process in found):
        print(printable(report(name, picture([process for process in found if process.job == name]))), end="\n\n")
    print(f"{output}: all of it, with the stacks and live tensors of {len(found)} processes")
    return 0 if found else 1


def data(processes: Sequence[Process]) -> dict[str, Any]:
    """All that is known, as plain data; ``waits``, ``cycles`` and ``awaited`` are what was concluded."""
    found = picture(processes)
    return {
        "version": 1,
        "time": time.time(),
        "processes": [each.answer or {"pid": each.pid, "job": each.job, "problem": each.problem} for each in processes],
        "waits": [
            {
                "job": wait.process.job,
                "pid": wait.process.pid,
                "group": wait.group,
                "rank": wait.rank,
                "step": wait.step,
                "round": wait.round,
                "seconds": wait.seconds,
                "seconds_left": wait.seconds_left,
                "waits_for": list(wait.ranks),
                "waits_for_pids": [peer.pid for peer in wait.peers if isinstance(peer, Process)],
                "thread": wait.thread,
                "device": wait.device,
            }
            for wait in found.waits
        ],
        "cycles": [[str(each) for each in cycle] for cycle in found.cycles],
        "awaited": [{"who": str(node), "processes_waiting": count} for node, count in found.awaited],
    }


def report(job: str, found: Picture) -> str:
    """What people read first."""
    return "\n".join(_report(job, found))


def _report(job: str, found: Picture) -> Iterator[str]:
    stuck = [wait for wait in found.waits if wait.peers]
    waiting = {wait.process for wait in stuck}
    yield f"job {job}: {len(found.processes)} processes, {len(waiting)} of them wait for others"
    for process in found.processes:
        if process.problem:
            yield f"  process {process.pid} {process.problem}"
    yield from map(_line, stuck)
    for cycle in found.cycles:
        yield f"A CYCLE: {' waits for '.join(map(str, [*cycle, cycle[0]]))}: none of them can go on"
    for node, count in found.awaited:
        who = "all that wait" if count == len(waiting) else f"{count} of them"
        yield f"Waited for by {who}: {node}, which {_state(node)}"
    culprits = [node for node, _ in found.awaited if isinstance(node, Process)]
    culprits += [node for cycle in found.cycles for node in cycle if isinstance(node, Process)]
    for process in culprits[:_STACKS]:
        yield from _stacks(process)


def _line(wait: Wait) -> str:
    whom = ", ".join(map(str, wait.peers[:8])) + ", ..." * (len(wait.peers) > 8)
    step = repr(wait.step) + (f", round {wait.round}," if wait.round is not None else "")
    left = f"fails in {lasting(wait.seconds_left)}" if wait.seconds_left > 0 else "its time is up"
    group = f"of group {wait.group!r}, as rank {wait.rank} of it"
    return f"  {wait.process} waits for {whom}: in {step} {group}{wait.where}, since {lasting(wait.seconds)}; {left}"


def _state(node: Process | Absent) -> str:
    if isinstance(node, Absent) or node.answer is None:
        return "has ended, has not made the group yet, does not answer, runs elsewhere, or has inspection off"
    amid = [group["operation"] for group in node.answer["groups"] if group["operation"]]
    return f"is in {amid[0]['name']!r} and waits for no rank" if amid else "is in no collective operation or barrier"


def _stacks(process: Process) -> Iterator[str]:
    for stack in process.answer["stacks"] if process.answer else ():
        yield f"{process}, thread {stack['name']!r}, the innermost call last:"
        yield from (f"    {frame}" for frame in stack["frames"][-_SHOWN:])
