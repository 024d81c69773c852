"""A one-shot all-reduce in Triton: every block waits for its peers' blocks, then adds up the values of all ranks.

    torchrun --nproc-per-node 4 examples/triton_all_reduce.py

The kernel accesses peers with symmem.triton, over any backend with load/store access. Without a GPU, the same kernel
runs in Triton's interpreter, on processes that share the host's memory (pip install triton numpy).
"""

import os
import sys

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import triton
import triton.language as tl

import symmem
from symmem import triton as symm


@triton.jit
def all_reduce(x, out, elements, pointers, signals, rank, world: tl.constexpr, block: tl.constexpr):
    number = tl.program_id(0)
    symm.barrier(signals, number, rank, world)  # all ranks have filled in x
    at = number * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    for peer in range(world):  # in the order of ranks, so that all ranks get the same sum
        total += symm.load(x + at, pointers, rank, peer, at < elements)
    tl.store(out + at, total, mask=at < elements)
    symm.barrier(signals, number, rank, world)  # no rank still reads x: it may be written again


on_gpu = torch.cuda.is_available()
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if on_gpu:
    torch.cuda.set_device(rank % torch.cuda.device_count())

elements, block = (250_000, 4096) if on_gpu else (5000, 512)
x = symmem.allocate(elements, torch.float32).rendezvous()
out = torch.empty(elements, dtype=torch.float32, device=x.device)
blocks = triton.cdiv(elements, block)
view = x.device_view()
assert blocks <= view.channels  # block b uses signal channel b; device_view(signals) takes memory for more


def input_of(peer: int, step: int) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(1000 * step + peer))


for step in range(3):
    x.tensor.copy_(input_of(rank, step))
    all_reduce[(blocks,)](x.tensor, out, elements, view.pointers, view.signals, rank, world, block)
    x.synchronize()  # raises a named error if a peer did not come
    expected = sum(input_of(peer, step) for peer in range(world))
    if not torch.equal(out.cpu(), expected):
        sys.exit(f"rank {rank}: the sum is wrong in step {step}")

if rank == 0:
    how = "compiled" if on_gpu else "interpreted"
    print(f"all-reduce of {elements} float32 over {world} ranks in Triton, {how}, {x.backend!r} memory: right")
x.barrier()
dist.destroy_process_group()
