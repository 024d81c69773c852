"""Calls of operators through their variant with ``out=``, so that Inductor allocates the results."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.utils import convert_shape_to_inductor
from torch._inductor.virtualized import V
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from symmem.compile.plan.symmetric_layout import declare
from symmem.group.resolve import group_named
from symmem.ops.collectives import KINDS
from symmem.ops.registry.built_in import OWN_NAMESPACE

__all__ = ["OutCall", "out_variant"]


@functools.cache
def out_variant(op: OpOverload) -> OpOverload | None:
    """The variant of an operator that writes its result to an argument ``out``; None if there is none.

    The variant is an overload of ``op``, or an operator with the same name and the suffix ``_out``. Its schema must
    have the same arguments, with the same names and types, and one more tensor ``out`` that it writes to. Operators
    that return several tensors or write to their arguments have no variant.
    """
    schema = op._schema
    if schema.is_mutable or len(schema.returns) != 1 or schema.returns[0].type.kind() != "TensorType":
        return None
    if schema.returns[0].alias_info is not None or op.namespace == "aten":
        return None
    name = schema.name.partition("::")[2]
    namespace = getattr(torch.ops, op.namespace)
    packets = [getattr(namespace, packet, None) for packet in (name, f"{name}_out")]
    for packet in packets:
        for overload in packet.overloads() if packet is not None else ():
            found: OpOverload = getattr(packet, overload)
            if found is not op and _is_variant(schema, found._schema):
                return found
    return None


def _is_variant(schema: Any, other: Any) -> bool:
    arguments = {argument.name: argument for argument in other.arguments}
    out = arguments.pop("out", None)
    if out is None or out.type.kind() != "TensorType" or out.alias_info is None or not out.alias_info.is_write:
        return False
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments.values()):
        return False
    wanted = {argument.name: str(argument.type) for argument in schema.arguments}
    return {name: str(argument.type) for name, argument in arguments.items()} == wanted and len(other.returns) <= 1


class OutCall(ir.ExternKernelOut):
    """A call of an operator with ``out=``. All arguments are passed by name, because their order may differ."""

    _op: OpOverload
    _values: Any

    @classmethod
    def make(cls, op: OpOverload, out: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ir.TensorBox:
        """Call ``out`` in the graph instead of ``op``.

        Args:
            op: The operator that returns a new tensor.
            out: Its variant that writes to ``out``.
            args: Positional arguments for ``op``.
            kwargs: Keyword arguments for ``op``.
        """
        names = [argument.name for argument in op._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        with V.graph.fake_mode:
            processed = ir.FallbackKernel.process_kernel(op, **given)
        # A tuple in older torch, an object since torch 2.14 or 2.15.
        example, inputs = (
            processed[:2] if isinstance(processed, tuple) else (processed.example_output, processed.tensor_args)
        )
        # The sizes and strides that the operator itself would return.
        made = ir.FixedLayout(
            example.device,
            example.dtype,
            convert_shape_to_inductor(example.size()),
            convert_shape_to_inductor(example.stride()),
        )
        node = cls(layout=made, inputs=list(inputs), python_kernel_name=str(out), op_overload=out)
        node._op, tensors = op, iter(node.inputs)
        flat, spec = pytree.tree_flatten(given)
        node._values = [next(tensors) if isinstance(value, ir.IRNode) else value for value in flat], spec
        return ir.TensorBox.create(node)

    def codegen(self, wrapper: Any) -> None:
        """Write the call into the generated code."""
        self.codegen_comment(wrapper)
        flat, spec = self._values
        shown = [_Code(value.codegen_reference()) if isinstance(value, ir.IRNode) else value for value in flat]
        given = pytree.tree_unflatten(shown, spec)
        show: Any = V.graph.wrapper_code.val_to_arg_str
        if self._op.namespace == OWN_NAMESPACE and self._op._opname in KINDS:
            x, *options, group = (given[argument.name] for argument in self._op._schema.arguments)
            target = _collective(self._op._opname, group, options)
            wrapper.writeline(f"{target}({show(x)}, {self.codegen_reference()})")
        else:
            args = [f"{name}={show(value)}" for name, value in given.items()]
            wrapper.writeline(f"torch.ops.{self.op_overload}({', '.join(args)}, out={self.codegen_reference()})")


def _collective(operation: str, group: str, options: Sequence[Any]) -> str:
    """The name of a function in generated code that calls one of symmem's operators past the dispatcher.

    All calls that differ only in their tensors share the function.
    """
    known = ", ".join(map(repr, (operation, group, group_named(group).size, *options)))
    name = hashlib.sha256(known.encode()).hexdigest()[:12]
    return declare("symmem.compile.run.calls", f"symmem_{operation}_{name}", f"collective({known})")


class _Code:
    """An object with given code as its ``repr``."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __repr__(self) -> str:
        return self._code
