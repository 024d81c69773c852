"""A mapping that gets its signals from :meth:`Mapping.signals_at`, over one pad per rank."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from symmem.backends.base import Backend, Mapping, RankGroup, Signals

__all__ = ["SignalledMapping"]


class SignalledMapping(Mapping):
    """A mapping that forwards barrier and signals. A subclass implements ``signals_at``.

    Args:
        backend: See :class:`Mapping`.
        group: See :class:`Mapping`.
        device: See :class:`Mapping`.
        pointers: See :class:`Mapping`.
        pads: Address of every rank's pad in this process; 0 if the rank is not load/store reachable.
    """

    def __init__(
        self,
        backend: Backend,
        group: RankGroup,
        device: torch.device,
        pointers: Sequence[int],
        pads: Sequence[int],
    ) -> None:
        super().__init__(backend, group, device, pointers)
        self._pads = tuple(pads)

    @functools.cached_property
    def signals(self) -> Signals:
        """The signals of the whole memory. They are made on first use: on CUDA they need a compiler."""
        return self.signals_at(self._pads)

    def barrier(self, channel: int, timeout: float) -> None:
        self.signals.barrier(channel, timeout)

    def put_signal(self, rank: int, channel: int, timeout: float) -> None:
        self.signals.put_signal(rank, channel, timeout)

    def wait_signal(self, rank: int, channel: int, timeout: float) -> None:
        self.signals.wait_signal(rank, channel, timeout)

    def signal_pad(self, rank: int) -> tuple[int, int]:
        return self.signals.signal_pad(rank)

    def check(self) -> None:
        if signals := vars(self).get("signals"):  # signals that were never made cannot have failed
            signals.check()
