"""Data-parallel training (DDP). One line differs from the same program over gloo or NCCL.

    torchrun --nproc-per-node 2 examples/data_parallel.py

Every rank trains on its part of the data, and DDP averages the gradients. The result equals that of one process that
sees all data.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import symmem

dist.init_process_group("symmem")  # instead of "nccl" or "gloo"
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1)).to(device)


def train(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()


rows = 8  # per rank
data = torch.randn(rows * world, 16, generator=torch.Generator().manual_seed(2)).to(device)
targets = data.sum(1, keepdim=True).sin()
own = slice(rank * rows, (rank + 1) * rows)

parallel = DistributedDataParallel(make_model())
train(parallel, data[own], targets[own])

alone = make_model()
train(alone, data, targets)
for one, other in zip(parallel.parameters(), alone.parameters(), strict=True):
    if not torch.allclose(one, other, atol=1e-5):
        sys.exit(f"rank {rank}: the parameters differ by {(one - other).abs().max().item()}")

if rank == 0:
    for each in symmem.distributed.report():
        print(f"{each.operation}: {each.calls} calls by {each.by} {each.why}")
    print(f"right: {world} ranks and one process have trained the same model")
dist.destroy_process_group()
