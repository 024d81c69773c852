"""Several backends in one process, on different tensors and groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

import symmem
from symmem.backends.base import Capability
from symmem.tools.conformance.case import Context

__all__ = ["SETS", "run_together"]

SETS = (
    ("native", "pytorch_cuda", "nvshmem", "host"),
    ("host", "nvshmem", "pytorch_nccl", "native"),
    ("nvshmem", "pytorch_nvshmem", "native", "host"),
    ("pytorch_nvshmem", "nvshmem", "host", "native"),
)
"""Backends that are tested together. A process has one of torch's transports; backends that share NVSHMEM come in both
orders."""


def run_together(names: Sequence[str]) -> None:
    """Use the backends one after the other, over all ranks and over pairs, then interleaved. Runs on every rank.

    Raises:
        AssertionError: Some memory has other values than its rank stored.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world - 1, 2)]
    pair = pairs[rank // 2] if rank // 2 < len(pairs) else None
    contexts = [Context(name) for name in names]
    tensors: list[symmem.SymmetricTensor] = []
    for number, ctx in enumerate(contexts):
        st = ctx.shared(1000 + number, torch.int32)
        if pair is not None:
            st.rendezvous(pair)
        st.tensor.fill_(100 * number + rank)
        tensors.append(st)
    for ctx, st in zip(contexts, tensors, strict=True):
        if Capability.SIGNALS in ctx.backend.capabilities:
            st.barrier()
    contexts[0].meet()
    for number, st in reversed(list(enumerate(tensors))):
        assert (st.get((rank + 1) % world) == 100 * number + (rank + 1) % world).all().item(), names[number]
        if pair is not None:
            partner = rank ^ 1
            assert (st.get(partner % 2, group=pair) == 100 * number + partner).all().item(), names[number]
            st.barrier(group=pair)
    contexts[0].meet()
    for ctx, st in zip(contexts, tensors, strict=True):  # close one; the others must still work
        st.close()
        for other in tensors:
            if not other.closed:
                other.barrier()
        assert ctx.shared(7).get((rank + 1) % world).sum().item() == 0
        ctx.meet()
    del tensors, st, other
    for made in pairs:
        if made is pair:
            dist.destroy_process_group(made)
    contexts[0].meet()
