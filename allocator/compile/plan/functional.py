"""Functional collectives, ``torch.ops._c10d_functional``, that symmem's operators run.

Inductor's nodes stay, so that its passes see the collective and its ``wait_tensor`` as two nodes, as ever. Only the
generated code of the collective differs: it calls :func:`symmem.distributed.functional.collective`. A form that returns
a new tensor becomes a node per tensor, and Inductor allocates its result. The operators take any memory, so inputs stay
where they are.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.virtualized import V
from torch._ops import OpOverload
from torch.utils._sympy.symbol import SymT, symbol_is_type

from symmem.compile.plan import symmetric_layout
from symmem.compile.plan.reasons import source_line
from symmem.compile.plan.symmetric_layout import declare, emit_header, nbytes_of
from symmem.compile.report import LEFT, SERVED, Decision
from symmem.distributed.functional import base_name, group_asked, obstacle
from symmem.distributed.methods import FUNCTIONAL
from symmem.group.group import Group

__all__ = ["lowering", "reported_name"]

_NAMESPACE = "_c10d_functional"


def reported_name(op: OpOverload) -> str | None:
    """The name of a functional collective in reports, the same for all its forms; None for other operators."""
    base = base_name(op._opname)
    return f"{_NAMESPACE}::{base}" if op.namespace == _NAMESPACE and base in FUNCTIONAL else None


def lowering(op: OpOverload, usual: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The lowering of a functional collective; None if symmem is not asked to run it.

    Args:
        op: An operator with a :func:`reported_name`.
        usual: Inductor's lowering.
        args: Its positional arguments in the graph.
        kwargs: Its keyword arguments in the graph.
    """
    group = group_asked(_by_name(op, args, kwargs)["group_name"])
    if group is None or V.graph.cpp_wrapper:
        return None
    return lambda *args, **kwargs: _Collective(op, group, _by_name(op, args, kwargs)).lower(usual, args, kwargs)


def _by_name(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, in the order of the schema."""
    names = [argument.name for argument in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: given[name] for name in names}


class _Collective:
    """One functional collective.

    Args:
        op: The operator.
        group: Its group.
        given: Its arguments by name.
    """

    def __init__(self, op: OpOverload, group: Group, given: Mapping[str, Any]) -> None:
        self._op, self._base, self._group = op, base_name(op._opname), group
        (self._argument, x), *rest = given.items()
        self._inputs: list[Any] = list(x) if isinstance(x, list | tuple) else [x]
        self._rest = [value for name, value in rest if name != "out"]
        self._reduction: str | None = given.get("reduce_op")
        self._plan = symmetric_layout.current_plan() or symmetric_layout.begin_plan(uuid.uuid4().hex[:12])
        self._call = self._plan.next_call()

    def lower(self, usual: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Add the nodes, and return the results."""
        why = next(filter(None, map(self._obstacle, self._inputs)), "")
        if not why and not self._op._schema.is_mutable:
            results = [self._new(x) for x in self._inputs]
            return results if "coalesced" in self._op._opname else results[0]
        before = len(V.graph.operations)
        result = usual(*args, **kwargs)
        kernels: list[Any] = [node for node in V.graph.operations[before:] if isinstance(node, ir._CollectiveKernel)]
        if len(kernels) != 1:
            why = why or "Inductor's own choice (_collective.auto_select)"
        for x in self._inputs:
            self._note(x, kernels[0].get_name() if kernels else x.get_name(), why)
        if why:
            for kernel in kernels:
                _report_with(kernel)
        else:
            self._write_calls(kernels[0])
        return result

    def _obstacle(self, x: Any) -> str:
        """Why symmem does not run the collective for a tensor; empty if it does."""
        if self._base == "all_to_all_single" and any(map(_is_from_data, [*self._rest[0], *self._rest[1]])):
            return "sizes of parts that depend on data"
        nbytes = nbytes_of(x.get_size(), x.get_dtype()) or 0
        if self._base == "all_gather_into_tensor":
            nbytes *= self._group.size
        return obstacle(self._base, self._reduction, x.get_device().type, x.get_dtype(), nbytes)

    def _new(self, x: Any) -> ir.TensorBox:
        """Add a node with a new result for one tensor."""
        if self._base not in ("all_reduce", "broadcast"):
            x = ir.ExternKernel.require_contiguous(x)
        single = getattr(torch.ops._c10d_functional, self._base).default
        kernel: Any = ir._CollectiveKernel.create_out_of_place(single, x, *self._rest)
        kernel.should_allocate = lambda: True
        self._note(x, kernel.get_name(), "")

        def codegen(wrapper: Any) -> None:
            kernel.codegen_comment(wrapper)
            (source,), name = kernel.inputs, kernel.get_name()
            given = [source.codegen_reference(), name]
            rest = self._rest
            if self._base == "all_to_all_single":
                given += [wrapper.codegen_python_shape_tuple(sizes) for sizes in rest[:2]]
                rest = rest[2:]
            wrapper.writeline(f"{name} = {_function(self._base, rest)}({', '.join(given)})")

        kernel.codegen = codegen
        result: ir.TensorBox = ir.TensorBox.create(kernel)
        return result

    def _write_calls(self, kernel: Any) -> None:
        """Let the node of an in-place form, or of one with ``out=``, call symmem."""
        name = self._op._opname.replace("_coalesced", "")

        def codegen(wrapper: Any) -> None:
            kernel.codegen_comment(wrapper)
            places = [node.codegen_reference() for node in kernel.inputs]
            pairs = [places] if name.endswith("_out") else [(place, place) for place in places]
            for x, out in pairs:
                wrapper.writeline(f"{_function(name, self._rest)}({x}, {out})")

        kernel.codegen = codegen

    def _note(self, x: Any, buffer: str, why: str) -> None:
        self._plan.decisions.append(
            Decision(
                op=f"{_NAMESPACE}::{self._base}",
                argument=self._argument,
                outcome=LEFT if why else SERVED,
                buffer=buffer,
                group=self._group.name,
                shape=tuple(map(str, x.get_size())),
                dtype=str(x.get_dtype()).removeprefix("torch."),
                nbytes=nbytes_of(x.get_size(), x.get_dtype()),
                why=why or f"symmem::{FUNCTIONAL[self._base].operator}",
                where=source_line(V.graph.current_node),
                call=self._call,
            )
        )


def _is_from_data(size: Any) -> bool:
    return any(symbol_is_type(symbol, SymT.UNBACKED_INT) for symbol in getattr(size, "free_symbols", ()))


def _function(name: str, rest: Sequence[Any]) -> str:
    """The name of the function in generated code that runs a functional collective with these arguments."""
    emit_header()
    known = ", ".join(map(repr, (name, *rest)))
    digest = hashlib.sha256(known.encode()).hexdigest()[:12]
    return declare("symmem.distributed.functional", f"symmem_{name}_{digest}", f"collective({known})")


def _report_with(kernel: Any) -> None:
    """Write the decisions into the generated code, with the code of a node that stays as it is."""
    usual = kernel.codegen

    def codegen(wrapper: Any) -> None:
        emit_header()
        usual(wrapper)

    kernel.codegen = codegen
