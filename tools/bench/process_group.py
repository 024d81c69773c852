"""``symmem bench process_group``: torch.distributed over the backend symmem, beside gloo or NCCL in the same processes.

The figures are those of ``symmem bench collectives``, with names such as ``dist_all_reduce``. All contenders are calls
of torch.distributed with plain tensors. They differ in the process group only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from symmem.backends import get_backend
from symmem.tools.bench import collectives
from symmem.tools.bench.contenders import through_torch
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.progress import SILENT, Progress
from symmem.tools.bench.timing import clock_of

__all__ = ["run"]


@functools.cache
def _group() -> Any:
    return dist.new_group(backend="symmem")


def _on_rank(operator: str, nbytes: int, backend: str, largest: int) -> collectives.Samples:
    device = torch.device(get_backend(backend).device_type)
    groups = {"symmem": _group(), "gloo" if device.type == "cpu" else "nccl": dist.group.WORLD}
    return collectives.sample(operator, through_torch(operator, nbytes, device, groups), clock_of(device.type))


def run(
    backend: str,
    ranks: Sequence[int] | None,
    sizes: Sequence[int],
    operators: Sequence[str],
    progress: Progress = SILENT,
) -> Iterator[Figure]:
    """Yield all figures. For the arguments and errors see :func:`symmem.tools.bench.collectives.run`."""
    suite = "process_group"
    yield from collectives.for_all_worlds(backend, ranks, sizes, operators, progress, suite, _on_rank, "dist_")
