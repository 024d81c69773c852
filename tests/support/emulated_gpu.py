"""Emulate GPUs by CPU threads: the machine's C++ compiler compiles CUDA kernels.

A CUDA thread is a thread of the CPU. ``__syncthreads`` is a barrier of a block's threads. Peers' memory belongs to this
process. Inline assembly is replaced. So tests see the accesses of kernels and their order, but not the behaviour of a
GPU's memory.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from symmem.ops.engines.collective_kernels import KERNELS, SOURCE

COMPILER = shutil.which("g++") or shutil.which("c++")

_BEFORE = r"""
#include <atomic>
#include <condition_variable>
#include <csetjmp>
#include <cstring>
#include <deque>
#include <mutex>
#include <sched.h>
#include <thread>
#include <time.h>
#include <unistd.h>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
struct Index { unsigned x, y, z; };
thread_local Index threadIdx, blockIdx, blockDim, gridDim;
// A thread that has trapped does not come any more.
struct Block {
  std::mutex mutex;
  std::condition_variable all_here;
  unsigned expected, here = 0, round = 0;
  bool all = true, all_before = true;
  explicit Block(unsigned threads) : expected(threads) {}
  void next() { here = 0; ++round; all_before = all; all = true; all_here.notify_all(); }
  bool wait(bool mine) {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned before = round;
    all = all && mine;
    if (++here == expected) next();
    else all_here.wait(lock, [&] { return round != before; });
    return all_before;
  }
  void drop() {
    std::unique_lock<std::mutex> lock(mutex);
    if (--expected == here && here) next();
  }
};
thread_local Block *all_of_block;
static void __syncthreads() { all_of_block->wait(true); }
static int __syncthreads_and(int predicate) { return all_of_block->wait(predicate); }
static void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
static unsigned atomicAdd(unsigned *word, unsigned value) { return __atomic_fetch_add(word, value, __ATOMIC_RELAXED); }
static unsigned atomicCAS(unsigned *word, unsigned expected, unsigned value) {
  __atomic_compare_exchange_n(word, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
static int __ffsll(long long word) { return __builtin_ffsll(word); }
static float __uint_as_float(unsigned word) { float value; memcpy(&value, &word, 4); return value; }
static unsigned __float_as_uint(float value) { unsigned word; memcpy(&word, &value, 4); return word; }
static std::atomic<bool> stopped{false};
static void __nanosleep(unsigned) { sched_yield(); }
thread_local std::jmp_buf out_of_kernel;
[[noreturn]] static void leave() { std::longjmp(out_of_kernel, 1); }
[[noreturn]] static void __trap() { stopped = true; leave(); }
"""

# Replacements for the bodies of these functions.
_REPLACED = {
    "load_relaxed": "sched_yield(); if (stopped) leave(); return __atomic_load_n(word, __ATOMIC_RELAXED);",
    "load_acquire": "sched_yield(); if (stopped) leave(); return __atomic_load_n(word, __ATOMIC_ACQUIRE);",
    "store_relaxed": "__atomic_store_n(word, value, __ATOMIC_RELAXED);",
    "fence": "__atomic_thread_fence(__ATOMIC_SEQ_CST);",
    "peek": "if (stopped) leave(); sched_yield(); const u64 *w = (const u64 *)at;"
    "return {__atomic_load_n(w, __ATOMIC_RELAXED), __atomic_load_n(w + 1, __ATOMIC_RELAXED)};",
    "push": "u64 *w = (u64 *)at; __atomic_store_n(w + 1, unit.b, __ATOMIC_RELAXED);"
    "__atomic_store_n(w, unit.a, __ATOMIC_RELAXED);",
    "load_whole": "return {*(const volatile u64 *)at, *(const volatile u64 *)(at + 8)};",
    "save": "if (left < 16 || u64(at) % 16 != 0) save_slowly(at, unit, left < 16 ? u32(left) : 16);"
    "else { ((volatile u64 *)at)[0] = unit.a; ((volatile u64 *)at)[1] = unit.b; }",
    "lane": "return threadIdx.x % 32;",
}
WAITING = {
    "read_clock": "struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000ull + t.tv_nsec;",
    "leave_word": "u32 *w = at; w[1] = b; w[2] = c; w[3] = d; __atomic_store_n(w, a, __ATOMIC_RELEASE);",
    "not_before": "",
}
"""Replacements for bodies of functions from :func:`symmem.backends.signal_kernels.lateness`."""

_AFTER = r"""
extern "C" void restart() { stopped = false; }
extern "C" int launch(int which, const Call *given, unsigned blocks, unsigned count) {
  void (*const kernels[])(Call) = {@KERNELS@};
  const Call call = *given;
  std::vector<std::thread> threads;
  std::deque<Block> all_blocks;
  std::atomic<int> trapped{0};
  for (unsigned b = 0; b < blocks; ++b) {
    Block *block = &all_blocks.emplace_back(count);
    for (unsigned t = 0; t < count; ++t)
      threads.emplace_back([&, b, t, block] {
        threadIdx.x = t; blockIdx.x = b; blockDim = {count, 1, 1}; gridDim = {blocks, 1, 1};
        all_of_block = block;
        if (setjmp(out_of_kernel) == 0) {
          kernels[which](call);
        } else {
          trapped = 1;
          block->drop();
        }
      });
  }
  for (auto &thread : threads) thread.join();
  return trapped;
}
"""


def _replace_bodies(source: str, replaced: Mapping[str, str]) -> str:
    for name, body in replaced.items():
        pattern = rf"(\n__device__ __(?:forceinline|noinline)__ [\w ]+[ *]{name}\([^)]*\) \{{).*?(?<=[;\n ])\}}\n"
        match = re.search(pattern, source, re.DOTALL)
        assert match is not None, f"there is no {name} in the source"
        source = source[: match.end(1)] + body + "}\n" + source[match.end() :]
    return source


def compile_kernels(kind: str, macros: Mapping[str, str], folder: Path) -> ctypes.CDLL:
    """Compile the kernels of a module of the collective operations; see :func:`emulate`."""
    return emulate(SOURCE, _REPLACED | WAITING, KERNELS[kind], macros, folder / f"{kind}{macros['WORLD']}.so")


def emulate(
    cuda: str, replaced: Mapping[str, str], kernels: Sequence[str], macros: Mapping[str, str], library: Path
) -> ctypes.CDLL:
    """Compile kernels to a library. Its ``launch(number, call, blocks, threads)`` returns 0 unless the kernel traps.

    After a trap no kernel runs until ``restart()``.

    Args:
        cuda: The source. Its kernels take a ``Call``.
        replaced: New bodies of functions, by name.
        kernels: Names of the kernels.
        macros: Macros for the command line.
        library: The file to make.
    """
    assert COMPILER is not None
    names = "".join(f"{name}, " for name in kernels)
    source = library.with_suffix(".cpp")
    source.write_text(_BEFORE + _replace_bodies(cuda, replaced) + _AFTER.replace("@KERNELS@", names))
    flags = [f"-D{name}={value}" for name, value in macros.items()]
    command = [COMPILER, "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC", "-pthread", *flags]
    subprocess.run([*command, "-o", str(library), str(source)], check=True, timeout=100)
    return ctypes.CDLL(str(library))
