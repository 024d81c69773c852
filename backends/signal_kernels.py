"""The kernels of barrier and signals, in CUDA C++.

A pad holds uint32 words, all 0 at first::

    flag[channel, source]       1 while a signal from `source` has not been taken
    arrived[channel, source]    how many barriers of this channel `source` has come to, modulo 2**32
    turn[channel]               how many the owner has come to

To put a signal, ``source`` waits until its flag in the receiver's pad is 0, and sets it to 1. To take the signal, the
receiver waits until the flag is 1, and sets it to 0. So every operation leaves the word as the next one needs it, and a
captured CUDA graph can be replayed. PyTorch's CUDASymmetricMemory uses the same protocol, and its kernels can work on
these flags. They expect flags for more channels. Where symmem is PyTorch's symmetric memory, further flags for them are
behind all other words.

A barrier counts instead. In one kernel, every rank stores its turn into every peer's pad and waits until all have
reached that turn. A store travels one way, but a compare-and-swap on a flag at the peer makes a round trip. The turn is
counted on the device, so a graph can be replayed.

Order: a put, and the arrival of a rank (a fence, then the store), release at system scope. A take, and the wait for the
others, acquire (PTX ISA, "Memory Consistency Model"). So kernels after the operation see the stores of kernels before
it, in the memory of any rank.

A rank that is lost: if a process of the group ends, the host sets a word in host memory that waiting threads look at.
They give up: they write the awaited peer to host memory, and the kernel returns. All later waits of the group end in
the same way, within milliseconds. The CUDA context and this process's memory stay usable.

Timeout: such a kernel writes the awaited peer to host memory and traps. The trap makes the CUDA context of this process
unusable on purpose: no later kernel, in a graph or not, can continue with data that never came. Collective operations
give up instead, because they can replace the data by NaNs. A strict kernel traps for a lost rank too. Calls of
PyTorch's interface that give a timeout are strict, because their programs expect ``torch.cuda.synchronize()`` to raise.

Long waits: a waiting thread writes a report to the same memory, and again after every beat. It never removes the
report. A reader that finds it unchanged in two readings knows that the wait is over
(:mod:`symmem.backends.kernel_words`). So the end of a wait costs nothing, for any number of threads, blocks and streams
that wait for a rank.
"""

from __future__ import annotations

import functools

from symmem.backends.base import SIGNAL_CHANNELS

__all__ = [
    *("BAD_CHANNEL", "BEAT", "DIFFERS", "FLAG_BARRIER", "GROUPS", "GROUP_SPREAD", "LATE", "OPERATIONS", "PLACES"),
    *("REFUSED", "SOURCE", "TICK", "for_torch", "lateness", "memory_access", "pad_nbytes", "pad_words", "torch_nbytes"),
]

OPERATIONS = ("barrier", "put_signal", "wait_signal")
"""Names of the kernels. The first is operation 1 in the status."""

FLAG_BARRIER = "flag_barrier"
"""Name of a further kernel: a barrier for pads that hold flags alone, such as PyTorch's. It too is operation 1."""

BAD_CHANNEL = 4
"""An operation in the status: a user's kernel used a missing channel. The peer is then the number of channels."""

BEAT, TICK = 26, 20
"""A waiting thread reports every 2**BEAT nanoseconds (67 ms). Reports count time in 2**TICK nanoseconds (1.05 ms)."""

PLACES, GROUP_SPREAD = 512, 61
"""Places of 16 bytes behind the status, for the reports of waiting threads. A wait of group g for a peer is reported at
place (GROUP_SPREAD * g + peer) % PLACES. Peers of one group never share a place, and groups of up to 61 ranks rarely
do. In a shared place, the last report remains."""

GROUPS = 2048
"""Records of 32 bytes behind the places, one per group: {1 + a lost rank, or 0, from the host; 3 unused words;
operation, detail, peer and cause of a thread that gave up, from kernels}. The cause is 0 if a rank is lost, else
{LATE, REFUSED or DIFFERS (16 bits), the rank that made the others give up (8), the rank that it waited for (8)}."""

LATE, REFUSED, DIFFERS = 1, 2, 3
"""Why kernels of collective operations gave up: a rank did not come in time, refused the call, or made another one."""


for_torch = False
"""Whether pads end with room for PyTorch's kernels. :mod:`symmem.torch_backend` sets it. It counts at the first pad of
the process, and must be the same on all ranks."""


@functools.cache
def torch_nbytes() -> int:
    """Bytes of that room: as many as PyTorch's own pads have by default, for 32 blocks and 72 ranks; or 0."""
    return 4 * 32 * 72 if for_torch else 0


def pad_words(world: int) -> int:
    """The number of words of a pad in a group of ``world`` ranks, without the room for PyTorch's kernels."""
    return SIGNAL_CHANNELS * (2 * world + 1)


def pad_nbytes(world: int) -> int:
    """Bytes of a pad in a group of ``world`` ranks."""
    return 4 * pad_words(world) + torch_nbytes()


def memory_access(bits: int) -> str:
    """CUDA source: loads and stores of other ranks' words of 32 or 64 bits at system scope, and a fence."""
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


def lateness(operation: str, detail: str, timeout: str = "stop(call, what, peer);", lost: str = "") -> str:
    """CUDA source: timeouts and reports of waiting threads, and the end of their wait if a rank is lost.

    The source uses ``status``, ``limit`` and ``group`` of a ``struct Call``.
    A report is {operation (8 bits), group (24)}, {detail (16), peer (16)}, ticks since the start, ticks left.

    Args:
        operation: C++ expression for the number of the operation. It may use the pointer ``call``, and ``what``, an
            argument of the waiting code.
        detail: C++ expression for the second word of the status, with the same variables.
        timeout: C++ statements for a thread that has waited for ``limit``. By default it traps.
        lost: C++ statements for a thread that is about to give up because a rank is lost.
    """
    numbers = f"const u32 BEAT = {BEAT}, TICK = {TICK}, PLACES = {PLACES}, GROUP_SPREAD = {GROUP_SPREAD};\n"
    source = r"""
const u32 SPINS = 64;        // loads between two readings of the clock
const u32 TURNS = 256;       // readings of the clock between two loads of host memory, if there are as many threads
const u64 GIVEN_UP = ~0ull;  // the start of a wait for a group that has lost a rank

__device__ __forceinline__ u64 read_clock() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now) : : "memory");
  return now;
}

// One store of 16 bytes, so the reports of two threads never mix.
__device__ __forceinline__ void leave_word(u32 *at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};"
               : : "l"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void stop(const Call *call, u32 what, u32 peer) {
  leave_word(call->status, OPERATION, DETAIL, peer, call->group);
  __threadfence_system();
  __trap();
}

// What the host and the kernels of this process write about the group.
__device__ __forceinline__ u32 *record_of(const Call *call) {
  return call->status + 4 * (1 + PLACES) + 8 * call->group;
}

// Keeps the compiler from computing values from these before the wait, in the fast path.
__device__ __forceinline__ void not_before(const Call *&call, u32 &peer) { asm volatile("" : "+l"(call), "+r"(peer)); }

// Whether it is this thread's turn to look.
__device__ __forceinline__ bool is_turn(u32 reading) {
  const u32 threads = gridDim.x * blockDim.x, turns = threads < TURNS ? threads : TURNS;
  return reading % turns == (blockIdx.x * blockDim.x + threadIdx.x) % turns;
}

// A waiting thread calls this after every SPINS loads, first with began = 0. Returns whether it must wait on. `began`
// becomes the start of the wait, rounded to 256 ns, with the number of reports in the lowest 8 bits.
__device__ __forceinline__ bool waits_on(const Call *call, u32 what, u32 peer, u32 spins, u64 &began) {
  const u64 now = read_clock();
  not_before(call, peer);
  u32 *record = record_of(call);
  if (began == GIVEN_UP) {  // the rank's last stores have not come since either
    LOST
    leave_word(record + 4, OPERATION, DETAIL, peer, 0);
    return false;
  }
  if (began == 0) began = now & ~255ull;
  const u64 waited = now - began;
  // In long waits threads look at host memory, in turns: loads of all threads at once would take a millisecond, for
  // which the next kernel of a peer would wait.
  if (waited >> TICK != 0 && is_turn(spins / SPINS) && *(const volatile u32 *)record != 0) {
    began = GIVEN_UP;
    return true;
  }
  if (waited >= call->limit) { TIMEOUT }
  if (((u32(waited >> BEAT) ^ u32(began)) & 255) == 0) return true;
  leave_word(call->status + 4 * (1 + (call->group * GROUP_SPREAD + peer) % PLACES), OPERATION << 24 | call->group,
             DETAIL << 16 | peer, u32(waited >> TICK), u32((call->limit - waited) >> TICK));
  ++began;
  return true;
}
"""
    for name, code in (("OPERATION", operation), ("DETAIL", detail), ("TIMEOUT", timeout), ("LOST", lost)):
        source = source.replace(name, code)
    return numbers + source


SOURCE = (
    f"#define CHANNELS {SIGNAL_CHANNELS}"
    + r"""
// WORLD, the number of ranks, is defined on the compiler's command line.
typedef unsigned int u32;
typedef unsigned long long u64;

struct Call {
  u32 *pads[WORLD];  // every rank's pad, as an address of this process
  u32 *status;       // host memory: {operation, channel, peer, group} after a timeout; places of reports; records
  u64 limit;         // nanoseconds
  u32 channel, rank, peer, group;
  u32 strict;        // whether the kernel traps if a rank is lost
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
    + lateness("what", "call->channel", lost="if (call->strict) stop(call, what, peer);")
    + r"""
__device__ __forceinline__ void put(const Call &call, u32 operation, u32 peer) {
  u32 *flag = call.pads[peer] + call.channel * WORLD + call.rank;
  u64 began = 0;
  for (u32 spins = 1; swap_release(flag, 0, 1) != 0; ++spins)
    if (spins % SPINS == 0 && !waits_on(&call, operation, peer, spins, began)) return;
}

__device__ __forceinline__ void take(const Call &call, u32 operation, u32 peer) {
  u32 *flag = call.pads[call.rank] + call.channel * WORLD + peer;
  u64 began = 0;
  for (u32 spins = 1; load_acquire(flag) == 0; ++spins)
    if (spins % SPINS == 0 && !waits_on(&call, operation, peer, spins, began)) return;
  store_relaxed(flag, 0);  // only the receiver writes the word while it is 1
}

__device__ __forceinline__ u32 *arrived(const Call &call, u32 at, u32 source) {
  return call.pads[at] + (CHANNELS + call.channel) * WORLD + source;
}

// One thread per rank. The fence and the load of the turn do not wait for each other.
extern "C" __global__ void barrier(const __grid_constant__ Call call) {
  u32 *turns = call.pads[call.rank] + 2 * CHANNELS * WORLD + call.channel;
  const u32 turn = load_relaxed(turns) + 1;
  const u32 peer = threadIdx.x;
  if (peer < WORLD && peer != call.rank) {
    fence();
    store_relaxed(arrived(call, peer, call.rank), turn);
    u64 began = 0;
    for (u32 spins = 1; int(load_acquire(arrived(call, call.rank, peer)) - turn) < 0; ++spins)
      if (spins % SPINS == 0 && !waits_on(&call, BARRIER, peer, spins, began)) break;
  }
  __syncthreads();  // all threads have loaded the turn before it changes
  if (peer == 0) store_relaxed(turns, turn);
}

// One thread per rank, as above. A signal to every peer, and one from it.
extern "C" __global__ void flag_barrier(const __grid_constant__ Call call) {
  const u32 peer = threadIdx.x;
  if (peer >= WORLD || peer == call.rank) return;
  put(call, BARRIER, peer);
  take(call, BARRIER, peer);
}

extern "C" __global__ void put_signal(const __grid_constant__ Call call) { put(call, PUT, call.peer); }

extern "C" __global__ void wait_signal(const __grid_constant__ Call call) { take(call, WAIT, call.peer); }
"""
)
"""CUDA source for NVRTC. ``WORLD`` is the number of ranks. It includes no header, and needs sm_70 or newer."""
