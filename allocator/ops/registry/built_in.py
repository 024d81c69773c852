"""Built-in registrations: torch's ops ``torch.ops.symm_mem``, and the one-sided ops of symmem.

For torch's ops they name the arguments that the kernels rendezvous, according to the kernels of PyTorch 2.11 to 2.15.
Upstream's lowering of ``multimem_all_gather_out`` differs: its kernel stores to all ranks' ``out``, and reads ``input``
as plain memory.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NAMESPACE", "NEED", "NEED_NONE", "OWN", "OWN_NAMESPACE", "Need"]

NAMESPACE = "symm_mem"
OWN_NAMESPACE = "symmem"


class Need(NamedTuple):
    """The requirements of one op.

    Attributes:
        args: Arguments that must be symmetric memory.
        exit_barrier: See :class:`symmem.ops.Registration`.
        one_sided: See :class:`symmem.ops.Registration`.
    """

    args: tuple[str, ...]
    exit_barrier: bool = False
    one_sided: bool = False


_ALL_TO_ALL = ("input", "out", "in_splits", "out_splits_offsets")

# Kernels over peers' pointers and over multicast begin and end with a barrier of all ranks. NVSHMEM kernels end when
# this rank has its data; peers may still read from this rank.
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
    # It returns tensors over peers' memory. Tensors over the memory of a copy would be useless after the call.
    "get_remote_tensors": Need(("x",), one_sided=True),
    # For the following ops, the peer makes no call, or calls another op.
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
"""Requirements by op name. A torch without some of these ops is fine."""

OWN: dict[str, Need] = {
    "put": Need(("x",), one_sided=True),
    "get": Need(("x",), one_sided=True),
    "get_out": Need(("x",), one_sided=True),
    "put_signal": Need(("x",), one_sided=True),
    "wait_signal": Need(("x",), one_sided=True),
    "barrier": Need(("x",), exit_barrier=True),
}
"""Requirements of symmem's ops. The others take any memory, see :mod:`symmem.ops.collectives`."""

NEED_NONE: dict[str, str] = {
    "_async_input_mm": "waits for flags in any memory of this device",
    "_barrier": "takes a handle, no tensor",
    "_low_contention_all_gather": "copies other memory into its workspace",
    "_low_contention_all_gather_ce_multicast": "reads any memory, and allocates its symmetric output",
    "_low_contention_reduce_scatter": "copies other memory into its workspace",
    "_rendezvous": "returns None for a tensor in other memory",
    "fused_all_gather_matmul": "copies other memory into its workspace",
    "fused_all_gather_scaled_matmul": "copies other memory into its workspace",
    "fused_matmul_reduce_scatter": "uses its own workspace",
    "fused_scaled_matmul_reduce_scatter": "uses its own workspace",
    "memset32_": "sets any memory of this device",
    "nccl_get_out": "gets by a handle, into any memory",
    "nccl_put_signal": "puts by a handle, and reads any memory",
    "nccl_wait_signal": "takes a handle, no tensor",
    # According to torch. NVSHMEM does so for peers on the same host, and needs registered memory otherwise
    # (pytorch 195370).
    "nvshmem_get_out": "gets by a handle, into any memory",
    "stream_write_value32_": "sets any memory of this device",
}
"""Ops of the namespace that take any memory, with the reason."""
