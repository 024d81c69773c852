"""``symmem tune``: measures the kernels of the collective operations on this machine, and writes a table of algorithms.

Each is measured within a CUDA graph of many calls, on zeros of bfloat16; what a kernel
can use in place is in symmetric memory.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import symmem
from symmem.config.kernel_tables import Row
from symmem.errors import UnsupportedError
from symmem.ops.engines.base import Engine
from symmem.ops.engines.checked import CheckedEngine
from symmem.ops.engines.cuda_tuning import Table, built_in
from symmem.ops.engines.select import engine_for
from symmem.tools.bench.figures import Figure
from symmem.tools.ranks import RankPool
from symmem.tools.table import render
from symmem.tools.tuning import Change, changes, check_output, rows_from, search, write
from symmem.version import VERSION

__all__ = ["call_of", "each_row", "run"]

_TIMEOUT = 600.0  # seconds, for all rows at one size
_ROUNDS = 7
_MOST_CALLS = 200

Call = Callable[[], object]
Timer = Callable[[Call], float]


def each_row(engine: Any, operation: str, rows: Sequence[Row], call: Call, timer: Timer) -> list[float]:
    """What a timer says of a call of an engine's operation, run by each of the rows. Collective over its group."""
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
    """A call of the operation; of [world, n] tensors."""
    if operation == "all_reduce":
        return partial(engine.all_reduce, symmetric[0], symmetric[0], "sum")
    if operation == "reduce_scatter":
        return partial(engine.reduce_scatter, symmetric, other[0], "sum")
    return partial(engine.all_gather, other[0], symmetric)


def _measured(operation: str, nbytes: int, rows: Sequence[Row]) -> list[float]:
    """Median seconds of an operation with each of the rows, on this rank. Collective over the default group."""
    group = symmem.resolve_group()
    engine: Any = engine_for(group, torch.device("cuda", torch.cuda.current_device()))
    if isinstance(engine, CheckedEngine):
        engine = engine.engine
    memory = symmem.allocate((group.size, nbytes // 2), torch.bfloat16, arena=False).rendezvous()
    other = torch.empty_like(memory.tensor)
    memory.tensor.zero_()
    found = each_row(engine, operation, rows, call_of(engine, operation, memory.tensor, other), _in_a_graph(nbytes))
    memory.close()
    return found


def _in_a_graph(nbytes: int) -> Timer:
    calls = max(3, min(_MOST_CALLS, (64 << 20) // nbytes))

    def timer(call: Call) -> float:
        call()  # which may compile it
        _all_here()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may go on: NCCL's watchdog
            for _ in range(calls):
                call()
        seconds = statistics.median([_replayed(graph) / calls for _ in range(_ROUNDS + 1)][1:])
        _all_here()  # before the graph goes
        return seconds

    return timer


def _all_here() -> None:
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    _all_here()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _machine() -> list[str]:
    """What was measured on."""
    driver = Path("/proc/driver/nvidia/version")
    return [torch.cuda.get_device_name(), driver.read_text().splitlines()[0] if driver.exists() else "driver unknown"]


def run(world: int | None, operations: Sequence[str], sizes: Sequence[int], output: Path, *, as_json: bool) -> int:
    """Measure, write the table, and print what it changes against the one that symmem brings.

    Args:
        world: Ranks; None for all GPUs.
        operations: Of :data:`symmem.config.kernel_tables.KERNELS`.
        sizes: Bytes, growing, even.
        output: The file; what it says of other operations or numbers of ranks stays.
        as_json: Whether to print a JSON object a line, as benchmarks do.

    Raises:
        UnsupportedError: This machine has less than two GPUs, or less than ranks.
        ConfigError: The file is there already, and is no table; or its folder is not there.
    """
    gpus = torch.cuda.device_count()
    world = gpus if world is None else world
    if not 2 <= world <= gpus:
        raise UnsupportedError(
            f"`symmem tune` measures kernels on CUDA: it needs two ranks or more, each with a GPU, not {world} ranks "
            f"on {gpus} GPUs",
            hint="run it on a machine like those that the table is for",
        )
    check_output(output)
    known, found, rows = built_in(world)._asdict(), {}, {}
    with RankPool(world, timeout=_TIMEOUT) as pool:

        def measure(operation: str, nbytes: int, tried: Sequence[Row]) -> list[float]:
            taken = pool.run(_measured, operation, nbytes, tried)
            return [max(column) for column in zip(*taken, strict=True)]

        for operation in operations:
            times = search(operation, world, known[operation], sizes, measure)
            rows[operation] = rows_from(times)
            found[operation] = changes(times, known[operation], rows[operation])
        machine = pool.run(_machine)[0]
    date = datetime.date.today().isoformat()
    what = f"{', '.join(operations)} of {world} ranks, measured {date}"
    write(output, rows, world, [what, f"symmem {VERSION}, torch {torch.__version__}", *machine])
    print(_as_json(found, world) if as_json else _as_table(found, output))
    return 0


def _as_json(found: dict[str, list[Change]], world: int) -> str:
    return "\n".join(
        Figure(f"tune_{name}", "native", world, nbytes, after * 1e6, "us", "built_in", before * 1e6).json()
        for name, changed in found.items()
        for nbytes, _, _, before, after in changed
    )


def _as_table(found: dict[str, list[Change]], output: Path) -> str:
    lines = [
        (name, nbytes, _told(old), f"{before * 1e6:.2f}", _told(new), f"{after * 1e6:.2f}", f"{after / before:.3f}")
        for name, changed in found.items()
        for nbytes, old, new, before, after in changed
    ]
    table = render(("operation", "bytes", "built-in", "us", "tuned", "us", "ratio"), lines)
    return f"{table}\n\nwritten to {output}; for all ranks alike: SYMMEM_ENABLE='algorithms({output.absolute()})'"


def _told(row: Row) -> str:
    return f"{row.kernel} {row.blocks} x {row.threads}"
