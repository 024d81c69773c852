"""Kernels of test_triton.py."""

import triton
import triton.language as tl

from symmem import triton as symm


@triton.jit
def sum_of_all(x, out, pointers, signals, rank, turn, first, world: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    channel = first + tl.program_id(0)
    tl.store(x + at, at * (rank + 1) + turn)
    symm.barrier(signals, channel, rank, world)
    total = tl.zeros((block,), tl.int32)
    for peer in range(world):
        total += symm.load(x + at, pointers, rank, peer)
    tl.store(out + at, total)
    symm.barrier(signals, channel, rank, world)


@triton.jit
def pass_on(x, out, pointers, signals, rank, right, left, value, world: tl.constexpr, block: tl.constexpr):
    at = tl.arange(0, block)
    values = tl.zeros((block,), tl.int32) + value
    symm.put_with_signal(x + at, values, pointers, signals, right, 2, rank, world, mask=at < block)
    symm.wait_signal(signals, left, 2, rank, world)
    tl.store(out + at, tl.load(x + at))
    symm.put_signal(signals, left, 3, rank, world)  # it may be overwritten
    symm.wait_signal(signals, right, 3, rank, world)


@triton.jit
def put(signals, peer, channel, count, rank, world: tl.constexpr):
    symm.put_signal(signals, peer, channel, rank, world, count)


@triton.jit
def take(signals, source, channel, count, rank, world: tl.constexpr):
    symm.wait_signal(signals, source, channel, rank, world, count)


@triton.jit
def see(signals, source, channel, count, rank, world: tl.constexpr):
    symm.wait_signal(signals, source, channel, rank, world, count, keep=True)


@triton.jit
def meet(signals, channel, rank, world: tl.constexpr):
    symm.barrier(signals, channel, rank, world)


@triton.jit
def count(x, pointers, rank, times):
    symm.atomic_add(x, 1, pointers, rank, 0)
    symm.atomic_cas(x + 1, 0, rank + 1, pointers, rank, 0)
    symm.atomic_xchg(x + 2, rank + 1, pointers, rank, 0)


@triton.jit
def everything(x, out, pointers, signals, rank, world: tl.constexpr, block: tl.constexpr):
    at = tl.arange(0, block)
    symm.barrier(signals, tl.program_id(0), rank, world)
    tl.store(out + at, symm.load(x + at, pointers, rank, 1))
    symm.put_signal(signals, 1, 0, rank, world)
    symm.wait_signal(signals, 1, 0, rank, world)


def print_ptx(world: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"x": "*fp32", "out": "*fp32", "pointers": "*i64", "signals": "*i64", "rank": "i32"}
    source = ASTSource(
        everything,
        signature=signature | {"world": "constexpr", "block": "constexpr"},
        constexprs={"world": world, "block": 1024},
        attrs={(index,): [["tt.divisibility", 16]] for index in range(4)},
    )
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
