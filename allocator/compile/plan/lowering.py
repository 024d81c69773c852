"""Lowering of operators with registered arguments.

For every registered tensor, the first rule that applies decides:

1. Inductor allocates its buffer: the buffer gets symmetric memory, and there is no copy.
2. It comes from elsewhere, for example a graph input, a constant, or an operator that allocates its own result.
   Compiled code then checks it at run time, and copies plain memory into a persistent buffer (``Graph.place``).

Operators with a variant that writes to ``out=`` are called through it, so that Inductor plans their results too.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.lowering import clone, fallback_handler
from torch._inductor.virtualized import V
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from symmem.compile.plan import symmetric_layout
from symmem.compile.plan.out_variants import OutCall, out_variant
from symmem.compile.plan.reasons import copied_back, producer_name, source_line, verdict
from symmem.compile.plan.symmetric_layout import GraphPlan, SymmetricLayout, can_place, nbytes_of, root_of
from symmem.compile.records import ArgumentRecord
from symmem.compile.report import PLACED, Decision
from symmem.errors import UnsupportedError
from symmem.group.resolve import name_of
from symmem.ops.registry.eager_checks import backend_of
from symmem.ops.registry.registration import Registration

__all__ = ["handler"]

OPS = torch.ops.symmem


def handler(
    known: Registration, target: OpOverload, op: OpOverload, usual: Callable[..., Any] | None
) -> Callable[..., Any]:
    """The lowering of an operator with registered arguments.

    Args:
        known: The operator's registration.
        target: The operator that the graph calls: ``op``, or its mutable-op wrapper, which returns nothing.
        op: The operator.
        usual: The operator's custom lowering; None if Inductor calls the operator itself.
    """

    def lowered(*args: Any, **kwargs: Any) -> Any:
        call = _Call(known, op, args, kwargs)
        placed, kwargs = call.place()
        if usual is not None:
            result = usual(*placed, **kwargs)
        elif (out := out_variant(op)) is not None and not V.graph.cpp_wrapper:
            result = OutCall.make(op, out, placed, kwargs)
        else:
            fallback: Any = fallback_handler
            result = fallback(target, add_to_fallback_set=False)(*placed, **kwargs)
            if target is not op:
                kernel: Any = V.graph.operations[-1]
                kernel.python_kernel_name = f"torch.ops.{op}"
        call.finish()
        return result

    return lowered


def _device_type(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The type of the device of an operator's tensors."""
    values = tree_leaves((args, kwargs))
    devices = (value.get_device() for value in values if isinstance(value, ir.TensorBox))
    return next((device.type for device in devices if device is not None), "cpu")


class _Call:
    """One call of an operator with registered arguments."""

    def __init__(self, known: Registration, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._known, self._op = known, op
        self._args, self._kwargs = list(args), dict(kwargs)
        self._group = name_of(known.group_of(args, kwargs))
        self._backend = backend_of(op.namespace, _device_type(args, kwargs))
        self._plan: GraphPlan = symmetric_layout.current_plan() or symmetric_layout.begin_plan(uuid.uuid4().hex[:12])
        self._number = self._plan.next_call()
        self._placed: list[ir.TensorBox] = []
        self._mutated: list[tuple[ir.TensorBox, ir.TensorBox]] = []  # originals and their copies
        self._checked: dict[Any, tuple[Any, Any, str]] = {}  # run-time checks by key: buffer, view and argument

    def place(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of the call, with the registered ones in symmetric memory."""
        for name in self._known.args:
            value = self._place_value(name, self._known.value_of(name, self._args, self._kwargs), name)
            position = self._known.parameters[name].position
            if name in self._kwargs:
                self._kwargs[name] = value
            elif position < len(self._args):
                self._args[position] = value
        return self._args, self._kwargs

    def _place_value(self, name: str, value: Any, label: str) -> Any:
        if isinstance(value, list | tuple):
            return [self._place_value(name, item, f"{label}[{index}]") for index, item in enumerate(value)]
        if not isinstance(value, ir.TensorBox):
            return value
        placed = self._place_tensor(value, label)
        if placed is not value and self._known.parameters[name].mutated:
            self._mutated.append((value, placed))
        self._placed.append(placed)
        return placed

    def _place_tensor(self, x: Any, label: str) -> Any:
        if nbytes_of(x.get_size(), x.get_dtype()) == 0:
            return x
        x = _realized(x)
        buffer = root_of(x)
        spec = buffer.get_output_spec() if isinstance(buffer, ir.Buffer) else None
        if isinstance(spec, SymmetricLayout):
            if spec.backend == self._backend and spec.join(self._group):
                self._note(x, buffer, label, PLACED, "its buffer is already in symmetric memory")
                return x
        elif self._can_be_placed(buffer):
            buffer.layout = SymmetricLayout(spec, self._group, self._backend)
            self._note(x, buffer, label, PLACED, f"{producer_name(buffer)} writes straight to it")
            return x
        return self._check_at_run_time(x, buffer, label)

    def _can_be_placed(self, buffer: Any) -> bool:
        """Whether Inductor can allocate a buffer in symmetric memory. If not, :func:`.reasons.verdict` says why."""
        supported = not (V.graph.cpp_wrapper or inductor.memory_planning or self._known.one_sided)
        return supported and can_place(buffer)

    def _check_at_run_time(self, x: Any, buffer: Any, label: str) -> Any:
        """Let the runtime decide about an argument: see :meth:`symmem.compile.run.graph.Graph.place`."""
        name = buffer.get_name() if isinstance(buffer, ir.Buffer) else x.get_name()
        decision = verdict(buffer, self._known.one_sided)
        view = tuple(x.get_size()), tuple(x.get_stride()), x.get_layout().offset, x.get_dtype()
        key = (V.graph, name, *view, self._group, self._backend, decision.policy)
        if self._known.mutated and key not in self._checked:
            self._check_no_overlap(x, buffer, label)
        repeated, memo = key in self._checked, self._plan.memo.get(key)
        self._checked[key] = buffer, x, label
        # An argument that is passed twice in one call stays one tensor, even if an earlier operator wrote to it.
        if memo is not None and (repeated or name not in V.graph.mutated_buffers):
            self._note(x, memo[0], label, memo[1], "as for an earlier operator of this graph", number=memo[2])
            return memo[0]
        described, keep = f"{self._known.op}: the argument {label!r}", symmetric_layout.keeps_outgrown(x.get_device())
        number = self._plan.next_number()
        record = ArgumentRecord(number, self._group, self._backend, decision.policy, keep, described)
        kernel, placed = _kernel(OPS._place.default, x, self._plan.name, *record)
        placed.data.data.codegen_size_asserts = lambda wrapper: None  # x has them already
        V.graph.unaligned_buffers.add(placed.get_name())  # x may be unaligned
        # The result of the check may change from call to call, so CUDA graphs are captured without it.
        kernel.symmem_uncaptured = decision.policy in ("agree", "strict")
        if kernel.symmem_uncaptured and name in V.graph.graph_inputs:
            self._plan.uncaptured_inputs.add(name)

        def code(args: Sequence[str]) -> str:
            variable, shape = symmetric_layout.declare_record(record), symmetric_layout.shape_of(x)
            return f"{kernel.get_name()} = {symmetric_layout.emit_header()}.place({variable}, {args[0]}, {shape})"

        _write_as(kernel, code)
        self._note(x, placed, label, decision.outcome, decision.why, decision.advice, number)
        self._plan.memo[key] = placed, decision.outcome, number
        return placed

    def _check_no_overlap(self, x: Any, buffer: Any, label: str) -> None:
        """Raise if two arguments of the call share memory, because the operator would write to separate copies.

        Raises:
            UnsupportedError: The arguments may share memory, as far as the compiler can tell.
        """
        for other, view, other_label in self._checked.values():
            if other is buffer and _overlap(x, view):
                raise UnsupportedError(
                    f"{self._known.op} writes to its arguments, and {other_label!r} and {label!r} share memory that is "
                    "not symmetric: each of them would be copied",
                    hint="pass a tensor in symmetric memory, or a tensor that the compiled function makes",
                    step=self._known.op,
                )

    def _note(
        self,
        x: ir.TensorBox,
        buffer: Any,
        label: str,
        outcome: str,
        why: str,
        advice: str = "",
        number: int | None = None,
    ) -> None:
        nbytes = nbytes_of(x.get_size(), x.get_dtype())
        back = 0
        if outcome == PLACED:
            nbytes = nbytes_of([buffer.get_layout().storage_size()], x.get_dtype())
            if self._known.parameters[label.partition("[")[0]].mutated:
                back = copied_back(self._known.value_of, label)
                advice = "write to the input outside of the compiled function" if back else ""
        self._plan.decisions.append(
            Decision(
                op=self._known.op,
                argument=label,
                outcome=outcome,
                buffer=buffer.get_name(),
                group=self._group,
                shape=tuple(map(str, x.get_size())),
                dtype=str(x.get_dtype()).removeprefix("torch."),
                nbytes=nbytes,
                why=why,
                advice=advice,
                where=source_line(V.graph.current_node),
                barrier=self._needs_barrier(),
                call=self._number,
                number=number,
                copied_back=back,
            )
        )

    def _needs_barrier(self) -> bool:
        return not (self._known.exit_barrier or self._known.one_sided)

    def finish(self) -> None:
        """Add the barrier and the write-back that follow the operator, if they are needed."""
        if self._needs_barrier() and self._placed:
            number = self._plan.next_number()
            kernel, _nothing = _kernel(OPS._finish.default, list(self._placed), self._plan.name, number, self._group)
            _write_as(
                kernel,
                lambda args: f"{symmetric_layout.emit_header()}.finish({number}, {args[0]}, {args[3]})",
            )
        if self._mutated:
            originals, placed = map(list, zip(*self._mutated, strict=True))
            kernel, _nothing = _kernel(OPS._write_back.default, originals, placed, self._known.op)
            _write_as(
                kernel,
                lambda args: f"{symmetric_layout.imported('symmem.compile.run.calls')}.write_back({', '.join(args)})",
            )


def _realized(x: Any) -> Any:
    """Give a tensor an address. Tensors that overlap themselves, and views without strides, are copied."""
    x.realize()
    found: Any = ir.ExternKernel.realize_input(x)
    if not isinstance(found, ir.TensorBox):
        found = ir.TensorBox(found)
    if not _is_dense(found):
        found = clone(found, memory_format=torch.contiguous_format)
        found.realize()
        found.freeze_layout()
    if ir.is_storage_and_layout(found):
        ir.as_storage_and_layout(found, freeze=True)
    return found


def _is_dense(x: ir.TensorBox) -> bool:
    """Whether no two elements share memory: every dimension steps over the extent of all smaller steps.

    Dynamic sizes count as in the example call.
    """
    hint = V.graph.sizevars.optimization_hint
    reached = 0
    for stride, size in sorted(
        (hint(stride), hint(size)) for stride, size in zip(x.get_stride(), x.get_size(), strict=True)
    ):
        if size > 1 and stride <= reached:
            return False
        reached += (size - 1) * stride
    return True


def _overlap(x: Any, y: Any) -> bool:
    """Whether two views of a buffer may have an element in common."""
    spans = []
    for view in (x, y):
        begin, extent = view.get_layout().offset, 1
        for size, stride in zip(view.get_size(), view.get_stride(), strict=True):
            extent = extent + (size - 1) * stride
        spans.append((begin, begin + extent))
    (begin, end), (other_begin, other_end) = spans
    at_most = V.graph.sizevars.statically_known_leq
    return not (at_most(end, other_begin) or at_most(other_end, begin))


def _kernel(op: OpOverload, *args: Any) -> tuple[Any, Any]:
    """Call one of symmem's operators in the graph; returns its node and its result."""
    made = ir.FallbackKernel.create(op, *args)
    if made is None:
        return V.graph.operations[-1], None
    # In older torch, up to 2.13 or 2.14, the single output is a separate node.
    return made.inputs[0] if isinstance(made, ir.MultiOutput) else made, ir.TensorBox.create(made)


def _write_as(kernel: Any, code: Callable[[Sequence[str]], str]) -> None:
    """Let generated Python call a function of the runtime directly, because a call of an operator takes longer.

    Args:
        kernel: The node that calls the operator.
        code: Makes the line of code from the operator's arguments.
    """
    if V.graph.cpp_wrapper:
        return

    def codegen(wrapper: Any) -> None:
        wrapper.writeline(code([*kernel.codegen_args(), *kernel.codegen_kwargs()]))

    kernel.codegen = codegen
