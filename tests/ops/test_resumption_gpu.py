"""A rank refuses an operation on GPUs, or comes too late to it. The others get NaNs, and later operations work."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from patience import LONG, SETTINGS, SOON, TASK

import symmem
from symmem import ops
from symmem.errors import (
    InvalidArgumentError,
    MismatchError,
    PeerTimeoutError,
    RendezvousError,
    SymmemError,
    UnsupportedError,
)
from symmem.ops.engines.base import Engines
from symmem.tools.commands.doctor import examine
from symmem.tools.ranks import RankPool, rank_store

WORLD, ABSENT = 2, 1
FOUND = examine("native")

pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.why_not)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(WORLD, env={"SYMMEM_ENABLE": SETTINGS}, timeout=TASK) as made:
        yield made


def rank_and_group() -> tuple[int, symmem.Group]:
    group = symmem.resolve_group(None)
    return group.rank, group


def wrong_dtype(x: torch.Tensor) -> torch.Tensor:
    with pytest.raises(InvalidArgumentError, match="out must have"):
        ops.all_reduce(x, out=torch.empty_like(x, dtype=torch.float64))
    return x


def a_leaf(x: torch.Tensor) -> torch.Tensor:
    with pytest.raises(UnsupportedError, match="has no gradient"):
        ops.all_reduce(x, out=torch.empty_like(x).requires_grad_())
    return x


def integers(x: torch.Tensor) -> torch.Tensor:
    with pytest.raises(UnsupportedError, match="can be reduced"):
        ops.all_reduce(x.int())
    return x


def reduce(value: float, count: int = 8) -> float:
    result = ops.all_reduce(torch.full((count,), value, device="cuda"))
    torch.cuda.synchronize()
    first, last = result[0].item(), result[-1].item()
    assert first == last or (math.isnan(first) and math.isnan(last))
    return float(first)


def refuses(way: Callable[[torch.Tensor], torch.Tensor], count: int) -> None:
    rank, group = rank_and_group()
    for _ in range(3):
        assert reduce(1.0, count) == 2
    for _ in range(2):
        began = time.monotonic()
        if rank == ABSENT:
            way(torch.full((count,), 10.0, device="cuda"))
        else:
            assert math.isnan(reduce(10.0, count))
        assert time.monotonic() - began < SOON
        assert reduce(100.0, count) == 200
        if rank != ABSENT:
            with pytest.raises(SymmemError) as caught:
                group.check()
            assert caught.value.rank == ABSENT
        group.check()
        assert reduce(7.0, count) == 14


@pytest.mark.parametrize("count", [8, 1 << 20])
@pytest.mark.parametrize("way", [wrong_dtype, a_leaf, integers], ids=lambda way: way.__name__)
def test_the_next_operation_after_a_refusal_works(way: Any, count: int, pool: RankPool) -> None:
    pool.run(refuses, way, count, timeout=LONG)


def is_ahead() -> None:
    """Rank 0 launches many operations before its GPU comes to the refused one."""
    rank, group = rank_and_group()
    x = torch.ones(1000, device="cuda")
    assert reduce(1.0, 1000) == 2
    torch.cuda.synchronize()
    results = []
    if rank != ABSENT:
        torch.cuda._sleep(int(2e9))  # about a second
    for call in range(100):
        try:
            wrong = rank == ABSENT and call == 50
            results.append(ops.all_reduce(x, out=torch.empty(2, device="cuda") if wrong else None))
        except SymmemError:
            results.append(torch.full_like(x, torch.nan))
        if call == 95:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    values = [result[0].item() for result in results]
    assert values[:50] == [2.0] * 50
    assert all(value == 2.0 or math.isnan(value) for value in values)
    assert math.isnan(values[50])
    assert values[96:] == [2.0] * 4
    if rank != ABSENT:
        with pytest.raises(SymmemError, match="out must have"):
            group.check()


def test_a_rank_may_be_ahead_of_its_gpu(pool: RankPool) -> None:
    pool.run(is_ahead, timeout=LONG)


def replays() -> None:
    rank, _group = rank_and_group()
    x, out = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    st = symmem.allocate(8, torch.float32, backend="native").rendezvous()
    ops.all_reduce(x, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.all_reduce(x, out=out)

    def replay() -> float:
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        return float(out[0].item())

    assert replay() == 2
    if rank == ABSENT:
        wrong_dtype(x)
    else:
        assert math.isnan(reduce(1.0, 1000))
        with pytest.raises(RendezvousError, match="rank 1 refused a call"):
            st.synchronize()
    st.synchronize()
    st.barrier()  # signals work meanwhile
    for _ in range(10):
        assert math.isnan(replay())
    assert reduce(1.0, 1000) == 2
    for _ in range(10):
        assert replay() == 2


def test_graphs_work_again_after_the_next_eager_call(pool: RankPool) -> None:
    pool.run(replays, timeout=LONG)


def is_late(operation: str, count: int) -> None:
    rank, group = rank_and_group()
    x = torch.ones(count, device="cuda")

    def call() -> bool:
        """Whether the result is right; it is a NaN otherwise."""
        result = getattr(ops, operation)(x)
        torch.cuda.synchronize()
        ok = bool((result == (2 if operation == "all_reduce" else 1)).all())
        assert ok or bool(torch.isnan(result).any())
        return ok

    def wait_for(seconds: float) -> None:
        """The time limit of later operations."""
        group.settings = dataclasses.replace(group.settings, signal_timeout=seconds)
        engine = group.extension(Engines)[x.device]
        engine.use(engine.table)  # type: ignore[attr-defined]

    assert call()
    wait_for(1.0)
    key = f"gave up {operation} {count}"
    if rank == ABSENT:
        rank_store().wait([key])
    assert not call()
    if rank != ABSENT:
        rank_store().set(key, "yes")
    with pytest.raises(PeerTimeoutError, match=f"step {operation}. rank 1 did not come") as caught:
        call()
    assert caught.value.peers == (ABSENT,)
    wait_for(LONG)
    for _ in range(3):
        assert call()
    group.check()


@pytest.mark.parametrize("count", [8, 1 << 20])
@pytest.mark.parametrize("operation", ["all_reduce", "all_gather"])
def test_operations_work_again_after_a_timeout(operation: str, count: int, pool: RankPool) -> None:
    pool.run(is_late, operation, count, timeout=LONG)


def reduce_of(count: int, kind: str = "sum", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ops.all_reduce(torch.ones(count, dtype=dtype, device="cuda"), reduction=kind)


def gather_of(count: int) -> torch.Tensor:
    return ops.all_gather(torch.ones(count, device="cuda"))


def gather_into(symmetric: bool) -> torch.Tensor:
    """The result is in symmetric memory or elsewhere."""
    st = symmem.allocate((WORLD, 1 << 20), torch.float32).rendezvous()
    out = st.tensor if symmetric else torch.empty_like(st.tensor)
    return ops.all_gather(torch.ones(1 << 20, device="cuda"), out=out)


Call = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]

DIFFERENT: dict[str, tuple[Call, Call]] = {
    "sizes": ((reduce_of, (8,)), (reduce_of, (16,))),
    "large sizes": ((reduce_of, (1 << 22,)), (reduce_of, (1 << 21,))),
    "reductions": ((reduce_of, (8,)), (reduce_of, (8, "max"))),
    "reductions of many": ((reduce_of, (1 << 22,)), (reduce_of, (1 << 22, "max"))),
    "dtypes": ((reduce_of, (8, "sum", torch.float16)), (reduce_of, (8, "sum", torch.bfloat16))),
    "operations": ((reduce_of, (8,)), (gather_of, (8,))),
    "large operations": ((reduce_of, (1 << 20,)), (gather_of, (1 << 20,))),
    "places": ((gather_into, (True,)), (gather_into, (False,))),
}


def differs(name: str) -> None:
    rank, group = rank_and_group()
    for _ in range(3):
        assert reduce(1.0) == 2
    function, arguments = DIFFERENT[name][rank == ABSENT]
    for _ in range(2):
        began = time.monotonic()
        result = function(*arguments)
        torch.cuda.synchronize()
        assert time.monotonic() - began < SOON
        assert torch.isnan(result).any()
        with pytest.raises(
            MismatchError, match=r"ranks are at different operations: .* on rank 0, .* on rank 1"
        ) as caught:
            reduce(5.0)
        assert __file__ in str(caught.value)
        for value in (7.0, 8.0):
            assert reduce(value) == 2 * value
        group.check()


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ_are_named_on_all_ranks(name: str, pool: RankPool) -> None:
    pool.run(differs, name, timeout=LONG)


def replays_another_call() -> None:
    """Rank 0 replays a sum, and rank 1 asks for a maximum; before, both made the same calls in different ways."""
    rank, group = rank_and_group()
    x, out = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    ops.all_reduce(x, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.all_reduce(x, out=out)

    def call(reduction: str = "sum") -> float:
        if rank == ABSENT:
            ops.all_reduce(x, reduction=reduction, out=out)
        else:
            graph.replay()
        torch.cuda.synchronize()
        return out[0].item()

    for _ in range(10):
        assert call() == 2
    assert math.isnan(call("max"))
    with pytest.raises(MismatchError, match=r"all_reduce\(sum\) of 1000 .* on rank 0, all_reduce\(max\) of 1000 .* on"):
        reduce(1.0)
    for _ in range(10):
        assert call() == 2
    group.check()


def test_a_replay_is_compared_with_the_calls_of_other_ranks(pool: RankPool) -> None:
    pool.run(replays_another_call, timeout=LONG)
