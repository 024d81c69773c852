// Kernels of the tests of symmem.cuh; it is included, or pasted, before.
struct Call {
  symmem::View view;
  int *x, *out;
  unsigned long long *n;
};
using namespace symmem;

extern "C" __global__ void meet(const __grid_constant__ Call call) {
  int *mine = call.x + blockIdx.x * blockDim.x + threadIdx.x;
  for (int round = 0; round < 20; ++round) {
    *mine = (int(mine - call.x) + round) * int(call.view.rank + 1);
    barrier(call.view, 1 + blockIdx.x);
    int total = 0;
    for (u32 peer = 0; peer < call.view.world; ++peer) total += load(call.view, mine, peer);
    call.out[(round * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] = total;
    barrier(call.view, 1 + blockIdx.x);
  }
}

extern "C" __global__ void ring(const __grid_constant__ Call call) {
  const View &view = call.view;
  const u32 right = (view.rank + 1) % view.world, left = (view.rank + view.world - 1) % view.world;
  for (int round = 0; round < 20; ++round) {
    int *source = call.out + threadIdx.x;
    *source = 100 * round + int(view.rank);
    __syncthreads();
    put_with_signal(view, call.x, (const int *)call.out, blockDim.x, right, 0);
    wait_signal(view, left, 0);
    call.out[(1 + round) * blockDim.x + threadIdx.x] = call.x[blockDim.x - 1 - threadIdx.x];
    put_signal(view, left, 3, 2);  // x may be overwritten
    wait_signal(view, right, 3, 2);
  }
}

extern "C" __global__ void tally(const __grid_constant__ Call call) {
  unsigned *words = (unsigned *)call.x;
  atomic_add(call.view, words, 1u, 0);
  atomic_add(call.view, call.n, 1ull << 32, 0);
  atomic_cas(call.view, words + 1, 0u, call.view.rank + 1, 0);
  atomic_exchange(call.view, call.n + 1, 7ull, 0);
  store(call.view, call.x + 4 + call.view.rank, 9, 0);
}

extern "C" __global__ void late(const __grid_constant__ Call call) {
  if (call.view.rank == 0) barrier(call.view, 2);
}

extern "C" __global__ void bad_channel(const __grid_constant__ Call call) { put_signal(call.view, 0, call.view.channels); }

extern "C" __global__ void keep(const __grid_constant__ Call call) {
  put_signal(call.view, call.view.rank, 4, 3);
  wait_signal(call.view, call.view.rank, 4, 2, true);
}
