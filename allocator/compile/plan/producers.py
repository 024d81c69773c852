"""Operators that allocate their own result, and feed an operator with registered arguments."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler
from torch._inductor.utils import convert_shape_to_inductor
from torch._inductor.virtualized import V
from torch._ops import OpOverload

from symmem.compile.plan import symmetric_layout
from symmem.compile.plan.mutable_ops import original_of
from symmem.compile.plan.out_variants import OutCall, out_variant
from symmem.compile.plan.symmetric_layout import nbytes_of
from symmem.group.resolve import name_of
from symmem.ops.registry.registry import lookup

__all__ = ["REDIRECT_BYTES", "fed", "producer"]

REDIRECT_BYTES = 64 << 20
"""On CUDA, an operator without ``out=`` runs within ``use_symmetric_memory`` if its result has this many bytes or more.

That takes about 60 us per call.
"""


def fed(node: torch.fx.Node) -> str | None:
    """The group of the first operator with registered arguments that takes the result of a node, or a view of it."""
    seen, todo = set(), [node]
    while todo:
        for user in todo.pop().users:
            if user in seen or not isinstance(user.target, OpOverload):
                continue
            seen.add(user)
            known = lookup(original_of(user.target))
            if known is not None and not known.one_sided:
                return name_of(known.group_of(user.args, user.kwargs))
            if user.target.is_view:
                todo.append(user)
    return None


def _pays(made: torch.Tensor) -> bool:
    """Whether ``use_symmetric_memory`` takes less time than a copy. On the CPU it copies too."""
    nbytes = nbytes_of(convert_shape_to_inductor(made.shape), made.dtype) or 0
    return made.device.type == "cuda" and nbytes >= REDIRECT_BYTES


def producer(op: OpOverload, group: str | None) -> Callable[..., Any] | None:
    """A lowering that puts the result of an operator in memory that Inductor or symmem allocates.

    Args:
        op: The operator. It allocates its own result.
        group: The group of the operator with registered arguments that takes the result; None if there is none.

    Returns:
        A call of the variant with ``out=``, if there is one. Otherwise a call within
        :func:`symmem.use_symmetric_memory` if that takes less time than a copy, else None.
    """
    if V.graph.cpp_wrapper:
        return None
    if (out := out_variant(op)) is not None:
        return lambda *args, **kwargs: OutCall.make(op, out, args, kwargs)
    made = V.graph.current_node.meta.get("val")
    if group is None or inductor.triton.cudagraphs or not isinstance(made, torch.Tensor):
        return None
    if not _pays(made):
        return None

    def lowered(*args: Any, **kwargs: Any) -> Any:
        if symmetric_layout.current_plan() is None:
            symmetric_layout.begin_plan(uuid.uuid4().hex[:12])
        fallback: Any = fallback_handler
        result = fallback(op, add_to_fallback_set=False)(*args, **kwargs)
        kernel: Any = V.graph.operations[-1]
        kernel = kernel.inputs[0] if isinstance(kernel, ir.MultiOutput) else kernel

        def codegen(wrapper: Any) -> None:
            kernel.python_kernel_name = f"{symmetric_layout.emit_header()}.within({group!r}, torch.ops.{op})"
            type(kernel).codegen(kernel, wrapper)

        kernel.codegen, kernel.symmem_redirected = codegen, True
        return result

    return lowered
