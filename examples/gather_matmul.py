"""All-gather overlapped with matmul: multiply one peer's rows while the next peer's rows arrive.

    torchrun --nproc-per-node 4 examples/gather_matmul.py

y = all_gather(x) @ w, where every rank has some rows of x and a separate w (a column-parallel layer with sequence
parallelism). No rank sends: ranks get their peers' rows, on a second CUDA stream, or in a thread on the CPU.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

import symmem

on_gpu = torch.cuda.is_available()
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if on_gpu:
    torch.cuda.set_device(rank % torch.cuda.device_count())

rows, inner, cols = (1024, 4096, 2048) if on_gpu else (64, 128, 96)
dtype = torch.bfloat16 if on_gpu else torch.float32
x = symmem.allocate((rows, inner), dtype).rendezvous()
every_x = torch.empty(world, rows, inner, dtype=dtype, device=x.device)
y = torch.empty(world, rows, cols, dtype=dtype, device=x.device)

side = torch.cuda.Stream() if on_gpu else None
thread = ThreadPoolExecutor(1)


def fetch(peer: int) -> Callable[[], None]:
    """Begin to copy a peer's rows. Returns a function that makes the current stream, or this thread, wait for them."""
    if side is None:
        return thread.submit(x.get, peer, every_x[peer]).result
    with torch.cuda.stream(side):
        x.get(peer, every_x[peer])
        arrived = side.record_event()
    return lambda: torch.cuda.current_stream().wait_event(arrived)


def gather_matmul(w: torch.Tensor) -> torch.Tensor:
    """all_gather(x) @ w, of shape [world * rows, cols]."""
    x.barrier()  # all ranks have filled in x
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    peers = [(rank + step) % world for step in range(1, world)]  # ranks start with different peers
    waits = [fetch(peer) for peer in peers]
    torch.matmul(x.tensor, w, out=y[rank])
    for peer, wait in zip(peers, waits, strict=True):
        wait()
        torch.matmul(every_x[peer], w, out=y[peer])
    x.barrier()  # no rank still reads x: it may be written again
    return y.view(world * rows, cols)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


for step in range(3):
    w = draw(100 + rank, inner, cols).to(x.device)
    x.tensor.copy_(draw(world * step + rank, rows, inner))
    made = gather_matmul(w)
    x.synchronize()  # raises a named error if a peer did not come
    whole = torch.cat([draw(world * step + peer, rows, inner) for peer in range(world)]).to(x.device)
    if not torch.allclose(made, whole @ w, rtol=1e-2, atol=1e-2 * inner**0.5):
        sys.exit(f"rank {rank}: the product is wrong in step {step}")

if rank == 0:
    how = "a second stream" if on_gpu else "a thread"
    print(f"all-gather of {world} x {rows} rows over {x.backend!r} memory, by {how} beside the matmuls: right")
x.barrier()
dist.destroy_process_group()
