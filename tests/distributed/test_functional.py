"""Functional collectives in compiled graphs: symmem's operators run them, with the results of eager code."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from patience import SETTINGS, TASK
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils import _pytree as pytree

import symmem
from symmem.tools.ranks import RankPool

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SERVED, LEFT = "run by symmem", "run by the process group"


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    cache = tmp_path_factory.mktemp("inductor")
    return {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "SYMMEM_ENABLE": SETTINGS,
    }


@pytest.fixture(scope="module")
def pool(env: dict[str, str | None]) -> Iterator[RankPool]:
    with RankPool(2, env=env, process_group="symmem", timeout=TASK) as made:
        yield made


def world() -> dist.ProcessGroup:
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", UserWarning)
    return cast("dist.ProcessGroup", dist.group.WORLD)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(17 * seed + dist.get_rank()))


@contextlib.contextmanager
def reporting() -> Iterator[Any]:
    from symmem.compile.explanation import reporting as collect

    with collect() as report:
        yield report


def found(report: Any) -> list[tuple[str, str]]:
    """What ran the functional collectives: name and outcome."""
    decisions = [each for graph in report.graphs for each in graph.decisions]
    return [(each.op.removeprefix("_c10d_functional::"), each.outcome) for each in decisions]


def same(program: Callable[..., Any], *arguments: torch.Tensor, **options: Any) -> list[tuple[str, str]]:
    """Compare a program's compiled and eager results bit by bit, twice; return what ran its collectives."""
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="symmem", fullgraph=True, **options)
    with reporting() as report:
        for _ in range(2):
            copies = [x.clone() for x in arguments]
            wanted, results = program(*copies), compiled(*(given := [x.clone() for x in arguments]))
            for one, other in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(results), strict=True):
                assert torch.equal(one, other)
            for one, other in zip(copies, given, strict=True):
                assert torch.equal(one, other)
    return found(report)


# Every form.


def out_of_place() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor) -> Any:
        total = functional.all_reduce(x * 2, "sum", group)
        gathered = functional.all_gather_tensor(x + 1, 0, group)
        part = functional.reduce_scatter_tensor(gathered * 2, "avg", 0, group)
        exchanged = functional.all_to_all_single(x, None, None, group)
        sent = functional.broadcast(x * 3, 1, group)
        return total + 1, gathered * 1, part + 0, exchanged + 1, sent - x, x.t().contiguous()

    names = ["all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast"]
    assert same(program, values(2 * size, 3)) == [(name, SERVED) for name in names]


def coalesced() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor, y: torch.Tensor) -> Any:
        most = functional.all_reduce_coalesced([x, y * 2], "max", group)
        gathered = functional.all_gather_into_tensor_coalesced([x, y], group)
        parts = functional.reduce_scatter_tensor_coalesced([x * 2, y], "sum", [0, 0], group)
        return [each + 1 for each in (*most, *gathered, *parts)]

    ran = same(program, values(2 * size, 3), values(size))
    assert sorted(ran) == [
        *[("all_gather_into_tensor", SERVED)] * 2,
        *[("all_reduce", SERVED)] * 2,
        *[("reduce_scatter_tensor", SERVED)] * 2,
    ]


def in_place() -> None:
    size = dist.get_world_size()
    world()

    def program(x: torch.Tensor, gathered: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        dist.all_gather_into_tensor(gathered, x)
        dist.reduce_scatter_tensor(part, gathered * 2)
        return x + 1

    ran = same(program, values(3), torch.empty(3 * size), torch.empty(3))
    assert [outcome for _name, outcome in ran] == [SERVED] * 3


def operators_with_results() -> None:
    """The operators that torch's passes put into graphs."""
    name, size, ops = world().group_name, dist.get_world_size(), torch.ops._c10d_functional

    def program(x: torch.Tensor, y: torch.Tensor, gathered: torch.Tensor, part: torch.Tensor) -> Any:
        x, y = x + 1, y + 1
        a = ops.wait_tensor(ops.all_reduce_(x, "min", name))
        b, c = map(ops.wait_tensor, ops.all_reduce_coalesced_([y, y * 2], "sum", name))
        d = ops.wait_tensor(ops.broadcast_(y * 3, 1, name))
        e = ops.wait_tensor(ops.all_gather_into_tensor_out(a + 1, size, name, out=gathered * 0))
        f = ops.wait_tensor(ops.reduce_scatter_tensor_out(e * 2, "sum", size, name, out=part * 0))
        return a * 1, b * 1, c * 1, d * 1, e * 1, f * 1

    ran = same(program, values(3), values(4), torch.empty(3 * size), torch.empty(3))
    assert [outcome for _name, outcome in ran] == [SERVED] * 6


def other_shapes_and_dtypes() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor, scalar: torch.Tensor, half: torch.Tensor, numbers: torch.Tensor) -> Any:
        total = functional.all_reduce(x.t(), "sum", group)
        whole = functional.all_reduce(scalar * 2, "sum", group)
        gathered = functional.all_gather_tensor(half.t() * 2, 0, group)
        nothing = functional.all_gather_tensor(x[:0] * 2, 0, group)
        most = functional.all_reduce(numbers + 1, "max", group)
        part = functional.reduce_scatter_tensor(half.t(), "sum", 0, group)
        return total + 1, whole * 1, gathered * 1, nothing * 1, most + 1, part + 1

    numbers = torch.arange(4) * dist.get_rank()
    assert {outcome for _name, outcome in same(program, values(3, 2), values(), values(3, 2 * size).half(), numbers)} == {
        SERVED
    }


def dynamic_shapes() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor) -> Any:
        total = functional.all_reduce(x * 2, "sum", group)
        gathered = functional.all_gather_tensor(total + 1, 0, group)
        return functional.all_to_all_single(gathered, None, None, group) + 1, total * 1

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="symmem", fullgraph=True, dynamic=True)
    with reporting() as report:
        for rows in (4, 6, 10):
            x = values(rows * size, 3)
            for one, other in zip(program(x), compiled(x), strict=True):
                assert torch.equal(one, other)
    assert len(report.graphs) == 1
    assert [outcome for _name, outcome in found(report)] == [SERVED] * 3


def gradients() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor) -> torch.Tensor:
        gathered = functional.all_gather_tensor_autograd(x * 2, 0, group)
        part = functional.reduce_scatter_tensor_autograd(gathered.square(), "sum", 0, group)
        return functional.all_to_all_single_autograd(part, [2] * size, [2] * size, group).sin()

    torch._dynamo.reset()
    results = []
    with reporting() as report:
        for run in (program, torch.compile(program, backend="symmem", fullgraph=True)):
            x = values(2 * size, 3).requires_grad_()
            run(x).sum().backward()
            assert x.grad is not None
            results.append(x.grad)
    torch.testing.assert_close(*results)
    assert len(report.graphs) == 2
    assert [outcome for _name, outcome in found(report)] == [SERVED] * 6


def torchs_passes_for_overlap() -> None:
    """The passes move the waits of symmem's collectives as ever, and the results stay."""
    group = world()

    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = functional.all_reduce(x * 2, "sum", group)
        gathered = functional.all_gather_tensor(x + 1, 0, group)
        other = y @ y @ y
        return total.sum() + gathered.sum() + other

    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    x, y = values(4, 3), values(8, 8, seed=1)
    options = {"reorder_for_compute_comm_overlap": True}
    compiled = torch.compile(program, backend="symmem", fullgraph=True, options=options)
    result, (code, *_rest) = run_and_get_code(compiled, x, y)
    torch.testing.assert_close(result, program(x, y))
    lines = [line for line in code.splitlines() if "(" in line and ("symmem_all" in line or "wait_tensor" in line)]
    calls = ["wait" if "wait_tensor" in line else "call" for line in lines if " = collective" not in line]
    calls = [each for each, line in zip(calls, lines, strict=True) if not line.startswith(("#", "symmem"))]
    assert sorted(calls) == ["call", "call", "wait", "wait"]


@pytest.mark.parametrize(
    "program",
    [
        out_of_place,
        coalesced,
        in_place,
        operators_with_results,
        other_shapes_and_dtypes,
        dynamic_shapes,
        gradients,
        torchs_passes_for_overlap,
    ],
)
def test_every_form_has_the_results_of_eager_code(pool: RankPool, program: Callable[[], None]) -> None:
    pool.run(program)
