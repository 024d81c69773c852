"""``torch.ops.symm_mem`` for CPU tensors: results, arguments that are refused, and compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory

import symmem
from symmem import torch_backend
from symmem.errors import InvalidArgumentError, NotSymmetricError, PeerTimeoutError, SymmemError

symm_mem: Any = torch.distributed._symmetric_memory
ops: Any = torch.ops.symm_mem

NAME = "0"  # of the default group


def place() -> tuple[int, int]:
    torch_backend.enable()
    return dist.get_rank(), dist.get_world_size()


def values(rank: int, *shape: int) -> torch.Tensor:
    """The same on every rank for an argument."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def symmetric(values: torch.Tensor) -> torch.Tensor:
    t: torch.Tensor = symm_mem.empty(values.shape, dtype=values.dtype, device="cpu")
    return t.copy_(values)


def all_reduce_program() -> None:
    rank, world = place()
    for shape in ((4,), (3, 5), (1000,), (0,)):
        for name, reduced in (("sum", torch.sum), ("avg", torch.mean), ("max", torch.amax)):
            expected = reduced(torch.stack([values(r, *shape) for r in range(world)]), 0)
            x = symmetric(values(rank, *shape))
            buffer = symmetric(torch.zeros(max(x.numel(), 1) + 7))
            made = {
                "functional": ops.one_shot_all_reduce(x, name, NAME),
                "out": ops.one_shot_all_reduce_out(x, name, NAME, torch.empty(shape)),
                "copy": ops.one_shot_all_reduce_copy(buffer, values(rank, *shape), name, NAME),
                "copy out": ops.one_shot_all_reduce_copy_out(
                    buffer, values(rank, *shape), name, NAME, torch.empty(shape)
                ),
                "two-shot out": ops.two_shot_all_reduce_out(x, name, NAME, torch.empty(shape)),
            }
            assert torch.equal(x, values(rank, *shape))
            assert torch.equal(buffer[: x.numel()].view(shape), x)
            made["two-shot"] = ops.two_shot_all_reduce_(x, name, NAME)
            assert made["two-shot"] is x or made["two-shot"].data_ptr() == x.data_ptr()
            for form, got in made.items():
                assert got.shape == expected.shape, form
                assert torch.allclose(got, expected, atol=1e-6, equal_nan=True), form


def parts_program() -> None:
    rank, world = place()
    whole = [values(r, 2 * world, 3, 4 * world) for r in range(world)]
    x, total = symmetric(whole[rank]), torch.stack(whole).sum(0)
    first = ops.reduce_scatter_out(x, NAME, False, torch.empty(2, 3, 4 * world))
    last = ops.reduce_scatter_out(x, NAME, True, torch.empty(2 * world, 3, 4))
    torch.testing.assert_close(first, total.chunk(world)[rank])
    torch.testing.assert_close(last, total.chunk(world, -1)[rank])
    for memory in (x, whole[rank]):  # this operator takes any memory
        got = torch.ops._c10d_functional.wait_tensor(ops._low_contention_all_gather(memory, NAME))
        assert torch.equal(got, torch.cat(whole))
        for name, expected in (("sum", total), ("avg", total / world)):
            torch.testing.assert_close(
                ops._low_contention_reduce_scatter(memory, name, NAME), expected.chunk(world)[rank]
            )
    view = x[1:2]
    remote = ops.get_remote_tensors(x, NAME)
    assert [torch.equal(remote[r], whole[r]) for r in range(world)] == [True] * world
    symm_mem.rendezvous(x, NAME).barrier()
    assert view.shape == (1, 3, 4 * world)


def fused_program() -> None:
    rank, world = place()
    shards, b = [values(r, 4, 6) for r in range(world)], values(99, 6, 5)
    gathered, (product,) = ops.fused_all_gather_matmul(shards[rank], [b], 0, NAME)
    torch.testing.assert_close(gathered, torch.cat(shards))
    torch.testing.assert_close(product, torch.cat(shards) @ b)
    wide = [values(r, 4 * world, 6) for r in range(world)]
    got = ops.fused_matmul_reduce_scatter(wide[rank], b, "sum", 0, NAME)
    torch.testing.assert_close(got, torch.stack([w @ b for w in wide]).sum(0).chunk(world)[rank])


def words_program() -> None:
    place()
    t = symmetric(torch.zeros(8, dtype=torch.int32))
    assert ops.stream_write_value32_(t, 3, 2**32 - 1).tolist() == [0, 0, 0, -1, 0, 0, 0, 0]
    assert ops.memset32_(t, 1, 5, 2).tolist() == [0, 5, 5, -1, 0, 0, 0, 0]
    wrong: dict[str, Callable[[], object]] = {
        "a flat, contiguous uint32 tensor, or int32, not .* of torch.float32": lambda: ops.memset32_(
            torch.zeros(8), 0, 1, 1
        ),
        r"a flat, contiguous uint32 tensor, or int32, not \[2, 4\]": lambda: ops.memset32_(t.view(2, 4), 0, 1, 1),
        "count must be a positive integer": lambda: ops.memset32_(t, 0, 1, 0),
        r"val must be in the range of.*\(uint32_t\), not 4294967296": lambda: ops.memset32_(t, 0, 2**32, 1),
        "not -1": lambda: ops.stream_write_value32_(t, 0, -1),
        r"offset \+ count is 9, which exceeded the numel of the input, 8": lambda: ops.memset32_(t, 7, 1, 2),
        r"offset \+ count .* exceeded the numel": lambda: ops.stream_write_value32_(t, 8, 1),
        "offset must be greater than or equal to 0": lambda: ops.stream_write_value32_(t, -1, 1),
    }
    for text, call in wrong.items():
        with pytest.raises(InvalidArgumentError, match=text) as caught:
            call()
        assert isinstance(caught.value, RuntimeError)  # as PyTorch's kernels raise
    assert t.tolist() == [0, 5, 5, -1, 0, 0, 0, 0]


def refused_program() -> None:
    """What one rank refuses is refused on all ranks, and the next call works."""
    rank, world = place()
    x = symmetric(values(rank, 4))
    calls: dict[str, tuple[type[SymmemError], Callable[[], object]]] = {
        "plain": (NotSymmetricError, lambda: ops.one_shot_all_reduce(values(rank, 4), "sum", NAME)),
        "reduction": (InvalidArgumentError, lambda: ops.two_shot_all_reduce_(x, "product", NAME)),
        "shape": (InvalidArgumentError, lambda: ops.one_shot_all_reduce_out(x, "sum", NAME, torch.empty(5))),
        "small": (InvalidArgumentError, lambda: ops.one_shot_all_reduce_copy(x, torch.zeros(5), "sum", NAME)),
        "uneven": (
            InvalidArgumentError,
            lambda: ops.reduce_scatter_out(symmetric(torch.zeros(world + 1)), NAME, False, torch.empty(1)),
        ),
        "scalar": (
            InvalidArgumentError,
            lambda: ops._low_contention_reduce_scatter(torch.zeros(()), "sum", NAME),
        ),
    }
    for what, (kind, call) in calls.items():
        with pytest.raises(kind) as caught:
            call() if rank == 1 else ops.one_shot_all_reduce(x, "sum", NAME)
        assert not isinstance(caught.value, PeerTimeoutError), what
        got = ops.one_shot_all_reduce(x, "sum", NAME)
        torch.testing.assert_close(got, torch.stack([values(r, 4) for r in range(world)]).sum(0))


def two_doors_program() -> None:
    rank, world = place()
    expected = torch.full((10,), float(sum(range(world))))
    with symmem.use_symmetric_memory(dist.group.WORLD):
        redirected = torch.full((10,), float(rank))
    for x in (symmem.allocate(10).tensor.fill_(rank), redirected):
        assert torch.equal(ops.one_shot_all_reduce(x, "sum", NAME), expected)


def compiled_program(backend: str) -> None:
    rank, world = place()
    weight, buffer = values(7, 8, 8), symmetric(torch.zeros(100))

    def chain(x: torch.Tensor) -> torch.Tensor:
        x = ops.one_shot_all_reduce_copy(buffer, x @ weight, "sum", NAME)
        return ops._low_contention_all_gather(x.relu() * 2, NAME) + 1

    compiled = torch.compile(chain, backend=backend, dynamic=False)  # Inductor's lowerings of these fail otherwise
    for rows in (4, 4, 2):
        total = torch.stack([values(r, rows, 8) @ weight for r in range(world)]).sum(0).relu()
        torch.testing.assert_close(compiled(values(rank, rows, 8)), torch.cat([total * 2] * world) + 1)


def placed_program(backend: str) -> None:
    """The compiler allocates the operators' inputs as symmetric memory."""
    from torch._inductor.utils import run_and_get_code

    rank, world = place()
    weight = values(7, 8, 8)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = ops.one_shot_all_reduce(x @ weight, "sum", NAME).relu()
        return x

    compiled = torch.compile(chain, backend=backend, dynamic=False)  # Inductor's lowerings of these fail otherwise
    if backend == "inductor":
        _result, (code,) = run_and_get_code(compiled, values(rank, 4, 8))
        assert "= empty_strided_p2p(" in code
    for rows in (4, 4, 2):
        xs = [values(r, rows, 8) for r in range(world)]
        for _ in range(2):
            xs = [torch.stack([x @ weight for x in xs]).sum(0).relu()] * world
        torch.testing.assert_close(compiled(values(rank, rows, 8)), xs[0], rtol=1e-4, atol=1e-4)


def async_tp_program() -> None:
    """Inductor fuses matrix products with the collectives beside them, without NCCL."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code
    from torch.distributed._functional_collectives import all_gather_tensor, reduce_scatter_tensor

    rank, world = place()
    a, b = values(7, 8, 16), values(8, 16, 4)
    symm_mem.enable_symm_mem_for_group(NAME)
    nccl, group = dist.is_nccl_available, dist.group.WORLD
    assert group is not None

    def layer(x: torch.Tensor) -> torch.Tensor:
        wide = all_gather_tensor(x, 0, group) @ a
        return reduce_scatter_tensor(wide.relu() @ b, "sum", 0, group)

    shards = [values(r, 4, 8) for r in range(world)]
    expected = (torch.cat(shards) @ a).relu() @ b * world
    with config.patch(_micro_pipeline_tp=True, fx_graph_cache=False):
        result, (code,) = run_and_get_code(torch.compile(layer), shards[rank])
    assert "symm_mem.fused_all_gather_matmul" in code
    assert "symm_mem.fused_matmul_reduce_scatter" in code
    assert dist.is_nccl_available is nccl
    for got in (result, layer(shards[rank])):
        torch.testing.assert_close(got, expected.chunk(world)[rank])


PROGRAMS = [
    *(all_reduce_program, parts_program, fused_program, words_program, refused_program, two_doors_program),
]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(pools: Any, size: int, program: Any) -> None:
    pools.get(size, "torch_backend").run(program)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "symmem"])
def test_compiled(pools: Any, backend: str) -> None:
    pools.get(2, "torch_backend").run(compiled_program, backend)


@pytest.mark.parametrize("backend", ["inductor", "symmem"])
def test_placed(new_pool: Any, backend: str) -> None:
    new_pool(2).run(placed_program, backend)


def test_async_tp(new_pool: Any) -> None:
    new_pool(2).run(async_tp_program)
