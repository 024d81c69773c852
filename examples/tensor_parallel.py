"""A tensor-parallel transformer block by torch's own parallelize_module, eager and under torch.compile.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

One line differs from the same program over gloo or NCCL: the backend of the process group. Every rank has a part of
each weight, so the attention and the MLP need one all-reduce each, in the backward pass too. symmem's operators run
them, in the compiled graphs as well. Outputs and gradients are compared with the same block on one rank.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import symmem

dist.init_process_group("symmem")  # instead of "nccl" or "gloo"
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)

batch, tokens, head_width, heads = 2, 16, 8, 2 * world
width = head_width * heads


class Block(nn.Module):
    """Attention and an MLP, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        parts = [
            layer(y).unflatten(-1, (-1, head_width)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        x = x + self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


def make_block() -> Block:
    torch.manual_seed(0)  # the same on all ranks
    return Block().to(device)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(block: nn.Module, parameters: nn.Module, alone: Block, how: str) -> None:
    """Compare outputs and gradients with those of one rank."""
    for step in range(2):
        x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(step)).to(device)
        for each in (parameters, alone):
            each.zero_grad()
        result, expected = block(x), alone(x)
        result.square().mean().backward()
        expected.square().mean().backward()
        pairs = [(result, expected)]
        pairs += [(p.grad, q.grad) for p, q in zip(parameters.parameters(), alone.parameters(), strict=True)]
        for one, other in pairs:
            if not torch.allclose(whole(one), other, rtol=1e-3, atol=1e-4):
                sys.exit(f"rank {rank}: {how}, step {step}: wrong by {(whole(one) - other).abs().max().item():.2g}")


columns, rows = ColwiseParallel, RowwiseParallel
plan = {"query": columns(), "key": columns(), "value": columns(), "out": rows(), "up": columns(), "down": rows()}
alone = make_block()
block = parallelize_module(make_block(), init_device_mesh(device.type, (world,)), plan)
check(block, block, alone, "eager")
check(torch.compile(block, backend="symmem"), block, alone, "compiled")  # or symmem.compile.enable()

x = torch.zeros(batch, tokens, width, device=device)
report = symmem.compile.explain(block, x)
ran = [decision.outcome for graph in report.graphs for decision in graph.decisions]
if set(ran) != {"run by symmem"}:
    sys.exit(f"rank {rank}: symmem does not run all collectives of the graphs: {report}")
if rank == 0:
    print(report)
    print(f"right: {world} ranks have the outputs and gradients of one, eager and compiled, on {device.type}")
dist.destroy_process_group()
