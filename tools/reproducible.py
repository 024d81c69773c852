"""Whether bits of sums depend on what they must not depend on; ``symmem check reproducible`` runs these cases.

Every rank reduces the same row of random numbers alone, in batches, and with every algorithm, twice and in two sets of
processes. Then the same leaves are reduced as a tree by 1, 2, 4, ... ranks. The magnitudes of the numbers are so
different that every other order of additions gives other bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import symmem
from symmem.config.kernel_tables import KERNELS, Row
from symmem.group.group import Group
from symmem.ops import functions as ops
from symmem.ops.engines.checked import CheckedEngine
from symmem.ops.engines.host import REGION, TWO_SHOT
from symmem.ops.engines.select import engine_for
from symmem.tools.ranks import RankPool

__all__ = ["CONTRACTS", "Comparison", "examine", "row_bits", "tree_bits"]

CONTRACTS = ("batch", "algorithms", "ranks", "runs", "tree")
"""What the bits must not depend on: the rows around a row, the algorithm, the rank, the run; and for the order
``"tree"`` the number of ranks."""

_OPERATIONS = ("all_reduce", "reduce_scatter")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_REDUCTIONS = ("sum", "avg", "min", "max")
_ROW = 37  # elements; not whole vectors
_BATCHES = ((1, 0), (2, 5), (13, 1), (100, 50))  # rows before and after
_LEAVES, _WIDTH = 16, 16 * 1031
_TIMEOUT = 600.0  # seconds; the first use of a GPU compiles kernels

Key = tuple[str, str]
"""Operation and dtype."""


@dataclass(frozen=True)
class Comparison:
    """The result of one case.

    Attributes:
        contract: One of :data:`CONTRACTS`.
        operation: ``all_reduce`` or ``reduce_scatter``.
        dtype: For example ``float32``.
        differs: Where the bits differ; empty if they are the same.
    """

    contract: str
    operation: str
    dtype: str
    differs: tuple[str, ...]


def _values(shape: Sequence[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-6, 6, shape, generator=generator)


def _bytes(x: torch.Tensor) -> bytes:
    dense = x.contiguous().cpu()
    return ctypes.string_at(dense.data_ptr(), dense.nbytes)


def _device(device_type: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")


# What the ranks do. Both are collective over the default group, and return bits by operation and dtype.


def row_bits(device_type: str) -> dict[Key, dict[str, bytes]]:
    """Reduce this rank's row in many ways. Returns the bits of the result by the name of the way."""
    group, found = symmem.resolve_group(), dict[Key, dict[str, bytes]]()
    for operation in _OPERATIONS:
        for name, dtype in _DTYPES.items():
            row = _values((1, _ROW), group.rank)
            row[0, :2] = torch.tensor([0.0, -0.0] if group.rank % 2 else [-0.0, 0.0])
            row = row.to(dtype).to(_device(device_type))
            ways = {"alone": _reduced(operation, group, row, 0, 0), "again": _reduced(operation, group, row, 0, 0)}
            for before, after in _BATCHES:
                ways[f"batch: row {before} of {before + 1 + after}"] = _reduced(operation, group, row, before, after)
            for way, bits in _algorithms(operation, group, row):
                ways[f"algorithms: {way}"] = bits
            found[operation, name] = ways
    return found


def _reduced(operation: str, group: Group, row: torch.Tensor, before: int, after: int) -> bytes:
    """The bits of the row after all reductions of a batch, in which the other rows are this rank's number."""
    batch = row.new_full((before + 1 + after, _ROW), float(group.rank))
    batch[before] = row[0]
    function: Any = getattr(ops, operation)
    x = batch if operation == "all_reduce" else torch.stack([batch] * group.size)
    return b"".join(_bytes(function(x, group, reduction)[before]) for reduction in _REDUCTIONS)


def _algorithms(operation: str, group: Group, row: torch.Tensor) -> Iterator[tuple[str, bytes]]:
    """Every algorithm of the group's engine: by the table on CUDA, and by the size on the CPU."""
    if row.device.type == "cpu":
        for way, nbytes in (("two shots", TWO_SHOT), ("pieces", REGION)):
            share = nbytes if operation == "all_reduce" else nbytes // group.size
            before = share // row.nbytes + 1
            yield way, _reduced(operation, group, row, before, 3)
        return
    engine: Any = engine_for(group, row.device)
    if isinstance(engine, CheckedEngine):
        engine = engine.engine
    table = engine.table
    known = (row._replace(nbytes=None) for row in getattr(table, operation))
    extra = (Row(group.size, None, kernel, 512, 8) for kernel in KERNELS[operation])
    try:
        for each in dict.fromkeys((*known, *extra)):
            engine.use(table._replace(**{operation: (each,)}))
            way = f"{each.kernel} {each.blocks} x {each.threads}"
            yield way, _reduced(operation, group, row, 0, 0)
            yield f"{way}, large", _reduced(operation, group, row, 3000, 7)
    finally:
        engine.use(table)


def tree_bits(device_type: str) -> dict[Key, tuple[bytes, bytes]]:
    """Reduce this rank's part of the leaves as a tree: the bits of the sum and of the average."""
    group, found = symmem.resolve_group(), dict[Key, tuple[bytes, bytes]]()
    for name, dtype in _DTYPES.items():
        leaves = _values((_LEAVES, _WIDTH), 5).chunk(group.size)[group.rank].to(dtype).to(_device(device_type))
        for operation in _OPERATIONS:
            x = leaves if operation == "all_reduce" else leaves.view(len(leaves), group.size, -1)
            function: Any = getattr(ops, operation)
            total, average = (_bytes(function(x, group, reduction, order="tree")) for reduction in ("sum", "avg"))
            found[operation, name] = total, average
    return found


# Comparison.


def examine(
    world: int,
    device_type: str,
    rows: Callable[[str], Any] = row_bits,
    trees: Callable[[str], Any] = tree_bits,
) -> list[Comparison]:
    """Start ranks, run all cases, and compare the bits.

    Args:
        world: Number of ranks.
        device_type: ``"cpu"`` or ``"cuda"``.
        rows: The work of a rank for rows: :func:`row_bits`, or a function with results of the same form.
        trees: The same for :func:`tree_bits`.

    Raises:
        RanksFailedError: A rank raised an error.
    """
    runs = [_on_ranks(world, rows, device_type) for _ in range(2)]
    sizes = [1 << power for power in range(world.bit_length())]
    grown = {size: _on_ranks(size, trees, device_type) for size in sizes if size <= _LEAVES}
    found = []
    for contract in CONTRACTS:
        for operation in _OPERATIONS:
            for name in _DTYPES:
                key = operation, name
                if contract == "tree":
                    differs = _tree_differs(operation, {size: [each[key] for each in grown[size]] for size in grown})
                else:
                    differs = _row_differs(contract, *([rank[key] for rank in run] for run in runs))
                found.append(Comparison(contract, operation, name, tuple(differs)))
    return found


def _on_ranks(size: int, work: Callable[[str], Any], device_type: str) -> list[Any]:
    with RankPool(size, timeout=_TIMEOUT, process_group="gloo") as pool:
        return pool.run(work, device_type)


def _row_differs(
    contract: str, first: Sequence[Mapping[str, bytes]], second: Sequence[Mapping[str, bytes]]
) -> Iterator[str]:
    """Where the bits differ, from both runs of all ranks."""
    if contract == "ranks":
        yield from (f"rank {rank}" for rank, ways in enumerate(first) if ways["alone"] != first[0]["alone"])
        return
    for rank, (ways, later) in enumerate(zip(first, second, strict=True)):
        if contract == "runs":
            same = ways == later and ways["again"] == ways["alone"] and later["again"] == later["alone"]
            yield from () if same else (f"rank {rank}",)
            continue
        for way, bits in ways.items():
            if way.startswith(f"{contract}: ") and bits != ways["alone"]:
                yield f"{way.partition(': ')[2]} on rank {rank}"


def _tree_differs(operation: str, ranks: Mapping[int, Sequence[tuple[bytes, bytes]]]) -> Iterator[str]:
    """The numbers of ranks with other bits than one rank."""
    (wanted,) = ranks[1]
    for size, found in ranks.items():
        if operation == "all_reduce":
            same = all(each == wanted for each in found)
        else:
            same = tuple(map(b"".join, zip(*found, strict=True))) == wanted
        if not same:
            yield f"{size} ranks"
