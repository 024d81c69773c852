"""The same bits for a row at every place of a batch, with every algorithm, and for a tree at every number of ranks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import symmem
from symmem.distributed.hosts import _combined
from symmem.ops import functions as ops
from symmem.ops.engines.arithmetic import SIGNED_ZEROS

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGERS[x.itemsize])


# Minima and maxima of zeros.

DTYPES = (*SIGNED_ZEROS, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int32, torch.uint8)
EVERYWHERE = 131  # more than two vectors of bytes, and a remainder


def extremes(dtype: torch.dtype, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All combinations of signed values on ranks, [rank, combination, place], and their minima and maxima."""
    has_signs = dtype in SIGNED_ZEROS
    values = (0.0, -0.0, 1.0, -1.0) if has_signs or dtype.is_floating_point else (0.0, 1.0, 2.0)
    combinations = list(itertools.product(values, repeat=size))

    def key(value: float) -> tuple[float, float]:
        return value, math.copysign(1.0, value)

    def filled(rows: Any) -> torch.Tensor:
        return torch.tensor(rows).to(dtype).unsqueeze(-1).repeat(*(1 for _ in torch.tensor(rows).shape), EVERYWHERE)

    wanted = {name: filled([pick(row, key=key) for row in combinations]) for name, pick in (("min", min), ("max", max))}
    return filled(list(zip(*combinations, strict=True))), wanted


def reduce_extremes() -> None:
    group = symmem.resolve_group()
    for dtype in DTYPES:
        tensors, wanted = extremes(dtype, group.size)
        for reduction, right in wanted.items():
            got = ops.all_reduce(tensors[group.rank], reduction=reduction)
            assert torch.equal(bits(got), bits(right)), (dtype, reduction)
            rows = torch.stack([tensors[group.rank]] * group.size)
            got = ops.reduce_scatter(rows, reduction=reduction)
            assert torch.equal(bits(got), bits(right)), (dtype, reduction)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_sign_of_a_zero_does_not_depend_on_its_place(pools: Any, size: int) -> None:
    pools.get(size).run(reduce_extremes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sign_of_a_zero_does_not_depend_on_its_place_over_hosts(dtype: torch.dtype) -> None:
    tensors, wanted = extremes(dtype, 3)
    for reduction, right in wanted.items():
        assert torch.equal(bits(_combined(tensors, reduction).to(dtype)), bits(right)), reduction


def complex_averages() -> None:
    group = symmem.resolve_group()
    for dtype in (torch.complex64, torch.complex128):
        numbers = torch.randn(500, dtype=dtype, generator=torch.Generator().manual_seed(group.rank))
        alone = torch.stack([ops.all_reduce(each, reduction="avg") for each in numbers])
        for pad in range(5):
            padded = torch.cat([numbers[:pad], numbers])
            assert torch.equal(ops.all_reduce(padded, reduction="avg")[pad:], alone)


def test_averages_of_complex_numbers_do_not_depend_on_their_place(pools: Any) -> None:
    pools.get(3).run(complex_averages)
