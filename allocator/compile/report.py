"""What became of each registered argument of a compiled graph, and why: for people, and as JSON."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ALREADY", "COPIED", "GRAPH", "MARK", "PLACED", "Decision", "GraphReport", "Report", "name_in", "report_of"]

MARK = "symmem decision: "
"""Before a decision, in a comment of the generated code."""

GRAPH = "symmem graph: "
"""Before the name of a graph, in a comment of the generated code."""

PLACED = "placed"
"""Its producer writes to symmetric memory: no copy."""

ALREADY = "as it comes"
"""It is used as it is where it lies in symmetric memory already, and else copied: decided at run time."""

COPIED = "copied"
"""It is copied at each call."""


@dataclass(frozen=True)
class Decision:
    """What became of one argument of one call of an operator.

    Attributes:
        op: Qualified name of the operator.
        argument: Its name; with an index, if it is a list.
        outcome: :data:`PLACED`, :data:`ALREADY` or :data:`COPIED`.
        buffer: Of the compiled graph.
        group: Name of the group.
        shape: As the compiler knows it.
        dtype: Of its elements.
        nbytes: None if the shape is not known when it is compiled.
        why: The reason.
        advice: What to change to avoid a copy; empty if there is none.
        where: The line of the program that called the operator.
        barrier: Whether a barrier follows the operator, since it has none of its own at its end.
    """

    op: str
    argument: str
    outcome: str
    buffer: str
    group: str
    shape: tuple[str, ...]
    dtype: str
    nbytes: int | None
    why: str
    advice: str = ""
    where: str = ""
    barrier: bool = False

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Decision:
        """The inverse of :meth:`line`."""
        known = json.loads(line)
        return cls(**{**known, "shape": tuple(known["shape"])})


@dataclass(frozen=True)
class Buffer:
    """One piece of symmetric memory that a graph allocates.

    Attributes:
        name: Of the buffer for which it is allocated first.
        nbytes: None if its shape is not known when it is compiled.
        group: Name of the group.
        users: Buffers that lie in it, one after the other.
    """

    name: str
    nbytes: int | None
    group: str
    users: tuple[str, ...]


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    Attributes:
        name: Of the graph.
        decisions: One for each registered argument, in the order of the calls.
        buffers: The symmetric memory that it allocates for buffers of its own.
    """

    name: str
    decisions: tuple[Decision, ...]
    buffers: tuple[Buffer, ...]

    @property
    def copies(self) -> int:
        """Arguments that are copied at each call, for certain."""
        return sum(each.outcome == COPIED for each in self.decisions)

    @property
    def reuses(self) -> int:
        """How often a buffer takes the memory of one before."""
        return sum(len(each.users) - 1 for each in self.buffers)

    @property
    def peak(self) -> int:
        """Bytes of symmetric memory that it may hold: its buffers, and a copy of each argument that may need one.

        Without those whose shape is not known when it is compiled.
        """
        copies = {each.buffer: each.nbytes or 0 for each in self.decisions if each.outcome != PLACED}
        return sum(each.nbytes or 0 for each in self.buffers) + sum(copies.values())

    def to_json(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        return {**asdict(self), "copies": self.copies, "reuses": self.reuses, "peak": self.peak}

    def __str__(self) -> str:
        lines = [
            f"graph {self.name}: {len(self.decisions)} registered arguments, {self.copies} copied at each call, "
            f"{len(self.buffers)} symmetric buffers, {self.reuses} reuses, {_bytes(self.peak)} of symmetric memory"
        ]
        for each in self.decisions:
            size = f"[{', '.join(each.shape)}] {each.dtype}, {_bytes(each.nbytes)}"
            lines.append(f"  {each.op}({each.argument}: {size}): {each.outcome}: {each.why}")
            if each.advice:
                lines.append(f"    to avoid the copy: {each.advice}")
            if each.barrier:
                lines.append("    a barrier follows: the operator is registered without exit_barrier=True")
            if each.where:
                lines.append(f"    {each.where}")
        for each_buffer in self.buffers:
            users = ", ".join(each_buffer.users)
            lines.append(f"  memory of {_bytes(each_buffer.nbytes)} in group {each_buffer.group!r} for {users}")
        return "\n".join(lines)


@dataclass
class Report:
    """What was compiled: all graphs with registered operators, in the order in which they were compiled or loaded.

    Attributes:
        graphs: One report each.
    """

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def copies(self) -> int:
        """Of all graphs; see :attr:`GraphReport.copies`."""
        return sum(each.copies for each in self.graphs)

    def to_json(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        return {"graphs": [each.to_json() for each in self.graphs]}

    def __str__(self) -> str:
        if not self.graphs:
            return "no compiled graph has a registered operator (`symmem ops list` shows which are registered)"
        return "\n".join(str(each) for each in self.graphs)


def _bytes(nbytes: int | None) -> str:
    if nbytes is None:
        return "of a size known at run time"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


_GRAPH = re.compile(rf"^# {re.escape(GRAPH)}(\w+)$", re.MULTILINE)
_DECISION = re.compile(rf"^(?:#|//) {re.escape(MARK)}(.*)$", re.MULTILINE)
_TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_RECORD = re.compile(rf"^(symmem_\w+) = symmem\.compile\.run\.graph\.Buffer\(.*\bgroups=\(({_TEXT}),", re.MULTILINE)
_ALLOCATED = re.compile(r"^\s*(\w+) = symmem_running\.here\.graph\.(?:buffer|fresh)\((\w+),", re.MULTILINE)
_REUSED = re.compile(r"^\s*(\w+) = (?:reinterpret_tensor\()?(\w+)\b[^#\n]*;[^#\n]*# reuse", re.MULTILINE)


def name_in(source: str) -> str | None:
    """The name of the graph of generated code; None if it has no registered operator."""
    found = _GRAPH.search(source)
    return found and found.group(1)


def report_of(name: str, source: str) -> GraphReport:
    """Read off the generated code of a graph what it does: code which comes out of a cache is reported as well."""
    decisions = tuple(Decision.from_line(line) for line in _DECISION.findall(source))
    return GraphReport(name, decisions, tuple(_buffers(source, decisions)))


def _buffers(source: str, decisions: Sequence[Decision]) -> list[Buffer]:
    sizes = {each.buffer: each.nbytes for each in decisions}
    homes = {record: ast.literal_eval(group) for record, group in _RECORD.findall(source)}
    groups = {name: homes[record] for name, record in _ALLOCATED.findall(source)}
    users = {name: [name] for name in groups}
    home = {name: name for name in users}
    for new, old in _REUSED.findall(source):
        if old in home:
            home[new] = home[old]
            users[home[old]].append(new)
    return [Buffer(name, sizes.get(name), groups[name], tuple(known)) for name, known in users.items()]
