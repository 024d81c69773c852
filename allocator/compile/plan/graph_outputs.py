"""Results of a graph: persistent buffers are not returned, because the next call overwrites them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._inductor import ir
from torch._inductor.virtualized import V

from symmem.compile.plan.symmetric_layout import SymmetricLayout, keeps_outgrown, nbytes_of, root_of

__all__ = ["FRESH_BYTES", "output"]

FRESH_BYTES = 1 << 20
"""Results of this many bytes or more are allocated at every call. Copying is faster for smaller results."""


def output(values: Sequence[Any]) -> list[Any]:
    """The results of a graph; a result in a persistent buffer becomes a copy or gets fresh memory."""
    return [_escaped(value) if isinstance(value, ir.TensorBox | ir.BaseView) else value for value in values]


def _escaped(value: Any) -> Any:
    buffer = root_of(value)
    if not _is_persistent(buffer):
        return value
    spec = buffer.get_output_spec()
    if isinstance(spec, SymmetricLayout) and _is_fresh(buffer, spec):
        spec.escape(buffer.get_name())
        # A view, because Inductor copies results that it takes for its own persistent buffers.
        layout = ir.FixedLayout(value.get_device(), value.get_dtype(), value.get_size(), value.get_stride())
        layout.offset = value.get_layout().offset
        return ir.TensorBox(ir.ReinterpretView(data=ir.StorageBox(buffer), layout=layout))
    return ir.ExternKernel.require_exact_strides(ir.ExternKernel.copy_input(value), value.get_stride())


def _is_fresh(buffer: Any, spec: SymmetricLayout) -> bool:
    """Whether a result is allocated at every call instead of copied."""
    nbytes = nbytes_of([spec.storage_size()], buffer.get_dtype())
    large = nbytes is not None and nbytes >= FRESH_BYTES
    return large and spec.backend is None and not keeps_outgrown(buffer.get_device())


def _is_persistent(buffer: Any) -> bool:
    """Whether a buffer is persistent, or an operator's view of a persistent buffer."""
    if not isinstance(buffer, ir.Buffer):
        return False
    if isinstance(buffer.get_output_spec(), SymmetricLayout):
        return True
    aliased = buffer.get_inputs_that_alias_output()
    return any(_is_persistent(root_of(V.graph.get_buffer(name))) for name in aliased if name in V.graph.name_to_buffer)
