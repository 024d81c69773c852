"""What is registered from the start: ops of torch, ``torch.ops.symm_mem``, and one-sided ones of symmem itself.

Of torch's ops: the arguments that their kernels rendezvous, and no others; read off the kernels of PyTorch 2.11 to
2.15. Upstream's own lowerings differ for ``multimem_all_gather_out``, whose kernel stores to all ranks' ``out`` and
reads its ``input`` as any memory.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NAMESPACE", "NEED", "NEED_NONE", "OWN", "OWN_NAMESPACE", "Need"]

NAMESPACE = "symm_mem"
OWN_NAMESPACE = "symmem"


class Need(NamedTuple):
    """What one op needs.

    Attributes:
        args: Arguments that must be symmetric memory.
        exit_barrier: See :class:`symmem.ops.Registration`.
        one_sided: See there.
    """

    args: tuple[str, ...]
    exit_barrier: bool = False
    one_sided: bool = False


_ALL_TO_ALL = ("input", "out", "in_splits", "out_splits_offsets")

# The kernels over peers' pointers and over multicast begin and end with a barrier of all ranks. Those of NVSHMEM end
# when this rank has its data, while peers may still read from it.
NEED: dict[str, Need] = {
    "_low_contention_all_gather_ce_multicast_out": Need(("out",), exit_barrier=True),
    "multimem_all_gather_out": Need(("out",), exit_barrier=True),
    "multimem_all_reduce_": Need(("input",), exit_barrier=True),
    "multimem_one_shot_all_reduce": Need(("input",), exit_barrier=True),
    "multimem_one_shot_all_reduce_out": Need(("input",), exit_barrier=True),
    "multimem_one_shot_reduce_out": Need(("input",), exit_barrier=True),
    "one_shot_all_reduce": Need(("input",), exit_barrier=True),
    "one_shot_all_reduce_copy": Need(("symm_buffer",), exit_barrier=True),
    "one_shot_all_reduce_copy_out": Need(("symm_buffer",), exit_barrier=True),
    "one_shot_all_reduce_out": Need(("input",), exit_barrier=True),
    "reduce_scatter_out": Need(("input",), exit_barrier=True),
    "two_shot_all_reduce_": Need(("input",), exit_barrier=True),
    "two_shot_all_reduce_out": Need(("input",), exit_barrier=True),
    "nccl_all_to_all_nd": Need(("input",), exit_barrier=True),
    "nccl_reduce_scatter_offset": Need(("input",), exit_barrier=True),
    "all_to_all_vdev": Need(_ALL_TO_ALL),
    "all_to_all_vdev_2d": Need(_ALL_TO_ALL),
    "all_to_all_vdev_2d_offset": Need(("input", "out", "in_splits_offsets", "out_splits_offsets")),
    "multi_root_tile_reduce": Need(("in_tiles", "out_tile")),
    "nvshmem_all_to_all": Need(("input", "out")),
    "nvshmem_broadcast": Need(("input",)),
    "tile_reduce": Need(("in_tile", "out_tile")),
    # It hands out tensors over peers' memory: of a copy they would be of no use once the call is over.
    "get_remote_tensors": Need(("x",), one_sided=True),
    # Of the following, the peer does not call along, or calls another op.
    "memcpy_to_multicast_": Need(("symm_mem_out",), one_sided=True),
    "nccl_get": Need(("tensor",), one_sided=True),
    "nccl_put": Need(("tensor",), one_sided=True),
    "nccl_put_with_signal": Need(("tensor",), one_sided=True),
    "nccl_wait_for_signal": Need(("sigpad",), one_sided=True),
    "nvshmem_get": Need(("tensor",), one_sided=True),
    "nvshmem_put": Need(("tensor",), one_sided=True),
    "nvshmem_put_with_signal": Need(("tensor", "sigpad"), one_sided=True),
    "nvshmem_wait_for_signal": Need(("sigpad",), one_sided=True),
}
"""By the name of the op. A torch that lacks one of them is fine."""

OWN: dict[str, Need] = {
    "put": Need(("x",), one_sided=True),
    "get": Need(("x",), one_sided=True),
    "get_out": Need(("x",), one_sided=True),
    "put_signal": Need(("x",), one_sided=True),
    "wait_signal": Need(("x",), one_sided=True),
    "barrier": Need(("x",), exit_barrier=True),
}
"""Of symmem's own ops; those that are not here take any memory: see :mod:`symmem.ops.collectives`."""

NEED_NONE: dict[str, str] = {
    "_async_input_mm": "waits for flags in any memory of this device",
    "_barrier": "takes a handle, no tensor",
    "_low_contention_all_gather": "copies other memory into a workspace of its own",
    "_low_contention_all_gather_ce_multicast": "reads any memory, and allocates its symmetric output",
    "_low_contention_reduce_scatter": "copies other memory into a workspace of its own",
    "_rendezvous": "answers None for a tensor in other memory",
    "fused_all_gather_matmul": "copies other memory into a workspace of its own",
    "fused_all_gather_scaled_matmul": "copies other memory into a workspace of its own",
    "fused_matmul_reduce_scatter": "works in a workspace of its own",
    "fused_scaled_matmul_reduce_scatter": "works in a workspace of its own",
    "memset32_": "sets any memory of this device",
    "nccl_get_out": "gets by a handle, into any memory",
    "nccl_put_signal": "puts by a handle, and reads any memory",
    "nccl_wait_signal": "takes a handle, no tensor",
    # So says torch; NVSHMEM does of peers on the same host, and asks for registered memory otherwise (pytorch 195370).
    "nvshmem_get_out": "gets by a handle, into any memory",
    "stream_write_value32_": "sets any memory of this device",
}
"""Ops of the namespace that take any memory, and why."""
