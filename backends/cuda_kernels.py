"""The kernels of barrier and signals, in CUDA C++.

A pad begins with uint32 words ``flag[channel, source]``, all 0 at first. ``source`` puts a signal by turning its word
in the receiver's pad from 0 to 1, for which it waits until the word is 0; the receiver takes it by turning 1 to 0. So
every operation leaves the words as the next one needs them, nothing has to be counted or reset, and a captured CUDA
graph can be replayed. This is the protocol of PyTorch's CUDASymmetricMemory, whose kernels work on these pads too.

Order: a put is a compare-and-swap with release semantics at system scope, a take begins with a load with acquire
semantics (PTX ISA, "Memory Consistency Model"), so what kernels before the put have stored, in any rank's memory, is
seen by kernels after the take. The barrier is all-to-all in one kernel, a thread for each put and one for each take,
in different warps: its latency is that of one store to a peer and back, not of two.

Failure: a kernel whose time is up writes which peer it waited for into host memory, and traps. A trap makes the CUDA
context of this process unusable, on purpose: no later kernel, in a graph or not, can go on with data that never came.
"""

from __future__ import annotations

__all__ = ["OPERATIONS", "SOURCE"]

OPERATIONS = ("barrier", "put_signal", "wait_signal")
"""Names of the kernels; the first is Operation 1 in the status that a kernel leaves."""

SOURCE = r"""
// WORLD, the number of ranks, is defined on the compiler's command line.
typedef unsigned int u32;
typedef unsigned long long u64;

struct Call {
  u32 *pads[WORLD];  // each rank's pad, in this process's addresses
  u32 *status;       // host memory: {operation, channel, peer, group}
  u64 limit;         // nanoseconds
  u32 channel, rank, peer, group;
};

enum Operation { BARRIER = 1, PUT = 2, WAIT = 3 };

const u32 SPINS = 64;                         // looks between two readings of the clock
const u32 HALF = (WORLD + 31) / 32 * 32;      // threads of the barrier that put, and that take: whole warps

__device__ __forceinline__ u32 swap_release(u32 *word, u32 expected, u32 value) {
  u32 old;
  asm volatile("atom.release.sys.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(old) : "l"(word), "r"(expected), "r"(value) : "memory");
  return old;
}

__device__ __forceinline__ u32 load_acquire(const u32 *word) {
  u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void store(u32 *word, u32 value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

// Called now and then, with 0 at first, when the clock starts; returns the deadline.
__device__ __noinline__ u64 give_up_when_late(const Call &call, u32 operation, u32 peer, u64 deadline) {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now) : : "memory");
  if (deadline == 0) return now + call.limit;
  if (now < deadline) return deadline;
  // One store of 16 bytes, so that two threads that give up at a time do not mix their reports.
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};"
               : : "l"(call.status), "r"(operation), "r"(call.channel), "r"(peer), "r"(call.group) : "memory");
  __threadfence_system();
  __trap();
  return 0;
}

__device__ __forceinline__ void put(const Call &call, u32 operation, u32 peer) {
  u32 *flag = call.pads[peer] + call.channel * WORLD + call.rank;
  u64 deadline = 0;
  for (u32 spins = 1; swap_release(flag, 0, 1) != 0; ++spins)
    if (spins % SPINS == 0) deadline = give_up_when_late(call, operation, peer, deadline);
}

__device__ __forceinline__ void take(const Call &call, u32 operation, u32 peer) {
  u32 *flag = call.pads[call.rank] + call.channel * WORLD + peer;
  u64 deadline = 0;
  for (u32 spins = 1; load_acquire(flag) == 0; ++spins)
    if (spins % SPINS == 0) deadline = give_up_when_late(call, operation, peer, deadline);
  store(flag, 0);  // the word is the receiver's as long as it is 1: nobody else writes it
}

extern "C" __global__ void barrier(const __grid_constant__ Call call) {
  const u32 peer = threadIdx.x % HALF;
  if (peer >= WORLD || peer == call.rank) return;
  if (threadIdx.x < HALF) put(call, BARRIER, peer);
  else take(call, BARRIER, peer);
}

extern "C" __global__ void put_signal(const __grid_constant__ Call call) { put(call, PUT, call.peer); }

extern "C" __global__ void wait_signal(const __grid_constant__ Call call) { take(call, WAIT, call.peer); }
"""
"""For NVRTC, with ``WORLD`` defined as the number of ranks. Needs no header, and sm_70 or newer."""
