// Symmetric memory inside of CUDA C++ kernels. For nvcc and NVRTC; includes nothing. Needs sm_70 or newer.
//
//   #include "symmem.cuh"                                  // -I$(symmem include-path), or symmem.include_path()
//   __global__ void kernel(symmem::View view, float *x) {  // bytes(st.device_view()), by value
//     x[threadIdx.x] = 1;
//     symmem::barrier(view, blockIdx.x);                   // block b of this rank meets block b of all others
//     float theirs = *symmem::remote(view, x + threadIdx.x, peer);
//   }
//
// Signals. Each rank has words signals[channel][source], all 0 at rest. A word counts what `source` has put and the
// owner has not taken: a semaphore. So every operation leaves it as the next one needs it, and a captured CUDA graph can
// be replayed. The words are the flags of SymmetricTensor.put_signal and wait_signal, so a kernel may take what the host
// put, and the other way round, while at most one signal is under way on that word. Atomics on peers' memory need NVLink,
// or PCIe that has atomics.
//
// Time. Whoever waits longer than view.limit writes whom it waited for into view.status and traps; that makes this
// process's CUDA context unusable, on purpose. SymmetricTensor.synchronize() then raises PeerTimeoutError by name. Whoever
// waits for long, on a channel below 65536, says so behind the status meanwhile: `symmem dump` and `symmem top` show it.
//
// Memory order is that of the PTX ISA, "Memory Consistency Model"; all scopes are .sys, for peers are other devices.
#pragma once

namespace symmem {

typedef unsigned int u32;
typedef unsigned long long u64;

// What a kernel knows of a symmetric tensor; made by SymmetricTensor.device_view(). All addresses are this process's.
struct View {
  void *const *pointers;  // [world]: the first byte of each rank's tensor; in device memory
  u32 *const *signals;    // [world]: each rank's words [channels][world]; in device memory
  u32 *status;            // host memory: {operation, channel, peer, group} of the wait that failed; then of long waits
  u64 nbytes;             // bytes of each rank's tensor
  u64 limit;              // nanoseconds that a wait may take
  u32 rank, world, channels;
  u32 group;              // number of the group, for the status
};
static_assert(sizeof(View) == 56, "View is not laid out as symmem.tensor.device_view writes it");

enum Operation : u32 { BARRIER = 1, WAIT_SIGNAL = 3, BAD_CHANNEL = 4 };  // in the status

namespace detail {

__device__ __forceinline__ u32 load_relaxed(const u32 *word) {
  u32 value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void add_release(u32 *word, u32 value) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ u32 add_acquire(u32 *word, u32 value) {
  u32 old;
  asm volatile("atom.acquire.sys.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(word), "r"(value) : "memory");
  return old;
}

__device__ __forceinline__ u64 now() {
  u64 nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds) : : "memory");
  return nanoseconds;
}

// One store of 16 bytes, so that what two threads write at a time does not mix.
__device__ __forceinline__ void leave_word(u32 *at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};"
               : : "l"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __noinline__ void fail(const View &view, u32 operation, u32 channel, u32 peer) {
  leave_word(view.status, operation, channel, peer, view.group);
  __threadfence_system();
  __trap();
}

// As symmem.backends.signal_kernels has them, where it is said how a wait is told.
enum : u32 { BEAT = 26, TICK = 20, PLACES = 512, GROUP_SPREAD = 61 };

__device__ __noinline__ void tell(const View &view, u32 operation, u32 channel, u32 peer, u64 waited) {
  if (channel < 65536)
    leave_word(view.status + 4 * (1 + (view.group * GROUP_SPREAD + peer) % PLACES), operation << 24 | view.group,
               channel << 16 | peer, u32(waited >> TICK), u32((view.limit - waited) >> TICK));
}

__device__ __forceinline__ u32 thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

__device__ __forceinline__ u32 threads() { return blockDim.x * blockDim.y * blockDim.z; }

__device__ __forceinline__ u32 *word(const View &view, u32 owner, u32 channel, u32 source) {
  if (channel >= view.channels) fail(view, BAD_CHANNEL, channel, view.channels);
  return view.signals[owner] + u64(channel) * view.world + source;
}

// By one thread. The read-modify-write that takes is the acquire: it reads what the last add_release has written.
__device__ __forceinline__ void take(const View &view, u32 operation, u32 channel, u32 source, u32 count, bool keep) {
  u32 *own = word(view, view.rank, channel, source);
  if (load_relaxed(own) < count) {
    const u64 begin = now();
    u32 beats = 0;
    while (load_relaxed(own) < count) {
      const u64 waited = now() - begin;
      if (waited > view.limit) fail(view, operation, channel, source);
      if (u32(waited >> BEAT) == beats) continue;
      beats = u32(waited >> BEAT);
      tell(view, operation, channel, source, waited);
    }
  }
  add_acquire(own, keep ? 0 : 0u - count);
}

}  // namespace detail

// Pointers.

// The address, at `peer`, of what lies at `local` in this rank's tensor.
//   1. An address only; it orders nothing. Any access through it is as the caller makes it.
template <typename T> __device__ __forceinline__ T *remote(const View &view, T *local, u32 peer) {
  const u64 offset = u64(local) - u64(view.pointers[view.rank]);
  return (T *)((char *)view.pointers[peer] + offset);
}

// Loads, stores and atomics to a rank, each by the calling thread alone.

// What `peer` has at `local`.
//   1. A weak load: it may be made only after a barrier or a wait that orders it after the store.
template <typename T> __device__ __forceinline__ T load(const View &view, const T *local, u32 peer) {
  return *remote(view, local, peer);
}

// Store to `peer`, at `local`.
//   1. A weak store: others may read it only after a barrier or a put_signal that follows it.
template <typename T> __device__ __forceinline__ void store(const View &view, T *local, T value, u32 peer) {
  *remote(view, local, peer) = value;
}

// Read-modify-write at `peer` of 4 or 8 bytes; returns what was there.
//   1. acq_rel.sys: what this thread did before is visible to who reads the result with acquire; and what the one whose
//      value it read did before a release is visible to this thread afterwards.
//   2. Atomic towards all atomics of scope sys, of any GPU; not towards the CPU, unless the memory is the host's.
#define SYMMEM_ATOMIC(TYPE, LETTER, BITS)                                                                         \
  __device__ __forceinline__ TYPE atomic_add(const View &view, TYPE *local, TYPE value, u32 peer) {               \
    TYPE old;                                                                                                     \
    asm volatile("atom.acq_rel.sys.global.add.u" BITS " %0, [%1], %2;"                                            \
                 : "=" LETTER(old) : "l"(remote(view, local, peer)), LETTER(value) : "memory");                   \
    return old;                                                                                                   \
  }                                                                                                               \
  __device__ __forceinline__ TYPE atomic_exchange(const View &view, TYPE *local, TYPE value, u32 peer) {          \
    TYPE old;                                                                                                     \
    asm volatile("atom.acq_rel.sys.global.exch.b" BITS " %0, [%1], %2;"                                           \
                 : "=" LETTER(old) : "l"(remote(view, local, peer)), LETTER(value) : "memory");                   \
    return old;                                                                                                   \
  }                                                                                                               \
  __device__ __forceinline__ TYPE atomic_cas(const View &view, TYPE *local, TYPE expected, TYPE value, u32 peer) { \
    TYPE old;                                                                                                     \
    asm volatile("atom.acq_rel.sys.global.cas.b" BITS " %0, [%1], %2, %3;"                                        \
                 : "=" LETTER(old) : "l"(remote(view, local, peer)), LETTER(expected), LETTER(value) : "memory"); \
    return old;                                                                                                   \
  }
SYMMEM_ATOMIC(u32, "r", "32")
SYMMEM_ATOMIC(u64, "l", "64")
#undef SYMMEM_ATOMIC

// Meeting and signals. All threads of a block call them together, as __syncthreads.

// Wait until the blocks that call it with this channel have come on all ranks: one block a rank.
//   1. Release: what any thread of the block has stored before, in any rank's memory, is visible to all threads of the
//      blocks that meet, after the barrier. (__syncthreads, then red.release.sys by one thread for each rank.)
//   2. Acquire: no load that follows it is made before. (atom.acquire.sys, then __syncthreads.)
//   3. It orders nothing between blocks of one rank, and blocks of one rank do not wait for each other. All blocks that
//      meet must be running: no more of them than the GPU holds at a time.
//   4. A channel is used by one block of a rank at a time; never by barriers and signals in turn.
__device__ __forceinline__ void barrier(const View &view, u32 channel) {
  __syncthreads();
  for (u32 peer = detail::thread(); peer < view.world; peer += detail::threads())
    detail::add_release(detail::word(view, peer, channel, view.rank), 1);
  for (u32 peer = detail::thread(); peer < view.world; peer += detail::threads())
    detail::take(view, BARRIER, channel, peer, 1, false);
  __syncthreads();
}

// Add `count` to this rank's word at `peer`. Waits for nobody.
//   1. Release: as for barrier, towards the block that takes it. (__syncthreads, then red.release.sys by one thread.)
__device__ __forceinline__ void put_signal(const View &view, u32 peer, u32 channel, u32 count = 1) {
  __syncthreads();
  if (detail::thread() == 0) detail::add_release(detail::word(view, peer, channel, view.rank), count);
}

// Wait until the word of `source` is `count` or more, and take `count` from it; with `keep`, leave it as it is: then
// counts only grow, and the caller says which one it waits for (an epoch, below 2**32).
//   1. Acquire: what the blocks that put those `count` have stored before is visible to all threads of this block
//      afterwards. (atom.acquire.sys by one thread, then __syncthreads.)
//   2. One block takes from a word at a time.
__device__ __forceinline__ void wait_signal(
    const View &view, u32 source, u32 channel, u32 count = 1, bool keep = false) {
  if (detail::thread() == 0) detail::take(view, WAIT_SIGNAL, channel, source, count, keep);
  __syncthreads();
}

// Copy `elements` from anywhere to `local` at `peer`, with all threads of the block; then put_signal.
//   1. As store, and put_signal: who has taken the signal sees the elements.
template <typename T>
__device__ __forceinline__ void put_with_signal(
    const View &view, T *local, const T *source, u64 elements, u32 peer, u32 channel) {
  T *target = remote(view, local, peer);
  for (u64 i = detail::thread(); i < elements; i += detail::threads()) target[i] = source[i];
  put_signal(view, peer, channel);
}

}  // namespace symmem
