"""Symmem's own calls in compiled code: right values, with a graph break where there must be one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmem
from symmem import ops, torch_compat
from symmem.tools.ranks import RankPool

pytestmark = pytest.mark.slow


def value(rank: int, step: int) -> float:
    return rank + 1.0 + step


def check(function: Callable[[torch.Tensor], torch.Tensor], expected: Callable[[float, float], float]) -> None:
    """Call a compiled function twice. Compute what to expect from the values of this rank and of the other."""
    rank = dist.get_rank()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager")
    for step in range(2):
        result = compiled(torch.full((4,), value(rank, step)))
        assert result.tolist() == [expected(value(rank, step), value(1 - rank, step))] * 4, (function, step)


# The first use of symmem, of its modules and of a group is in compiled code.


def reduced_in_place(x: torch.Tensor) -> torch.Tensor:
    ops.all_reduce(x, out=x)
    return x + 1


def allocated(x: torch.Tensor) -> torch.Tensor:
    made = symmem.allocate(4, torch.float32, device="cpu").rendezvous()
    made.tensor.copy_(x)
    made.barrier()
    result = made.remote_tensor(1 - dist.get_rank()) * 2
    made.barrier()
    return result


def redirected(x: torch.Tensor) -> torch.Tensor:
    with symmem.use_symmetric_memory():
        y = x * 2
        z = torch.empty_like(y)
    assert symmem.find(y) is not None
    assert symmem.find(z) is not None
    return y


COLD: dict[Any, Callable[[float, float], float]] = {
    reduced_in_place: lambda mine, other: mine + other + 1,
    allocated: lambda mine, other: other * 2,
    redirected: lambda mine, other: mine * 2,
}


def cold(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(function, COLD[function])


@pytest.mark.parametrize("function", COLD)
def test_a_cold_process(function: Any, new_pool: Callable[..., RankPool]) -> None:
    new_pool(2).run(cold, function)


# A cold group in a warm process.


def handles() -> None:
    """Handles outside of an arena, one-sided copies, signals, and views."""
    other = 1 - dist.get_rank()

    def program(x: torch.Tensor) -> torch.Tensor:
        made = symmem.allocate(4, arena=False, device="cpu").rendezvous()
        made.tensor.zero_()
        made.barrier()
        made.put(x * 2, other)
        made.put_signal(other)
        made.wait_signal(other)
        received = made.tensor + 1
        made.barrier()
        out = torch.empty(4)
        made.get(other, out)
        part = symmem.SymmetricTensor.wrap(made.tensor[:2]).get(other)
        both = made.contiguous_view().sum(0)
        found = symmem.find(made.tensor)
        assert found is not None
        made.barrier()
        made.close()
        return received + out + part.sum() + both + found.nbytes

    check(program, lambda mine, other: (2 * other + 1) + 2 * mine + 4 * mine + 2 * (mine + other) + 16)


def operators_with_out() -> None:
    rank = dist.get_rank()
    for group in (None, dist.new_group(), symmem.resolve_group(dist.new_group()), made()):

        def program(x: torch.Tensor, group: Any = group) -> torch.Tensor:
            rows = torch.stack([x, x + 1])
            out, wide = torch.empty(4), torch.empty(2, 4)
            total = ops.all_reduce(x, group, out=out) + ops.all_reduce(x, group)
            total = total + ops.all_gather(x, group, out=wide).sum(0)
            total = total + ops.reduce_scatter(rows, group, out=out)
            total = total + ops.all_to_all(rows, group, out=wide).sum(0)
            total = total + ops.all_to_all(rows, group, out=rows).sum(0)
            total = total + ops.broadcast(x * 1, group, root=1, out=out)
            y = x * 2
            return total + ops.all_reduce(y, group, out=y)

        def expected(mine: float, other: float) -> float:
            both, last = mine + other, other if rank == 0 else mine
            return 2 * both + both + (both + 2 * rank) * 3 + last + 2 * both

        check(program, expected)


def made() -> symmem.Group:
    """A group that is made from a store."""
    store = dist.distributed_c10d._get_default_store()
    return symmem.Group.from_store(dist.get_rank(), 2, dist.PrefixStore("made", store), "made")


def one_sided_operators() -> None:
    other = 1 - dist.get_rank()

    def program(x: torch.Tensor) -> torch.Tensor:
        handle = symmem.allocate(4, torch.float32)
        tensor = handle.tensor
        ops.barrier()
        ops.barrier(tensor)
        ops.put(tensor, x, other)
        ops.put_signal(tensor, other)
        ops.wait_signal(tensor, other)
        received = tensor + 0
        ops.barrier(tensor)
        out = torch.empty(4)
        ops.get(tensor, other, out=out)
        result = received + ops.get(tensor, other) + out
        ops.barrier(tensor)
        return result

    check(program, lambda mine, other: other + 2 * mine)


def other_names() -> None:
    """Functions about groups and memory, and those of torch_compat."""
    group = dist.new_group()
    other = 1 - dist.get_rank()

    def program(x: torch.Tensor) -> torch.Tensor:
        tensor = torch_compat.empty(4, device="cpu")
        handle = torch_compat.rendezvous(tensor, group)
        tensor.copy_(x)
        handle.barrier()
        received = handle.get_buffer(other, (4,), torch.float32) + 0
        handle.barrier()
        symmem.collect(group)
        assert symmem.memory_stats(group)
        assert symmem.memory_snapshot()
        return received + decorated(x) + symmem.resolve_group(group).size

    @symmem.use_symmetric_memory(group)
    def decorated(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    check(program, lambda mine, other: other + 2 * mine + 2)


def whole_graphs() -> None:
    """What is known without a call is in the graph."""
    handle = symmem.allocate((2, 3), torch.float32)

    def program(x: torch.Tensor) -> torch.Tensor:
        assert handle.device.type == "cpu"
        assert not handle.closed
        return ops.all_reduce(x.to(handle.dtype), symmem.resolve_group()) + handle.shape[1] + handle.nbytes

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [2 + 3 + 24] * 2


def destroyed() -> None:
    """Compiled functions do not keep a destroyed group."""
    kept = []
    for _ in range(2):
        process_group = dist.new_group()
        name = process_group.group_name

        def program(x: torch.Tensor, name: str = name) -> torch.Tensor:
            ops.all_reduce(x, name, out=x)
            with symmem.use_symmetric_memory(name):
                y = x * 2
            return y + symmem.allocate(4, group=name).rendezvous(name).tensor.fill_(0)

        torch._dynamo.reset()
        compiled = torch.compile(program, backend="eager")
        assert compiled(torch.ones(4)).tolist() == [4.0] * 4
        group = weakref.ref(symmem.resolve_group(name))
        dist.destroy_process_group(process_group)
        del process_group
        gc.collect()
        kept.append((compiled, group()))
    assert [group for _compiled, group in kept] == [None, None]


WARM = (handles, operators_with_out, one_sided_operators, other_names, whole_graphs, destroyed)


@pytest.mark.parametrize("case", WARM)
def test_a_warm_process(case: Callable[[], None], living_pool: Callable[..., RankPool]) -> None:
    living_pool(2).run(case)
