"""The same bits on GPUs: for a row in every batch, with every algorithm, and for a tree at 1, 2, 4 and 8 ranks."""

from __future__ import annotations

import itertools
import operator
from functools import reduce
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import OPTIONS

import symmem
from symmem.ops import functions as ops
from symmem.ops.engines.base import Engines
from symmem.ops.engines.cuda_tuning import Row
from symmem.tools.commands.doctor import examine
from symmem.tools.ranks import RankPool

FOUND = examine("native")
WORLD = max(torch.cuda.device_count(), 1)
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.why_not)


@pytest.fixture(scope="module")
def pool() -> Any:
    with RankPool(WORLD, **OPTIONS) as pool:
        yield pool


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGERS[x.itemsize]).cpu()


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers of such different magnitudes that every order rounds differently. Made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-6, 6, shape, generator=generator)


def tree_of(leaves: torch.Tensor) -> torch.Tensor:
    """The definition of the tree, on the CPU."""
    half = len(leaves) // 2
    return leaves[0] if half == 0 else tree_of(leaves[:half]) + tree_of(leaves[half:])


def trees(sizes: list[int]) -> None:
    """All ranks make all groups, and the members of a group reduce the same leaves."""
    rank = dist.get_rank()
    for size in sizes:
        ranks = list(range(size))
        group = dist.new_group(ranks)
        if rank not in ranks:
            continue
        for dtype, width in itertools.product(FLOATS, (8, 8 * 1031, 8 << 17)):
            leaves = values((16, width), 5).to(dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            wanted = bits(tree_of(leaves.to(wide)).to(dtype))
            mine = leaves.chunk(size)[rank].cuda()
            assert torch.equal(bits(ops.all_reduce(mine, group, order="tree")), wanted), (size, dtype, width)
            out = torch.empty(width, dtype=dtype, device="cuda")
            ops.all_reduce(mine, group, "avg", out, order="tree")
            assert torch.equal(bits(out), bits(tree_of(leaves.to(wide)).div(16).to(dtype))), (size, dtype, width)
            part = ops.reduce_scatter(mine.unflatten(1, (size, -1)), group, order="tree")
            assert torch.equal(bits(part), wanted.view(size, -1)[rank]), (size, dtype, width)


def test_trees_have_the_same_bits_on_every_number_of_ranks(pool: RankPool) -> None:
    pool.run(trees, [size for size in (1, 2, 4, 8) if size <= WORLD])


def captured_trees() -> None:
    x = torch.zeros(2, 4096, dtype=torch.bfloat16, device="cuda")
    ops.all_reduce(x, order="tree")  # the first call cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.all_reduce(x, order="tree")
    for turn in range(3):
        x.copy_(values((2, 4096), 10 * turn + dist.get_rank()))
        wanted = ops.all_reduce(x, order="tree")
        graph.replay()
        assert torch.equal(bits(y), bits(wanted))


@pytest.mark.skipif(WORLD & (WORLD - 1) > 0 or WORLD < 2, reason="needs a power of two of GPUs, and two of them")
def test_trees_in_graphs(pool: RankPool) -> None:
    pool.run(captured_trees)


def every_algorithm() -> list[str]:
    """The bits of a row, which are the same in every batch and with every kernel, and the zeros."""
    group = symmem.resolve_group()
    row = values((1, 37), group.rank)
    ops.all_reduce(row.cuda())
    engine: Any = group.extension(Engines)[torch.device("cuda", torch.cuda.current_device())]
    table, found = engine.table, []
    try:
        for dtype, reduction in itertools.product(FLOATS, ("sum", "avg", "min", "max")):
            given = row.to(dtype).cuda()
            alone = bits(ops.all_reduce(given, reduction=reduction))
            for kernel, before in itertools.product(("one_shot", "two_shot"), (0, 1, 13, 2000, 40_000)):
                engine.use(table._replace(all_reduce=(Row(group.size, None, kernel, 256, 64),)))
                batch = torch.cat([given.new_zeros(before, 37), given, given.new_ones(5, 37)])
                assert torch.equal(bits(ops.all_reduce(batch, reduction=reduction)[before]), alone[0])
                rows = torch.stack([batch] * group.size)
                assert torch.equal(bits(ops.reduce_scatter(rows, reduction=reduction)[before]), alone[0])
            found.append(str(alone.tolist()))
        for dtype in FLOATS:
            zeros = torch.full((131,), -0.0 if group.rank == 0 else 0.0, dtype=dtype, device="cuda")
            for reduction, sign in (("min", True), ("max", False)):
                got = ops.all_reduce(zeros, reduction=reduction)
                assert bool((got.signbit() == sign).all()), (dtype, reduction)
    finally:
        engine.use(table)
    return found


@pytest.mark.skipif(WORLD < 2, reason="needs two GPUs")
def test_a_row_has_the_same_bits_in_every_batch_with_every_algorithm_on_every_rank(pool: RankPool) -> None:
    ranks = pool.run(every_algorithm)
    assert reduce(operator.and_, (found == ranks[0] for found in ranks))
