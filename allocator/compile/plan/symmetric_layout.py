"""Buffers that Inductor allocates in symmetric memory: their layout, and the code that allocates them.

A buffer of a compiled graph gets symmetric memory by its layout alone; Inductor reuses such buffers among themselves,
by group and size, and for nothing else.
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

from symmem.compile.report import GRAPH, MARK, Decision
from symmem.compile.run.graph import Buffer
from symmem.ops.engines.select import group_named

__all__ = [
    "State",
    "SymmetricLayout",
    "allocation",
    "can_place",
    "declare",
    "emit_header",
    "imported",
    "is_part",
    "keeps",
    "nbytes_of",
    "root_of",
    "root_wrapper",
    "shape_of",
    "start",
    "state",
]


class SymmetricLayout(ir.CommBufferLayout):
    """Of a buffer in the symmetric memory of groups.

    Args:
        layout: What it was.
        group: Name of the group whose memory it is.
        backend: Memory of its own, of this backend; None for the group's arena.

    Attributes:
        groups: Names of the groups that reach it; the first one's memory it is, and the others are part of that one.
        escapes: Whether the graph returns it: then it is allocated anew at each call.
    """

    def __init__(self, layout: Any, group: str, backend: str | None) -> None:
        super().__init__(layout, ir.CommBufferType.SYMM_MEM, group)
        self.groups: tuple[str, ...] = (group,)
        self.backend, self.escapes = backend, False

    def join(self, group: str) -> bool:
        """Let one more group reach it; False if neither group is part of the other."""
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
        """Note that the graph returns it."""
        self.escapes = True
        self._name(f" {name}")

    def _name(self, suffix: str = "") -> None:
        # Inductor reuses the memory of buffers among those with the same group_name.
        self.group_name = ", ".join(self.groups) + suffix


def is_part(part: str, whole: str) -> bool:
    """Whether all ranks of one process group are in another."""
    groups = [group_named(name).process_group for name in (part, whole)]
    if any(group is None for group in groups):
        return False
    inner, outer = (dist.get_process_group_ranks(group) for group in groups)
    return set(inner) <= set(outer)


@dataclass
class State:
    """What is known of a graph that is being compiled, its subgraphs included.

    Attributes:
        name: For reports, and for code in C++.
        decisions: What became of each registered argument.
        memo: Arguments that were placed already, by graph, buffer, view and group.
        apart: Names of inputs that are looked at outside of CUDA graphs.
        count: Buffers and arguments so far.
        told: Whether the generated code has the decisions.
    """

    name: str
    decisions: list[Decision] = field(default_factory=list)
    memo: dict[Any, Any] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    count: int = 0
    told: bool = False

    def next_number(self) -> int:
        """A number for a buffer or an argument of the graph."""
        self.count += 1
        return self.count - 1


def _root(graph: Any) -> Any:
    while getattr(graph, "parent", None) is not None:
        graph = graph.parent
    return graph


def state() -> State | None:
    """What is known of the graph that is being compiled; None if it has no registered operator so far."""
    found: State | None = getattr(_root(V.graph), "_symmem", None)
    return found


def start(name: str) -> State:
    """Begin with the first registered operator of a graph."""
    made = _root(V.graph)._symmem = State(name)
    return made


def emit_header() -> str:
    """Let the generated module know of its graph; returns what that is there, for the function that runs.

    What was decided goes along in comments: compiled code that comes out of a cache is reported as well.
    """
    wrapper, known = root_wrapper(), state()
    assert known is not None
    if not known.told:
        known.told = True
        wrapper.add_import_once("from symmem.compile.run.current_graph import running as symmem_running")
        for line in (f"{GRAPH}{known.name}", *(f"{MARK}{decision.line()}" for decision in known.decisions)):
            wrapper.imports.writeline(f"# {line}")
    return "symmem_running.here.graph"


def imported(module: str) -> str:
    """Let the generated module import one of ours; returns its name there."""
    root_wrapper().add_import_once(f"import {module}")
    return module


def declare(module: str, variable: str, value: str) -> str:
    """Let the generated module have a value of its own, out of a module of ours; returns the variable."""
    root_wrapper().add_import_once(f"{variable} = {imported(module)}.{value}")
    return variable


def root_wrapper() -> Any:
    """What writes the module of the graph that is being compiled."""
    return _root(V.graph).wrapper_code


def allocation(line: Any) -> str:
    """The code that allocates a buffer with a :class:`SymmetricLayout`."""
    node, known = line.node, state()
    assert known is not None
    layout = node.get_output_spec()
    device = node.get_device()
    buffer = Buffer(known.next_number(), node.get_dtype(), str(device), layout.groups, layout.backend, keeps(device))
    record = declare("symmem.compile.run.graph", f"symmem_{buffer.number}", repr(buffer))
    make = "fresh" if layout.escapes else "buffer"
    return f"{node.get_name()} = {emit_header()}.{make}({record}, {shape_of(node)})"


def shape_of(x: Any) -> str:
    """Sizes and strides of a tensor, as the arguments of a call in generated code."""
    tuple_of = V.graph.wrapper_code.codegen_shape_tuple
    return f"{tuple_of(tuple(x.get_size()))}, {tuple_of(tuple(x.get_stride()))}"


def keeps(device: torch.device | None) -> bool:
    """Whether CUDA graphs may be captured with a graph's memory, which then must stay as long as they do."""
    return device is not None and device.type == "cuda" and bool(inductor.triton.cudagraphs)


def root_of(x: Any) -> Any:
    """The buffer in whose memory a value lies."""
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
    """Whether Inductor allocates a buffer, and can do so in symmetric memory."""
    return (
        isinstance(buffer, ir.Buffer)
        and not isinstance(buffer, ir.InputBuffer)
        # Of several kernels to choose from, some may allocate their own result.
        and not (isinstance(buffer, ir.MultiTemplateBuffer) and not buffer.output_plannable)
        and buffer.should_allocate()
        and isinstance(buffer.get_output_spec(), ir.FlexibleLayout | ir.FixedLayout)
        and not buffer.get_inputs_that_alias_output()
    )


def nbytes_of(sizes: Any, dtype: torch.dtype) -> int | None:
    """Bytes of a dense tensor; None if its shape is not known when it is compiled."""
    elements = math.prod(sizes)
    return int(elements) * dtype.itemsize if isinstance(elements, int) or elements.is_number else None
