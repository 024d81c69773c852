"""The interface of engines. An engine runs the collective operations of a group on one device, over any backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

__all__ = ["REDUCTIONS", "Engine", "Engines", "describe", "shape_text"]

REDUCTIONS = ("sum", "avg", "min", "max")
"""The reductions. Sums of float16, bfloat16 and float8 are computed in float32."""


def shape_text(shape: Sequence[int]) -> str:
    """A shape in errors: ``2x3``, or ``one`` for a tensor without dimensions."""
    return "x".join(map(str, shape)) or "one"


def describe(operation: str, option: str | int, shape: str, dtype: torch.dtype, piece: int) -> str:
    """The text for a call in errors. The option is the reduction or the root; a large call has several pieces."""
    options = f"({option})" if isinstance(option, str) else f"(root {option})" if option else ""
    return f"{operation}{options} of {shape} {dtype}" + (f", piece {piece}" if piece else "")


class Engine(Protocol):
    """Collective operations of one group on one device.

    All ranks call the same operations with the same shapes and dtypes, in the same order. On CUDA a call is work on the
    current stream. It does not synchronise with the host, and CUDA graphs can capture it. On the CPU a call is complete
    when it returns. Results are bitwise equal on all ranks and from run to run. Tensors are contiguous and on the
    engine's device. They may have any size and alignment, in symmetric or other memory. The caller has checked shapes,
    dtypes and devices.

    Raises:
        PeerTimeoutError, PeerLostError: A rank did not come in time, or died. Names the rank.
    """

    def all_reduce(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """``out`` = the reduction over all ranks' ``source``, of the same shape. ``out`` may be ``source``."""

    def all_gather(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """``out`` [world, *source.shape] = all ranks' ``source``, in rank order. ``source`` may be ``out[rank]``."""

    def reduce_scatter(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """``out`` = the reduction over all ranks' ``source[rank]``, of ``source`` [world, *out.shape].

        ``out`` may be ``source[rank]``.
        """

    def all_reduce_tree(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """``out`` = the sum or average of all ranks' ``source[leaf]``, as one tree; see :mod:`.arithmetic`.

        ``source`` is [leaves of a rank, *out.shape], of a floating-point dtype. It does not overlap with ``out``.
        """

    def reduce_scatter_tree(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """The same for all ranks' ``source[leaf, rank]``, of ``source`` [leaves of a rank, world, *out.shape]."""

    def all_to_all(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """``out[r]`` = rank r's ``source[rank]``. Both are [world, ...], of one shape, and do not overlap."""

    def broadcast(self, source: torch.Tensor, out: torch.Tensor, root: int) -> None:
        """``out`` = rank ``root``'s ``source``, of the same shape. ``out`` may be ``source``."""


class Engines(dict[torch.device, Engine]):
    """The engines of a group by device. Stored in ``group.extensions``."""
