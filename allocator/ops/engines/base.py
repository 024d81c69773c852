"""What runs a collective operation: one engine for each group and device, whichever backend's memory it works over."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["REDUCTIONS", "Engine", "Engines"]

REDUCTIONS = ("sum", "avg", "min", "max")
"""How elements of all ranks are combined. Sums are made in float32 for float16, bfloat16 and float8."""


class Engine(Protocol):
    """Collective operations of one group on one device.

    All ranks call the same operations with the same shapes and dtypes, in the same order. On CUDA a call is work on the
    current stream, makes no host synchronisation, and can be captured by a CUDA graph; on the CPU it is done when it
    returns. Results are bitwise the same on all ranks and from run to run. Tensors are contiguous, on the engine's
    device, of any size and alignment, in symmetric memory or not; the caller has checked shapes, dtypes and devices.

    Raises:
        PeerTimeoutError, PeerLostError: A rank did not come in time, or died; names it.
    """

    def all_reduce(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """``out`` = the reduction over all ranks' ``source``; both of the same shape, the same tensor or apart."""

    def all_gather(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """``out`` [world, *source.shape] = all ranks' ``source``, in rank order."""

    def reduce_scatter(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """``out`` = the reduction over all ranks' ``source[rank]``, of ``source`` [world, *out.shape]."""

    def all_to_all(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """``out[r]`` = rank r's ``source[rank]``; both [world, ...] of the same shape, apart."""

    def broadcast(self, source: torch.Tensor, out: torch.Tensor, root: int) -> None:
        """``out`` = rank ``root``'s ``source``, of the same shape; the same tensor or apart."""


class Engines(dict[torch.device, Engine]):
    """The engines of one group by device; kept in ``group.extensions``."""
