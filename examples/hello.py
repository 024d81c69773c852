"""Every rank writes its number into symmetric memory, and adds up the numbers of all ranks.

    torchrun --nproc-per-node 4 examples/hello.py

To choose the backend, set SYMMEM_ENABLE=symmetric_memory_backend(host) (or NVFUSER_ENABLE), name a cluster file in
SYMMEM_CONFIG, or pass ``--backend host``. Otherwise symmem takes a backend that works.
"""

import argparse
import sys

import torch
import torch.distributed as dist

import symmem

parser = argparse.ArgumentParser()
parser.add_argument("--backend", help="name of a symmem backend")
args = parser.parse_args()

dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())

st = symmem.allocate(1024, torch.float32, backend=args.backend).rendezvous()
st.tensor.fill_(rank)
st.barrier()  # from here on, all ranks see the stores of all ranks

total = sum(st.remote_tensor(peer) for peer in range(world))
assert (total == world * (world - 1) / 2).all()
line = f"rank {rank} of {world}: {st.backend} memory, sum over all ranks {total[0].item():.0f}\n"
sys.stdout.write(line)  # one write, so that lines of ranks do not mix
sys.stdout.flush()

st.barrier()  # no rank leaves while others still read
dist.destroy_process_group()
