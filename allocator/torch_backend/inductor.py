"""What stock Inductor does with symmetric memory, for CPU tensors.

Inductor allocates the input of an operator like ``one_shot_all_reduce`` as symmetric memory if it can. It writes that
allocation for CUDA alone, and fails for other devices. With :mod:`symmem.torch_backend` the CPU has such memory too.

If the program asks for it (``_micro_pipeline_tp``), Inductor also fuses matrix products with the collectives beside
them, to operators like ``fused_all_gather_matmul``. It does so only if this PyTorch has NCCL. On the CPU the operators
need none.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable
from typing import Any

import torch

from symmem._lazy import when_imported

__all__ = ["install"]

_BUFFERS = "torch._inductor.codegen.wrapper"
_FUSIONS = "torch._inductor.fx_passes.micro_pipeline_tp"


def install() -> None:
    """Let Inductor do both on the CPU: now, or when it is imported. It is not imported here."""
    when_imported(_BUFFERS, _wrap_buffers)
    when_imported(_FUSIONS, _wrap_fusions)


def _wrap_buffers() -> None:
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


def _wrap_fusions() -> None:
    from torch._inductor.fx_passes import micro_pipeline_tp

    passes: Any = micro_pipeline_tp
    for name, node in (("fuse_all_gather_matmul", "shard_node"), ("fuse_matmul_reduce_scatter", "input_node")):
        setattr(passes, name, _without_nccl(getattr(passes, name), node))


def _without_nccl(fuse: Callable[[Any], None], node: str) -> Callable[[Any], None]:
    """A fusion that asks whether there is NCCL is told so for CPU tensors, during the call."""
    module, available = torch.distributed, torch.distributed.is_nccl_available

    @functools.wraps(fuse)
    def call(collective: Any) -> None:
        if getattr(collective, node).meta["val"].device.type == "cpu":
            module.is_nccl_available = lambda: True
        try:
            fuse(collective)
        finally:
            module.is_nccl_available = available

    return call
