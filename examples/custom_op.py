"""A custom operator, as serving engines have them, that registers its symmetric argument.

    torchrun --nproc-per-node 4 examples/custom_op.py

The operator gets its peers' memory from SymmetricTensor.wrap; its callers need not know. Because the argument is
registered, a call with plain memory raises a named error or works on a copy, instead of returning a wrong result. Code
in use_symmetric_memory() makes its tensors in symmetric memory, without a copy, and so does torch.compile.
"""

import sys

import torch
import torch.distributed as dist

import symmem


@torch.library.custom_op("serving::one_shot_all_reduce", mutates_args=())
def one_shot_all_reduce(x: torch.Tensor, tp_group: str) -> torch.Tensor:
    """Sum over the ranks of a group; x must be symmetric memory."""
    st = symmem.SymmetricTensor.wrap(x)  # raises if it is not
    st.barrier(group=tp_group)  # all ranks have filled in x
    peers = (st.remote_tensor(peer, group=tp_group) for peer in range(symmem.resolve_group(tp_group).size))
    total = sum(peers, torch.zeros_like(x))
    st.barrier(group=tp_group)  # no rank still reads x
    return total


@one_shot_all_reduce.register_fake
def _(x: torch.Tensor, tp_group: str) -> torch.Tensor:
    return torch.empty_like(x)


# The exit barrier lets compilers reuse x right after the call.
symmem.register_symm_mem_args("serving::one_shot_all_reduce", ["x"], exit_barrier=True)

on_gpu = torch.cuda.is_available()
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if on_gpu:
    torch.cuda.set_device(rank % torch.cuda.device_count())
device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
group = dist.group.WORLD.group_name


def input_of(peer: int) -> torch.Tensor:
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(peer)).to(device)


def check(case: str, y: torch.Tensor) -> None:
    expected = sum(2 * input_of(peer) for peer in range(world))
    if not torch.allclose(y, expected, rtol=1e-4, atol=1e-4):
        sys.exit(f"rank {rank}: the sum is wrong with {case}")
    if rank == 0:
        print(f"{case}: right")


plain = 2 * input_of(rank)
with symmem.ops.checked("error"):
    try:
        one_shot_all_reduce(plain, group)
    except symmem.errors.NotSymmetricError as error:
        if rank == 0:
            print(f"plain memory: NotSymmetricError, {error.what.splitlines()[0]}")
    else:
        sys.exit(f"rank {rank}: plain memory was let through")

with symmem.ops.checked("copy"):
    check("plain memory, copied for the op", one_shot_all_reduce(plain, group))

with symmem.use_symmetric_memory(group):
    made = 2 * input_of(rank)  # the multiplication knows nothing of symmetric memory
    check("memory made in use_symmetric_memory()", one_shot_all_reduce(made, group))
del made

compiled = torch.compile(lambda x: one_shot_all_reduce(2 * x, group), backend="symmem")
check("compiled, which writes 2 * x straight to symmetric memory", compiled(input_of(rank)))

dist.barrier()
dist.destroy_process_group()
