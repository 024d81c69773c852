"""Who waits for whom among processes that were asked, which wait for each other, and for whom all wait.

A rank waits in a round of a collective operation, or for a signal (a barrier, an operation on the host or on a GPU). It
is taken to wait for those ranks that have not come to it; of a round, whose messages go by way of rank 0, this follows
from how many rounds each rank has begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from symmem.tools.live.processes import Process

__all__ = ["Absent", "Picture", "Wait", "picture", "waits_of"]


@dataclass(frozen=True)
class Absent:
    """A rank of a group, none of whose processes has told of it."""

    group: str
    rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} of group {self.group!r} (not to be seen here)"


Node: TypeAlias = "Process | Absent"

_Key: TypeAlias = tuple[str, str, int, "str | None"]


@dataclass(frozen=True)
class Wait:
    """One wait.

    Attributes:
        process: Who waits.
        group: In which group, as which rank of it.
        rank: Ditto.
        step: For what.
        round: Its number, if it is a round of a collective operation.
        seconds: Since when.
        seconds_left: Until it fails.
        ranks: Whom it waits for, in the group; empty if all have come, and it is about to go on.
        peers: The same, as processes.
        thread: Which thread of the process; 0 if none is known to.
        device: The GPU, if a kernel waits there.
    """

    process: Process
    group: str
    rank: int
    step: str
    round: int | None
    seconds: float
    seconds_left: float
    ranks: tuple[int, ...]
    peers: tuple[Node, ...]
    thread: int
    device: str | None

    @property
    def where(self) -> str:
        """A remark for people, if it is on a GPU."""
        return f", on the GPU {self.device}" if self.device else ""


@dataclass(frozen=True)
class Picture:
    """What is known of a job.

    Attributes:
        processes: All that were found.
        waits: Those of all processes; the longest first.
        cycles: Processes each of which waits for the next, and the last for the first.
        awaited: Who is waited for and does not wait itself, and how many processes wait for it, also by way of others.
    """

    processes: Sequence[Process]
    waits: Sequence[Wait]
    cycles: Sequence[Sequence[Node]]
    awaited: Sequence[tuple[Node, int]]


def _members(processes: Sequence[Process]) -> dict[_Key, dict[int, tuple[Process, dict[str, Any]]]]:
    """Of each group, its ranks that have told: process, and status."""
    found: dict[_Key, dict[int, tuple[Process, dict[str, Any]]]] = {}
    for process in processes:
        for group in process.answer["groups"] if process.answer else ():
            if not group["closed"]:
                found.setdefault(_key(process, group), {})[group["rank"]] = process, group
    return found


def _key(process: Process, group: dict[str, Any]) -> _Key:
    # Before ranks have met they have no identity of the group; then its name has to do.
    return process.job, group["name"], group["size"], group["identity"]


def waits_of(processes: Sequence[Process]) -> list[Wait]:
    """All waits."""
    waits = []
    for key, ranks in _members(processes).items():
        for process, group in ranks.values():
            for each in ([group["round"]] if group["round"] else []) + group["signals"]:
                number = each.get("number")
                awaited = each["waits_for"] if number is None else _not_come(number, ranks, key[2])
                peers = [ranks[rank][0] if rank in ranks else Absent(key[1], rank) for rank in awaited]
                waits.append(
                    Wait(
                        process,
                        key[1],
                        group["rank"],
                        each["step"],
                        number,
                        each["seconds"],
                        each["seconds_left"],
                        tuple(awaited),
                        tuple(dict.fromkeys(peer for peer in peers if peer is not process)),
                        each["thread"] if number is None else group["operation"]["thread"] if group["operation"] else 0,
                        each.get("device"),
                    )
                )
    return sorted(waits, key=lambda wait: -wait.seconds)


def _not_come(number: int, ranks: dict[int, tuple[Process, dict[str, Any]]], size: int) -> list[int]:
    """The ranks that have not begun a round, as far as anybody can tell."""
    late = {rank for rank, (_, group) in ranks.items() if group["rounds"] < number}
    unseen = set(range(size)) - ranks.keys()
    leader = ranks[0][1]["round"] if 0 in ranks else None
    if leader and leader["number"] == number and leader["waits_for"] is not None:
        late |= unseen & set(leader["waits_for"])  # rank 0 knows, if its messages go over sockets
    elif not late:
        late = unseen  # some of them
    return sorted(late)


def picture(processes: Sequence[Process]) -> Picture:
    """Analyse what processes have answered, which must have the part ``groups``."""
    waits = waits_of(processes)
    edges: dict[Node, set[Node]] = {}
    for wait in waits:
        if wait.peers:
            edges.setdefault(wait.process, set()).update(wait.peers)
    reached = {node: _reached(node, edges) for node in edges}
    ends = {peer for peers in edges.values() for peer in peers} - edges.keys()
    counts = [(node, sum(node in each for each in reached.values())) for node in ends]
    awaited = sorted(counts, key=lambda each: (-each[1], str(each[0])))
    return Picture(processes, waits, list(_cycles(edges, reached)), awaited)


def _reached(start: Node, edges: dict[Node, set[Node]]) -> set[Node]:
    found: set[Node] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def _cycles(edges: dict[Node, set[Node]], reached: dict[Node, set[Node]]) -> Iterator[list[Node]]:
    """A shortest cycle of each set of nodes that all reach each other."""
    done: set[Node] = set()
    for start in edges:
        if start in done or start not in reached[start]:
            continue
        done |= {node for node in reached[start] if start in reached.get(node, ())}
        before: dict[Node, Node] = {}
        todo = deque([start])
        while start not in before:
            node = todo.popleft()
            for following in edges.get(node, set()) - before.keys():
                before[following] = node
                todo.append(following)
        cycle = [before[start]]
        while cycle[-1] != start:
            cycle.append(before[cycle[-1]])
        yield cycle[::-1]
