"""What a graph returns: persistent buffers are overwritten by the next call, and so are not handed out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._inductor import ir
from torch._inductor.virtualized import V

from symmem.compile.plan.symmetric_layout import SymmetricLayout, keeps, nbytes_of, root_of

__all__ = ["ANEW", "output"]

ANEW = 1 << 20
"""Bytes from which on a buffer that a graph returns is allocated at each call. Smaller ones take less time to copy."""


def output(values: Sequence[Any]) -> list[Any]:
    """What a graph returns, copied where it lies in a persistent buffer, which the next call overwrites."""
    return [_escaped(each) if isinstance(each, ir.TensorBox | ir.BaseView) else each for each in values]


def _escaped(value: Any) -> Any:
    buffer = root_of(value)
    if not _is_persistent(buffer):
        return value
    spec = buffer.get_output_spec()
    if isinstance(spec, SymmetricLayout) and _is_allocated_anew(buffer, spec):
        spec.escape(buffer.get_name())
        # As a view: Inductor copies what it takes for one of its own persistent buffers.
        made = ir.FixedLayout(value.get_device(), value.get_dtype(), value.get_size(), value.get_stride())
        made.offset = value.get_layout().offset
        return ir.TensorBox(ir.ReinterpretView(data=ir.StorageBox(buffer), layout=made))
    return ir.ExternKernel.require_exact_strides(ir.ExternKernel.copy_input(value), value.get_stride())


def _is_allocated_anew(buffer: Any, spec: SymmetricLayout) -> bool:
    """Whether to allocate a buffer that is returned at each call, instead of copying it: that takes time of its own."""
    nbytes = nbytes_of([spec.storage_size()], buffer.get_dtype())
    return spec.backend is None and nbytes is not None and nbytes >= ANEW and not keeps(buffer.get_device())


def _is_persistent(buffer: Any) -> bool:
    """Whether a buffer is one of the persistent ones, or an operator's view of one."""
    if not isinstance(buffer, ir.Buffer):
        return False
    if isinstance(buffer.get_output_spec(), SymmetricLayout):
        return True
    aliased = buffer.get_inputs_that_alias_output()
    return any(_is_persistent(root_of(V.graph.get_buffer(name))) for name in aliased if name in V.graph.name_to_buffer)
