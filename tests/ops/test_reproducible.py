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
from symmem.tools.ranks import rank_store

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


# Rows and algorithms.

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
ROW = 37  # no multiple of a vector


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers of such different magnitudes that every order rounds differently."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-6, 6, shape, generator=generator)


def rows_in_batches() -> list[str]:
    """A digest of the row's bits for every dtype and reduction, after a comparison over batches."""
    group, found = symmem.resolve_group(), []
    for dtype, reduction in itertools.product(FLOATS, ("sum", "avg", "min", "max")):
        row = values((ROW,), group.rank).to(dtype)
        alone = bits(ops.all_reduce(row, reduction=reduction))
        for before, after in ((1, 0), (2, 5), (13, 1), (2000, 3), (20_000, 7)):  # one shot, two shots, pieces
            batch = torch.cat([row.new_zeros(before, ROW), row.view(1, ROW), row.new_ones(after, ROW)])
            assert torch.equal(bits(ops.all_reduce(batch, reduction=reduction)[before]), alone), (dtype, reduction)
            scattered = ops.reduce_scatter(torch.stack([batch] * group.size), reduction=reduction)
            assert torch.equal(bits(scattered[before]), alone), (dtype, reduction)
        found.append(str(alone.tolist()))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_row_has_the_same_bits_in_every_batch_with_every_algorithm_on_every_rank(pools: Any, size: int) -> None:
    ranks = pools.get(size).run(rows_in_batches)
    assert ranks == ranks[:1] * size


# The tree.

LEAVES, WIDTH = 16, 8 * 1031


def reference(leaves: torch.Tensor, dtype: torch.dtype, reduction: str) -> torch.Tensor:
    """The definition of the tree: halves, recursively."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def total(some: torch.Tensor) -> torch.Tensor:
        half = len(some) // 2
        return some[0].to(wide) if half == 0 else total(some[:half]) + total(some[half:])

    found = total(leaves)
    return (found / len(leaves) if reduction == "avg" else found).to(dtype)


def grow_tree(dtype: torch.dtype, reduction: str, width: int) -> torch.Tensor:
    """Reduce the same leaves over this group's ranks in all forms; returns the integers of the bits."""
    group = symmem.resolve_group()
    everyones = values((LEAVES, width), 5).to(dtype)
    mine = everyones.chunk(group.size)[group.rank]
    got = ops.all_reduce(mine, None, reduction, order="tree")
    out = torch.empty_like(got)
    assert ops.all_reduce(mine, None, reduction, out, order="tree") is out
    assert torch.equal(bits(out), bits(got))
    assert torch.equal(bits(torch.ops.symmem.all_reduce_tree(mine, reduction, group.name)), bits(got))
    rows = mine.unflatten(1, (group.size, -1))
    part = ops.reduce_scatter(rows, None, reduction, order="tree")
    assert torch.equal(bits(part), bits(got.view(group.size, -1)[group.rank]))
    out = torch.empty_like(part)
    torch.ops.symmem.reduce_scatter_tree_out(rows, reduction, group.name, out=out)
    assert torch.equal(bits(out), bits(part))
    return bits(got)


@pytest.mark.parametrize("reduction", ["sum", "avg"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_tree_has_the_same_bits_on_every_number_of_ranks(pools: Any, dtype: torch.dtype, reduction: str) -> None:
    everyones = values((LEAVES, WIDTH), 5).to(dtype)
    wanted = bits(reference(everyones, dtype, reduction))
    for size in (1, 2, 4, 8):
        for got in pools.get(size).run(grow_tree, dtype, reduction, WIDTH):
            assert torch.equal(got, wanted), size
    if dtype == torch.float32:  # or the test would see no difference between orders
        assert not torch.equal(bits(sum(everyones[1:], everyones[0])), wanted)


def test_trees_of_any_size(pools: Any) -> None:
    for width in (0, 8, 2_000_000 // LEAVES * 8):  # nothing, one element per rank, several pieces
        wanted = bits(reference(values((LEAVES, width), 5), torch.float32, "sum"))
        for size in (2, 4):
            assert all(torch.equal(got, wanted) for got in pools.get(size).run(grow_tree, torch.float32, "sum", width))


def tree_gradients() -> None:
    group = symmem.resolve_group()
    for reduction, share in (("sum", 1.0), ("avg", 1 / (4 * group.size))):
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        (ops.all_reduce(x, None, reduction, order="tree") * (group.rank + 1)).sum().backward()
        total = group.size * (group.size + 1) / 2
        assert x.grad is not None
        assert x.grad.tolist() == [[total * share] * 3] * 4
        x = torch.randn(4, group.size, 3, dtype=torch.float64, requires_grad=True)
        (ops.reduce_scatter(x, None, reduction, order="tree") * (group.rank + 1)).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[[(rank + 1) * share] * 3 for rank in range(group.size)]] * 4


def test_gradients_of_trees(pools: Any) -> None:
    pools.get(2).run(tree_gradients)
    pools.get(4).run(tree_gradients)


def sum_as_tree(x: torch.Tensor) -> torch.Tensor:
    return ops.all_reduce(x * 2, order="tree") + 1


def compiled_tree() -> None:
    x = values((4, 100), symmem.resolve_group().rank)
    wanted = sum_as_tree(x)
    for backend in ("aot_eager", "symmem"):
        assert torch.equal(torch.compile(sum_as_tree, backend=backend, fullgraph=True)(x), wanted)


@pytest.mark.slow
def test_trees_compile(pools: Any) -> None:
    pools.get(2).run(compiled_tree)


def refused_tree(case: str) -> tuple[str, str]:
    group = symmem.resolve_group()
    odd = group.rank == 1
    x = torch.ones(3 if odd and case == "leaves of one" else 3 if case == "leaves" else 2, 4)
    options: dict[str, Any] = {"order": "tree"}
    if case == "different leaves" and odd:
        x = torch.ones(4, 4)
    if case == "minimum":
        options["reduction"] = "min"
    if case == "integers":
        x = x.int()
    if case == "order":
        options["order"] = "any"
    if case == "no leaves":
        x = x[0, 0]
    if case == "overlap":
        options["out"] = x[0]
    try:
        if case == "rows":
            ops.reduce_scatter(torch.ones(2, 5), **options)
        else:
            ops.all_reduce(x, **options)
    except symmem.SymmemError as error:
        assert torch.equal(ops.all_reduce(torch.ones(1, 2), order="tree"), torch.full((2,), float(group.size)))
        return type(error).__name__, str(error)
    raise AssertionError("not refused")


REFUSED = {
    "leaves": (
        "InvalidArgumentError",
        "a power of two of leaves on each rank, and a power of two of ranks, not 3 leaves",
    ),
    "leaves of one": ("InvalidArgumentError", "not 3 leaves on each of 2 ranks"),
    "different leaves": ("MismatchError", "all_reduce_tree(sum) of 4x4"),
    "minimum": ("InvalidArgumentError", "there is no 'min' of torch.float32 as a tree"),
    "integers": ("InvalidArgumentError", "there is no 'sum' of torch.int32 as a tree"),
    "order": ("InvalidArgumentError", "order must be 'ranks' or 'tree', not 'any'"),
    "no leaves": ("InvalidArgumentError", "x must have the shape [leaves of a rank, ...], not []"),
    "overlap": ("InvalidArgumentError", "x and out share memory"),
    "rows": ("InvalidArgumentError", "x must have the shape [leaves of a rank, 2, ...], not [2, 5]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_tree_is_refused_on_all_ranks(case: str, pools: Any) -> None:
    kind, text = REFUSED[case]
    for found, message in pools.get(2).run(refused_tree, case):
        assert found == kind, message
        assert text in message


def checked_trees() -> list[str]:
    """In the checked mode: a tree of the same leaves, and one where rank 1 averages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMMEM_ENABLE", "collective_check(each)")
        here = symmem.resolve_group()
        group = symmem.Group.from_store(here.rank, here.size, rank_store(), "checked trees")
    x, found = torch.ones(2, here.size), []
    assert ops.all_reduce(x, group, order="tree").tolist() == [2.0 * here.size] * here.size
    assert ops.reduce_scatter(x, group, order="tree").item() == 2.0 * here.size
    for operation in (ops.all_reduce, ops.reduce_scatter):
        try:
            operation(x, group, "avg" if here.rank == 1 else "sum", order="tree")
        except symmem.SymmemError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_trees_are_compared_in_the_checked_mode(pools: Any) -> None:
    for texts in pools.get(2).run(checked_trees):
        assert len(texts) == 2
        assert all(text.startswith("MismatchError") for text in texts)
        assert all("'reduction': sum on rank 0, avg on rank 1" in text for text in texts)


def three_ranks() -> str:
    try:
        ops.all_reduce(torch.ones(2, 4), order="tree")
    except symmem.SymmemError as error:
        return str(error)
    raise AssertionError("not refused")


def test_a_tree_needs_a_power_of_two_of_ranks(pools: Any) -> None:
    assert all("2 leaves on each of 3 ranks" in text for text in pools.get(3).run(three_ranks))
