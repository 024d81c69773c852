"""The kernels of barrier and signals, in CUDA C++.

A pad holds uint32 words, all 0 at first::

    flag[channel, source]       1 while a signal from `source` has not been taken
    arrived[channel, source]    how many barriers of this channel `source` has come to, modulo 2**32
    turn[channel]               how many the owner has come to

``source`` puts a signal by turning its flag in the receiver's pad from 0 to 1, for which it waits until the word is 0;
the receiver takes it by turning 1 to 0. So every operation leaves the word as the next one needs it, and a captured
CUDA graph can be replayed. This is the protocol of PyTorch's CUDASymmetricMemory, whose kernels work on the flags too.

A barrier counts instead: each rank stores its turn into every peer's pad and waits until all have reached it, all to
all in one kernel. A store goes one way, where a compare-and-swap on a flag at the peer goes there and back. The turn
is counted on the device, so that a graph can be replayed.

Order: a put, and a rank's arrival (a fence, then the store), release at system scope; a take, and the wait for the
others, acquire (PTX ISA, "Memory Consistency Model"). So what kernels before it have stored, in any rank's memory, is
seen by kernels after it.

Failure: a kernel whose time is up writes which peer it waited for into host memory, and traps. A trap makes the CUDA
context of this process unusable, on purpose: no later kernel, in a graph or not, can go on with data that never came.

Long waits: each thread that waits says so in the same memory, and says it again after every beat. Nobody takes it back:
who reads it twice and finds it unchanged knows that the wait is over (:mod:`symmem.backends.kernel_words`). So nothing
is to be done at the end of a wait, however many threads, blocks and streams wait for a rank at a time.
"""

from __future__ import annotations

from symmem.backends.base import SIGNAL_CHANNELS

__all__ = [
    *("BAD_CHANNEL", "BEAT", "GROUP_SPREAD", "OPERATIONS", "PLACES", "SOURCE", "TICK"),
    *("lateness", "memory_access", "pad_words"),
]

OPERATIONS = ("barrier", "put_signal", "wait_signal")
"""Names of the kernels; the first is Operation 1 in the status that a kernel leaves."""

BAD_CHANNEL = 4
"""In the status: a kernel of the user's own named a channel that is not there, of as many as the peer's place says."""

BEAT, TICK = 26, 20
"""Who waits says so each time that 2**BEAT nanoseconds (67 ms) have passed, and since when in 2**TICK (1.05 ms)."""

PLACES, GROUP_SPREAD = 512, 61
"""Places of 16 bytes for what those that wait say, behind the status. Group g's wait for a peer is told at the place
(GROUP_SPREAD * g + peer) % PLACES. Peers of one group never share one, and groups of up to 61 ranks seldom do; of those
that do, who spoke last is seen."""


def pad_words(world: int) -> int:
    """Words of a pad in a group of ``world`` ranks."""
    return SIGNAL_CHANNELS * (2 * world + 1)


def memory_access(bits: int) -> str:
    """Source of what kernels load and store other ranks' words of 32 or 64 bits with, at system scope, and a fence."""
    register = {32: "r", 64: "l"}[bits]
    return (
        (
            r"""
__device__ __forceinline__ uBITS load_relaxed(const uBITS *word) {
  uBITS value;
  asm volatile("ld.relaxed.sys.global.uBITS %0, [%1];" : "=REGISTER"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ uBITS load_acquire(const uBITS *word) {
  uBITS value;
  asm volatile("ld.acquire.sys.global.uBITS %0, [%1];" : "=REGISTER"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed(uBITS *word, uBITS value) {
  asm volatile("st.relaxed.sys.global.uBITS [%0], %1;" : : "l"(word), "REGISTER"(value) : "memory");
}

__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.sys;" : : : "memory"); }
"""
        )
        .replace("uBITS", f"u{bits}")
        .replace("REGISTER", register)
    )


def lateness(operation: str, detail: str) -> str:
    """Source of what a thread that waits calls, for a ``struct Call`` with ``status``, ``limit`` and ``group``.

    Where a wait is told: {operation (8 bits), group (24)}, {detail (16), peer (16)}, ticks since it began, ticks left.

    Args:
        operation: Its number, in C++, made of ``call``, a pointer, and ``what``, which the caller says.
        detail: The second word of the status, ditto.
    """
    numbers = f"const u32 BEAT = {BEAT}, TICK = {TICK}, PLACES = {PLACES}, GROUP_SPREAD = {GROUP_SPREAD};\n"
    source = r"""
const u32 SPINS = 64;  // looks between two readings of the clock

__device__ __forceinline__ u64 read_clock() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now) : : "memory");
  return now;
}

// One store of 16 bytes, so that what two threads write at a time does not mix.
__device__ __forceinline__ void leave_word(u32 *at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};"
               : : "l"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void stop(const Call *call, u32 what, u32 peer) {
  leave_word(call->status, OPERATION, DETAIL, peer, call->group);
  __threadfence_system();
  __trap();
}

// Keeps the compiler from preparing, before anybody waits, what is made of these.
__device__ __forceinline__ void not_before(const Call *&call, u32 &peer) { asm volatile("" : "+l"(call), "+r"(peer)); }

// Called now and then by who waits, with 0 at first; returns when the wait began, to 256 ns, and in the lowest 8 bits
// how often it was told.
__device__ __forceinline__ u64 give_up_when_late(const Call *call, u32 what, u32 peer, u64 began) {
  const u64 now = read_clock();
  if (began == 0) return now & ~255ull;
  not_before(call, peer);
  const u64 waited = now - began;
  if (waited < call->limit) {
    if (((u32(waited >> BEAT) ^ u32(began)) & 255) == 0) return began;
    leave_word(call->status + 4 * (1 + (call->group * GROUP_SPREAD + peer) % PLACES), OPERATION << 24 | call->group,
               DETAIL << 16 | peer, u32(waited >> TICK), u32((call->limit - waited) >> TICK));
    return began + 1;
  }
  stop(call, what, peer);
  return 0;
}
"""
    return numbers + source.replace("OPERATION", operation).replace("DETAIL", detail)


SOURCE = (
    f"#define CHANNELS {SIGNAL_CHANNELS}"
    + r"""
// WORLD, the number of ranks, is defined on the compiler's command line.
typedef unsigned int u32;
typedef unsigned long long u64;

struct Call {
  u32 *pads[WORLD];  // each rank's pad, in this process's addresses
  u32 *status;       // host memory: {operation, channel, peer, group} of who gave up; then of those that wait
  u64 limit;         // nanoseconds
  u32 channel, rank, peer, group;
};

enum Operation { BARRIER = 1, PUT = 2, WAIT = 3 };

__device__ __forceinline__ u32 swap_release(u32 *word, u32 expected, u32 value) {
  u32 old;
  asm volatile("atom.release.sys.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(old) : "l"(word), "r"(expected), "r"(value) : "memory");
  return old;
}

"""
    + memory_access(32)
    + lateness("what", "call->channel")
    + r"""
__device__ __forceinline__ void put(const Call &call, u32 operation, u32 peer) {
  u32 *flag = call.pads[peer] + call.channel * WORLD + call.rank;
  u64 began = 0;
  for (u32 spins = 1; swap_release(flag, 0, 1) != 0; ++spins)
    if (spins % SPINS == 0) began = give_up_when_late(&call, operation, peer, began);
}

__device__ __forceinline__ void take(const Call &call, u32 operation, u32 peer) {
  u32 *flag = call.pads[call.rank] + call.channel * WORLD + peer;
  u64 began = 0;
  for (u32 spins = 1; load_acquire(flag) == 0; ++spins)
    if (spins % SPINS == 0) began = give_up_when_late(&call, operation, peer, began);
  store_relaxed(flag, 0);  // the word is the receiver's as long as it is 1: nobody else writes it
}

__device__ __forceinline__ u32 *arrived(const Call &call, u32 at, u32 source) {
  return call.pads[at] + (CHANNELS + call.channel) * WORLD + source;
}

// A thread for each rank. The fence does not wait for the turn to be loaded, nor the load for the fence.
extern "C" __global__ void barrier(const __grid_constant__ Call call) {
  u32 *turns = call.pads[call.rank] + 2 * CHANNELS * WORLD + call.channel;
  const u32 turn = load_relaxed(turns) + 1;
  const u32 peer = threadIdx.x;
  if (peer < WORLD && peer != call.rank) {
    fence();
    store_relaxed(arrived(call, peer, call.rank), turn);
    u64 began = 0;
    for (u32 spins = 1; int(load_acquire(arrived(call, call.rank, peer)) - turn) < 0; ++spins)
      if (spins % SPINS == 0) began = give_up_when_late(&call, BARRIER, peer, began);
  }
  __syncthreads();  // all have loaded the turn before it changes
  if (peer == 0) store_relaxed(turns, turn);
}

extern "C" __global__ void put_signal(const __grid_constant__ Call call) { put(call, PUT, call.peer); }

extern "C" __global__ void wait_signal(const __grid_constant__ Call call) { take(call, WAIT, call.peer); }
"""
)
"""For NVRTC, with ``WORLD`` defined as the number of ranks. Needs no header, and sm_70 or newer."""
