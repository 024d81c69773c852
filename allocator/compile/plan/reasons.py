"""Why an argument was placed or not, and what would avoid a copy."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.virtualized import V

from symmem.compile.plan.symmetric_layout import SymmetricLayout
from symmem.compile.report import ALREADY, COPIED

__all__ = ["Verdict", "producer_name", "verdict", "where"]


def _is_within(buffer: Any) -> bool:
    """Whether the operator that makes a buffer runs within :func:`symmem.use_symmetric_memory`."""
    return any(getattr(each, "symmem_within", False) for each in (buffer, *getattr(buffer, "inputs", ())))


def producer_name(buffer: Any) -> str:
    """What writes a buffer, for people."""
    kernel = getattr(buffer, "python_kernel_name", None)
    origin = getattr(buffer, "origin_node", None)
    return str(kernel or (origin is not None and origin.target) or type(buffer).__name__)


class Verdict(NamedTuple):
    """What becomes of an argument that Inductor cannot place.

    Attributes:
        way: How it is looked after: see :class:`symmem.compile.run.graph.Argument`.
        outcome: For the report.
        why: The reason.
        advice: What would avoid a copy; empty if there is none.
    """

    way: str
    outcome: str
    why: str
    advice: str


def verdict(buffer: Any, one_sided: bool) -> Verdict:
    """What becomes of an argument that lies in a buffer which Inductor cannot place.

    Args:
        buffer: Where it lies.
        one_sided: Whether ranks call the operator alone.
    """
    if one_sided:
        why = "ranks call the operator alone: it must be symmetric memory, and no copy is made"
        return Verdict("strict", ALREADY, why, "")
    allocate = "allocate it with symmem.allocate, or make it within symmem.use_symmetric_memory, on all ranks"
    if isinstance(buffer, ir.ConstantBuffer):
        return Verdict("agree", COPIED, "a constant of the graph", "pass it as an argument, in symmetric memory")
    if isinstance(buffer, ir.InputBuffer):
        why = "an input of the graph, or a parameter: used where it lies if it is symmetric memory"
        return Verdict("agree", ALREADY, why, allocate)
    name = producer_name(buffer)
    if _is_within(buffer):
        why = f"the operator that makes it ({name}) runs within use_symmetric_memory"
        return Verdict("own", ALREADY, why, "")
    if buffer.get_inputs_that_alias_output():
        # It may hand on an input; what else an operator returns lies where it likes, on each rank for itself.
        why = f"a view that Inductor calls as an operator ({name}): looked at when it runs"
        return Verdict("agree", ALREADY, why, allocate)
    return Verdict("copy", COPIED, *_why_copied(buffer, name))


def _why_copied(buffer: Any, name: str) -> tuple[str, str]:
    """Reason and advice."""
    if isinstance(spec := buffer.get_output_spec(), SymmetricLayout):
        return f"its buffer lies in the memory of another group, {spec.groups[0]!r}", "use one group for both"
    if V.graph.cpp_wrapper:
        return "the code that is generated is C++ (cpp_wrapper), which cannot place buffers", "switch it off"
    if inductor.memory_planning:
        return "memory_planning puts buffers into pools of its own", "switch it off"
    if isinstance(buffer, ir.MultiTemplateBuffer):
        why = f"{name} is chosen among several kernels, some of which allocate their own result"
        return why, "compile without max_autotune"
    return (
        f"the operator that makes it ({name}) allocates its own result",
        "give that operator a variant with out=, of the same arguments",
    )


def where() -> str:
    """The line of the program that called the operator that is being lowered."""
    trace = (V.graph.current_node.meta.get("stack_trace") or "") if V.graph.current_node is not None else ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    places = [index for index, line in enumerate(lines) if line.startswith("File ")]
    return ": ".join(lines[places[-1] : places[-1] + 2]) if places else ""
