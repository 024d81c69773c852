"""Methods of a process group on GPUs that C repeats: results, counts, and the calls that remain in Python."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import OPTIONS

from symmem.distributed import SymmemProcessGroup, report
from symmem.tools.commands.doctor import examine
from symmem.tools.ranks import RankPool

FOUND = examine("native")
WORLD = max(torch.cuda.device_count(), 2)

pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.why_not)


@pytest.fixture(scope="module")
def pool() -> Any:
    with RankPool(WORLD, process_group="symmem", **OPTIONS) as pool:
        yield pool


def calls_in_python() -> list[str]:
    """The calls of methods that are made in Python from now on."""
    seen: list[str] = []
    serve = SymmemProcessGroup._serve

    def noted(self: Any, name: str, *arguments: Any) -> Any:
        seen.append(name)
        return serve(self, name, *arguments)

    SymmemProcessGroup._serve = noted  # type: ignore[assignment, method-assign]
    return seen


def numbers(rank: int, turn: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return ((torch.arange(count, device="cuda") * 7 + rank * 5 + turn) % 13).to(dtype)


def all_methods() -> None:
    """Alternating shapes, dtypes and reductions, with new tensors at every call."""
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames some functions
    rank, world, seen = dist.get_rank(), dist.get_world_size(), calls_in_python()
    turns, cases = 4, [(count, dtype) for count in (3, 40, 65536) for dtype in (torch.float32, torch.bfloat16)]
    for turn in range(turns):
        for count, dtype in cases:
            given = [numbers(each, turn, count, dtype) for each in range(world)]
            rows = [numbers(each, turn, world * count, dtype) for each in range(world)]
            parts = [row.view(world, count)[rank] for row in rows]
            for op, wanted in (
                (dist.ReduceOp.SUM, sum(each.double() for each in given).to(dtype)),  # type: ignore[union-attr]
                (dist.ReduceOp.MAX, torch.stack(given).amax(0)),
            ):
                x = given[rank].clone()
                dist.all_reduce(x, op=op)
                assert torch.equal(x, wanted), (turn, count, dtype, op)
            x = given[rank].clone()
            dist.broadcast(x, src=world - 1)
            assert torch.equal(x, given[world - 1])
            out = torch.empty(world * count, dtype=dtype, device="cuda")
            dist.all_gather_into_tensor(out, given[rank])
            assert torch.equal(out, torch.cat(given))
            dist.all_to_all_single(out, rows[rank])
            assert torch.equal(out, torch.cat(parts))
            dist.reduce_scatter_tensor(x, rows[rank], op=dist.ReduceOp.MIN)
            assert torch.equal(x, torch.stack(parts).amin(0))
    assert len(seen) == len(cases) * 6  # the first call of a kind
    served = {each.operation: each.calls for each in report() if each.by == "symmem"}
    assert [served[name] for name in ("all_reduce", "broadcast", "all_gather", "all_to_all", "reduce_scatter")] == [
        2 * turns * len(cases),
        *[turns * len(cases)] * 4,
    ]


def what_is_left_to_python() -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.full((50,), rank + 1.0, device="cuda")
    for _ in range(2):
        dist.all_reduce(x.fill_(rank + 1.0))
    seen, total = calls_in_python(), world * (world + 1) / 2
    dist.all_reduce(x.fill_(rank + 1.0))
    assert (x == total).all()
    assert seen == []
    parameter = torch.nn.Parameter(torch.full((50,), rank + 1.0, device="cuda"))
    dist.all_reduce(parameter)
    with torch.inference_mode():
        inferred = torch.full((50,), rank + 1.0, device="cuda")
        dist.all_reduce(inferred)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        dist.all_reduce(x.fill_(rank + 1.0))
    torch.cuda.current_stream().wait_stream(side)
    for result in (parameter, inferred, x):
        assert (result == total).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_reduce(x)
    x.fill_(rank + 1.0)
    graph.replay()
    assert (x == total).all()
    return seen


def test_all_methods(pool: RankPool) -> None:
    pool.run(all_methods)


def test_what_is_left_to_python(pool: RankPool) -> None:
    """A parameter, which autograd protects; a call on another stream; a capture. Not: a tensor of inference mode."""
    for seen in pool.run(what_is_left_to_python):
        assert seen == ["allreduce"] * 3
