"""Expert dispatch: ranks store tokens directly into the memory of the experts' ranks, unevenly, and back.

    torchrun --nproc-per-node 4 examples/expert_dispatch.py

The number of tokens per expert is known only at run time, so ranks first store their counts in all ranks' memory. The
counts give the place of a rank's tokens in a peer's buffer, without padding or questions. A signal says that they are
there.
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

tokens, width = 100, 32  # per rank; a rank can receive world * tokens, if all go to one expert
counts = symmem.allocate((world, world), torch.int64).rendezvous()  # [source, expert]; one expert per rank
inbox = symmem.allocate((world * tokens, width), torch.float32).rendezvous()
outbox = symmem.allocate((tokens, width), torch.float32).rendezvous()
device = inbox.device
DISPATCH, COMBINE = 0, 1  # channels


def weight_of(expert: int) -> torch.Tensor:
    return torch.randn(width, width, generator=torch.Generator().manual_seed(expert)).to(device) / width**0.5


def share_counts(mine: torch.Tensor) -> list[list[int]]:
    """Store this rank's counts in all ranks' tables, and return the complete table."""
    for peer in range(world):
        counts.remote_tensor(peer)[rank].copy_(mine)
    counts.barrier()
    table = counts.tensor.tolist()  # waits for the GPU, because the copies below need the numbers
    counts.barrier()  # all ranks have read their table
    return table


def dispatch(x: torch.Tensor, expert_of: torch.Tensor) -> torch.Tensor:
    """Run every row of x through its expert."""
    order = expert_of.argsort(stable=True)
    table = share_counts(torch.bincount(expert_of, minlength=world))
    begins = [sum(table[rank][:expert]) for expert in range(world)]  # start of every expert's tokens in sorted_x
    sorted_x = x[order]
    for step in range(world):
        expert = (rank + step) % world  # so that ranks do not all begin with the same expert
        begin, number = sum(table[source][expert] for source in range(rank)), table[rank][expert]
        inbox.remote_tensor(expert)[begin : begin + number] = sorted_x[begins[expert] : begins[expert] + number]
        inbox.put_signal(expert, DISPATCH)

    weight, begin = weight_of(rank), 0
    for source in range(world):  # work on tokens that have arrived, while others are on their way
        number = table[source][rank]
        inbox.wait_signal(source, DISPATCH)
        done = inbox.tensor[begin : begin + number] @ weight
        back = sum(table[source][:rank])
        outbox.remote_tensor(source)[back : back + number] = done
        outbox.put_signal(source, COMBINE)
        begin += number
    for expert in range(world):
        outbox.wait_signal(expert, COMBINE)
    y = torch.empty_like(x)
    y[order] = outbox.tensor
    inbox.barrier()  # all ranks are done with both buffers: the next call may begin
    return y


for step in range(4):
    draw = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(tokens, width, generator=draw).to(device)
    # Higher ranks have fewer tokens for low experts; in the last step all tokens go to one expert.
    expert_of = torch.randint(0, world, (tokens,), generator=draw).clamp(min=min(rank, world - 1) // 2).to(device)
    if step == 3:
        expert_of.fill_(world - 1)
    y = dispatch(x, expert_of)
    inbox.synchronize()  # raises a named error if a peer did not come
    expected = torch.stack([row @ weight_of(expert) for row, expert in zip(x, expert_of.tolist(), strict=True)])
    if not torch.allclose(y, expected, rtol=1e-3, atol=1e-3):
        sys.exit(f"rank {rank}: the outputs are wrong in step {step}")

if rank == 0:
    print(f"{tokens} tokens of each of {world} ranks through {world} experts and back, {inbox.backend!r} memory: right")
inbox.barrier()
dist.destroy_process_group()
