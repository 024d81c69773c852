"""Every rank writes its number into memory that all ranks can reach, and adds up what it sees there.

    torchrun --nproc-per-node 4 examples/hello.py

The backend is chosen from outside: SYMMEM_ENABLE=symmetric_memory_backend(host), NVFUSER_ENABLE likewise, or a
cluster file that SYMMEM_CONFIG names; or here, by ``--backend host``. With none of these, symmem takes what works.
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
st.barrier()  # from here on, all ranks see what all have written

total = sum(st.remote_tensor(peer) for peer in range(world))
assert (total == world * (world - 1) / 2).all()
line = f"rank {rank} of {world}: {st.backend} memory, sum over all ranks {total[0].item():.0f}\n"
sys.stdout.write(line)  # in one piece, so that ranks' lines do not mix
sys.stdout.flush()

st.barrier()  # nobody leaves while others still read
dist.destroy_process_group()
