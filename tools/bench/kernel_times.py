"""Times of the CUDA kernels of the collective operators, one per row of a kernel table; ``symmem tune`` uses them.

A kernel is timed in a CUDA graph of many calls, on bfloat16 zeros. Tensors that it can use in place are symmetric.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import symmem
from symmem.config.kernel_tables import Row
from symmem.ops.engines.base import Engine
from symmem.ops.engines.checked import CheckedEngine
from symmem.ops.engines.cuda_tuning import Table
from symmem.ops.engines.select import engine_for
from symmem.tools.bench.timing import CudaClock

__all__ = ["call_of", "each_row", "kernel_times"]

_ROUNDS = 7
_MOST_CALLS = 200

Call = Callable[[], object]


def each_row(
    engine: Any, operation: str, rows: Sequence[Row], call: Call, timer: Callable[[Call], float]
) -> list[float]:
    """Time ``call``, an operation of ``engine``, with every row as the only row of the table. Collective."""
    before: Table = engine.table
    try:
        found = []
        for row in rows:
            engine.use(before._replace(**{operation: (row,)}))
            found.append(timer(call))
        return found
    finally:
        engine.use(before)


def call_of(engine: Engine, operation: str, symmetric: torch.Tensor, other: torch.Tensor) -> Call:
    """Return a function that calls the operation on tensors of shape [world, n]."""
    if operation == "all_reduce":
        return partial(engine.all_reduce, symmetric[0], symmetric[0], "sum")
    if operation == "reduce_scatter":
        return partial(engine.reduce_scatter, symmetric, other[0], "sum")
    return partial(engine.all_gather, other[0], symmetric)


def kernel_times(operation: str, nbytes: int, rows: Sequence[Row]) -> list[float]:
    """Return this rank's median seconds of the operation with every row. Collective over the default group."""
    group = symmem.resolve_group()
    engine: Any = engine_for(group, torch.device("cuda", torch.cuda.current_device()))
    if isinstance(engine, CheckedEngine):
        engine = engine.engine
    memory = symmem.allocate((group.size, nbytes // 2), torch.bfloat16, arena=False).rendezvous()
    memory.tensor.zero_()
    call = call_of(engine, operation, memory.tensor, torch.empty_like(memory.tensor))
    count = max(3, min(_MOST_CALLS, (64 << 20) // nbytes))
    found = each_row(engine, operation, rows, call, partial(_in_a_graph, CudaClock(), count))
    memory.close()
    return found


def _in_a_graph(clock: CudaClock, count: int, call: Call) -> float:
    call()  # the first call may compile the kernel
    replay, samples = clock.capture(call, count), []
    for _ in range(_ROUNDS + 1):
        clock.all_here()
        samples.append(clock.seconds(replay).device / count)
    clock.all_here()  # before the graph is freed
    return statistics.median(samples[1:])
