"""``symmem bench compile`` on two ranks: counts, checks and figures."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compile_support import PATIENCE, Deferred

import symmem
from symmem.tools.bench import compile
from symmem.tools.ranks import RankPool, RanksFailedError

contenders, counts, costs, graphs = (
    Deferred(f"symmem.tools.bench.compiled_{name}") for name in ("contenders", "counts", "costs", "graphs")
)

pytestmark = pytest.mark.timeout(PATIENCE + 60)


@pytest.fixture(scope="module")
def pool(env: dict[str, str]) -> Iterator[RankPool]:
    with RankPool(2, env=env, timeout=PATIENCE) as made:
        yield made


# Counting.

CODE = """
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
cpp_fused_add_0 = async_compile.cpp_pybinding(['const float*'], r'''
extern "C" void kernel(const float* in_ptr0)
''')
def call(self, args):
    buf0 = symmem_running.here.graph.buffer(symmem_1, (8, 64), (64, 1))
    cpp_fused_add_0(arg0_1, buf0)
    buf1 = empty_strided_cpu((8, 64), (64, 1), torch.bfloat16)
    torch.ops.symmem.all_reduce_out.default(x=buf0, reduction='sum', group_name='0', out=buf1)
    buf2 = empty_strided_p2p((8, 64), (64, 1), torch.bfloat16, torch.device("cuda:0"), group_name="0", alloc_id=7)
    buf3 = torch.ops.symm_mem.one_shot_all_reduce.default(buf2, 'sum', '0')
    buf4 = buf2; del buf2  # reuse
    buf5 = torch.ops._c10d_functional.wait_tensor.default(buf3)
"""


def counted() -> tuple[int, ...]:
    x = torch.ones(4, 4)
    name, handle = graphs.group(), symmem.allocate((4, 4), dtype=torch.float32).rendezvous()

    def eager() -> torch.Tensor:
        y = torch.empty_like(x).copy_(x @ x)
        return symmem.ops.all_reduce(y, name).clone()  # copies within the operator do not count

    within = partial(graphs.BENCH.total, handle.tensor.fill_(1), name)
    return (
        sum(counts.copies(eager, "cpu")),
        sum(counts.copies(within, "cpu")),
        sum(counts.copies(within, "cpu", CODE)),
        counts.allocations(lambda: dist.all_reduce(x @ x)),
        counts.buffers(CODE),
        counts.buffers(CODE.replace("empty_strided_p2p", "other")),
    )


def test_what_is_counted(pool: RankPool) -> None:
    assert pool.run(counted) == [(2, 0, 1, 1, 4, 3)] * 2


KERNELS = {
    "Memcpy DtoD (Device -> Device)": (True, False),
    "Memcpy HtoD (Pageable -> Device)": (False, False),
    "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>": (
        False,
        True,
    ),
    "triton_poi_fused_clone_0": (False, True),
    "triton_tem_fused_mm_0": (False, False),
    "nvjet_tst_64x8_64x16_4x1_v_bz_NNT": (False, False),
    "void one_shot_all_reduce_kernel<c10::BFloat16, 16>": (False, False),
    "one_shot": (False, False),
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": (False, False),
}
"""Whether the kernel is a copy by the copy engine, and whether it is a copy kernel."""


def copying() -> dict[str, tuple[bool, bool]]:
    return {name: (counts.is_engine_copy(name), counts.is_copy_kernel(name)) for name in KERNELS}


def test_kernels_that_copy(pool: RankPool) -> None:
    assert pool.run(copying) == [KERNELS] * 2


# Checking.


def check_chain(wrong: bool) -> None:
    data = graphs.Chain(3, 32, 2, "cpu", dist.get_rank(), dist.get_world_size())
    weights = data.weights[::-1] if wrong else data.weights
    functions = {"eager": (graphs.eager_chain(), None)}
    contenders.line_up(functions, None, lambda name, step: (data.x(step), weights), data.expected)


def test_a_chain_is_compared_with_what_it_must_return(pool: RankPool) -> None:
    pool.run(check_chain, False)
    with pytest.raises(RanksFailedError, match=r"WrongResultError: \[rank \d\] eager has \d+ of 64 elements wrong"):
        pool.run(check_chain, True)


def attempt() -> Any:
    """The contender fails on one rank."""

    def make() -> Any:
        if dist.get_rank():
            raise AssertionError("not here\nin detail")
        return counts.Compiled(torch.ones, "")

    logged: list[str] = []
    contenders.log.warning = lambda text, *args: logged.append(text % args)
    return contenders.attempted("inductor", make), logged


def test_a_peer_that_fails_on_one_rank_is_left_out_on_all(pool: RankPool) -> None:
    assert pool.run(attempt) == [(False, ["inductor is left out: AssertionError: not here"])] * 2


def failing_peer() -> tuple[list[str], list[str]]:
    """The contenders and the calls if stock Inductor compiles a function that fails when it runs."""
    module: Any = importlib.import_module("symmem.tools.bench.compiled_contenders")
    before, called, x = module.compiled, [], torch.ones(2)

    def compiled(function: Any, backend: str | None, mode: str | None, *args: Any) -> Any:
        def call(*args: Any) -> torch.Tensor:
            called.append(f"{backend}, {before_reset}")
            if backend == "inductor" and function is torch.neg:
                raise RuntimeError("no")
            return x

        before_reset = resets[0]
        return counts.Compiled(call, "")

    resets, forget = [0], module._forget
    module._forget = lambda: (resets.__setitem__(0, resets[0] + 1), forget())
    module.compiled = compiled
    functions = {"": (torch.abs, "symmem"), "one": (torch.abs, "inductor"), "two": (torch.neg, "inductor")}
    try:
        found = contenders.line_up(functions, None, lambda name, step: (x,), lambda step: x)
    finally:
        module.compiled, module._forget = before, forget
    return list(found), called


def test_who_is_lined_up_was_compiled_after_the_last_failure(pool: RankPool) -> None:
    """A failure ends the CUDA graphs of all functions that were compiled before it."""
    for found, called in pool.run(failing_peer):
        assert found == ["", "one"]
        assert called == ["inductor, 0"] * 4 + ["inductor, 1"] + ["symmem, 2"] * 4 + ["inductor, 2"] * 4


# Figures.


@pytest.mark.ranks
def test_a_chain_has_two_buffers_and_no_copies() -> None:
    figures = list(compile.measure("host", 2, 64, ("chain",), 1))
    assert {each.peer for each in figures} == {"inductor", "eager"}
    assert all(each.bytes == 8 * 64 * 2 and each.value >= 0 for each in figures)
    found = {(each.figure, each.peer): (each.value, each.peer_value) for each in figures if each.unit == "count"}
    for which in ("chain", "chain_placed"):
        assert found[f"{which}_buffers", "eager"] == (2, 8)
        assert found[f"{which}_copies", "eager"] == (0, 0)


def test_an_input_is_copied_unless_it_is_symmetric(pool: RankPool) -> None:
    for found in pool.run(partial_input):
        assert found == {"": 1, "_symmetric": 0, "eager": 1}


def partial_input() -> dict[str, int]:
    """Leave out stock Inductor, because it needs a C++ compiler here."""
    known = contenders.attempted
    importlib.import_module("symmem.tools.bench.compiled_contenders").attempted = lambda name, make: False  # type: ignore[attr-defined]
    try:
        return {name: sum(each.copies) for name, each in contenders.graph_input("cpu", 64, None).items()}
    finally:
        importlib.import_module("symmem.tools.bench.compiled_contenders").attempted = known  # type: ignore[attr-defined]


def test_costs_are_of_what_is_placed(pool: RankPool) -> None:
    for found in pool.run(few_calls):
        kinds = ("placed", "input", "copy", "input_beside_copy", "symmetric")
        assert list(found) == [(kind, count) for count in (1, 2) for kind in kinds]
        assert all(map(math.isfinite, found.values()))  # a difference of two times may be negative


def few_calls() -> dict[tuple[str, int], float]:
    module: Any = importlib.import_module("symmem.tools.bench.compiled_costs")
    module._CALLS, module._ARGUMENTS = 2, (1, 2)
    return costs.overhead("cpu")
