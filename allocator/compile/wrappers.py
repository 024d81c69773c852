"""The wrapped functions of Inductor and their wrappers: see :mod:`.hook`."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._inductor import compile_fx, ir
from torch._inductor import lowering as inductor_lowering
from torch._inductor.codecache import FxGraphHashDetails
from torch._inductor.codegen.wrapper import AllocateLine, PythonWrapperCodegen
from torch._inductor.dependencies import WeakDep
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.scheduler import Scheduler
from torch._library.utils import get_layout_constraint_tag, is_builtin
from torch._ops import OpOverload

from symmem.compile.cache_keys import key_of, operators
from symmem.compile.plan import functional, graph_outputs, lowering, mutable_ops, producers, symmetric_layout
from symmem.compile.plan.reasons import source_line
from symmem.compile.plan.symmetric_layout import SymmetricLayout
from symmem.compile.report import GraphReport, has_memory, name_in, report_of
from symmem.compile.run import calls  # noqa: F401  # defines the operators that lowerings call
from symmem.compile.run.current_graph import bound, running
from symmem.compile.scope import is_on, listeners, seen
from symmem.config.settings import load_settings
from symmem.ops.registry import registry
from symmem.ops.registry.built_in import NAMESPACE

__all__ = ["OPTIONAL", "WRAPPED"]

log = logging.getLogger("symmem.compile")

_state = threading.local()


def _call_function(original: Any) -> Any:
    @functools.wraps(original)
    def call_function(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(target, OpOverload) or not is_on():
            return original(self, target, args, kwargs)
        op = mutable_ops.original_of(target)
        seen.add(op._name)
        known = registry.lookup(op)
        if known is not None:
            made: Any = lowering.handler(known, target, op, _own_lowering(target))
        elif functional.reported_name(op) is not None:
            made = functional.lowering(op, inductor_lowering.lowerings[op], args, kwargs)
        elif _makes_its_result(op):
            group = producers.fed(self.current_node)
            made = producers.producer(op, group) if group is not None or op.namespace == "symmem" else None
        else:
            made = None
        if made is None:
            return original(self, target, args, kwargs)
        with _lowered_by(target, made):
            return original(self, target, args, kwargs)

    return call_function


def _own_lowering(op: OpOverload) -> Any:
    """An operator's custom lowering. Torch's lowerings of torch.ops.symm_mem are ignored: they use other memory."""
    known = inductor_lowering.lowerings.get(op)
    if known is None or op.namespace == NAMESPACE or getattr(known, "_is_fallback_handler", False):
        return None
    return known


def _makes_its_result(op: OpOverload) -> bool:
    """Whether Inductor calls the operator itself, so that the operator allocates its result."""
    known = inductor_lowering.lowerings.get(op)
    return not is_builtin(op) and (known is None or getattr(known, "_is_fallback_handler", False))


@contextlib.contextmanager
def _lowered_by(op: OpOverload, made: Any) -> Iterator[None]:
    """Lower an operator by ``made`` within the block, after Inductor has given the arguments the required strides."""
    table, constraints = inductor_lowering.lowerings, inductor_lowering._maybe_layout_constraints
    known, constraint = table.get(op), constraints.get(op, ...)
    table[op] = made
    if constraint is ... and inductor_lowering.maybe_layout_constraints(op) is None:
        constraints[op] = inductor_lowering.tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
    try:
        yield
    finally:
        if known is None:
            del table[op]
        else:
            table[op] = known
        if constraint is ...:
            constraints.pop(op, None)


def _output(original: Any) -> Any:
    @functools.wraps(original)
    def output(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        if symmetric_layout.current_plan() is not None:
            values = args[0]
            if isinstance(values, tuple | list):
                args = (type(values)(graph_outputs.output(values)), *args[1:])
            else:
                args = (*graph_outputs.output([values]), *args[1:])
        return original(self, target, args, kwargs)

    return output


def _codegen_comm_buffer(original: Any) -> Any:
    @functools.wraps(original)
    def codegen_comm_buffer(self: Any, code: Any) -> None:
        if isinstance(self.node.get_output_spec(), SymmetricLayout):
            code.writeline(symmetric_layout.allocation(self))
        else:
            original(self, code)

    return codegen_comm_buffer


def _can_reuse(original: Any) -> Any:
    @functools.wraps(original)
    def can_reuse(self: Any, input_buffer: Any, output_buffer: Any = None) -> bool:
        if _is_symmetric(input_buffer) or _is_symmetric(output_buffer):
            return False
        return bool(original(self, input_buffer, output_buffer))

    return can_reuse


def _is_symmetric(value: Any) -> bool:
    """Whether a buffer, or a buffer that a scheduler node writes, is symmetric memory."""
    if value is None:
        return False
    outputs = value.get_outputs() if hasattr(value, "get_outputs") else [value]
    return any(
        isinstance(buffer := getattr(output, "node", output), ir.Buffer)
        and isinstance(buffer.get_output_spec(), SymmetricLayout)
        for output in outputs
    )


def _realize(original: Any) -> Any:
    function = original.__func__ if hasattr(original, "__func__") else original

    @functools.wraps(function)
    def maybe_realize(cls: Any, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        return None if is_on() else function(cls, kernel, *args, **kwargs)

    return classmethod(maybe_realize)


def _hash_details(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.symmem = None
        if is_on():
            called = list(operators(args[0] if args else kwargs["gm"]))
            seen.update(op._name for op, _node in called)  # code from a cache is not lowered
            self.symmem = key_of(called)
            # Torch's caches ignore source lines, so the code may come from another program.
            reported = [(_reported_name(op), source_line(node)) for op, node in called]
            _state.lines = [(name, line) for name, line in reported if name is not None]

    return init


def _reported_name(op: OpOverload) -> str | None:
    return op._name if registry.lookup(op) is not None else functional.reported_name(op)


def _post_compile(original: Any) -> Any:
    @functools.wraps(original)
    def post_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = name_in(self.source_code or "")
        with _captured(name is not None):
            result = original(self, *args, **kwargs)
        if name is not None:
            graph, lines = None, getattr(_state, "lines", None)
            if has_memory(self.source_code):
                self.current_callable = bound(self.current_callable)
                graph = self.current_callable.graph
            if lines is None and name not in symmetric_layout.planned:
                lines = []
            report = report_of(name, self.source_code, graph and graph.usage, lines)
            _write(report, graph)
            for listener in tuple(listeners):
                listener(report)
        _state.lines = None
        return result

    return post_compile


@contextlib.contextmanager
def _captured(symmetric: bool) -> Iterator[None]:
    """Note within the block whether the graph that CUDA graphs are made for has symmetric memory."""
    before, _state.captured = getattr(_state, "captured", False), symmetric
    try:
        yield
    finally:
        _state.captured = before


def _cudagraphify(original: Any) -> Any:
    @functools.wraps(original)
    def cudagraphify(model: Any, static_input_idxs: Sequence[int] = (), **options: Any) -> Any:
        if not getattr(_state, "captured", False):
            return original(model, static_input_idxs, **options)
        made: Any = None

        def run(inputs: Any) -> Any:
            nonlocal made
            if made is None:
                # Torch must not copy a symmetric input into the CUDA graph's memory, because peers would not find it
                # there. If the address of a static input changes, torch captures again.
                symmetric = [index for index, value in enumerate(inputs) if running.here.graph.keeps(value)]
                made = original(model, sorted({*static_input_idxs, *symmetric}), **options)
            return made(inputs)

        return run

    return cudagraphify


def _should_partition(original: Any) -> Any:
    @functools.wraps(original)
    def should_partition(self: Any, node: Any) -> Any:
        if getattr(node.node, "symmem_uncaptured", False):
            return "symmem checks this argument at every call, outside of CUDA graphs"
        return original(self, node)

    return should_partition


def _partition_signature(original: Any) -> Any:
    @functools.wraps(original)
    def get_graph_partition_signature(self: Any, partitions: Any, skip_cudagraphs: Any) -> Any:
        # Torch takes the result of a run-time check for an alias of the input. It would therefore count an operator on
        # the result as the last use of the input and pass both, and a CUDA graph would copy the input at every call.
        plan = symmetric_layout.current_plan()
        uncaptured = plan.uncaptured_inputs if plan is not None else set()
        for partition in partitions if uncaptured else ():
            accesses = {dep for node in partition for dep in node.read_writes.reads | node.read_writes.writes}
            used = {dep.name for dep in accesses if not isinstance(dep, WeakDep)}
            unused = uncaptured - {
                self.mutation_real_name.get(name, name) for name in used
            }  # Inductor renames on write
            for node in partition:
                node.last_usage -= unused
        return original(self, partitions, skip_cudagraphs)

    return get_graph_partition_signature


def _write(report: GraphReport, graph: Any) -> None:
    """Append a report to the file of the setting ``compile_report``; with ranks, to that name with ``.rankN`` added.

    Once the function is deleted, and at the latest when the process ends, a line with the usage follows.
    """
    path = load_settings().compile_report
    if path == "off":
        return
    rank = f".rank{dist.get_rank()}" if dist.is_available() and dist.is_initialized() else ""
    _append(path + rank, report.to_json())
    if any(each.number is not None for each in report.decisions):
        weakref.finalize(graph, _append_usage, path + rank, report)


def _append(path: str, line: Mapping[str, Any]) -> None:
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _append_usage(path: str, report: GraphReport) -> None:
    known = report.to_json()
    try:
        _append(path, {"name": known["name"], "usage": known["usage"]})
    except OSError as error:  # a finalizer cannot raise
        log.warning("the usage of graph %s could not be added to the report: %s", report.name, error)


WRAPPED: tuple[tuple[Any, str, tuple[str, ...], Callable[[Any], Any]], ...] = (
    (GraphLowering, "call_function", ("self", "target", "args", "kwargs"), _call_function),
    (GraphLowering, "output", ("self", "target", "args", "kwargs"), _output),
    (AllocateLine, "_codegen_comm_buffer", ("self", "code"), _codegen_comm_buffer),
    (PythonWrapperCodegen, "can_reuse", ("self", "input_buffer", "output_buffer"), _can_reuse),
    (Scheduler, "should_partition", ("self", "node"), _should_partition),
    (
        Scheduler,
        "get_graph_partition_signature",
        ("self", "partitions", "skip_cudagraphs"),
        _partition_signature,
    ),
    (FxGraphHashDetails, "__init__", ("self", "gm", "example_inputs", "fx_kwargs", "inputs_to_check"), _hash_details),
    (CompiledFxGraph, "post_compile", ("self", "example_inputs", "constants", "graph_kwargs"), _post_compile),
)
"""Owner, name, expected parameters, and the function that makes the wrapper from the original."""

OPTIONAL = (
    (ir.FallbackKernel, "_maybe_realize_symm_mem_args", _realize),
    (compile_fx, "cudagraphify", _cudagraphify),
)
"""Owner, name and wrapper function; ignored where torch has no such function."""
