"""Arithmetic whose bits do not depend on the place of an element, for :mod:`symmem.ops.engines.host`.

Torch's loops on the CPU take most elements in vectors, and the remainder one by one. Both round sums alike. But for a
minimum or maximum of 0.0 and -0.0, one of them returns its first argument and the other its second. So the same row had
other bits at another place of a batch. Here -0.0 is less than 0.0, as in IEEE 754-2019 (minimum, maximum) and in the
PTX instructions ``min.NaN`` and ``max.NaN`` of the kernels on CUDA.

A NaN is a NaN at every place, but its sign and payload depend on the place, for sums too: torch's conversions to
float16 and bfloat16 make different NaNs in vectors and in the remainder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["SIGNED_ZEROS", "divided", "sign_zeros"]

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
