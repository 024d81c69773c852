"""Fully sharded training (FSDP2). Two lines differ from the same program over gloo or NCCL.

    torchrun --nproc-per-node 2 examples/fully_sharded.py

Every rank holds a part of every parameter. FSDP2 gathers a layer before it is used, and reduces its gradients to the
parts. Its communication buffers come from the arena of the process group.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import symmem

dist.init_process_group("symmem")  # instead of "nccl" or "gloo"
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(4)), nn.Linear(32, 1)).to(device)


def train(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()


rows = 8  # per rank
data = torch.randn(rows * world, 32, generator=torch.Generator().manual_seed(2)).to(device)
targets = data.sum(1, keepdim=True).sin()
own = slice(rank * rows, (rank + 1) * rows)

sharded = make_model()
mesh = init_device_mesh(device.type, (world,))
for layer in (*sharded, sharded):
    fully_shard(layer, mesh=mesh)
for module in sharded.modules():
    if isinstance(module, FSDPModule):
        module.set_allocate_memory_from_process_group_for_comm(True)  # the second line
train(sharded, data[own], targets[own])

alone = make_model()
train(alone, data, targets)
for one, other in zip(sharded.parameters(), alone.parameters(), strict=True):
    assert isinstance(one, DTensor)
    whole = one.full_tensor()
    if not torch.allclose(whole, other, atol=1e-5):
        sys.exit(f"rank {rank}: the parameters differ by {(whole - other).abs().max().item()}")

if rank == 0:
    for each in symmem.distributed.report():
        print(f"{each.operation}: {each.calls} calls by {each.by} {each.why}")
    print(f"right: {world} ranks and one process have trained the same model")
dist.destroy_process_group()
