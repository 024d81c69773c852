"""Which kernel runs a collective operation on CUDA, in how many blocks: a table by number of ranks and bytes.

Chosen by measuring on 2 and 4 H200s with NVLink (NV18), no multicast; for more ranks, from the traffic that a kernel
makes. A kernel over landing zones (see :mod:`symmem.ops.cuda_kernels`) costs one way over the links, or two, beside the
traffic; one that meets, two or more ways and fences, but nothing is stored twice.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ALL_REDUCE",
    "BLOCKS",
    "MOVE",
    "REDUCE_SCATTER",
    "Choice",
    "Row",
    "choose",
    "choose_move",
    "choose_reduce_scatter",
    "grid",
    "symmetric_beyond",
]

BLOCKS = 256
"""Most blocks of any kernel."""

_UNIT = 16


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        world: Most ranks that it is for.
        nbytes: Most bytes that it is for; None for any number.
        kernel: Name of the kernel.
        threads: In a block.
        blocks: At most.
        symmetric: Whether it is only for tensors that lie in symmetric memory, all of them.
        nap: Nanoseconds between two looks of a thread at a landing zone.
    """

    world: int
    nbytes: int | None
    kernel: str
    threads: int
    blocks: int
    symmetric: bool = False
    nap: int = 0


class Choice(NamedTuple):
    """What runs: the kernel, the most it is launched with, and how long its threads nap between two looks."""

    kernel: str
    threads: int
    blocks: int
    nap: int = 0


_Ki, _Mi, _MANY = 1 << 10, 1 << 20, 1 << 30

ALL_REDUCE = (
    Row(2, 256 * _Ki, "one_shot", 128, 128),
    Row(2, 512 * _Ki, "one_shot", 256, 128),
    Row(2, 2 * _Mi, "one_shot", 512, 128),
    Row(2, 16 * _Mi, "two_shot", 512, 128),
    Row(2, None, "direct", 256, 128, symmetric=True),
    Row(2, None, "two_shot", 512, 128),
    Row(4, 256 * _Ki, "one_shot", 128, 128),
    Row(4, 512 * _Ki, "two_shot", 128, 128),
    Row(4, 16 * _Mi, "two_shot", 512, 128),
    Row(4, None, "direct", 512, 128, symmetric=True),
    Row(4, None, "two_shot", 512, 128),
    Row(8, 128 * _Ki, "one_shot", 128, 128),
    Row(8, 2 * _Mi, "two_shot", 128, 128),
    Row(8, 4 * _Mi, "two_shot", 256, 128),
    Row(8, None, "direct", 512, 64, symmetric=True),
    Row(8, None, "two_shot", 512, 128),
    Row(_MANY, 32 * _Ki, "one_shot", 128, 128),
    Row(_MANY, 4 * _Mi, "two_shot", 128, 128),
    Row(_MANY, None, "direct", 512, 64, symmetric=True),
    Row(_MANY, None, "two_shot", 512, 128),
)
"""For all-reduce, by bytes of the tensor. The first row that fits counts."""

REDUCE_SCATTER = (
    Row(_MANY, 256 * _Ki, "reduce_scatter", 128, 128),
    Row(_MANY, None, "reduce_scatter", 512, 128),
)
"""For reduce-scatter, by bytes of the result."""

MOVE = (
    Row(2, 512 * _Ki, "exchange", 256, 128),
    Row(4, 256 * _Ki, "exchange", 256, 128),
    Row(8, 128 * _Ki, "exchange", 256, 128),
    Row(_MANY, 32 * _Ki, "exchange", 256, 128),
    Row(_MANY, None, "pull", 512, 64),
)
"""For what only moves bytes, by bytes of what one rank gives to another."""


def choose(nbytes: int, world: int, symmetric: bool = False) -> Choice:
    """What runs an all-reduce.

    Args:
        nbytes: Bytes of the tensor.
        world: Ranks.
        symmetric: Whether source and result lie in symmetric memory, at addresses that are multiples of 16.
    """
    return _first(ALL_REDUCE, nbytes, world, symmetric)


def choose_reduce_scatter(nbytes: int, world: int) -> Choice:
    """What runs a reduce-scatter with a result of so many bytes."""
    return _first(REDUCE_SCATTER, nbytes, world, False)


def choose_move(nbytes: int, world: int) -> Choice:
    """What moves ``nbytes`` from each rank to each other one."""
    return _first(MOVE, nbytes, world, False)


def symmetric_beyond(world: int) -> int:
    """The most bytes of an all-reduce for which it does not matter where its tensors lie."""
    most = 0
    for row in ALL_REDUCE:
        if world <= row.world:
            if row.symmetric or row.nbytes is None:
                break
            most = row.nbytes
    return most


def _first(rows: tuple[Row, ...], nbytes: int, world: int, symmetric: bool) -> Choice:
    for row in rows:
        if world <= row.world and (row.nbytes is None or nbytes <= row.nbytes) and (symmetric or not row.symmetric):
            return Choice(row.kernel, row.threads, row.blocks, row.nap)
    raise AssertionError("a table ends with a row for everything")


def grid(choice: Choice, units: int) -> int:
    """Blocks for so many pieces of work, of which a thread does one or more."""
    return max(1, min(choice.blocks, -(-units // choice.threads)))
