"""Operators by their variant with ``out=``, so that Inductor allocates what they return."""

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
from symmem.ops.collectives import KINDS
from symmem.ops.engines.select import group_named
from symmem.ops.registry.built_in import OWN_NAMESPACE

__all__ = ["OutCall", "out_variant"]


@functools.cache
def out_variant(op: OpOverload) -> OpOverload | None:
    """The operator that does the same as ``op`` and writes to an argument ``out``; None if there is none.

    It is an overload of ``op``, or is called like it with ``_out`` behind. Its schema decides, not its name: the same
    arguments, of the same names and types, and one more tensor that it writes to, called ``out``. Operators that
    return several tensors, or write to their arguments, have none.
    """
    schema = op._schema
    if schema.is_mutable or len(schema.returns) != 1 or schema.returns[0].type.kind() != "TensorType":
        return None
    if schema.returns[0].alias_info is not None or op.namespace == "aten":
        return None
    name = schema.name.partition("::")[2]
    namespace = getattr(torch.ops, op.namespace)
    packets = [getattr(namespace, each, None) for each in (name, f"{name}_out")]
    for packet in packets:
        for overload in packet.overloads() if packet is not None else ():
            found: OpOverload = getattr(packet, overload)
            if found is not op and _does_the_same(schema, found._schema):
                return found
    return None


def _does_the_same(schema: Any, other: Any) -> bool:
    known = {each.name: each for each in other.arguments}
    out = known.pop("out", None)
    if out is None or out.type.kind() != "TensorType" or out.alias_info is None or not out.alias_info.is_write:
        return False
    if any(each.alias_info is not None and each.alias_info.is_write for each in known.values()):
        return False
    wanted = {each.name: each for each in schema.arguments}
    return {name: str(each.type) for name, each in wanted.items()} == {
        name: str(each.type) for name, each in known.items()
    } and len(other.returns) <= 1


class OutCall(ir.ExternKernelOut):
    """A call of an operator with ``out=``; all arguments go by name, since their order may differ."""

    _op: OpOverload
    _values: Any

    @classmethod
    def make(cls, op: OpOverload, out: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ir.TensorBox:
        """Call ``out`` in the graph in the place of ``op``.

        Args:
            op: Which returns a new tensor.
            out: Which writes to ``out``.
            args: As ``op`` takes them.
            kwargs: As ``op`` takes them.
        """
        names = [each.name for each in op._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        with V.graph.fake_mode:
            processed = ir.FallbackKernel.process_kernel(op, **given)
        # A tuple until torch 2.14, then an object.
        example, inputs = (
            processed[:2] if isinstance(processed, tuple) else (processed.example_output, processed.tensor_args)
        )
        # Sizes and strides as the operator itself would return them.
        made = ir.FixedLayout(
            example.device,
            example.dtype,
            convert_shape_to_inductor(example.size()),
            convert_shape_to_inductor(example.stride()),
        )
        node = cls(layout=made, inputs=list(inputs), python_kernel_name=str(out), op_overload=out)
        node._op, tensors = op, iter(node.inputs)
        flat, spec = pytree.tree_flatten(given)
        node._values = [next(tensors) if isinstance(each, ir.IRNode) else each for each in flat], spec
        return ir.TensorBox.create(node)

    def codegen(self, wrapper: Any) -> None:
        """Write the call."""
        self.codegen_comment(wrapper)
        flat, spec = self._values
        shown = [_Shown(each.codegen_reference()) if isinstance(each, ir.IRNode) else each for each in flat]
        given = pytree.tree_unflatten(shown, spec)
        show: Any = V.graph.wrapper_code.val_to_arg_str
        if self._op.namespace == OWN_NAMESPACE and self._op._opname in KINDS:
            x, *options, group = (given[each.name] for each in self._op._schema.arguments)
            target = _collective(self._op._opname, group, options)
            wrapper.writeline(f"{target}({show(x)}, {self.codegen_reference()})")
        else:
            args = [f"{name}={show(value)}" for name, value in given.items()]
            wrapper.writeline(f"torch.ops.{self.op_overload}({', '.join(args)}, out={self.codegen_reference()})")


def _collective(operation: str, group: str, options: Sequence[Any]) -> str:
    """What calls one of our own operators past the dispatcher, one for all calls that differ in tensors alone."""
    known = ", ".join(map(repr, (operation, group, group_named(group).size, *options)))
    name = hashlib.sha256(known.encode()).hexdigest()[:12]
    return declare("symmem.compile.run.calls", f"symmem_{operation}_{name}", f"collective({known})")


class _Shown:
    """A piece of code, where values are shown by their repr."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __repr__(self) -> str:
        return self._code
