"""What becomes of an operator with registered arguments when Inductor lowers it.

For each tensor among them, the first that holds:

1. Inductor allocates the buffer that it lies in: the buffer gets symmetric memory. No copy.
2. It comes from elsewhere: a graph input, a constant, an operator that makes its own result. Compiled code then looks
   where it lies, and copies what is not symmetric memory into a persistent buffer (``Graph.place``).

Operators with a variant that writes to ``out=`` are called by it, so that Inductor plans what they return as well.
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

from symmem.compile.plan import symmetric_layout  # the former defines operators
from symmem.compile.plan.out_variants import OutCall, out_variant
from symmem.compile.plan.reasons import producer_name, verdict, where
from symmem.compile.plan.symmetric_layout import State, SymmetricLayout, can_place, nbytes_of, root_of
from symmem.compile.report import PLACED, Decision
from symmem.compile.run import calls  # noqa: F401  # the former defines operators
from symmem.compile.run.graph import Argument
from symmem.errors import UnsupportedError
from symmem.ops.engines.select import name_of
from symmem.ops.registry.eager_checks import backend_of
from symmem.ops.registry.registration import Registration

__all__ = ["handler"]

OPS = torch.ops.symmem


def handler(
    known: Registration, target: OpOverload, op: OpOverload, usual: Callable[..., Any] | None
) -> Callable[..., Any]:
    """The lowering of an operator with registered arguments.

    Args:
        known: What is registered for it.
        target: What the graph calls: the operator, or its twin, which returns nothing.
        op: The operator.
        usual: A lowering of its own that it has; None if Inductor calls it as it is.
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


class _Call:
    """One call of an operator with registered arguments."""

    def __init__(self, known: Registration, op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._known, self._op = known, op
        self._args, self._kwargs = list(args), dict(kwargs)
        self._group = name_of(known.group_of(args, kwargs))
        self._backend = backend_of(op.namespace)
        self._state: State = symmetric_layout.state() or symmetric_layout.start(uuid.uuid4().hex[:12])
        self._placed: list[ir.TensorBox] = []
        self._back: list[tuple[ir.TensorBox, ir.TensorBox]] = []
        self._views: dict[Any, tuple[Any, Any, str]] = {}  # of what is looked after: buffer, view and argument

    def place(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of the call, those that are registered in symmetric memory."""
        for name in self._known.args:
            value = self._each(name, self._known.value_of(name, self._args, self._kwargs), name)
            position = self._known.parameters[name].position
            if name in self._kwargs:
                self._kwargs[name] = value
            elif position < len(self._args):
                self._args[position] = value
        return self._args, self._kwargs

    def _each(self, name: str, value: Any, place: str) -> Any:
        if isinstance(value, list | tuple):
            return [self._each(name, each, f"{place}[{index}]") for index, each in enumerate(value)]
        if not isinstance(value, ir.TensorBox):
            return value
        placed = self._one(value, place)
        if placed is not value and self._known.parameters[name].mutated:
            self._back.append((value, placed))
        self._placed.append(placed)
        return placed

    def _one(self, x: Any, place: str) -> Any:
        """One tensor, in symmetric memory."""
        if nbytes_of(x.get_size(), x.get_dtype()) == 0:
            return x
        x = _realized(x)
        buffer = root_of(x)
        spec = buffer.get_output_spec() if isinstance(buffer, ir.Buffer) else None
        if isinstance(spec, SymmetricLayout):
            if spec.backend == self._backend and spec.join(self._group):
                self._note(x, buffer, place, PLACED, "its buffer lies in symmetric memory already")
                return x
        elif self._can_be_placed(buffer):
            buffer.layout = SymmetricLayout(spec, self._group, self._backend)
            self._note(x, buffer, place, PLACED, f"{producer_name(buffer)} writes straight to it")
            return x
        return self._looked_after(x, buffer, place)

    def _can_be_placed(self, buffer: Any) -> bool:
        """Whether Inductor can allocate a buffer in symmetric memory; :func:`.reasons.verdict` says why not."""
        usual = not (V.graph.cpp_wrapper or inductor.memory_planning or self._known.one_sided)
        return usual and can_place(buffer)

    def _looked_after(self, x: Any, buffer: Any, place: str) -> Any:
        """What is decided at run time: see :meth:`symmem.compile.run.graph.Graph.place`."""
        name = buffer.get_name() if isinstance(buffer, ir.Buffer) else x.get_name()
        found = verdict(buffer, self._known.one_sided)
        seen = tuple(x.get_size()), tuple(x.get_stride()), x.get_layout().offset, x.get_dtype()
        key = (V.graph, name, *seen, self._group, self._backend, found.way)
        if self._known.mutated and key not in self._views:
            self._check_apart(x, buffer, place)
        known, memo = key in self._views, self._state.memo.get(key)
        self._views[key] = buffer, x, place
        # Within a call, an argument that is passed twice is one, whatever was written to it before.
        if memo is not None and (known or name not in V.graph.mutated_buffers):
            self._note(x, memo[0], place, memo[1], "the same as for another operator of this graph")
            return memo[0]
        described, keep = f"{self._known.op}: the argument {place!r}", symmetric_layout.keeps(x.get_device())
        argument = Argument(self._state.next_number(), self._group, self._backend, found.way, keep, described)
        kernel, placed = _kernel(OPS._place.default, x, self._state.name, *argument)
        placed.data.data.codegen_size_asserts = lambda wrapper: None  # it has those of x, or is x
        V.graph.unaligned_buffers.add(placed.get_name())  # as x may be
        # Where it lies may change: CUDA graphs are captured without the look.
        kernel.symmem_apart = found.way in ("agree", "strict")
        if kernel.symmem_apart and name in V.graph.graph_inputs:
            self._state.apart.add(name)

        def code(args: Sequence[str]) -> str:
            record = symmetric_layout.declare("symmem.compile.run.graph", f"symmem_{argument.number}", repr(argument))
            shape = symmetric_layout.shape_of(x)
            return f"{kernel.get_name()} = {symmetric_layout.emit_header()}.place({record}, {args[0]}, {shape})"

        _write_as(kernel, code)
        self._note(x, placed, place, found.outcome, found.why, found.advice)
        self._state.memo[key] = placed, found.outcome
        return placed

    def _check_apart(self, x: Any, buffer: Any, place: str) -> None:
        """Raise if an argument shares memory with another one of the call: one of them would be written to a copy.

        Raises:
            UnsupportedError: It does, as far as is known when it is compiled.
        """
        for other, view, name in self._views.values():
            if other is buffer and _overlap(x, view):
                raise UnsupportedError(
                    f"{self._known.op} writes to arguments, and {name!r} and {place!r} share memory that is not "
                    "symmetric: each would be copied",
                    hint="pass a tensor in symmetric memory, or one that the compiled function makes",
                    step=self._known.op,
                )

    def _note(self, x: ir.TensorBox, buffer: Any, place: str, outcome: str, why: str, advice: str = "") -> None:
        nbytes = nbytes_of(x.get_size(), x.get_dtype())
        if outcome == PLACED:
            nbytes = nbytes_of([buffer.get_layout().storage_size()], x.get_dtype())
        self._state.decisions.append(
            Decision(
                op=self._known.op,
                argument=place,
                outcome=outcome,
                buffer=buffer.get_name(),
                group=self._group,
                shape=tuple(map(str, x.get_size())),
                dtype=str(x.get_dtype()).removeprefix("torch."),
                nbytes=nbytes,
                why=why,
                advice=advice,
                where=where(),
                barrier=self._needs_barrier(),
            )
        )

    def _needs_barrier(self) -> bool:
        return not (self._known.exit_barrier or self._known.one_sided)

    def finish(self) -> None:
        """What comes after the operator: a barrier if it has none at its end, and writing back."""
        if self._needs_barrier() and self._placed:
            number = self._state.next_number()
            kernel, _nothing = _kernel(OPS._finish.default, list(self._placed), self._state.name, number, self._group)
            _write_as(
                kernel,
                lambda args: f"{symmetric_layout.emit_header()}.finish({number}, {args[0]}, {args[3]})",
            )
        if self._back:
            originals, placed = map(list, zip(*self._back, strict=True))
            kernel, _nothing = _kernel(OPS._write_back.default, originals, placed, self._known.op)
            _write_as(
                kernel,
                lambda args: f"{symmetric_layout.imported('symmem.compile.run.calls')}.write_back({', '.join(args)})",
            )


def _realized(x: Any) -> Any:
    """A tensor that has an address: views that no strides can express are copied, and so is what overlaps itself."""
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
    """Whether no two elements share memory: each dimension steps over all that the smaller steps reach.

    Of shapes that are not known yet, what they are in the call that is compiled for.
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
    for each in (x, y):
        begin, extent = each.get_layout().offset, 1
        for size, stride in zip(each.get_size(), each.get_stride(), strict=True):
            extent = extent + (size - 1) * stride
        spans.append((begin, begin + extent))
    (begin, end), (other_begin, other_end) = spans
    apart = V.graph.sizevars.statically_known_leq
    return not (apart(end, other_begin) or apart(other_end, begin))


def _kernel(op: OpOverload, *args: Any) -> tuple[Any, Any]:
    """Call one of our operators in the graph; the node that calls it, and what it returns."""
    made = ir.FallbackKernel.create(op, *args)
    if made is None:
        return V.graph.operations[-1], None
    # Until torch 2.14 the node is one, and its only output another.
    return made.inputs[0] if isinstance(made, ir.MultiOutput) else made, ir.TensorBox.create(made)


def _write_as(kernel: Any, code: Callable[[Sequence[str]], str]) -> None:
    """Let generated Python call a function of the runtime itself, which takes a part of the time of an operator.

    Args:
        kernel: Which calls the operator.
        code: The line, of the operator's arguments.
    """
    if V.graph.cpp_wrapper:
        return

    def codegen(wrapper: Any) -> None:
        wrapper.writeline(code([*kernel.codegen_args(), *kernel.codegen_kwargs()]))

    kernel.codegen = codegen
