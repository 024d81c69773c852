"""GPU memory from the driver's virtual memory management: handles and ranges of addresses that free themselves.

Freeing and kernels. A peer's memory lives until the last process unmaps it, so nobody has to be asked before memory
is freed. This process's own kernels are another matter: cuMemUnmap does not wait for them (vllm PR 43020, and
PyTorch's expandable segments say the same), and a kernel whose memory is unmapped under it is a fatal fault. So the
device is synchronised first, as PyTorch's CUDA transport does. The price is that the last tensor's end may wait for
kernels, within a barrier for as long as its timeout; memory that comes and goes belongs in an arena.

Synchronising would end a stream capture. What is freed during one is kept, and unmapped by the next free or
allocation after it. So a collection of garbage is safe at any time, on any thread, and never waits for another rank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from symmem.backends.base import Collective
from symmem.backends.driver import Driver
from symmem.errors import SymmemError

__all__ = ["DeviceRange", "MemoryHandle", "Token", "exchange_handles", "free_what_is_left"]

log = logging.getLogger("symmem.vmm")

Token: TypeAlias = "int | bytes"
"""Physical memory on its way between processes: a file descriptor, or an exported fabric handle."""


class MemoryHandle:
    """A reference to physical memory, or to a multicast object; released with the last reference to this.

    Attributes:
        value: The driver's handle.
    """

    def __init__(self, driver: Driver, value: int) -> None:
        self.value = value
        self._driver = driver
        self._descriptor: int | None = None
        self._closing: Callable[[], object] = lambda: None
        # Not at the interpreter's exit: the driver takes back all that a process had.
        self._finalizer = weakref.finalize(self, _release, driver, os.getpid(), value)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Release it now; may be called again."""
        self._finalizer()
        self._closing()

    def descriptor(self) -> int:
        """The memory as a file descriptor that lives as long as this; exported when it is first asked for."""
        if self._descriptor is None:
            self._descriptor = self._driver.export_descriptor(self.value)
            self._closing = closing = weakref.finalize(self, os.close, self._descriptor)
            closing.atexit = False
        return self._descriptor

    @classmethod
    def take(cls, driver: Driver, token: Token) -> MemoryHandle:
        """Import a token, which stays the caller's."""
        if isinstance(token, bytes):
            return cls(driver, driver.import_fabric(token))
        return cls(driver, driver.import_descriptor(token))


class DeviceRange:
    """A reserved range of a GPU's addresses; unmapped and given back with the last reference, or by ``close()``.

    Args:
        driver: The driver.
        ordinal: The GPU that will access it.
        nbytes: A multiple of ``alignment``.
        alignment: Of the address; the granularity of what is mapped into it.

    Attributes:
        address: The first one.
        pieces: Address and bytes of each mapping.
        afterwards: Called once nothing is mapped any more.
    """

    def __init__(self, driver: Driver, ordinal: int, nbytes: int, alignment: int) -> None:
        self._driver, self._ordinal = driver, ordinal
        self.address = driver.reserve(nbytes, alignment)
        self.pieces: list[tuple[int, int]] = []
        self.afterwards: list[Callable[[], object]] = []
        self._opened = 0  # how many pieces the GPU may access
        grave = _Grave(driver, ordinal, self.address, nbytes, self.pieces, self.afterwards)
        self._finalizer = weakref.finalize(self, _bury, grave)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Unmap and give back now; may be called again."""
        self._finalizer()

    def map(self, offset: int, handle: MemoryHandle, nbytes: int) -> int:
        """Map the first ``nbytes`` of a handle's memory at ``offset``; returns the address."""
        address = self.address + offset
        self._driver.map(address, nbytes, handle.value)
        self.pieces.append((address, nbytes))
        return address

    def holds(self, offset: int) -> bool:
        """Whether a piece was mapped at ``offset``."""
        return any(address == self.address + offset for address, _nbytes in self.pieces)

    def place(self, offset: int, token: Token, nbytes: int) -> int:
        """Import memory of a process, maybe this one, and map it at ``offset``; returns the address."""
        handle = MemoryHandle.take(self._driver, token)
        try:
            address = self.map(offset, handle, nbytes)
        finally:
            handle.close()  # the mapping keeps the memory
        return address

    def open(self) -> None:
        """Let the GPU access what was mapped since the last time.

        One call for all pieces that touch: setting access takes most of the time of a rendezvous. After an error it
        may be called again.
        """
        for run in _runs(self.pieces[self._opened :]):
            self._driver.allow(self._ordinal, *run)
        self._opened = len(self.pieces)

    def first_closed(self) -> int:
        """After an error: the index of the first piece that the GPU cannot access, or else of the next one."""
        for index, piece in enumerate(self.pieces):
            try:
                self._driver.allow(self._ordinal, *piece)
            except SymmemError:
                return index
        return len(self.pieces)


def _runs(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces in order of address, those that touch made one."""
    runs: list[tuple[int, int]] = []
    for address, nbytes in sorted(pieces):
        if runs and sum(runs[-1]) == address:
            runs[-1] = runs[-1][0], runs[-1][1] + nbytes
        else:
            runs.append((address, nbytes))
    return runs


@dataclass(frozen=True)
class _Grave:
    """What is left of a range that nobody refers to: enough to give it back."""

    driver: Driver
    ordinal: int
    address: int
    nbytes: int
    pieces: list[tuple[int, int]]
    afterwards: list[Callable[[], object]]
    process: int = field(default_factory=os.getpid)

    def give_back(self) -> bool:
        """Unmap and give back; False if it has to wait for the end of a stream capture."""
        if self.process != os.getpid():
            return True  # a forked child has no part in the GPU's memory
        try:
            with self.driver.on(self.ordinal):
                if not self.driver.quiesce(self.ordinal):
                    return False
                for piece in self.pieces:
                    quietly(self.driver.unmap, *piece)
                quietly(self.driver.unreserve, self.address, self.nbytes)
                for step in self.afterwards:
                    quietly(step)
        except SymmemError as error:  # a device that has failed: all it had is gone
            log.debug("cannot unmap %#x: %s", self.address, error)
        return True


_graves: deque[_Grave] = deque()  # what could not be given back yet


def _bury(grave: _Grave) -> None:
    _graves.append(grave)
    free_what_is_left()


def free_what_is_left() -> None:
    """Unmap what came free during a stream capture, unless one is still going on."""
    for _ in range(len(_graves)):
        try:
            grave = _graves.popleft()
        except IndexError:  # another thread was quicker
            return
        if not grave.give_back():
            _graves.append(grave)


def _release(driver: Driver, process: int, handle: int) -> None:
    if process == os.getpid():
        quietly(driver.release, handle)


def quietly(function: Callable[..., object], *arguments: int) -> None:
    """Free something. A device that has failed refuses, and there is nobody to tell."""
    try:
        function(*arguments)
    except SymmemError as error:
        log.debug("%s%s: %s", function, arguments, error)


@contextlib.contextmanager
def exchange_handles(
    driver: Driver,
    collective: Collective,
    step: str,
    card: dict[str, Any],
    handles: Sequence[MemoryHandle],
    fabric: bool,
) -> Iterator[list[tuple[dict[str, Any], tuple[Token, ...]]]]:
    """Give every rank's card and handles to every rank. Collective.

    Args:
        driver: The driver.
        collective: The operation in progress.
        step: Named in errors.
        card: Plain data.
        handles: Physical memory.
        fabric: Whether the handles can be exported to other hosts.

    Yields:
        Each rank's card and tokens, valid within the block.

    Raises:
        SymmemError: The same on all ranks; between hosts, unless all ranks have fabric handles, it names the hosts.
    """
    with contextlib.ExitStack() as undo:
        if fabric and not collective.passes_descriptors:
            card = card | {"fabric": [driver.export_fabric(handle.value).hex() for handle in handles]}
            received = undo.enter_context(collective.exchange(step, json.dumps(card).encode()))
            cards = [json.loads(each.payload) for each in received]
            yield [(card, tuple(map(bytes.fromhex, card.pop("fabric")))) for card in cards]
            return
        descriptors = [handle.descriptor() for handle in handles]
        received = undo.enter_context(collective.exchange(step, json.dumps(card).encode(), descriptors))
        yield [(json.loads(each.payload), each.descriptors) for each in received]
