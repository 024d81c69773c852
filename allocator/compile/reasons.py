"""Why an argument was placed or not, and what would avoid a copy."""

from __future__ import annotations

from typing import Any

from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.virtualized import V

from symmem.compile.layout import SymmetricLayout
from symmem.compile.report import ALREADY, COPIED

__all__ = ["is_within", "producer_name", "reason", "where"]


def is_within(buffer: Any) -> bool:
    """Whether the operator that makes a buffer runs within :func:`symmem.use_symmetric_memory`."""
    return any(getattr(each, "symmem_within", False) for each in (buffer, *getattr(buffer, "inputs", ())))


def producer_name(buffer: Any) -> str:
    """What writes a buffer, for people."""
    kernel = getattr(buffer, "python_kernel_name", None)
    origin = getattr(buffer, "origin_node", None)
    return str(kernel or (origin is not None and origin.target) or type(buffer).__name__)


def reason(buffer: Any, x: ir.TensorBox, one_sided: bool) -> tuple[str, str, str]:
    """Outcome, reason, and what would avoid a copy, of an argument that Inductor cannot place."""
    if one_sided:
        return ALREADY, "ranks call the operator alone: it must be symmetric memory, and no copy is made", ""
    allocate = "allocate it with symmem.allocate, or make it within symmem.use_symmetric_memory, on all ranks"
    if isinstance(buffer, ir.ConstantBuffer):
        return COPIED, "a constant of the graph", "pass it as an argument, in symmetric memory"
    if isinstance(buffer, ir.InputBuffer):
        return ALREADY, "an input of the graph, or a parameter: used where it lies if it is symmetric memory", allocate
    if isinstance(spec := buffer.get_output_spec(), SymmetricLayout):
        return (
            COPIED,
            f"its buffer lies in the memory of another group, {spec.groups[0]!r}",
            "use one group for both",
        )
    if V.graph.cpp_wrapper:
        return COPIED, "the code that is generated is C++ (cpp_wrapper), which cannot place buffers", "switch it off"
    if inductor.memory_planning:
        return COPIED, "memory_planning puts buffers into pools of its own", "switch it off"
    name = producer_name(buffer)
    if is_within(buffer):
        return ALREADY, f"the operator that makes it ({name}) runs within use_symmetric_memory", ""
    if buffer.get_inputs_that_alias_output():
        return ALREADY, f"a view that Inductor calls as an operator ({name}): looked at when it runs", allocate
    if isinstance(buffer, ir.MultiTemplateBuffer):
        why = f"{name} is chosen among several kernels, some of which allocate their own result"
        return COPIED, why, "compile without max_autotune"
    return (
        COPIED,
        f"the operator that makes it ({name}) allocates its own result",
        "give that operator a variant with out=, of the same arguments",
    )


def where() -> str:
    """The line of the program that called the operator that is being lowered."""
    trace = (V.graph.current_node.meta.get("stack_trace") or "") if V.graph.current_node is not None else ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    places = [index for index, line in enumerate(lines) if line.startswith("File ")]
    return ": ".join(lines[places[-1] : places[-1] + 2]) if places else ""
