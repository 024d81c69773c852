"""One script for a laptop, a host with 8 GPUs and a cluster: all differences are in YAML files.

A laptop, with host memory shared by 4 processes:

    SYMMEM_CONFIG=examples/clusters/laptop.yaml torchrun --nproc-per-node 4 examples/anywhere.py

A host with 8 GPUs:

    SYMMEM_CONFIG=examples/clusters/hgx.yaml torchrun --nproc-per-node 8 examples/anywhere.py

A Slurm cluster, 4 hosts with 8 GPUs each (in an sbatch script, with --nodes 4 --ntasks-per-node 1 --gpus-per-node 8):

    export SYMMEM_CONFIG=examples/clusters/multi-node.yaml
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun torchrun --nnodes 4 --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
        --rdzv-endpoint "$head:29500" examples/anywhere.py

The program finds the largest eigenvalue of a matrix that is split over all ranks, by power iteration.
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

rows = 32  # per rank
size = rows * world
whole = torch.rand(size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
whole = whole + whole.T

part = symmem.allocate(rows, torch.float64).rendezvous()  # the configuration chooses device and backend
mine = whole[rank * rows : (rank + 1) * rows].to(part.device)
vector = torch.ones(size, dtype=torch.float64, device=part.device) / size**0.5
for _ in range(100):
    torch.mv(mine, vector, out=part.tensor)
    vector = symmem.ops.all_gather(part.tensor).flatten()
    value = vector.norm()
    vector = vector / value

expected = torch.linalg.eigvalsh(whole)[-1].item()
if abs(value.item() - expected) > 1e-9 * expected:
    sys.exit(f"rank {rank}: {value.item()} is not the eigenvalue {expected}")
if rank == 0:
    settings = symmem.resolve_group().settings
    print(f"largest eigenvalue of a {size} x {size} matrix over {world} ranks: {value.item():.6f}, right")
    print(f"backend {part.backend!r}: {settings.origins['backend']}")
    print(f"arena of {settings.arena_size >> 20} MiB: {settings.origins['arena_size']}")
    print(f"ranks wait {settings.signal_timeout:g} s for each other: {settings.origins['signal_timeout']}")
part.barrier()
dist.destroy_process_group()
