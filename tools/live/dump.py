"""``symmem dump``: a snapshot of a job that hangs: which rank waits for which, at which step, and the stacks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from symmem.errors import InvalidArgumentError
from symmem.tools.display import seconds as lasting
from symmem.tools.live.processes import Process, ask_all
from symmem.tools.live.top import printable
from symmem.tools.live.waiting import Absent, Analysis, RankWait, analyse

__all__ = ["data", "report", "run"]

_SHOWN = 12  # frames per thread
_STACKS = 4  # processes with printed stacks; the file has the stacks of all processes


def run(job: str | None, output: Path, timeout: float) -> int:
    """Ask all processes, print a report, and write all answers to ``output``.

    Returns:
        The exit code: 1 if no process was found.

    Raises:
        InvalidArgumentError: The file cannot be written.
    """
    found = ask_all(["groups", "tensors", "stacks"], job, timeout)
    try:
        output.write_text(json.dumps(data(found)) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{output}: cannot be written: {error.strerror}") from error
    for name in dict.fromkeys(process.job for process in found):
        print(printable(report(name, analyse([process for process in found if process.job == name]))), end="\n\n")
    print(f"wrote {output}: the stacks, waits and live tensors of {len(found)} processes")
    return 0 if found else 1


def data(processes: Sequence[Process]) -> dict[str, Any]:
    """All answers, and the waits, cycles and awaited processes that follow from them, as plain data."""
    found = analyse(processes)
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


def report(job: str, found: Analysis) -> str:
    """Make the text for people."""
    return "\n".join(_report(job, found))


def _report(job: str, found: Analysis) -> Iterator[str]:
    stuck = [wait for wait in found.waits if wait.peers]
    waiting = {wait.process for wait in stuck}
    yield f"job {job}: {len(found.processes)} processes, {len(waiting)} of them wait for others"
    for process in found.processes:
        if process.problem:
            yield f"  process {process.pid} {process.problem}"
    yield from map(_line, stuck)
    for cycle in found.cycles:
        yield f"A CYCLE: {' waits for '.join(map(str, [*cycle, cycle[0]]))}: none of them can continue"
    for node, count in found.awaited:
        waiters = "All waiting processes" if count == len(waiting) else f"{count} of them"
        yield f"{waiters} wait for {node}, which {_state(node)}"
    culprits = [node for node, _ in found.awaited if isinstance(node, Process)]
    culprits += [node for cycle in found.cycles for node in cycle if isinstance(node, Process)]
    for process in culprits[:_STACKS]:
        yield from _stacks(process)


def _line(wait: RankWait) -> str:
    peers = ", ".join(map(str, wait.peers[:8])) + ", ..." * (len(wait.peers) > 8)
    step = repr(wait.step) + (f", round {wait.round}," if wait.round is not None else "")
    left = f"fails in {lasting(wait.seconds_left)}" if wait.seconds_left > 0 else "its timeout has passed"
    group = f"of group {wait.group!r}, as rank {wait.rank} of it"
    return f"  {wait.process} waits for {peers}: in {step} {group}{wait.where}, since {lasting(wait.seconds)}; {left}"


def _state(node: Process | Absent) -> str:
    if isinstance(node, Absent) or node.answer is None:
        return "has ended, has not made the group yet, does not answer, runs on another host, or has inspection off"
    running = [group["operation"] for group in node.answer["groups"] if group["operation"]]
    return (
        f"is in {running[0]['name']!r} and waits for no rank" if running else "is in no collective operation or barrier"
    )


def _stacks(process: Process) -> Iterator[str]:
    for stack in process.answer["stacks"] if process.answer else ():
        yield f"{process}, thread {stack['name']!r}, most recent call last:"
        yield from (f"    {frame}" for frame in stack["frames"][-_SHOWN:])
