"""Reports of compiled graphs: where registered arguments are placed or copied, and which functional collectives symmem
runs, and why. As text and as JSON."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from symmem.compile.records import BufferRecord, Usage

__all__ = [
    "AT_RUN_TIME",
    "COPIED",
    "GRAPH",
    "IN_PLACE",
    "LEFT",
    "MARK",
    "PLACED",
    "SERVED",
    "Decision",
    "GraphReport",
    "Report",
    "has_memory",
    "name_in",
    "report_of",
]

MARK = "symmem decision: "
"""Prefix of a decision in a comment of the generated code."""

GRAPH = "symmem graph: "
"""Prefix of a graph's name in a comment of the generated code."""

PLACED = "placed"
"""The producer writes to symmetric memory; there is no copy."""

IN_PLACE = "used in place"
"""The argument must be symmetric memory; there is no copy, and plain memory is an error."""

AT_RUN_TIME = "decided at run time"
"""Used in place if it is symmetric memory on all ranks, else copied."""

COPIED = "copied"
"""Copied at every call."""


SERVED = "run by symmem"
"""A functional collective that an operator of symmem runs."""

LEFT = "run by the process group"
"""A functional collective that symmem was asked to run, but cannot."""


@dataclass(frozen=True)
class Decision:
    """The decision about one registered argument in one call of an operator, or about a functional collective.

    Attributes:
        op: Qualified name of the operator.
        argument: Name of the argument, with an index if it is a list. Of a functional collective, its input.
        outcome: :data:`PLACED`, :data:`IN_PLACE`, :data:`AT_RUN_TIME` or :data:`COPIED`; of a functional collective,
            :data:`SERVED` or :data:`LEFT`.
        buffer: Name of the buffer in the compiled graph.
        group: Name of the group.
        shape: Sizes as the compiler knows them: numbers or symbols.
        dtype: Element type.
        nbytes: Size in bytes; None if the shape is dynamic.
        why: The reason.
        advice: A change that avoids the copy; empty if there is no copy or no such change.
        where: The source line that calls the operator.
        barrier: Whether compiled code adds a barrier after the operator, because it has no exit barrier.
        call: Number of the operator's call within the graph.
        number: Number of the argument within the graph, if compiled code checks it at every call.
        copied_back: Bytes that the graph copies to one of its inputs afterwards, because the operator wrote to a buffer
            of the graph instead of the input.
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
    call: int = 0
    number: int | None = None
    copied_back: int = 0

    def line(self) -> str:
        """Return the decision as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Decision:
        """Parse a decision that :meth:`line` returned."""
        known = json.loads(line)
        return cls(**{**known, "shape": tuple(known["shape"])})


@dataclass(frozen=True)
class Buffer:
    """Symmetric memory that a graph allocates.

    Attributes:
        name: Name of the first buffer in this memory.
        nbytes: Size in bytes; None if the shape is dynamic.
        group: Name of the group.
        users: Names of the buffers that use this memory one after the other.
    """

    name: str
    nbytes: int | None
    group: str
    users: tuple[str, ...]


@dataclass(frozen=True)
class GraphReport:
    """The report of one compiled graph.

    Attributes:
        name: Name of the graph.
        decisions: One per registered argument and per tensor of a functional collective, in the order of the calls.
        buffers: The symmetric memory that the graph allocates for its buffers.
        usage: How often the arguments with a number were used in place and copied until now. It goes on counting.
    """

    name: str
    decisions: tuple[Decision, ...]
    buffers: tuple[Buffer, ...]
    usage: Mapping[int, Usage] = field(default_factory=dict, compare=False, repr=False)

    @property
    def copies(self) -> int:
        """Number of arguments that are copied at every call."""
        return sum(each.outcome == COPIED for each in self.decisions)

    @property
    def reuses(self) -> int:
        """How often a buffer reuses the memory of an earlier one."""
        return sum(len(each.users) - 1 for each in self.buffers)

    @property
    def peak(self) -> int:
        """Most bytes of symmetric memory that the graph holds: its buffers and the arguments that may be copied.

        Buffers with dynamic shapes are not counted.
        """
        copies = {each.buffer: each.nbytes or 0 for each in self.decisions if each.outcome in (AT_RUN_TIME, COPIED)}
        return sum(each.nbytes or 0 for each in self.buffers) + sum(copies.values())

    def to_json(self) -> dict[str, Any]:
        """Return the report for ``json.dumps``."""
        known = {
            "name": self.name,
            "decisions": [asdict(each) for each in self.decisions],
            "buffers": [asdict(each) for each in self.buffers],
            "usage": {
                number: {"in_place": each.in_place, "copied": each.copied, "nbytes": each.nbytes}
                for number, each in self.usage.items()
            },
        }
        return {**known, "copies": self.copies, "reuses": self.reuses, "peak": self.peak}

    def __str__(self) -> str:
        collectives = [each.outcome == SERVED for each in self.decisions if each.outcome in (SERVED, LEFT)]
        head = (
            f"graph {self.name}: {len(self.decisions) - len(collectives)} registered arguments, {self.copies} copied "
            f"at every call, {len(self.buffers)} symmetric buffers, {self.reuses} reuses, {_bytes(self.peak)} of "
            "symmetric memory"
        )
        if collectives:
            head += f"; {len(collectives)} functional collectives, {sum(collectives)} run by symmem"
        lines = [head]
        for each in self.decisions:
            size = f"[{', '.join(each.shape)}] {each.dtype}, {_bytes(each.nbytes)}"
            lines.append(f"  {each.op}({each.argument}: {size}): {each.outcome}: {each.why}")
            usage = self.usage.get(-1 if each.number is None else each.number)
            if usage is not None:
                lines.append(f"    {_calls(usage)}")
            if each.copied_back:
                lines.append(
                    f"    the graph writes to an input before the operator: {_bytes(each.copied_back)} are copied back "
                    "to the input at every call"
                )
            if each.advice and (usage is None or usage.copied):
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
    """Reports of all graphs with registered operators, in the order in which they were compiled or loaded.

    Attributes:
        graphs: One report per graph.
    """

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def copies(self) -> int:
        """Number of arguments that are copied at every call, in all graphs."""
        return sum(each.copies for each in self.graphs)

    def to_json(self) -> dict[str, Any]:
        """Return the report for ``json.dumps``."""
        return {"graphs": [each.to_json() for each in self.graphs]}

    def __str__(self) -> str:
        if not self.graphs:
            return (
                "no compiled graph has a registered operator (`symmem ops list` shows which are registered), or a "
                "functional collective of a group that the setting compiled_collectives gives to symmem"
            )
        return "\n".join(str(each) for each in self.graphs)


def _calls(usage: Usage) -> str:
    times = f"in {usage.in_place} call{'s' * (usage.in_place != 1)}"
    copied = f"copied in {usage.copied}" + f" ({_bytes(usage.nbytes)} in all)" * bool(usage.copied)
    return f"used in place {times} until now, {copied}"


def _bytes(nbytes: int | None) -> str:
    if nbytes is None:
        return "dynamic size"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


_GRAPH = re.compile(rf"^# {re.escape(GRAPH)}(\w+)$", re.MULTILINE)
_DECISION = re.compile(rf"^(?:#|//) {re.escape(MARK)}(.*)$", re.MULTILINE)
_TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_RECORD = re.compile(
    rf"^(symmem_\w+) = {re.escape(f'{BufferRecord.__module__}.{BufferRecord.__name__}')}\(.*\bgroups=\(({_TEXT}),",
    re.MULTILINE,
)
_ALLOCATED = re.compile(r"^\s*(\w+) = symmem_running\.here\.graph\.(?:buffer|fresh)\((\w+),", re.MULTILINE)
_REUSED = re.compile(r"^\s*(\w+) = (?:reinterpret_tensor\()?(\w+)\b[^#\n]*;[^#\n]*# reuse", re.MULTILINE)


def name_in(source: str) -> str | None:
    """The name of the graph in generated code; None if it has no registered operator."""
    found = _GRAPH.search(source)
    return found and found.group(1)


def has_memory(source: str) -> bool:
    """Whether generated code uses symmetric memory of the function, and not only functional collectives."""
    return "symmem_running.here.graph." in source


def report_of(
    name: str,
    source: str,
    usage: Mapping[int, Usage] | None = None,
    lines: Sequence[tuple[str, str]] | None = None,
) -> GraphReport:
    """Read the report of a graph from its generated code, so that code from a cache is reported too.

    Args:
        name: Name of the graph.
        source: The generated code. Another program may have made it, and it contains the lines of that program.
        usage: See :class:`GraphReport`.
        lines: The operators that this program's graph calls, in order, and the source lines. None if this program has
            made the code, so that the lines in it are right.
    """
    decisions = tuple(Decision.from_line(line) for line in _DECISION.findall(source))
    if lines is not None:
        decisions = tuple(replace(each, where=_line_of(each, decisions, lines)) for each in decisions)
    return GraphReport(name, decisions, tuple(_buffers(source, decisions)), {} if usage is None else usage)


def _line_of(decision: Decision, decisions: Sequence[Decision], lines: Sequence[tuple[str, str]]) -> str:
    """The line of this program that makes a call; empty if it is not known."""
    calls = sorted({each.call for each in decisions if each.op == decision.op})
    found = [line for op, line in lines if op == decision.op]
    if len(found) == len(calls):
        return found[calls.index(decision.call)]
    return decision.where if decision.where in found else ""


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
