"""``symmem bench collectives``: the collective operators on the CPU beside gloo's, in the same processes, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

import symmem
from symmem.ops import collectives  # noqa: F401  # defines the operators
from symmem.tools.bench.figures import Figure, alternate, show
from symmem.tools.ranks import RankPool

__all__ = ["OPERATORS", "SIZES", "measure", "run"]

OPERATORS = ("all_reduce", "all_gather", "reduce_scatter")
SIZES = tuple(1 << power for power in (10, 14, 16, 18, 20, 22, 24))
"""Bytes: of the tensor for all_reduce, else of the one that has a row for each rank."""


def _pair(name: str, nbytes: int, world: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """One call of ours and one of gloo's, on float32: zeros, so that sums stay finite."""
    group = symmem.resolve_group().name
    rows = torch.zeros((world, max(nbytes // 4 // world, 1)))
    row = torch.zeros_like(rows[0])
    if name == "all_reduce":
        x, other = torch.zeros(nbytes // 4), torch.zeros(nbytes // 4)
        return lambda: torch.ops.symmem.all_reduce_(x, "sum", group), lambda: dist.all_reduce(other)
    if name == "all_gather":
        return (
            lambda: torch.ops.symmem.all_gather_out(row, group, out=rows),
            lambda: dist.all_gather_into_tensor(rows.view(-1), row),
        )
    return (
        lambda: torch.ops.symmem.reduce_scatter_out(rows, "sum", group, out=row),
        lambda: dist.reduce_scatter_tensor(row, rows.view(-1)),
    )


def _times(name: str, nbytes: int) -> tuple[float, float]:
    """Median seconds of a call, ours and gloo's, each the mean of a run of them."""
    ours, peer = _pair(name, nbytes, dist.get_world_size())
    counts = (max(3, min(200, (8 << 20) // nbytes)), max(2, min(20, (4 << 20) // nbytes)))

    def repeated(call: Callable[[], object], count: int) -> Callable[[], object]:
        def run() -> None:
            for _ in range(count):
                call()

        return run

    runs = [repeated(call, count) for call, count in zip((ours, peer), counts, strict=True)]
    for warm_up in runs:
        warm_up()
    mine, theirs = alternate(runs[0], runs[1], rounds=9)
    return mine / counts[0], theirs / counts[1]


def measure(world: int, sizes: Sequence[int] = SIZES) -> list[Figure]:
    """All figures at one world size, in microseconds; of all ranks, the slowest counts."""
    figures = []
    with RankPool(world) as pool:
        for name in OPERATORS:
            for nbytes in sizes:
                ours, peer = max(pool.run(_times, name, nbytes))
                figures.append(Figure(name, "host", world, nbytes, ours * 1e6, "us", "gloo", peer * 1e6))
    return figures


def run(worlds: Sequence[int], *, as_json: bool) -> int:
    """Measure and print."""
    show([figure for world in worlds for figure in measure(world)], as_json=as_json)
    return 0
