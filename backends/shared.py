"""The common part of ``host`` and ``native``, which export memory and map the memory of all ranks side by side.

The two differ in the kind of memory and how it is imported (:class:`Range`), in the place of the signal pads, and in
the implementation of signals.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from symmem.backends.base import Backend, RankGroup, tensor_at
from symmem.backends.libc import Inbox
from symmem.backends.signalled import SignalledMapping

__all__ = ["Range", "SharedMapping", "pass_and_map"]


class Range(Protocol):
    """A reserved range of addresses, in which memory is mapped. It is unmapped with the last reference to it."""

    address: int

    def place(self, offset: int, token: Any, nbytes: int) -> int:
        """Map the first ``nbytes`` of memory that another process exported at ``offset``; returns the address."""

    def open(self) -> None:
        """Allow access to the memory placed so far."""


class SharedMapping(SignalledMapping):
    """The memory of all ranks side by side in one range of addresses, and their signal pads anywhere.

    Args:
        backend: The backend that made it.
        group: The group of the rendezvous.
        device: The device of tensors over the memory.
        region: The range; rank r's memory is at ``r * stride``.
        stride: Bytes of every rank's memory.
        own: Address at which this rank's tensors already use the memory; they keep it.
        pads: Address of every rank's pad.
    """

    def __init__(
        self,
        backend: Backend,
        group: RankGroup,
        device: torch.device,
        region: Range,
        stride: int,
        own: int,
        pads: Sequence[int],
    ) -> None:
        pointers = [region.address + rank * stride for rank in range(group.size)]
        pointers[group.rank] = own
        super().__init__(backend, group, device, pointers, pads)
        self._region, self._stride = region, stride

    def contiguous(self) -> tuple[int, int]:
        return self._region.address, self._stride

    def home_of(self, address: int) -> int:
        rank = self.group.rank
        offset = address - self._region.address - rank * self._stride
        return self.pointers[rank] + offset if 0 <= offset < self._stride else address


def pass_and_map(descriptor: int, nbytes: int, reserve: Callable[[int], Range], memory: torch.Tensor) -> bool:
    """Pass memory through a socket, map it a second time, and return whether a store is visible there. For probes.

    Args:
        descriptor: The exported memory; the caller keeps it.
        nbytes: Bytes of the memory.
        reserve: Makes a range of so many bytes.
        memory: The same memory through its first mapping, as a uint8 tensor.
    """
    with contextlib.ExitStack() as undo:
        left, right = (undo.enter_context(end) for end in socket.socketpair())
        socket.send_fds(left, [b"\0"], [descriptor])
        inbox = Inbox(1)
        inbox.receive(right)
        (passed,) = inbox.take()
        second = reserve(nbytes)
        second.place(0, passed, nbytes)
        second.open()
        memory.fill_(42)
        return bool(tensor_at(second.address, 1, memory.device, second).item() == 42)
