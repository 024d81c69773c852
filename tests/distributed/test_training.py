"""DDP, FSDP2, tensor parallelism and compiled collectives over the backend symmem give the results of gloo."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import symmem
from symmem.distributed import report
from symmem.ops import functions as ops

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

STEPS = 3


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        loss = model(torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_ddp(group: Any) -> list[torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(layers(), process_group=group, bucket_cap_mb=1e-4)
    train(model)
    return [each.detach() for each in model.parameters()]


def with_fsdp(group: Any, from_the_arena: bool = False) -> list[torch.Tensor]:
    mesh = DeviceMesh.from_group(group, "cpu")
    model: Any = layers()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    if from_the_arena:
        for layer in (model[0], model[2], model):
            layer.set_allocate_memory_from_process_group_for_comm(True)
    train(model)
    return [each.full_tensor().detach() for each in model.parameters()]


def both(program: Callable[..., Sequence[torch.Tensor]], *arguments: Any) -> None:
    """Run a program over gloo and over symmem."""
    warnings.simplefilter("ignore", FutureWarning)
    expected = program(dist.new_group(backend="gloo"), *arguments)
    for one, other in zip(expected, program(dist.group.WORLD, *arguments), strict=True):
        torch.testing.assert_close(one, other)


def ddp() -> None:
    both(with_ddp)


def fsdp() -> None:
    both(with_fsdp)


def fsdp_from_the_arena() -> None:
    gathered = []
    original = ops.all_gather

    def recording(x: torch.Tensor, group: Any, out: torch.Tensor) -> torch.Tensor:
        gathered.append((symmem.find(out) is not None, out[group.rank].data_ptr() == x.data_ptr()))
        return original(x, group, out)

    expected = with_fsdp(dist.new_group(backend="gloo"))
    with mock.patch.object(ops, "all_gather", recording):
        found = with_fsdp(dist.group.WORLD, True)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
    in_arena, in_place = zip(*gathered, strict=True)
    assert sum(in_arena) == sum(in_place) >= 2 * STEPS  # all gathers of parameters; full_tensor() makes others
    gc.collect()


def tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    expected = layers()(x)
    model = parallelize_module(layers(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    result = model(x)
    result.sum().backward()
    torch.testing.assert_close(expected, result)


def compiled() -> None:
    size, world = dist.get_world_size(), cast("dist.ProcessGroup", dist.group.WORLD)

    @torch.compile(fullgraph=True)
    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = functional.all_reduce(x * 2, "sum", world)
        z = torch.empty(4 * size)
        dist.all_gather_into_tensor(z, x)
        dist.all_reduce(x)
        return y + 1, z, x

    warnings.simplefilter("ignore", FutureWarning)
    y, z, x = program(torch.ones(4))
    assert y.tolist() == [2 * size + 1] * 4
    assert z.tolist() == [1] * (4 * size)
    assert x.tolist() == [size] * 4


@pytest.mark.parametrize("program", [ddp, fsdp, fsdp_from_the_arena, tensor_parallel, compiled])
def test_programs_need_no_change(pool_of: Any, program: Callable[[], None]) -> None:
    pool_of(2).run(program)


def served() -> set[str]:
    return {each.by for each in report()}


def test_symmem_served_all_of_it(new_pool: Any) -> None:
    pool = new_pool(2, process_group="symmem")
    pool.run(ddp)
    pool.run(fsdp)
    assert pool.run(served) == [{"symmem"}] * 2
