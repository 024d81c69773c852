"""Stock Inductor's communication buffers for CPU tensors.

Inductor allocates the input of an operator like ``one_shot_all_reduce`` as symmetric memory if it can. It writes that
allocation for CUDA alone, and fails for other devices. With :mod:`symmem.torch_backend` the CPU has such memory too.
"""

from __future__ import annotations

import functools
import secrets
from typing import Any

from symmem._lazy import when_imported

__all__ = ["install"]

_MODULE = "torch._inductor.codegen.wrapper"


def install() -> None:
    """Let Inductor write such allocations for the CPU: now, or when it is imported. It is not imported here."""
    when_imported(_MODULE, _wrap)


def _wrap() -> None:
    from torch._inductor.codegen import wrapper

    line: Any = wrapper.AllocateLine
    original = getattr(line, "_codegen_comm_buffer", None)
    if original is None:  # an older torch has another class, and fails as without symmem
        return

    @functools.wraps(original)
    def _codegen_comm_buffer(self: Any, code: Any) -> None:
        node = self.node
        device = node.get_device()
        if device is None or device.type != "cpu":
            original(self, code)
            return
        sizes, strides = (self.wrapper.codegen_shape_tuple(tuple(x)) for x in (node.get_size(), node.get_stride()))
        # Inductor's own ids come from `random`, and Dynamo restores its state: graph after graph gets the same ids.
        code.writeline(
            f"{node.get_name()} = empty_strided_p2p({sizes}, {strides}, {node.get_dtype()}, torch.device('cpu'), "
            f"group_name={node.get_output_spec().group_name!r}, alloc_id={secrets.randbits(63)})"
        )

    line._codegen_comm_buffer = _codegen_comm_buffer
