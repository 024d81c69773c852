// Symmetric memory inside CUDA C++ kernels. For nvcc and NVRTC; includes nothing. Needs sm_70 or newer.
//
//   #include "symmem.cuh"                                  // -I$(symmem include-path), or symmem.include_path()
//   __global__ void kernel(symmem::View view, float *x) {  // bytes(st.device_view()), by value
//     x[threadIdx.x] = 1;
//     symmem::barrier(view, blockIdx.x);                   // block b waits for block b of all other ranks
//     float theirs = *symmem::remote(view, x + threadIdx.x, peer);
//   }
//
// Signals. Every rank has words signals[channel][source]; they are 0 at rest. A word is a semaphore: it counts the
// signals that `source` has put and the owner has not taken. Every operation leaves the word ready for the next
// operation, so a captured CUDA graph can be replayed. The words are also the flags of SymmetricTensor.put_signal and
// wait_signal. A kernel may take the host's signal, and the host a kernel's, while at most one signal is pending on the
// word. Atomics on peers' memory need NVLink, or PCIe with atomics.
//
// Time. A wait that takes longer than view.limit writes the peer into view.status and traps. So does a wait of 0.1 s or
// more once a process of the group has ended. The trap makes this process's CUDA context unusable, on purpose.
// SymmetricTensor.synchronize() then raises a PeerTimeoutError or PeerLostError that names the peer. A long wait on a
// channel below 65536 is reported behind the status meanwhile; `symmem dump` and `symmem top` show it.
//
// Memory order follows the PTX ISA, "Memory Consistency Model". All scopes are .sys, because peers are other devices.
#pragma once

namespace symmem {

typedef unsigned int u32;
typedef unsigned long long u64;

// A symmetric tensor as kernels see it; made by SymmetricTensor.device_view(). All addresses are of this process.
struct View {
  void *const *pointers;  // [world]: the first byte of every rank's tensor; in device memory
  u32 *const *signals;    // [world]: every rank's words [channels][world]; in device memory
  u32 *status;            // host memory: {operation, channel, peer, group} of the failed wait; waits; records
  u64 nbytes;             // bytes of a rank's tensor
  u64 limit;              // longest wait in nanoseconds
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

// Store 16 bytes at once, so that the records of two threads do not mix.
__device__ __forceinline__ void leave_word(u32 *at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};"
               : : "l"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __noinline__ void fail(const View &view, u32 operation, u32 channel, u32 peer) {
  leave_word(view.status, operation, channel, peer, view.group);
  __threadfence_system();
  __trap();
}

// The same as in symmem.backends.signal_kernels, which describes how waits are reported.
enum : u32 { BEAT = 26, TICK = 20, PLACES = 512, GROUP_SPREAD = 61 };

// Report a wait. If the host has noted that a process of the group ended, fail.
__device__ __noinline__ void report_wait(const View &view, u32 operation, u32 channel, u32 peer, u64 waited) {
  if (*(const volatile u32 *)(view.status + 4 * (1 + PLACES) + 8 * view.group)) fail(view, operation, channel, peer);
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

// Called by one thread. The final read-modify-write is the acquire: it reads the value of the last add_release.
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
      report_wait(view, operation, channel, source, waited);
    }
  }
  add_acquire(own, keep ? 0 : 0u - count);
}

}  // namespace detail

// Pointers.

// Return the address in `peer`'s tensor that corresponds to `local` in this rank's tensor.
//   1. This computes an address and orders nothing. The caller chooses how to access it.
template <typename T> __device__ __forceinline__ T *remote(const View &view, T *local, u32 peer) {
  const u64 offset = u64(local) - u64(view.pointers[view.rank]);
  return (T *)((char *)view.pointers[peer] + offset);
}

// Loads, stores and atomics on a peer's memory. The calling thread acts alone.

// Load the element of `peer` at `local`.
//   1. A weak load: make it after a barrier or a wait that orders it after the store.
template <typename T> __device__ __forceinline__ T load(const View &view, const T *local, u32 peer) {
  return *remote(view, local, peer);
}

// Store to the element of `peer` at `local`.
//   1. A weak store: other ranks may read it only after a later barrier or put_signal.
template <typename T> __device__ __forceinline__ void store(const View &view, T *local, T value, u32 peer) {
  *remote(view, local, peer) = value;
}

// Read-modify-write of 4 or 8 bytes at `peer`; returns the previous value.
//   1. acq_rel.sys: a thread that reads the result with acquire sees this thread's earlier stores. This thread sees the
//      stores that were released with the value it reads.
//   2. Atomic with respect to all atomics of scope sys, of any GPU. With respect to the CPU only in host memory.
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

// Barrier and signals. All threads of a block must call them together, as __syncthreads.

// Wait until one block of every rank has called it with this channel.
//   1. Release: all earlier stores of any thread of the block, to any rank's memory, are visible after the barrier to
//      all threads of the participating blocks. (__syncthreads, then red.release.sys by one thread per rank.)
//   2. Acquire: no later load is made before the barrier. (atom.acquire.sys, then __syncthreads.)
//   3. It orders nothing between blocks of one rank, and blocks of one rank do not wait for each other. All
//      participating blocks must run at the same time, so there may be no more of them than the GPU can hold.
//   4. One block of a rank may use a channel at a time. A channel must not alternate between barriers and signals.
__device__ __forceinline__ void barrier(const View &view, u32 channel) {
  __syncthreads();
  for (u32 peer = detail::thread(); peer < view.world; peer += detail::threads())
    detail::add_release(detail::word(view, peer, channel, view.rank), 1);
  for (u32 peer = detail::thread(); peer < view.world; peer += detail::threads())
    detail::take(view, BARRIER, channel, peer, 1, false);
  __syncthreads();
}

// Add `count` to this rank's word at `peer`. Does not wait.
//   1. Release: earlier stores of the block are visible to the block that takes the signal, as for barrier.
//      (__syncthreads, then red.release.sys by one thread.)
__device__ __forceinline__ void put_signal(const View &view, u32 peer, u32 channel, u32 count = 1) {
  __syncthreads();
  if (detail::thread() == 0) detail::add_release(detail::word(view, peer, channel, view.rank), count);
}

// Wait until the word of `source` is `count` or more, and subtract `count` from it. With `keep`, the word does not
// change. Counts then only grow, and the caller waits for an epoch below 2**32.
//   1. Acquire: stores that the signalling blocks made before they put these `count` signals are visible to all threads
//      of this block afterwards. (atom.acquire.sys by one thread, then __syncthreads.)
//   2. Only one block may take from a word at a time.
__device__ __forceinline__ void wait_signal(
    const View &view, u32 source, u32 channel, u32 count = 1, bool keep = false) {
  if (detail::thread() == 0) detail::take(view, WAIT_SIGNAL, channel, source, count, keep);
  __syncthreads();
}

// Copy `elements` elements from any memory to `local` at `peer`, with all threads of the block; then put_signal.
//   1. As store, then put_signal: a block that has taken the signal sees the elements.
template <typename T>
__device__ __forceinline__ void put_with_signal(
    const View &view, T *local, const T *source, u64 elements, u32 peer, u32 channel) {
  T *target = remote(view, local, peer);
  for (u64 i = detail::thread(); i < elements; i += detail::threads()) target[i] = source[i];
  put_signal(view, peer, channel);
}

}  // namespace symmem
