"""Why an argument is placed, used in place or copied, and how to avoid a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.virtualized import V
from torch._library.utils import is_builtin
from torch._ops import OpOverload

from symmem.compile.plan.symmetric_layout import SymmetricLayout
from symmem.compile.report import AT_RUN_TIME, COPIED, IN_PLACE

__all__ = ["Verdict", "producer_name", "source_line", "verdict"]

_TORCH = str(Path(torch.__file__).parent)
_IF_SYMMETRIC = "used in place if it is symmetric memory on all ranks, else copied"


def _is_redirected(buffer: Any) -> bool:
    """Whether the operator that makes a buffer runs within :func:`symmem.use_symmetric_memory`."""
    return any(getattr(node, "symmem_redirected", False) for node in (buffer, *getattr(buffer, "inputs", ())))


def _maker(buffer: Any) -> Any:
    """The node of the operator that makes a buffer, also if the buffer is one of its results."""
    return buffer.inputs[0] if isinstance(buffer, ir.MultiOutput) else buffer


def producer_name(buffer: Any) -> str:
    """The name of the operator that writes a buffer, for messages."""
    buffer = _maker(buffer)
    kernel = getattr(buffer, "python_kernel_name", None)
    origin = getattr(buffer, "origin_node", None)
    return str(kernel or (origin is not None and origin.target) or type(buffer).__name__)


class Verdict(NamedTuple):
    """The decision about an argument that Inductor cannot place.

    Attributes:
        policy: How the runtime treats it: see :class:`symmem.compile.records.ArgumentRecord`.
        outcome: The outcome in the report.
        why: The reason.
        advice: How to avoid a copy; empty if there is no way.
    """

    policy: str
    outcome: str
    why: str
    advice: str


def verdict(buffer: Any, one_sided: bool) -> Verdict:
    """Decide about an argument that Inductor cannot place.

    Args:
        buffer: The buffer of the argument.
        one_sided: Whether a rank calls the operator alone.
    """
    if one_sided:
        why = "a rank calls the operator alone, so the argument must be symmetric memory; no copy is made"
        return Verdict("strict", IN_PLACE, why, "")
    allocate = "allocate it with symmem.allocate, or make it within symmem.use_symmetric_memory, on all ranks"
    if isinstance(buffer, ir.ConstantBuffer):
        return Verdict("agree", COPIED, "a constant of the graph", "pass it as an argument, in symmetric memory")
    if isinstance(buffer, ir.InputBuffer):
        return Verdict("agree", AT_RUN_TIME, f"an input of the graph or a parameter, {_IF_SYMMETRIC}", allocate)
    name = producer_name(buffer)
    if _is_redirected(buffer):
        why = f"the operator that makes it ({name}) runs within use_symmetric_memory, {_IF_SYMMETRIC}"
        return Verdict("own", AT_RUN_TIME, why, "")
    if buffer.get_inputs_that_alias_output():
        # The operator may return a view of an input, or memory that differs between the ranks.
        return Verdict("agree", AT_RUN_TIME, f"a view that an operator returns ({name}), {_IF_SYMMETRIC}", allocate)
    return Verdict("copy", COPIED, *_why_copied(buffer, name))


def _why_copied(buffer: Any, name: str) -> tuple[str, str]:
    """The reason and the advice."""
    if isinstance(spec := buffer.get_output_spec(), SymmetricLayout):
        return f"its buffer is in the memory of another group, {spec.groups[0]!r}", "use one group for both operators"
    if V.graph.cpp_wrapper:
        return "the generated code is C++ (cpp_wrapper), which cannot place buffers", "switch cpp_wrapper off"
    if inductor.memory_planning:
        return "memory_planning puts buffers into its own pools", "switch memory_planning off"
    if isinstance(buffer, ir.MultiTemplateBuffer):
        why = f"{name} is chosen among several kernels, and some of them allocate their own result"
        return why, "compile without max_autotune"
    why = f"the operator that makes it ({name}) allocates its own result"
    op = getattr(_maker(buffer), "op_overload", None)
    if isinstance(op, OpOverload) and is_builtin(op):
        return why, "call it in an operator of your own with one result, which has a variant with out="
    return why, "give that operator a variant with out= that takes the same arguments"


_SCATTERS = {
    getattr(torch.ops.aten, name).default
    for name in ("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter", "copy", "clone")
}


def copied_back(value_of: Callable[..., Any], label: str) -> int:
    """Bytes that the graph copies to its inputs after the operator being lowered has written to an argument.

    Args:
        value_of: Returns an argument of the operator by name.
        label: Name of the argument, with an index if it is a list.
    """
    node, (name, _, index) = V.graph.current_node, label.partition("[")
    value = value_of(name, node.args, node.kwargs)
    value = value[int(index[:-1])] if index else value
    while isinstance(value, torch.fx.Node) and _is_part(value):
        value = value.args[0]
    found, todo, seen = 0, [value], set()
    while todo:
        for user in getattr(todo.pop(), "users", ()):
            if user in seen:
                continue
            seen.add(user)
            if user.target is torch.ops.aten.copy_.default:
                into = user.args[0]
                example = into.meta.get("val")
                if into.op == "placeholder" and isinstance(example, torch.Tensor):
                    elements: Any = example.numel()
                    if isinstance(elements, torch.SymInt):  # as in the example call
                        elements = V.graph.sizevars.optimization_hint(elements.node.expr)
                    found += elements * example.dtype.itemsize
            elif _is_part(user) or user.target in _SCATTERS:
                todo.append(user)
    return found


def _is_part(node: torch.fx.Node) -> bool:
    """Whether a node is a view."""
    return isinstance(node.target, OpOverload) and node.target.is_view


def source_line(node: torch.fx.Node | None) -> str:
    """The source line that a node comes from, outside of torch if there is one; empty if it is not known."""
    trace = (node.meta.get("stack_trace") or "") if node is not None else ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    places = [index for index, line in enumerate(lines) if line.startswith("File ")]
    place = next((index for index in reversed(places) if _TORCH not in lines[index]), places[-1] if places else 0)
    return ": ".join(lines[place : place + 2]) if places else ""
