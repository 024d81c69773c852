"""A tensor-parallel MLP under torch.compile, with symmem's all-reduce in the graph.

    torchrun --nproc-per-node 4 examples/tensor_parallel.py

Every rank has a slice of the hidden layer: the first weight is split by columns, the second by rows, so that the MLP
needs one all-reduce. It compiles to one graph, in which Inductor plans the operator's buffers like any others. The
result is compared with the same MLP on one rank.
"""

import sys

import torch
import torch.distributed as dist

import symmem

on_gpu = torch.cuda.is_available()
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if on_gpu:
    torch.cuda.set_device(rank % torch.cuda.device_count())
device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

batch, width, hidden = 8, 64, 256


class ParallelMLP(torch.nn.Module):
    """This rank's part of an MLP. All ranks have the same input and the same output."""

    def __init__(self, whole_up: torch.Tensor, whole_down: torch.Tensor) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(whole_up.chunk(world, 1)[rank].contiguous())
        self.down = torch.nn.Parameter(whole_down.chunk(world, 0)[rank].contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        partial = torch.nn.functional.gelu(x @ self.up) @ self.down
        return symmem.ops.all_reduce(partial)


torch.manual_seed(0)  # the same on all ranks
up = (torch.randn(width, hidden) / width**0.5).to(device)
down = (torch.randn(hidden, width) / hidden**0.5).to(device)
mlp = torch.compile(ParallelMLP(up, down), fullgraph=True, backend="symmem")

for step in range(3):
    x = torch.randn(batch, width).to(device)
    with torch.no_grad():
        y = mlp(x)
    expected = torch.nn.functional.gelu(x @ up) @ down
    if not torch.allclose(y, expected, rtol=1e-3, atol=1e-3):
        sys.exit(f"rank {rank}: the output is wrong in step {step}, by {(y - expected).abs().max().item():.2g}")

if rank == 0:
    print(f"MLP {width} -> {hidden} -> {width} over {world} ranks on {device.type}, compiled: right")
dist.barrier()
dist.destroy_process_group()
