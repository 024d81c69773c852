"""Buffers that Inductor allocates in symmetric memory: their layout, and the generated code that allocates them.

The layout alone decides that a buffer gets symmetric memory. Inductor reuses the memory of such buffers only among
themselves, by group and size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.virtualized import V

from symmem.compile.records import ArgumentRecord, BufferRecord
from symmem.compile.report import GRAPH, MARK, Decision
from symmem.group.resolve import group_named

__all__ = [
    "GraphPlan",
    "SymmetricLayout",
    "allocation",
    "begin_plan",
    "can_place",
    "current_plan",
    "declare",
    "declare_record",
    "emit_header",
    "imported",
    "is_part",
    "keeps_outgrown",
    "nbytes_of",
    "planned",
    "root_of",
    "shape_of",
]


class SymmetricLayout(ir.CommBufferLayout):
    """The layout of a buffer in the symmetric memory of one or more groups.

    Args:
        layout: The layout before.
        group: Name of the group that owns the memory.
        backend: Backend of a separate allocation; None for the group's arena.

    Attributes:
        groups: Names of the groups that reach the buffer. The first group owns the memory and contains the others.
        escapes: Whether the graph returns the buffer, so that it is allocated at every call.
    """

    def __init__(self, layout: Any, group: str, backend: str | None) -> None:
        super().__init__(layout, ir.CommBufferType.SYMM_MEM, group)
        self.groups: tuple[str, ...] = (group,)
        self.backend, self.escapes = backend, False

    def join(self, group: str) -> bool:
        """Let another group reach the buffer. Returns False if neither group is part of the other."""
        if group in self.groups:
            return True
        if self.backend is not None:
            return False
        if is_part(group, self.groups[0]):
            self.groups = (*self.groups, group)
        elif is_part(self.groups[0], group):
            self.groups = (group, *self.groups)
        else:
            return False
        self._name()
        return True

    def escape(self, name: str) -> None:
        """Note that the graph returns the buffer."""
        self.escapes = True
        self._name(f" {name}")

    def _name(self, suffix: str = "") -> None:
        # Inductor reuses memory among buffers with the same group_name.
        self.group_name = ", ".join(self.groups) + suffix


def is_part(part: str, whole: str) -> bool:
    """Whether all ranks of one process group belong to another."""
    groups = [group_named(name).process_group for name in (part, whole)]
    if any(group is None for group in groups):
        return False
    inner, outer = (dist.get_process_group_ranks(group) for group in groups)
    return set(inner) <= set(outer)


planned: set[str] = set()
"""Names of the graphs that this process has compiled itself, instead of loading them from a cache."""


@dataclass
class GraphPlan:
    """The plan of a graph that is being compiled, with its subgraphs.

    Attributes:
        name: Name of the graph, for reports and for C++ code.
        decisions: The decisions about registered arguments so far.
        memo: The results for arguments that are checked at run time, by graph, buffer, view and group.
        uncaptured_inputs: Names of inputs that are checked outside of CUDA graphs.
        count: Number of buffers and arguments so far.
        calls: Number of calls of registered operators so far.
        header_written: Whether the generated code contains the decisions.
    """

    name: str
    decisions: list[Decision] = field(default_factory=list)
    memo: dict[Any, Any] = field(default_factory=dict)
    uncaptured_inputs: set[str] = field(default_factory=set)
    count: int = 0
    calls: int = 0
    header_written: bool = False

    def next_number(self) -> int:
        """Return the number of the next buffer or argument of the graph."""
        self.count += 1
        return self.count - 1

    def next_call(self) -> int:
        """Return the number of the next call of a registered operator."""
        self.calls += 1
        return self.calls - 1


def _root(graph: Any) -> Any:
    while getattr(graph, "parent", None) is not None:
        graph = graph.parent
    return graph


def current_plan() -> GraphPlan | None:
    """The plan of the graph that is being compiled; None if it has no registered operator so far."""
    found: GraphPlan | None = getattr(_root(V.graph), "_symmem", None)
    return found


def begin_plan(name: str) -> GraphPlan:
    """Begin a plan, at the first registered operator of a graph."""
    made = _root(V.graph)._symmem = GraphPlan(name)
    planned.add(name)
    return made


def emit_header() -> str:
    """Return the expression for the running function's graph in generated code; write its import on first use.

    The decisions are written as comments, so that code from a cache is reported too.
    """
    wrapper, known = _root(V.graph).wrapper_code, current_plan()
    assert known is not None
    if not known.header_written:
        known.header_written = True
        wrapper.add_import_once("from symmem.compile.run.current_graph import running as symmem_running")
        for line in (f"{GRAPH}{known.name}", *(f"{MARK}{decision.line()}" for decision in known.decisions)):
            wrapper.imports.writeline(f"# {line}")
    return "symmem_running.here.graph"


def imported(module: str) -> str:
    """Write an import into the generated module, and return the module's name."""
    _root(V.graph).wrapper_code.add_import_once(f"import {module}")
    return module


def declare(module: str, variable: str, value: str) -> str:
    """Write ``variable = module.value`` into the generated module once, and return the variable."""
    _root(V.graph).wrapper_code.add_import_once(f"{variable} = {imported(module)}.{value}")
    return variable


def declare_record(record: BufferRecord | ArgumentRecord) -> str:
    """Write a record into the generated module, and return its variable."""
    return declare(type(record).__module__, f"symmem_{record.number}", repr(record))


def allocation(line: Any) -> str:
    """Generated code that allocates a buffer with a :class:`SymmetricLayout`."""
    node, known = line.node, current_plan()
    assert known is not None
    layout = node.get_output_spec()
    device = node.get_device()
    number, keep = known.next_number(), keeps_outgrown(device)
    users = (decision for decision in known.decisions if decision.buffer == node.get_name())
    op = next((f"{user.op}: the argument {user.argument!r}" for user in users), "")
    record = BufferRecord(number, node.get_dtype(), str(device), layout.groups, layout.backend, keep, op)
    make = "fresh" if layout.escapes else "buffer"
    return f"{node.get_name()} = {emit_header()}.{make}({declare_record(record)}, {shape_of(node)})"


def shape_of(x: Any) -> str:
    """Sizes and strides of a tensor, as arguments in generated code."""
    tuple_of = V.graph.wrapper_code.codegen_shape_tuple
    return f"{tuple_of(tuple(x.get_size()))}, {tuple_of(tuple(x.get_stride()))}"


def keeps_outgrown(device: torch.device | None) -> bool:
    """Whether outgrown memory stays allocated, because captured CUDA graphs may still use it."""
    return device is not None and device.type == "cuda" and bool(inductor.triton.cudagraphs)


def root_of(x: Any) -> Any:
    """The buffer that holds the memory of a value."""
    while True:
        spec = x.get_output_spec() if isinstance(x, ir.Buffer) else None
        if isinstance(x, ir.BaseView):
            x = x.unwrap_view()
        elif isinstance(x, ir.MutableBox):
            x = x.data
        elif isinstance(spec, ir.NonOwningLayout):
            x = spec.view
        elif isinstance(spec, ir.MutationLayoutSHOULDREMOVE):
            x = spec.get_buffer()
        else:
            return x


def can_place(buffer: Any) -> bool:
    """Whether Inductor can allocate a buffer in symmetric memory."""
    return (
        isinstance(buffer, ir.Buffer)
        and not isinstance(buffer, ir.InputBuffer)
        # Some of the kernels to choose from may allocate their own result.
        and not (isinstance(buffer, ir.MultiTemplateBuffer) and not buffer.output_plannable)
        and buffer.should_allocate()
        and isinstance(buffer.get_output_spec(), ir.FlexibleLayout | ir.FixedLayout)
        and not buffer.get_inputs_that_alias_output()
    )


def nbytes_of(sizes: Any, dtype: torch.dtype) -> int | None:
    """Bytes of a dense tensor; None if its shape is dynamic."""
    elements = math.prod(sizes)
    return int(elements) * dtype.itemsize if isinstance(elements, int) or elements.is_number else None
