"""torch.compile on GPUs (mission D2 to D5, B3, E2): the cases of compile_cases.py, CUDA graphs, torch's own operators.

Run on a machine with two GPUs or more; elsewhere the reason is told.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmem
from symmem.tools.ranks import RankPool

if torch.cuda.device_count() < 2:
    pytest.skip("needs two NVIDIA GPUs", allow_module_level=True)

HERE = Path(__file__).parent


class _Cases:
    """compile_cases.py, which only ranks import."""

    def __getattr__(self, name: str) -> Any:
        sys.path.insert(0, str(HERE))
        return getattr(importlib.import_module("compile_cases"), name)


cases = _Cases()

# Those that need the CPU, or compile for long.
LEFT_OUT = ("cpp_wrapper", "memory_planning", "unknown_torch", "cuda_graphs", "options", "conditional")
ALL = re.findall(r"^def (case_\w+)", (HERE / "compile_cases.py").read_text(), re.MULTILINE)
CASES = [name for name in ALL if not any(each in name for each in LEFT_OUT)]
ENV = {"SYMMEM_TEST_DEVICE": "cuda", "SYMMEM_ENABLE": "signal_timeout(20s),rendezvous_timeout(20s)"}


@pytest.fixture(scope="module")
def pool(env: dict[str, str]) -> Iterator[RankPool]:
    with RankPool(2, env=env) as made:
        yield made


def run(name: str) -> None:
    getattr(cases, name)()


@pytest.mark.parametrize("name", CASES)
def test_case(pool: RankPool, name: str) -> None:
    pool.run(run, name)


def templates() -> None:
    """What Triton templates and cuBLAS are chosen from is written straight to symmetric memory (D2)."""
    name, weight = cases.group(), torch.ones(64, 64, device="cuda") / 64
    report = cases.check(
        lambda x: torch.ops.ct.total(x @ weight, name),
        lambda step: (cases.values(64, 64, seed=step),),
        lambda x: cases.summed(x @ weight),
        options={"max_autotune_gemm": True},
    )
    assert cases.outcomes(report) == [cases.PLACED]


def test_templates(pool: RankPool) -> None:
    pool.run(templates, timeout=75)


# CUDA graphs (D5).


def replayed(
    f: Callable[..., Any], make: Callable[[int], tuple[Any, ...]], expected: Callable[..., Any], calls: int = 12
) -> None:
    """Many calls under CUDA graphs, with other allocations in between."""
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="symmem", mode="reduce-overhead")
    others = []
    for step in range(calls):
        args = make(step)
        wanted = expected(*(each.clone() for each in args))
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*args)
        torch.testing.assert_close(torch.utils._pytree.tree_map(torch.clone, result), wanted)
        others.append(symmem.allocate((64, 64), dtype=torch.float32).tensor.fill_(step))
        others.append(torch.full((64, 64), float(step), device="cuda"))
        if step % 4 == 3:
            others.clear()
            symmem.collect()


def graphs_chain() -> None:
    name, weight = cases.group(), torch.ones(8, 8, device="cuda") / 8

    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.ops.ct.total(x @ weight, name)
        return x * 2

    def expected(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = cases.summed(x @ weight)
        return x * 2

    replayed(f, lambda step: (cases.values(8, 8, seed=step),), expected)


def graphs_inputs() -> None:
    """A plain input is copied once a call, outside of the capture; a symmetric one stays where it is."""
    name = cases.group()
    mine = symmem.allocate((32, 32), dtype=torch.float32).tensor

    def make(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return cases.values(32, 32, seed=step), mine.copy_(cases.values(32, 32, seed=step + 100))

    replayed(
        lambda x, y: torch.ops.ct.total(x, name) + torch.ops.ct.total(y, name),
        make,
        lambda x, y: cases.summed(x) + cases.summed(y),
    )


def graphs_in_place() -> None:
    name = cases.group()

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch.ops.ct.add_peer_(y, name)
        return y * 2

    replayed(f, lambda step: (cases.values(16, seed=step),), lambda x: cases.summed(x + 1) * 2)


def graphs_own_operators() -> None:
    name = cases.group()
    replayed(
        lambda x: symmem.ops.all_reduce(x + 1, name) * 2,
        lambda step: (cases.values(64, 64, seed=step),),
        lambda x: cases.summed(x + 1) * 2,
    )


# torch's own operators, in memory of torch's own transport.


def torch_operators(mode: str | None) -> None:
    name, weight = dist.group.WORLD.group_name, torch.ones(64, 64, device="cuda") / 64
    symm_mem = torch.ops.symm_mem

    def f(x: torch.Tensor) -> Any:
        y = symm_mem.one_shot_all_reduce(x @ weight, "sum", name)
        z = symm_mem.two_shot_all_reduce_(x + 1, "sum", name)
        return y, z, symm_mem.one_shot_all_reduce(x, "sum", name)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="symmem", mode=mode)
    for step in range(8):
        x = cases.values(64, 64, seed=step)
        wanted = cases.summed(x @ weight), cases.summed(x + 1), cases.summed(x)
        if mode:
            torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(tuple(each.clone() for each in compiled(x)), wanted)


def unaligned_input() -> None:
    """An argument that begins at no multiple of 16 bytes is taken where it lies."""
    name, whole = cases.group(), symmem.allocate(1001, torch.float32).rendezvous().tensor
    total = cases.ct.total
    run = cases.compiled(lambda x: total(x, name))
    cases.POINTERS.clear()
    for step in range(3):
        x = whole[1:].copy_(cases.values(1000, seed=step))
        torch.testing.assert_close(run(x), cases.summed(x))
    assert [whole[1:].data_ptr()] * 3 == cases.POINTERS


def torchs_memory(mode: str | None) -> None:
    """What a caller has in torch's own symmetric memory is not copied; a plain input is, by the copy engine, once."""
    import torch.distributed._symmetric_memory as torchs

    from symmem.tools.bench.compiled_counts import copies

    name = dist.group.WORLD.group_name
    mine = torchs.empty(64, 64, dtype=torch.float32, device="cuda")
    torchs.rendezvous(mine, name)
    symmem.allocate(1000, torch.float32, backend="pytorch_cuda")  # so that the next does not begin the arena
    carved = symmem.allocate((64, 64), torch.float32, backend="pytorch_cuda").rendezvous().tensor
    with symmem.use_symmetric_memory(backend="pytorch_cuda"):
        _first, pooled = torch.empty(1000, device="cuda"), torch.empty(64, 64, device="cuda")
    # Of tensors within an allocation, torch's operators read what lies at its beginning.
    for memory, wanted in (
        (mine, (0, 0)),
        *((each, (1, 0)) for each in (torch.empty(64, 64, device="cuda"), carved, pooled)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", name), backend="symmem", mode=mode
        )
        for step in range(6):
            memory.copy_(cases.values(64, 64, seed=step))
            total = cases.summed(memory)
            if mode:
                torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(memory).clone(), total)
        counted = copies(lambda: compiled(memory), "cuda")  # noqa: B023  # called here and now
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
    return str(cases.values(1).device.type)


def test_the_ranks_had_gpus(pool: RankPool) -> None:
    assert pool.run(device_type) == ["cuda", "cuda"]
