"""Finds which processes wait for which, the cycles among them, and the processes that all others wait for.

A rank waits in a round of a collective operation, or for a signal (a barrier, or an operation on the host or a GPU). It
waits for the ranks that have not arrived there. Messages of a round go through rank 0, so for a round the missing ranks
follow from the number of rounds that every rank has begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from symmem.tools.live.processes import Process

__all__ = ["Absent", "Analysis", "RankWait", "analyse", "waits_of"]


@dataclass(frozen=True)
class Absent:
    """A rank of a group that no process reports."""

    group: str
    rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} of group {self.group!r} (not visible here)"


Node: TypeAlias = "Process | Absent"

_Key: TypeAlias = tuple[str, str, int, "str | None"]


@dataclass(frozen=True)
class RankWait:
    """One wait of a rank.

    Attributes:
        process: The process that waits.
        group: Name of the group.
        rank: Rank of the process in the group.
        step: The step or signal that it waits in.
        round: Number of the round, if it waits in a round of a collective operation.
        seconds: Duration of the wait so far.
        seconds_left: Time until the wait fails.
        ranks: Ranks of the group that it waits for; empty if all have arrived and it is about to continue.
        peers: The same, as processes.
        thread: The thread that waits; 0 if unknown.
        device: The GPU, if a kernel waits.
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
        """Text for people that names the GPU, if any."""
        return f", on the GPU {self.device}" if self.device else ""


@dataclass(frozen=True)
class Analysis:
    """The waits of a job.

    Attributes:
        processes: All processes that were found.
        waits: Waits of all processes, the longest first.
        cycles: Lists of processes. Every process waits for the next one, and the last for the first.
        awaited: Processes that others wait for and that do not wait themselves, with the number of processes that wait
            for them directly or through others.
    """

    processes: Sequence[Process]
    waits: Sequence[RankWait]
    cycles: Sequence[Sequence[Node]]
    awaited: Sequence[tuple[Node, int]]


def _members(processes: Sequence[Process]) -> dict[_Key, dict[int, tuple[Process, dict[str, Any]]]]:
    """The ranks of every group that report it: process and status, by group and rank."""
    found: dict[_Key, dict[int, tuple[Process, dict[str, Any]]]] = {}
    for process in processes:
        for group in process.answer["groups"] if process.answer else ():
            if not group["closed"]:
                found.setdefault(_key(process, group), {})[group["rank"]] = process, group
    return found


def _key(process: Process, group: dict[str, Any]) -> _Key:
    # A group has no identity before its ranks have joined; until then only its name tells it apart.
    return process.job, group["name"], group["size"], group["identity"]


def waits_of(processes: Sequence[Process]) -> list[RankWait]:
    """The waits of all processes, the longest first."""
    waits = []
    for key, ranks in _members(processes).items():
        for process, group in ranks.values():
            for each in ([group["round"]] if group["round"] else []) + group["signals"]:
                number = each.get("number")
                awaited = each["waits_for"] if number is None else _missing(number, ranks, key[2])
                peers = [ranks[rank][0] if rank in ranks else Absent(key[1], rank) for rank in awaited]
                waits.append(
                    RankWait(
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


def _missing(number: int, ranks: dict[int, tuple[Process, dict[str, Any]]], size: int) -> list[int]:
    """The ranks that have not begun a round, as far as the answers show."""
    late = {rank for rank, (_, group) in ranks.items() if group["rounds"] < number}
    unseen = set(range(size)) - ranks.keys()
    leader = ranks[0][1]["round"] if 0 in ranks else None
    if leader and leader["number"] == number and leader["waits_for"] is not None:
        late |= unseen & set(leader["waits_for"])  # rank 0 knows it if messages go over sockets
    elif not late:
        late = unseen  # at least one of them
    return sorted(late)


def analyse(processes: Sequence[Process]) -> Analysis:
    """Analyse answers of processes; the answers must have the part ``groups``."""
    waits = waits_of(processes)
    edges: dict[Node, set[Node]] = {}
    for wait in waits:
        if wait.peers:
            edges.setdefault(wait.process, set()).update(wait.peers)
    reached = {node: _reached(node, edges) for node in edges}
    ends = {peer for peers in edges.values() for peer in peers} - edges.keys()
    counts = [(node, sum(node in each for each in reached.values())) for node in ends]
    awaited = sorted(counts, key=lambda each: (-each[1], str(each[0])))
    return Analysis(processes, waits, list(_cycles(edges, reached)), awaited)


def _reached(start: Node, edges: dict[Node, set[Node]]) -> set[Node]:
    found: set[Node] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def _cycles(edges: dict[Node, set[Node]], reached: dict[Node, set[Node]]) -> Iterator[list[Node]]:
    """A shortest cycle of every set of nodes that all reach each other."""
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
