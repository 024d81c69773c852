"""Arithmetic whose bits do not depend on the place of an element or the number of ranks, for the engines.

**Places.**
Torch's loops on the CPU take most elements in vectors, and the remainder one by one. Both round sums alike. But for a
minimum or maximum of 0.0 and -0.0, one of them returns its first argument and the other its second. So the same row had
other bits at another place of a batch. Here -0.0 is less than 0.0, as in IEEE 754-2019 (minimum, maximum) and in the
PTX instructions ``min.NaN`` and ``max.NaN`` of the kernels on CUDA.

A NaN is a NaN at every place, but its sign and payload depend on the place, for sums too: torch's conversions to
float16 and bfloat16 make different NaNs in vectors and in the remainder.

**The tree.** The order ``"tree"`` adds leaves as a balanced binary tree over all leaves of all ranks: neighbours first,
then neighbouring sums, and so on. Rank r has leaves r * k to r * k + k - 1. If the number of ranks and k are powers of
two, every rank's leaves are a subtree, so the tree does not depend on how many ranks share the leaves. All sums are
float32 (float64 for float64), those that ranks exchange too, and the last one is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["SIGNED_ZEROS", "Tree", "divided", "sign_zeros", "sum_leaves", "tree_dtype"]

SIGNED_ZEROS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}
"""The dtypes that have a -0.0, and integers of the same size. The float8 dtypes ``fnuz`` have none."""


def divided(total: torch.Tensor, count: int) -> torch.Tensor:
    """Divide in place. Complex numbers as pairs: their division has two algorithms, in vectors and in the remainder."""
    (torch.view_as_real(total) if total.is_complex() else total).div_(count)
    return total


def sign_zeros(parts: Sequence[torch.Tensor], out: torch.Tensor, reduction: str, room: torch.Tensor) -> None:
    """Set the signs of the zeros in ``out``, the minimum or maximum of ``parts``.

    A minimum has a sign bit if any part has one, and a maximum if all parts have one. For results other than zeros this
    is true already, so no test for zeros is needed.

    Args:
        parts: Two or more tensors of a dtype in :data:`SIGNED_ZEROS`.
        out: Their minimum or maximum, of the same shape and dtype.
        reduction: ``"min"`` or ``"max"``.
        room: Any contiguous tensor of at least as many bytes, which is overwritten. To allocate it costs more than the
            rest.
    """
    integers = SIGNED_ZEROS[out.dtype]
    bits = out.view(integers)
    signs = room.view(-1).view(integers)[: bits.numel()].view(bits.shape)
    merge = torch.bitwise_or if reduction == "min" else torch.bitwise_and
    merge(parts[0].view(integers), parts[1].view(integers), out=signs)
    for part in parts[2:]:
        merge(signs, part.view(integers), out=signs)
    bits.bitwise_xor_(signs.bitwise_xor_(bits).bitwise_and_(-1 << (8 * integers.itemsize - 1)))


def tree_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sums of a tree over leaves of a floating-point dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_leaves(leaves: torch.Tensor) -> torch.Tensor:
    """Sum over the first dimension, a power of two, as a tree. May return a view if there is one leaf."""
    wide = tree_dtype(leaves.dtype)
    while leaves.shape[0] > 1:
        leaves = leaves[::2].to(wide) + leaves[1::2].to(wide)
    return leaves[0].to(wide)


class Tree(NamedTuple):
    """The upper part of a tree, over ranks.

    Attributes:
        reduction: ``"sum"`` or ``"avg"``.
        leaves: The number of leaves of all ranks.
    """

    reduction: str
    leaves: int

    def combine(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Combine all ranks' results of :func:`sum_leaves` into ``out``, of any floating-point dtype."""
        rows = list(parts)
        while len(rows) > 1:
            rows = [torch.add(*rows[pair : pair + 2]) for pair in range(0, len(rows), 2)]
        self.finish(rows[0], out)

    def finish(self, total: torch.Tensor, out: torch.Tensor) -> None:
        """Divide if the reduction is an average, and round into ``out``, which may be ``total``."""
        if self.reduction == "avg":
            total = total / self.leaves
        if total is not out:
            out.copy_(total)
