"""The process group backend ``symmem`` of ``torch.distributed``.

    import symmem
    torch.distributed.init_process_group("symmem")

Nothing else changes in a program: ``torch.distributed``, DDP, FSDP2, DTensor and DeviceMesh call the process group.
The operators of :mod:`symmem.ops` run the collective operations that they have, over shared memory. The inner process
group runs all others: gloo on the CPU, NCCL on CUDA. :func:`report` tells which calls went where, and why.
"""

from __future__ import annotations

from symmem.distributed.process_group import Served, SymmemProcessGroup, report

__all__ = ["Served", "SymmemProcessGroup", "report"]
