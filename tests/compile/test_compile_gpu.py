"""torch.compile on GPUs: the cases of compile_cases.py, CUDA graphs, and torch's own operators.

The tests need a machine with two GPUs or more. Elsewhere they are skipped with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import compile_cases
import pytest
import torch
import torch.distributed as dist
from compile_operators import POINTERS
from compile_support import PATIENCE, case_pool, cases_of, check, compiled, ct, group, outcomes, summed, values
from patience import SETTINGS

import symmem
from symmem.compile.report import PLACED
from symmem.tools.ranks import RankPool

if torch.cuda.device_count() < 2:
    pytest.skip("needs two NVIDIA GPUs", allow_module_level=True)

ENV = {"SYMMEM_TEST_DEVICE": "cuda", "SYMMEM_ENABLE": SETTINGS}
pytestmark = pytest.mark.timeout(PATIENCE + 60)


@pytest.fixture(scope="module")
def pool(env: dict[str, str]) -> Iterator[RankPool]:
    with case_pool(env) as made:
        yield made


@pytest.mark.parametrize("case", cases_of(compile_cases, gpu=True), ids=attrgetter("__name__"))
def test_case(pool: RankPool, case: Callable[[], None]) -> None:
    pool.run(case)


def templates() -> None:
    """Triton templates and cuBLAS write straight to symmetric memory."""
    name, weight = group(), torch.ones(64, 64, device="cuda") / 64
    report = check(
        lambda x: ct.total(x @ weight, name),
        lambda step: (values(64, 64, seed=step),),
        lambda x: summed(x @ weight),
        options={"max_autotune_gemm": True},
    )
    assert outcomes(report) == [PLACED]


def test_templates(pool: RankPool) -> None:
    pool.run(templates)


# CUDA graphs.


def replayed(
    f: Callable[..., Any], make: Callable[[int], tuple[Any, ...]], expected: Callable[..., Any], calls: int = 12
) -> None:
    """Many calls under CUDA graphs, with other allocations in between."""
    torch._dynamo.reset()
    run = compiled(f, mode="reduce-overhead")
    others = []
    for step in range(calls):
        args = make(step)
        wanted = expected(*(each.clone() for each in args))
        torch.compiler.cudagraph_mark_step_begin()
        result = run(*args)
        torch.testing.assert_close(torch.utils._pytree.tree_map(torch.clone, result), wanted)
        others.append(symmem.allocate((64, 64), dtype=torch.float32).tensor.fill_(step))
        others.append(torch.full((64, 64), float(step), device="cuda"))
        if step % 4 == 3:
            others.clear()
            symmem.collect()


def graphs_chain() -> None:
    name, weight = group(), torch.ones(8, 8, device="cuda") / 8

    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = ct.total(x @ weight, name)
        return x * 2

    def expected(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = summed(x @ weight)
        return x * 2

    replayed(f, lambda step: (values(8, 8, seed=step),), expected)


def graphs_inputs() -> None:
    """A plain input is copied once per call, outside of the capture. A symmetric input is used in place."""
    name = group()
    mine = symmem.allocate((32, 32), dtype=torch.float32).tensor

    def make(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return values(32, 32, seed=step), mine.copy_(values(32, 32, seed=step + 100))

    replayed(
        lambda x, y: ct.total(x, name) + ct.total(y, name),
        make,
        lambda x, y: summed(x) + summed(y),
    )


def graphs_in_place() -> None:
    name = group()

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        ct.add_peer_(y, name)
        return y * 2

    replayed(f, lambda step: (values(16, seed=step),), lambda x: summed(x + 1) * 2)


def graphs_own_operators() -> None:
    name = group()
    replayed(
        lambda x: symmem.ops.all_reduce(x + 1, name) * 2,
        lambda step: (values(64, 64, seed=step),),
        lambda x: summed(x + 1) * 2,
    )


# torch's own operators, in memory of torch's transport.


def torch_operators(mode: str | None) -> None:
    name, weight = dist.group.WORLD.group_name, torch.ones(64, 64, device="cuda") / 64  # type: ignore[union-attr]
    symm_mem = torch.ops.symm_mem

    def f(x: torch.Tensor) -> Any:
        y = symm_mem.one_shot_all_reduce(x @ weight, "sum", name)
        z = symm_mem.two_shot_all_reduce_(x + 1, "sum", name)
        return y, z, symm_mem.one_shot_all_reduce(x, "sum", name)

    torch._dynamo.reset()
    run = compiled(f, mode=mode)
    for step in range(8):
        x = values(64, 64, seed=step)
        wanted = summed(x @ weight), summed(x + 1), summed(x)
        if mode:
            torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(tuple(each.clone() for each in run(x)), wanted)


def unaligned_input() -> None:
    """An argument whose address is no multiple of 16 bytes is used in place."""
    name, whole = group(), symmem.allocate(1001, torch.float32).rendezvous().tensor
    run = compiled(lambda x: ct.total(x, name))
    POINTERS.clear()
    for step in range(3):
        x = whole[1:].copy_(values(1000, seed=step))
        torch.testing.assert_close(run(x), summed(x))
    assert [whole[1:].data_ptr()] * 3 == POINTERS


def torchs_memory(mode: str | None) -> None:
    """An input in torch's symmetric memory is not copied. The copy engine copies a plain input once."""
    import torch.distributed._symmetric_memory as torchs

    from symmem.tools.bench.compiled_counts import copies

    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    mine = torchs.empty(64, 64, dtype=torch.float32, device="cuda")  # type: ignore[call-overload]
    torchs.rendezvous(mine, name)
    symmem.allocate(1000, torch.float32, backend="pytorch_cuda")  # so that the next is not at the arena's start
    suballocated = symmem.allocate((64, 64), torch.float32, backend="pytorch_cuda").rendezvous().tensor
    with symmem.use_symmetric_memory(backend="pytorch_cuda"):
        _first, pooled = torch.empty(1000, device="cuda"), torch.empty(64, 64, device="cuda")
    # For a tensor inside an allocation, torch's operators would read the start of the allocation.
    for memory, wanted in (
        (mine, (0, 0)),
        *((each, (1, 0)) for each in (torch.empty(64, 64, device="cuda"), suballocated, pooled)),
    ):
        torch._dynamo.reset()
        run = compiled(lambda x: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", name), mode=mode)
        for step in range(6):
            memory.copy_(values(64, 64, seed=step))
            total = summed(memory)
            if mode:
                torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(run(memory).clone(), total)
        counted = copies(lambda: run(memory), "cuda")  # noqa: B023  # called in this iteration
        assert (counted.engine, counted.kernel) == wanted, memory is mine


GRAPHS = [graphs_chain, graphs_inputs, graphs_in_place, graphs_own_operators]


@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: case.__name__)
def test_cuda_graphs(pool: RankPool, case: Callable[[], None]) -> None:
    pool.run(case)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_torch_operators(pool: RankPool, mode: str | None) -> None:
    pool.run(torch_operators, mode)


def test_an_input_that_is_not_aligned(pool: RankPool) -> None:
    pool.run(unaligned_input)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_torchs_own_memory(pool: RankPool, mode: str | None) -> None:
    pool.run(torchs_memory, mode)


def device_type() -> str:
    return str(values(1).device.type)


def test_the_ranks_had_gpus(pool: RankPool) -> None:
    assert pool.run(device_type) == ["cuda", "cuda"]
