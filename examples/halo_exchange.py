"""A stencil that stores halo rows directly into the neighbours' memory, with all steps in one CUDA C++ kernel.

    torchrun --nproc-per-node 4 examples/halo_exchange.py

Every rank owns some rows of a periodic grid, and averages the four neighbours of every cell (Jacobi). The kernel uses
symmem.cuh to put its first and last row into its neighbours' halos, with a signal for both; needs
pip install 'cuda-python>=13' cuda-core. On the CPU, torch and the signals of SymmetricTensor make the same exchange.
"""

import sys

import torch
import torch.distributed as dist

import symmem

KERNEL = r"""
#include "symmem.cuh"
extern "C" __global__ void jacobi(const symmem::View *of_grid, float *grid, long rows, long cols, long steps) {
  const symmem::View view = *of_grid;
  const unsigned up = (view.rank + view.world - 1) % view.world, down = (view.rank + 1) % view.world;
  const long size = (rows + 2) * cols;  // of one half of the memory; the two halves take turns
  for (long step = 0; step < steps; ++step) {
    const float *old = grid + step % 2 * size;
    float *now = grid + (step + 1) % 2 * size;
    for (long i = threadIdx.x; i < rows * cols; i += blockDim.x) {
      const long row = i / cols + 1, col = i % cols;
      now[row * cols + col] = 0.25f * (old[(row - 1) * cols + col] + old[(row + 1) * cols + col] +
                                       old[row * cols + (col + cols - 1) % cols] + old[row * cols + (col + 1) % cols]);
    }
    __syncthreads();
    symmem::put_with_signal(view, now + (rows + 1) * cols, (const float *)now + cols, cols, up, 0);
    symmem::put_with_signal(view, now, (const float *)now + rows * cols, cols, down, 1);
    symmem::wait_signal(view, down, 0);  // my lower halo has arrived, and the neighbour has read my earlier row
    symmem::wait_signal(view, up, 1);
  }
}
"""


def run_cuda(st: symmem.SymmetricTensor, rows: int, cols: int, steps: int) -> None:
    from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

    device = Device(torch.cuda.current_device())
    device.set_current()
    options = ProgramOptions(arch=f"sm_{device.arch}", include_path=symmem.include_path())
    kernel = Program(KERNEL, "c++", options).compile("cubin").get_kernel("jacobi")
    view = st.device_view()
    stream, config = torch.cuda.current_stream(), LaunchConfig(grid=1, block=512)
    launch(stream, config, kernel, view.struct_tensor.data_ptr(), st.tensor.data_ptr(), rows, cols, steps)
    st.synchronize()  # raises a named error if a neighbour did not come


def run_torch(st: symmem.SymmetricTensor, rows: int, cols: int, steps: int) -> None:
    up, down = (rank - 1) % world, (rank + 1) % world
    above, below = st.remote_tensor(up), st.remote_tensor(down)
    for step in range(steps):
        old, now, half = st.tensor[step % 2], st.tensor[(step + 1) % 2], (step + 1) % 2
        inner = old[1:-1]
        now[1:-1] = 0.25 * (old[:-2] + old[2:] + inner.roll(1, 1) + inner.roll(-1, 1))
        above[half, rows + 1] = now[1]
        st.put_signal(up, channel=0)
        below[half, 0] = now[rows]
        st.put_signal(down, channel=1)
        st.wait_signal(down, channel=0)
        st.wait_signal(up, channel=1)


on_gpu = torch.cuda.is_available()
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if on_gpu:
    torch.cuda.set_device(rank % torch.cuda.device_count())

rows, cols, steps = 32, 100, 50
whole = torch.rand(rows * world, cols, generator=torch.Generator().manual_seed(1))
st = symmem.allocate((2, rows + 2, cols), torch.float32).rendezvous()
mine = torch.arange(rank * rows - 1, (rank + 1) * rows + 1) % (rows * world)  # with the halo
st.tensor[0].copy_(whole[mine])
st.barrier()  # from here on, neighbours may store into this memory
(run_cuda if on_gpu else run_torch)(st, rows, cols, steps)

for _ in range(steps):
    whole = 0.25 * (whole.roll(1, 0) + whole.roll(-1, 0) + whole.roll(1, 1) + whole.roll(-1, 1))
if not torch.allclose(st.tensor[steps % 2, 1:-1].cpu(), whole[rank * rows : (rank + 1) * rows]):
    sys.exit(f"rank {rank}: the grid is wrong")
if rank == 0:
    how = "one CUDA kernel" if on_gpu else "torch"
    print(f"{steps} steps on a grid of {rows * world} x {cols}, {world} ranks, by {how}, {st.backend!r} memory: right")
st.barrier()
dist.destroy_process_group()
