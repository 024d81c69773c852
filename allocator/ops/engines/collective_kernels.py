"""The kernels of the collective operations, in CUDA C++.

Every rank has a workspace. All other ranks can load from it and store to it::

    control    turn         uint64: how many kernels the owner has finished, plus 2**32 for every call, also from graphs
               end          uint32: 2 * turn + 1, modulo 2**32, if the owner's kernels give up from this turn on; else 0
               cause        uint32: why, from the rank that set it; see :data:`symmem.backends.signal_kernels.GROUPS`
               call         uint32: the signature of the owner's first call that gave up, or 0
               ticket       uint32: how many blocks of the running kernel have read the turn
               marks        uint64 [2 parities, source]: {signature of the call of `source`, the turn + 1 (32 bits)}
               flags        uint64 [2 parities, 2 phases, block, source]: the turn in which this block of `source` came
    landing    [2 parities, source, SLOT bytes]: data that `source` pushed to the owner; at rest, all bytes are 255
    stage      [2 parities, STAGE bytes]: data that the owner publishes for others to pull

**Pushing, without a barrier.** A rank stores units of 16 bytes into the landing zones of its peers, and polls its own
landing zone. A unit has two words of 8 bytes. Every word arrives whole. At rest a word is 64 ones; any other value
means that the data has arrived. The reader then restores the 64 ones. So a word is its own flag, and neither flags nor
fences are needed. In float reductions, 64 ones are NaNs, and the sender replaces them by other NaNs. If bits must pass
unchanged, a word carries 4 bytes of data and 32 zeros. This doubles the traffic, as in NCCL's LL protocol, which also
relies on words of 8 bytes. (PTX ISA, "Memory Consistency Model": a vector access is one access per element, in any
order; elements of up to 64 bits are single-copy atomic. Data as its own flag is the idea of the "Lamport" kernels of
TensorRT-LLM and of NCCL's LL.)

* `one_shot`: every rank pushes everything to every rank. One trip over the link, (world - 1) x bytes of traffic.
* `two_shot`: every rank pushes slice p to rank p. Rank p reduces it and pushes the result to all. Two trips,
  2 x bytes. A thread sends its next unit before it waits for the previous one, so the links stay busy.
* `reduce_scatter`: the first half of `two_shot`. `exchange`: slices of plain bytes, for all other operations.

**Comparing.** A call has a signature: a hash of all that must be equal on all ranks. At its start a rank stores it to
all others. While the threads of a block wait for data, its last warp waits for the signatures of all ranks. If one
differs, all ranks give up. No block ends before it has compared, and `put` stores nothing before, so a result of calls
that differ looks wrong on all ranks. This adds a store per peer, and no trip.

**Why the landing zone can be reused.** The parity alternates with the turn. In every operation, every rank waits for
the signatures of all others, so for all of them to begin this operation. So a rank in turn t + 2 knows that all ranks
have begun turn t + 1. Hence they have ended the kernel of turn t, and this kernel had read and reset the words that the
rank now overwrites. In its stores, no rank is ever more than one turn ahead of another. The kernels count the turn on
the device, so a CUDA graph can be replayed and mixed with eager operations.

**Meeting, for large sizes.** After a fence, block b of a rank stores the turn into a flag of block b on all peers, and
waits for their flags. A block never waits for other blocks of its GPU. Flags have 64 bits, so they never wrap around.

* `pull`: a rank copies its part to its stage, meets the others, and loads the parts it needs from their stages.
* `put`: for results in symmetric memory. A rank stores its part into the results of all ranks, between two meetings.

**Deterministic.** All algorithms reduce elements in rank order, in float32 (float64 for float64), and round once. A
result is rounded before it is passed on. With the macro TREE they add ranks as a balanced binary tree instead.

**In place.** A thread reads all it needs of the elements that it overwrites before it overwrites them.

**Giving up.** A kernel gives up if a rank is lost, if a peer does not come within the time limit, if a peer makes
another call, or if a rank refuses the call and therefore launches no kernel. It returns. In the results of a block that
gave up, sums are NaNs; of elements that are only moved from other ranks, all bits are 1. It writes a record to host
memory. The word `end` keeps that: later kernels of this rank give up at their start. They store nothing to peers, which
may be several turns behind, and do not advance the turn. A thread that has waited for the time limit, or that finds
another signature, sets the `end` of all ranks. A rank that refuses a call does so when its earlier kernels are done;
the peers still finish those. If a rank is lost, every other rank sets its own `end`. The host resets the workspaces
when the kernels of all ranks have returned; see :mod:`.cuda`.

During a long wait a thread publishes that it waits, as in :mod:`symmem.backends.signal_kernels`.

An engine runs its operations one after the other: from one stream, or from several that events order. Blocks wait only
for the block of the same number on other ranks, so kernels cannot block one another by occupying the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from symmem.backends.signal_kernels import DIFFERS, LATE, lateness, memory_access

__all__ = [
    *("CALL", "CAUSE", "COMPARING", "END", "KERNELS", "OPERATORS", "SOURCE", "STEPS", "THREADS"),
    *("TYPES", "WorkspaceLayout"),
]

STEPS = {16: "all_reduce", 17: "all_gather", 18: "reduce_scatter", 19: "all_to_all", 20: "broadcast"}
"""Numbers of the operations in a kernel's status. Smaller numbers belong to the signals."""

TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "E4M3",
    torch.float8_e5m2: "E5M2",
    torch.float64: "F64",
}
"""Dtypes that can be reduced, and their names in the source. Float8 saturates instead of becoming infinite."""

OPERATORS = {"sum": "SUM", "avg": "AVG", "min": "MIN", "max": "MAX"}
"""Names of the reductions in the source. Minimum and maximum of a NaN are NaN."""

KERNELS = {
    "reduce": ("one_shot", "two_shot", "reduce_scatter"),
    "move": ("exchange", "pull", "put"),
}
"""The kernels of the two modules. `reduce` is compiled per dtype and reduction; `move` copies plain bytes."""

END, CAUSE, CALL = 8, 16, 20
"""Offsets of these words of the control area."""

THREADS, COMPARING = 512, 32
"""Most threads of a block that move data, and its further threads, which compare calls; these come last. The registers
of a kernel are limited, so that a multiprocessor can run two such blocks at once."""

_MARKS = 128  # offset of the marks; before them are the turn and, in a separate cache line, the ticket


class WorkspaceLayout(NamedTuple):
    """Offsets and sizes in a workspace.

    Attributes:
        world: Number of ranks.
        blocks: Maximum number of blocks of a kernel.
        slot: Bytes that one source can push in one turn. Both trips of `two_shot` use half of it.
        stage: Bytes that a rank can publish in one turn.
    """

    world: int
    blocks: int
    slot: int
    stage: int

    @classmethod
    def make(cls, world: int, landing: int, stage: int, blocks: int) -> WorkspaceLayout:
        """Return a layout with about ``landing`` and ``stage`` bytes per parity."""
        return cls(world, blocks, max(landing // world // 512 * 512, 512), -(-stage // 512) * 512)

    @property
    def flags(self) -> int:
        """Offset of the flags."""
        return _MARKS + 2 * self.world * 8

    @property
    def landing(self) -> int:
        """Offset of the landing zones."""
        return -(-(self.flags + 2 * 2 * self.blocks * self.world * 8) // 4096) * 4096

    @property
    def stages(self) -> int:
        """Offset of the stages."""
        return self.landing + 2 * self.world * self.slot

    @property
    def nbytes(self) -> int:
        """Bytes of a workspace."""
        return self.stages + 2 * self.stage

    def macros(self) -> dict[str, str]:
        """Return the macros that describe this layout to the source."""
        numbers = {
            "WORLD": self.world,
            "BLOCKS": self.blocks,
            "END": END,
            "CAUSE": CAUSE,
            "CALL": CALL,
            "THREADS": THREADS,
            "COMPARING": COMPARING,
            "MARKS": _MARKS,
            "FLAGS": self.flags,
            "LANDING": self.landing,
            "SLOT": self.slot,
            "STAGES": self.stages,
            "STAGE": self.stage,
        }
        return {name: str(number) for name, number in numbers.items()}


SOURCE = (
    r"""
// The compiler's command line defines WORLD, the layout and, for reductions, REDUCES, TYPE_x, OPERATOR_x and perhaps
// TREE, for a power of two of ranks.
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Call {
  u8 *areas[WORLD];     // workspaces by rank, as addresses of this process
  u8 *outs[WORLD];      // `put`: results by rank
  const u8 *source;
  u8 *out;
  u64 bytes;            // size of the whole message
  u64 slice;            // size of a rank's part
  u64 stride;           // distance between two ranks' parts in the source
  u64 out_stride;       // the same in the result
  u64 limit;            // nanoseconds
  u32 *status;          // host memory; see symmem.backends.signal_kernels. Here for the long waits and the records
  u32 step, rank, group, root;
  u32 nap;              // nanoseconds to sleep between two polls
  u32 signature;        // must be equal on all ranks; not 0
  u32 counts;           // 1 in the last kernel of a call; else 0
  u32 unused;
};

const u32 NO_ROOT = 0xffffffffu;
const u64 ONES = ~0ull;

"""
    + f"const u32 LATE = {LATE}, DIFFERS = {DIFFERS};"
    + r"""

struct Unit { u64 a, b; };

// A set of ranks.
#if WORLD <= 32
typedef u32 Ranks;
#else
typedef u64 Ranks;
#endif

__device__ __forceinline__ constexpr Ranks bit(u32 rank) { return Ranks(1) << rank; }

// Memory.
"""
    + memory_access(64)
    + r"""
// Load a unit of a landing zone. Both words are read whole.
__device__ __forceinline__ Unit peek(const u8 *at) {
  Unit unit;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(unit.a), "=l"(unit.b) : "l"(at) : "memory");
  return unit;
}

__device__ __forceinline__ void push(u8 *at, Unit unit) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" : : "l"(at), "l"(unit.a), "l"(unit.b) : "memory");
}

// Load up to 16 bytes of any alignment. Missing bytes are 0.
__device__ __noinline__ Unit load_slowly(const u8 *at, u32 count) {
  u64 words[2] = {0, 0};
  if ((u64(at) | count) % 4 == 0) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
      if (i * 4 < count) words[i / 2] |= u64(*(const volatile u32 *)(at + i * 4)) << (i % 2 * 32);
  } else if ((u64(at) | count) % 2 == 0) {
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
      if (i * 2 < count) words[i / 4] |= u64(*(const volatile unsigned short *)(at + i * 2)) << (i % 4 * 16);
  } else {
#pragma unroll
    for (u32 i = 0; i < 16; ++i)
      if (i < count) words[i / 8] |= u64(*(const volatile u8 *)(at + i)) << (i % 8 * 8);
  }
  return {words[0], words[1]};
}

__device__ __noinline__ void save_slowly(u8 *at, Unit unit, u32 count) {
  const u64 words[2] = {unit.a, unit.b};
  if ((u64(at) | count) % 4 == 0) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
      if (i * 4 < count) *(volatile u32 *)(at + i * 4) = u32(words[i / 2] >> (i % 2 * 32));
  } else if ((u64(at) | count) % 2 == 0) {
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
      if (i * 2 < count)
        *(volatile unsigned short *)(at + i * 2) = (unsigned short)(words[i / 4] >> (i % 4 * 16));
  } else {
#pragma unroll
    for (u32 i = 0; i < 16; ++i)
      if (i < count) *(volatile u8 *)(at + i) = u8(words[i / 8] >> (i % 8 * 8));
  }
}

// Load 16 bytes at a multiple of 16. Without a branch in between, several of these loads are in flight together.
__device__ __forceinline__ Unit load_whole(const u8 *at) {
  Unit unit;
  asm volatile("ld.global.v2.u64 {%0, %1}, [%2];" : "=l"(unit.a), "=l"(unit.b) : "l"(at) : "memory");
  return unit;
}

__device__ __forceinline__ Unit load(const u8 *at, u64 left) {
  if (left < 16 || u64(at) % 16 != 0) return load_slowly(at, left < 16 ? u32(left) : 16);
  return load_whole(at);
}

__device__ __forceinline__ void save(u8 *at, Unit unit, u64 left) {
  if (left < 16 || u64(at) % 16 != 0)
    save_slowly(at, unit, left < 16 ? u32(left) : 16);
  else
    asm volatile("st.global.v2.u64 [%0], {%1, %2};" : : "l"(at), "l"(unit.a), "l"(unit.b) : "memory");
}

// Waiting.
"""
    + lateness("call->step", "0", "return false;")
    + r"""
__device__ __forceinline__ u32 lane() {
  u32 number;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(number));
  return number;
}

// Giving up.

__device__ __forceinline__ u64 *turn_word(const Call &call) { return (u64 *)call.areas[call.rank]; }

__device__ __forceinline__ volatile u32 *word(const Call &call, u32 rank, u32 offset) {
  return (volatile u32 *)(call.areas[rank] + offset);
}

__device__ __forceinline__ u32 end_at(u64 turn) { return u32(turn) * 2 + 1; }

// Not inline: else the compiler computes with the turn at the start, so that loads of the source wait for its load.
__device__ __noinline__ bool has_come(u64 turn, u32 end) {
  return int(end_at(turn) - end) >= 0;  // modulo 2**32
}

// Whether a kernel gives up, and must store nothing to peers.
__device__ __forceinline__ bool is_over(u64 turn, u32 end) {
  asm volatile("" : "+r"(end));  // not before earlier loads of the source, which must not wait for the load of `end`
  return end != 0 && has_come(turn, end);
}

__device__ __forceinline__ u32 load_end(const Call &call) { return *word(call, call.rank, END); }

const u32 PATIENCE = 16 * SPINS;  // loads before a thread looks whether a peer has ended its wait, about 0.5 ms

// A waiting thread calls this after every SPINS loads. Returns whether it must wait on.
__device__ __forceinline__ bool stays(const Call &call, u64 turn, u32 peer, u32 spins, u64 &began) {
  return waits_on(&call, 0, peer, spins, began) && (spins < PATIENCE || !is_over(turn, load_end(call)));
}

// End a rank from this turn on.
__device__ __forceinline__ void end_rank(const Call &call, u32 rank, u64 turn, u32 cause) {
  *word(call, rank, CAUSE) = cause;
  fence();
  *word(call, rank, END) = end_at(turn);
}

// Record that a thread gives up because of a peer: it is late, or makes another call, or, if the cause is 0, a rank is
// lost. All ranks notice a loss; else the first thread ends them.
__device__ __noinline__ void give_up(const Call &call, u64 turn, u32 peer, u32 why) {
  if (!is_over(turn, load_end(call))) {
    const u32 cause = why ? why << 16 | call.rank << 8 | peer : 0;
    end_rank(call, call.rank, turn, cause);
#pragma unroll 1
    for (u32 rank = 0; why && rank < WORLD; ++rank)
      if (rank != call.rank) end_rank(call, rank, turn, cause);
  }
  fence();  // the cause was stored before the end
  atomicCAS((u32 *)(call.areas[call.rank] + CALL), 0u, call.signature);
  leave_word(record_of(&call) + 4, call.step, 0, peer, *word(call, call.rank, CAUSE));
}

__device__ __forceinline__ u32 lateness_of(u64 began) { return began == GIVEN_UP ? 0 : LATE; }

struct Start {
  u64 turn;
  u32 end;
};

// Two loads in flight together; one load of both words takes longer.
__device__ __forceinline__ Start read_start(const Call &call) {
  const u64 turn = load_relaxed(turn_word(call));
  return {turn, load_end(call)};
}

// Call after all threads of the block have read the turn. The block with the last ticket may change it. The ticket's
// latency overlaps with the wait for the peers.
__device__ __forceinline__ u32 draw_ticket(const Call &call) {
  __syncthreads();
  if (threadIdx.x != 0 || gridDim.x == 1) return 0;
  return atomicAdd((u32 *)(call.areas[call.rank] + 64), 1u);
}

__device__ __forceinline__ void advance(const Call &call, u64 turn, u32 ticket, bool over) {
  if (threadIdx.x != 0 || ticket != gridDim.x - 1) return;
  *(volatile u32 *)(call.areas[call.rank] + 64) = 0;
  store_relaxed(turn_word(call), turn + !over + (u64(call.counts) << 32));
}

__device__ __forceinline__ u64 *flag(const Call &call, u32 at, u64 turn, u32 phase, u32 source) {
  return (u64 *)(call.areas[at] + FLAGS) + ((turn % 2 * 2 + phase) * BLOCKS + blockIdx.x) * WORLD + source;
}

__device__ __forceinline__ u64 *mark(const Call &call, u32 at, u64 turn, u32 source) {
  return (u64 *)(call.areas[at] + MARKS) + turn % 2 * WORLD + source;
}

#define WORKERS (blockDim.x - COMPARING)

// Tell the others which call this rank makes. The threads that compare do it in one block.
__device__ __forceinline__ void tell(const Call &call, u64 turn, u32 end) {
  if (blockIdx.x != 0 || threadIdx.x < WORKERS || is_over(turn, end)) return;
  for (u32 peer = threadIdx.x - WORKERS; peer < WORLD; peer += COMPARING)
    if (peer != call.rank) store_relaxed(mark(call, peer, turn, call.rank), u64(call.signature) << 32 | u32(turn + 1));
}

// Wait until a thread that compares knows its peers' calls. Returns whether they equal this rank's.
__device__ __forceinline__ bool is_same_call(const Call &call, u64 turn, bool over) {
  for (u32 peer = threadIdx.x - WORKERS; peer < WORLD; peer += COMPARING) {
    if (peer == call.rank) continue;
    u64 began = 0, theirs = 0;
    for (u32 spins = 1; !over; ++spins) {
      theirs = load_relaxed(mark(call, call.rank, turn, peer));
      if (u32(theirs) == u32(turn + 1)) break;
      over = spins % SPINS == 0 && !stays(call, turn, peer, spins, began);
    }
    if (!over && u32(theirs >> 32) == call.signature) continue;
    give_up(call, turn, peer, over ? lateness_of(began) : DIFFERS);
    return false;
  }
  return true;
}

// Whether all threads of the block have what they need, and all ranks make the same call. Ends the work of a block.
__device__ __forceinline__ bool is_sound(const Call &call, u64 turn, u32 end) {
  const bool over = is_over(turn, end);
  return __syncthreads_and(threadIdx.x < WORKERS ? !over : is_same_call(call, turn, over));
}

// Wait for the same block of all ranks. Stores that these blocks made before are visible afterwards. The first time,
// compare the calls too. Returns false if this kernel gives up.
__device__ __forceinline__ bool meet(const Call &call, u64 turn, u32 phase, bool over) {
  bool came = __syncthreads_and(!over);  // no flag for data that a thread has not stored
  const u32 peer = threadIdx.x;
  if (threadIdx.x >= WORKERS) {
    came = phase == 0 ? is_same_call(call, turn, !came) : came;
  } else if (peer < WORLD && peer != call.rank) {
    if (came) {
      fence();
      store_relaxed(flag(call, peer, turn, phase, call.rank), turn + 1);
    }
    u64 began = 0;
    for (u32 spins = 1; came && load_acquire(flag(call, call.rank, turn, phase, peer)) != turn + 1; ++spins)
      if (spins % SPINS == 0) came = stays(call, turn, peer, spins, began);
    if (!came) give_up(call, turn, peer, lateness_of(began));
  }
  return __syncthreads_and(came);
}

__device__ __forceinline__ u8 *slot(const Call &call, u32 at, u64 turn, u32 source) {
  return call.areas[at] + LANDING + (turn % 2 * WORLD + source) * u64(SLOT);
}

// The k-th peer after this rank. Ranks begin with different peers, which spreads the traffic.
__device__ __forceinline__ u32 next(const Call &call, u32 k) {
  const u32 peer = call.rank + k;
  return peer < WORLD ? peer : peer - WORLD;
}

// Bytes of a rank's part from this unit to the end of the part; 0 beyond it.
__device__ __forceinline__ u64 left_of(const Call &call, u32 rank, u64 unit) {
  const u64 start = rank * call.stride, at = start + unit * 16;
  const u64 end = start + call.slice < call.bytes ? start + call.slice : call.bytes;
  return at < end ? end - at : 0;
}

__device__ __forceinline__ bool is_whole(Unit unit) { return unit.a != ONES && unit.b != ONES; }

// Whether this unit is complete in all parts and begins at a multiple of 16. The last part is the shortest.
__device__ __forceinline__ bool is_regular(const Call &call, u64 unit) {
  return (u64(call.source) | call.stride) % 16 == 0 && left_of(call, WORLD - 1, unit) >= 16;
}

// For a unit with 8 bytes of data, 4 per word.
__device__ __forceinline__ bool is_split_whole(Unit unit) { return unit.a >> 32 == 0 && unit.b >> 32 == 0; }

// Pick one of the ranks. Threads of a warp pick different ones, so that all missing ranks are reported.
__device__ __forceinline__ u32 one_of(Ranks ranks) {
  const Ranks later = ranks & (~Ranks(0) << lane() % WORLD);
  return __ffsll(later ? later : ranks) - 1;
}

// Wait for a unit of every rank in `wanted`, then reset its place in the landing zone. If the kernel gives up, this
// unit and the thread's later ones are not valid.
template <bool SPLIT>
__device__ __forceinline__ void receive(
    const Call &call, u64 turn, const u8 *own, Ranks wanted, Unit (&got)[WORLD], u32 &end) {
  u64 began = 0;
  Ranks missing = wanted;
  bool over = is_over(turn, end);
  for (u32 spins = 1; !over; ++spins) {
    // Make all loads before the first check, so that they are in flight together.
#pragma unroll
    for (u32 r = 0; r < WORLD; ++r)
      if (missing & bit(r)) got[r] = peek(own + r * u64(SLOT));
#pragma unroll
    for (u32 r = 0; r < WORLD; ++r)
      if (SPLIT ? is_split_whole(got[r]) : is_whole(got[r])) missing &= ~bit(r);
    if (missing == 0) break;
    if (call.nap) __nanosleep(call.nap);
    if (spins % SPINS == 0 && !stays(call, turn, one_of(missing), spins, began)) over = true;
  }
  if (missing != 0) {
    give_up(call, turn, one_of(missing), lateness_of(began));
    end = end_at(turn);
  }
#pragma unroll
  for (u32 r = 0; r < WORLD; ++r)
    if (wanted & bit(r)) push((u8 *)own + r * u64(SLOT), {ONES, ONES});
}

__device__ __forceinline__ Ranks all_others(const Call &call) {
  return Ranks(ONES >> (64 - WORLD)) & ~bit(call.rank);
}

__device__ __forceinline__ void clear(Unit (&got)[WORLD]) {
#pragma unroll
  for (u32 r = 0; r < WORLD; ++r) got[r] = {ONES, ONES};
}

#define NOTHING (Unit{ONES, ONES})

// A thread's first unit, and the distance to its next one. Threads that compare have none.
#define FIRST (threadIdx.x < WORKERS ? blockIdx.x * WORKERS + threadIdx.x : ~0u)
#define STEP (gridDim.x * WORKERS)

#ifdef REDUCES
#if TYPE_F64
typedef double Wide;
#define COUNT 2
#define OTHER_NAN 0x7fffffffffffffffull
#elif TYPE_F32
typedef float Wide;
#define COUNT 4
#define OTHER_NAN 0x7fffffff7fffffffull
#elif TYPE_F16 || TYPE_BF16
typedef float Wide;
#define COUNT 8
#define OTHER_NAN 0x7fff7fff7fff7fffull
#else
typedef float Wide;
#define COUNT 16
#define OTHER_NAN 0x7f7f7f7f7f7f7f7full
#endif

__device__ __forceinline__ Unit guard(Unit unit) {
  return {unit.a == ONES ? OTHER_NAN : unit.a, unit.b == ONES ? OTHER_NAN : unit.b};
}

__device__ __forceinline__ Wide combine(Wide a, Wide b) {
#if OPERATOR_SUM || OPERATOR_AVG
  return a + b;
#elif TYPE_F64
  if (a != a || b != b) return a + b;
#if OPERATOR_MIN
  return a < b || (a == b && __double_as_longlong(a) < 0) ? a : b;
#else
  return a > b || (a == b && __double_as_longlong(a) >= 0) ? a : b;
#endif
#elif OPERATOR_MIN
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
#else
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
#endif
}

#if TYPE_F64
__device__ __forceinline__ void widen(Unit unit, Wide (&wide)[COUNT]) {
  wide[0] = __longlong_as_double(unit.a);
  wide[1] = __longlong_as_double(unit.b);
}
__device__ __forceinline__ Unit narrow(const Wide (&wide)[COUNT]) {
  return {u64(__double_as_longlong(wide[0])), u64(__double_as_longlong(wide[1]))};
}
#else
__device__ __forceinline__ void widen_word(u32 word, Wide *wide) {
#if TYPE_F32
  wide[0] = __uint_as_float(word);
#elif TYPE_BF16
  wide[0] = __uint_as_float(word << 16);
  wide[1] = __uint_as_float(word & 0xffff0000u);
#elif TYPE_F16
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(wide[0]), "=f"(wide[1]) : "r"(word));
#else
#if TYPE_E4M3
#define FLOAT8 "e4m3x2"
#else
#define FLOAT8 "e5m2x2"
#endif
  asm("{.reg .b16 l, h, a, b; .reg .b32 x, y; mov.b32 {l, h}, %4;"
      "cvt.rn.f16x2." FLOAT8 " x, l; mov.b32 {a, b}, x; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;"
      "cvt.rn.f16x2." FLOAT8 " y, h; mov.b32 {a, b}, y; cvt.f32.f16 %2, a; cvt.f32.f16 %3, b;}"
      : "=f"(wide[0]), "=f"(wide[1]), "=f"(wide[2]), "=f"(wide[3]) : "r"(word));
#endif
}

__device__ __forceinline__ u32 narrow_word(const Wide *wide) {
  u32 word;
#if TYPE_F32
  word = __float_as_uint(wide[0]);
#elif TYPE_BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(wide[1]), "f"(wide[0]));
#elif TYPE_F16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(wide[1]), "f"(wide[0]));
#else
  asm("{.reg .b16 l, h; cvt.rn.satfinite." FLOAT8 ".f32 l, %2, %1; cvt.rn.satfinite." FLOAT8 ".f32 h, %4, %3;"
      "mov.b32 %0, {l, h};}"
      : "=r"(word) : "f"(wide[0]), "f"(wide[1]), "f"(wide[2]), "f"(wide[3]));
#endif
  return word;
}

__device__ __forceinline__ void widen(Unit unit, Wide (&wide)[COUNT]) {
  widen_word(u32(unit.a), wide);
  widen_word(u32(unit.a >> 32), wide + COUNT / 4);
  widen_word(u32(unit.b), wide + COUNT / 2);
  widen_word(u32(unit.b >> 32), wide + COUNT / 4 * 3);
}

__device__ __forceinline__ Unit narrow(const Wide (&wide)[COUNT]) {
  return {narrow_word(wide) | u64(narrow_word(wide + COUNT / 4)) << 32,
          narrow_word(wide + COUNT / 2) | u64(narrow_word(wide + COUNT / 4 * 3)) << 32};
}
#endif

#if TREE
// Neighbours first, then neighbouring sums, on every rank.
__device__ __forceinline__ Unit reduce(const Unit (&got)[WORLD]) {
  Wide sums[WORLD][COUNT];
#pragma unroll
  for (u32 r = 0; r < WORLD; ++r) widen(got[r], sums[r]);
#pragma unroll
  for (u32 span = 1; span < WORLD; span *= 2)
#pragma unroll
    for (u32 r = 0; r < WORLD; r += 2 * span)
#pragma unroll
      for (u32 i = 0; i < COUNT; ++i) sums[r][i] = combine(sums[r][i], sums[r + span][i]);
  return guard(narrow(sums[0]));
}
#else
// In rank order, on every rank.
__device__ __forceinline__ Unit reduce(const Unit (&got)[WORLD]) {
  Wide total[COUNT], wide[COUNT];
  widen(got[0], total);
#pragma unroll
  for (u32 r = 1; r < WORLD; ++r) {
    widen(got[r], wide);
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) total[i] = combine(total[i], wide[i]);
  }
#if OPERATOR_AVG
#pragma unroll
  for (u32 i = 0; i < COUNT; ++i) total[i] /= Wide(WORLD);
#endif
  return guard(narrow(total));
}
#endif

// Store the own unit, and mark all others as missing. Selects word by word, because an index known only at run time
// would move the array from registers to memory.
__device__ __forceinline__ void begin(const Call &call, Unit mine, Unit (&got)[WORLD]) {
#pragma unroll
  for (u32 r = 0; r < WORLD; ++r) {
    got[r].a = r == call.rank ? mine.a : ONES;
    got[r].b = r == call.rank ? mine.b : ONES;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + COMPARING, 2) one_shot(const __grid_constant__ Call call) {
  const Start start = read_start(call);
  const u64 turn = start.turn;
  u32 end = start.end;
  const u32 units = u32((call.bytes + 15) / 16);
  const auto give = [&](u32 u) {
    const Unit mine = guard(load(call.source + u64(u) * 16, call.bytes - u64(u) * 16));
    if (is_over(turn, end)) return;
#pragma unroll
    for (u32 k = 1; k < WORLD; ++k) push(slot(call, next(call, k), turn, call.rank) + u64(u) * 16, mine);
  };
  tell(call, turn, end);
  if (FIRST < units) give(FIRST);
  const u32 ticket = draw_ticket(call);
  const u8 *own = slot(call, call.rank, turn, 0);
  for (u32 u = FIRST; u < units; u += STEP) {
    if (u + STEP < units) give(u + STEP);
    const u64 at = u64(u) * 16, left = call.bytes - at;
    Unit got[WORLD];
    begin(call, guard(load(call.source + at, left)), got);
    receive<false>(call, turn, own + at, all_others(call), got, end);
    save(call.out + at, reduce(got), left);
  }
  const bool sound = is_sound(call, turn, end);
  for (u32 u = FIRST; !sound && u < units; u += STEP) save(call.out + u64(u) * 16, NOTHING, call.bytes - u64(u) * 16);
  advance(call, turn, ticket, !sound);
}

template <bool GATHER>
__device__ __forceinline__ void by_slices(const Call &call) {
  const Start start = read_start(call);
  const u64 turn = start.turn;
  u32 end = start.end;
  const u32 units = u32((call.slice + 15) / 16);
  const Ranks others = all_others(call);
  const u8 *own = slot(call, call.rank, turn, 0);
  // Push one unit of every peer's slice to this peer.
  const auto give = [&](u32 u) {
    if (is_regular(call, u)) {
      Unit units_of[WORLD];
#pragma unroll
      for (u32 k = 1; k < WORLD; ++k)
        units_of[k] = load_whole(call.source + next(call, k) * call.stride + u64(u) * 16);
      if (is_over(turn, end)) return;
#pragma unroll
      for (u32 k = 1; k < WORLD; ++k)
        push(slot(call, next(call, k), turn, call.rank) + u64(u) * 16, guard(units_of[k]));
      return;
    }
    for (u32 k = 1; k < WORLD && !is_over(turn, end); ++k) {
      const u32 peer = next(call, k);
      const u64 left = left_of(call, peer, u);
      if (left == 0) continue;
      const Unit unit = load(call.source + peer * call.stride + u64(u) * 16, left);
      push(slot(call, peer, turn, call.rank) + u64(u) * 16, guard(unit));
    }
  };
  // Receive one unit of the own slice from all ranks, and push the result to all.
  const auto take = [&](u32 u) {
    const u64 left = left_of(call, call.rank, u), at = u64(u) * 16;
    if (left == 0) return;
    Unit got[WORLD];
    begin(call, guard(load(call.source + call.rank * call.stride + at, left)), got);
    receive<false>(call, turn, own + at, others, got, end);
    const Unit result = reduce(got);
    if (GATHER && !is_over(turn, end)) {
#pragma unroll
      for (u32 k = 1; k < WORLD; ++k)
        push(slot(call, next(call, k), turn, call.rank) + SLOT / 2 + at, result);
    }
    save(call.out + (GATHER ? call.rank * call.stride : 0) + at, result, left);
  };
  // Receive one unit of every peer's result.
  const auto fetch = [&](u32 u) {
    Ranks wanted = 0;
    Unit got[WORLD];
    clear(got);
#pragma unroll
    for (u32 r = 0; r < WORLD; ++r)
      if (left_of(call, r, u)) wanted |= bit(r);
    receive<false>(call, turn, own + SLOT / 2 + u64(u) * 16, wanted & others, got, end);
#pragma unroll
    for (u32 r = 0; r < WORLD; ++r)
      if (wanted & others & bit(r)) save(call.out + r * call.stride + u64(u) * 16, got[r], left_of(call, r, u));
  };
  tell(call, turn, end);
  if (FIRST < units) give(FIRST);
  const u32 ticket = draw_ticket(call);
  for (u32 u = FIRST; u < units; u += STEP) {
    if (u + STEP < units) give(u + STEP);
    take(u);
    if (GATHER && u >= STEP) fetch(u - STEP);
  }
  if (GATHER && FIRST < units) fetch(FIRST + (units - 1 - FIRST) / STEP * STEP);
  const bool sound = is_sound(call, turn, end);
  for (u32 u = FIRST; !sound && u < units; u += STEP)
    for (u32 r = 0; r < WORLD; ++r)
      if (GATHER || r == call.rank)
        save(call.out + (GATHER ? r * call.stride : 0) + u64(u) * 16, NOTHING, left_of(call, r, u));
  advance(call, turn, ticket, !sound);
}

extern "C" __global__ void __launch_bounds__(THREADS + COMPARING, 2) two_shot(const __grid_constant__ Call call) {
  by_slices<true>(call);
}

extern "C" __global__ void __launch_bounds__(THREADS + COMPARING, 2) reduce_scatter(const __grid_constant__ Call call) {
  by_slices<false>(call);
}

#else  // plain bytes

// All operations that only move bytes. Part p of rank r's result is part r of rank p. If the stride is 0, rank p has
// only one part, for all ranks. With a root, only the root's part moves.

__device__ __forceinline__ Unit split(u64 data) { return {data & 0xffffffffu, data >> 32}; }

__device__ __forceinline__ u64 load_line(const u8 *at, u64 left) {
  if (left < 8 || u64(at) % 8 != 0) return load_slowly(at, left < 8 ? u32(left) : 8).a;
  return *(const volatile u64 *)at;
}

__device__ __forceinline__ void save_line(u8 *at, u64 data, u64 left) {
  if (left < 8 || u64(at) % 8 != 0)
    save_slowly(at, {data, 0}, left < 8 ? u32(left) : 8);
  else
    *(volatile u64 *)at = data;
}

extern "C" __global__ void __launch_bounds__(THREADS + COMPARING, 2) exchange(const __grid_constant__ Call call) {
  const Start start = read_start(call);
  const u64 turn = start.turn;
  u32 end = start.end;
  const auto give = [&](u32 peer, u32 u, u64 data) {
    if (!is_over(turn, end)) push(slot(call, peer, turn, call.rank) + u64(u) * 16, split(data));
  };
  const u32 lines = u32((call.slice + 7) / 8);  // a unit of 16 bytes carries 8 bytes of data
  const bool gives = call.root == NO_ROOT || call.root == call.rank;
  tell(call, turn, end);
  for (u32 u = FIRST; gives && u < lines; u += STEP) {
    const u64 at = u64(u) * 8, left = call.slice - at;
    if (call.stride == 0) {
      const u64 data = load_line(call.source + at, left);
#pragma unroll
      for (u32 k = 1; k < WORLD; ++k)
        give(next(call, k), u, data);
      save_line(call.out + call.rank * call.out_stride + at, data, left);
      continue;
    }
    if (left >= 8 && (u64(call.source) | call.stride) % 8 == 0) {
      u64 parts[WORLD];
#pragma unroll
      for (u32 k = 0; k < WORLD; ++k)
        parts[k] = *(const volatile u64 *)(call.source + next(call, k) * call.stride + at);
#pragma unroll
      for (u32 k = 1; k < WORLD; ++k)
        give(next(call, k), u, parts[k]);
      save_line(call.out + call.rank * call.out_stride + at, parts[0], left);
      continue;
    }
    for (u32 k = 0; k < WORLD; ++k) {
      const u32 peer = next(call, k);
      const u64 data = load_line(call.source + peer * call.stride + at, left);
      if (k == 0)
        save_line(call.out + peer * call.out_stride + at, data, left);
      else
        give(peer, u, data);
    }
  }
  const u32 ticket = draw_ticket(call);
  const Ranks wanted = all_others(call) & (call.root == NO_ROOT ? ~Ranks(0) : bit(call.root));
  const u8 *own = slot(call, call.rank, turn, 0);
  const auto keep = [&](u32 u, const Unit (&got)[WORLD]) {
#pragma unroll
    for (u32 r = 0; r < WORLD; ++r)
      if (wanted & bit(r))
        save_line(call.out + r * call.out_stride + u64(u) * 8, got[r].a | got[r].b << 32, call.slice - u64(u) * 8);
  };
  Unit got[WORLD];
  for (u32 u = FIRST; u < lines; u += STEP) {
    clear(got);
    receive<true>(call, turn, own + u64(u) * 16, wanted, got, end);
    keep(u, got);
  }
  const bool sound = is_sound(call, turn, end);
  clear(got);
  for (u32 u = FIRST; !sound && u < lines; u += STEP) keep(u, got);
  advance(call, turn, ticket, !sound);
}

extern "C" __global__ void __launch_bounds__(THREADS + COMPARING, 2) pull(const __grid_constant__ Call call) {
  const Start start = read_start(call);
  const u64 turn = start.turn;
  u32 end = start.end;
  tell(call, turn, end);
  const u32 ticket = draw_ticket(call);
  const u32 units = u32((call.slice + 15) / 16);
  const u64 pitch = call.stride == 0 ? 0 : u64(units) * 16;  // distance between two parts in the stage
  u8 *stage = call.areas[call.rank] + STAGES + turn % 2 * u64(STAGE);
  if (call.root == NO_ROOT || call.root == call.rank)
    for (u32 u = FIRST; u < units; u += STEP) {
      const u64 at = u64(u) * 16, left = call.slice - at;
      const u32 parts = call.stride == 0 ? 1 : WORLD;
      for (u32 p = 0; p < parts; ++p) {
        const Unit unit = load(call.source + p * call.stride + at, left);
        if (!is_over(turn, end)) save(stage + p * pitch + at, unit, 16);  // peers may still read what is there
        if (call.stride == 0 || p == call.rank) save(call.out + call.rank * call.out_stride + at, unit, left);
      }
    }
  const bool all_came = meet(call, turn, 0, is_over(turn, end));
  for (u32 u = FIRST; u < units; u += STEP) {
    const u64 at = u64(u) * 16, left = call.slice - at;
    Unit parts[WORLD];
#pragma unroll
    for (u32 k = 1; k < WORLD; ++k) {
      const u32 peer = next(call, k);
      if (!all_came)
        parts[k] = NOTHING;
      else if (call.root == NO_ROOT || call.root == peer)
        parts[k] = load_whole(call.areas[peer] + STAGES + turn % 2 * u64(STAGE) + call.rank * pitch + at);
    }
#pragma unroll
    for (u32 k = 1; k < WORLD; ++k) {
      const u32 peer = next(call, k);
      if (call.root == NO_ROOT || call.root == peer) save(call.out + peer * call.out_stride + at, parts[k], left);
    }
  }
  advance(call, turn, ticket, !all_came);
}

extern "C" __global__ void __launch_bounds__(THREADS + COMPARING, 2) put(const __grid_constant__ Call call) {
  const Start start = read_start(call);
  const u64 turn = start.turn;
  u32 end = start.end;
  tell(call, turn, end);
  const u32 ticket = draw_ticket(call);
  bool all_came = meet(call, turn, 0, is_over(turn, end));
  const u32 units = all_came && (call.root == NO_ROOT || call.root == call.rank) ? u32(call.slice / 16) : 0;
  for (u32 u = FIRST; u < units; u += STEP) {
    const u64 at = u64(u) * 16, place = call.rank * call.out_stride + at;
    if (call.stride == 0) {
      const Unit unit = load(call.source + at, 16);
#pragma unroll
      for (u32 k = 1; k <= WORLD; ++k) save(call.outs[next(call, k % WORLD)] + place, unit, 16);
      continue;
    }
    Unit parts[WORLD];
#pragma unroll
    for (u32 k = 0; k < WORLD; ++k) parts[k] = load(call.source + next(call, k) * call.stride + at, 16);
#pragma unroll
    for (u32 k = 0; k < WORLD; ++k) save(call.outs[next(call, k)] + place, parts[k], 16);
  }
  all_came = all_came && meet(call, turn, 1, false);
  if (!all_came)
    for (u32 u = FIRST; u < u32(call.slice / 16); u += STEP)
      for (u32 r = 0; r < WORLD; ++r)
        if (call.root == NO_ROOT || call.root == r)
          save(call.out + r * call.out_stride + u64(u) * 16, NOTHING, 16);
  advance(call, turn, ticket, !all_came);
}
#endif
"""
)
"""CUDA C++ for NVRTC. Needs sm_80 or newer (sm_89 for float8), at most 64 ranks, and no header."""
