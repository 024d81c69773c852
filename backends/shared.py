"""What the backends share that export memory and map all ranks' side by side: ``host`` and ``native``.

They differ in what memory is and how it is imported (:class:`Range`), in where signal pads lie, and in who signals.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from symmem.backends.base import Backend, Group, Mapping, Signals, tensor_at
from symmem.backends.descriptors import close_all

__all__ = ["Range", "SharedMapping", "pass_and_map"]


class Range(Protocol):
    """A reserved range of addresses, in which memory is mapped; unmapped when the last reference to it is gone."""

    address: int

    def place(self, offset: int, token: Any, nbytes: int) -> int:
        """Map the first ``nbytes`` of what another process exported at ``offset``; returns the address."""

    def open(self) -> None:
        """Allow access to what was placed."""


class SharedMapping(Mapping):
    """All ranks' memory side by side in one range of addresses, and their signal pads anywhere.

    Args:
        backend: Whose it is.
        group: The group that met.
        device: Where tensors over the memory lie.
        region: The range; rank r's memory is at ``r * stride``.
        stride: Bytes of each rank's memory.
        own: Address that this rank's tensors have already; they keep it.
        pads: Address of each rank's pad.
    """

    def __init__(
        self,
        backend: Backend,
        group: Group,
        device: torch.device,
        region: Range,
        stride: int,
        own: int,
        pads: Sequence[int],
    ) -> None:
        pointers = [region.address + rank * stride for rank in range(group.size)]
        pointers[group.rank] = own
        super().__init__(backend, group, device, pointers)
        self._region, self._stride = region, stride
        self._pads = tuple(pads)

    @functools.cached_property
    def signals(self) -> Signals:
        """Those of the whole memory; made when they are first used."""
        return self.signals_at(self._pads)

    def barrier(self, channel: int, timeout: float) -> None:
        self.signals.barrier(channel, timeout)

    def put_signal(self, rank: int, channel: int, timeout: float) -> None:
        self.signals.put_signal(rank, channel, timeout)

    def wait_signal(self, rank: int, channel: int, timeout: float) -> None:
        self.signals.wait_signal(rank, channel, timeout)

    def check(self) -> None:
        if signals := vars(self).get("signals"):  # nothing can have failed of signals that were never made
            signals.check()

    def contiguous(self) -> tuple[int, int]:
        return self._region.address, self._stride

    def signal_pad(self, rank: int) -> tuple[int, int]:
        return self.signals.signal_pad(rank)


def pass_and_map(descriptor: int, nbytes: int, reserve: Callable[[int], Range], memory: torch.Tensor) -> bool:
    """Pass memory through a socket, map it a second time, and say whether a store is seen there. For probes.

    Args:
        descriptor: The exported memory; stays the caller's.
        nbytes: Bytes of it.
        reserve: Makes a range of so many bytes.
        memory: The same memory as it is mapped already, as a uint8 tensor.
    """
    with contextlib.ExitStack() as undo:
        left, right = (undo.enter_context(end) for end in socket.socketpair())
        socket.send_fds(left, [b"\0"], [descriptor])
        descriptors = socket.recv_fds(right, 1, 1)[1]
        undo.callback(close_all, descriptors)
        second = reserve(nbytes)
        second.place(0, descriptors[0], nbytes)
        second.open()
        memory.fill_(42)
        return bool(tensor_at(second.address, 1, memory.device, second).item() == 42)
