"""GPU memory from the driver's virtual memory management: handles and ranges of addresses that free themselves.

Freeing needs no agreement with peers, because memory lives until the last process unmaps it. Kernels of this process
are different: cuMemUnmap does not wait for them (vllm PR 43020 and PyTorch's expandable segments confirm this), and a
kernel that uses unmapped memory is a fatal fault. So the device is synchronised first, as in PyTorch's CUDA transport.
The price is that freeing the last tensor may wait for kernels; if a kernel waits in a barrier, for as long as the
timeout. Short-lived memory belongs in an arena.

Synchronising would end a stream capture. So memory that is freed during a capture is kept, and the next free or
allocation after the capture unmaps it. A garbage collection is therefore safe at any time and on any thread, and never
waits for another rank.
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
from symmem.backends.libc import Descriptor
from symmem.backends.untraced import untraced
from symmem.errors import SymmemError, UnsupportedError

__all__ = ["DeviceRange", "MemoryHandle", "Token", "exchange_handles", "free_pending", "map_again"]

log = logging.getLogger("symmem.vmm")

Token: TypeAlias = "int | bytes"
"""Physical memory in a message between processes: a file descriptor, or an exported fabric handle."""


class MemoryHandle:
    """A reference to physical memory or a multicast object. It is released with the last reference to this object.

    Attributes:
        value: The driver's handle.
    """

    def __init__(self, driver: Driver, value: int) -> None:
        self.value = value
        self._driver = driver
        self._descriptor: Descriptor | None = None
        # Not at the interpreter's exit: the driver frees everything of a process.
        self._finalizer = weakref.finalize(self, _release, driver, os.getpid(), value)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Release it now. May be called again."""
        self._finalizer()
        if self._descriptor is not None:
            self._descriptor.close()

    def descriptor(self) -> Descriptor:
        """The memory as a file descriptor, exported on the first call. It is closed with this object."""
        if self._descriptor is None:
            self._descriptor = Descriptor.of(self._driver.export_descriptor(self.value))
        return self._descriptor

    @classmethod
    def take(cls, driver: Driver, token: Token) -> MemoryHandle:
        """Import a token; the caller keeps it."""
        if isinstance(token, bytes):
            return cls(driver, driver.import_fabric(token))
        return cls(driver, driver.import_descriptor(token))


class DeviceRange:
    """A reserved range of a GPU's addresses. It is unmapped and freed with its last reference, or by ``close()``.

    Args:
        driver: The driver.
        ordinal: The GPU that will access it.
        nbytes: A multiple of ``alignment``.
        alignment: Alignment of the address; the granularity of memory mapped into the range.

    Attributes:
        address: The first address.
        pieces: Address and bytes of every mapping.
        afterwards: Functions to call after everything is unmapped.
    """

    def __init__(self, driver: Driver, ordinal: int, nbytes: int, alignment: int) -> None:
        self._driver, self._ordinal, self._gpus = driver, ordinal, {ordinal}
        self.address = driver.reserve(nbytes, alignment)
        self.pieces: list[tuple[int, int]] = []
        self.afterwards: list[Callable[[], object]] = []
        self._opened = 0  # number of pieces that the GPU may access
        remains = _Remains(driver, self._gpus, self.address, nbytes, self.pieces, self.afterwards)
        self._finalizer = weakref.finalize(self, _free, remains)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Unmap and free it now. May be called again."""
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
        """Import memory of any process, this one included, and map it at ``offset``; returns the address."""
        handle = MemoryHandle.take(self._driver, token)
        try:
            address = self.map(offset, handle, nbytes)
        finally:
            handle.close()  # the mapping keeps the memory
        return address

    def open(self) -> None:
        """Let the GPU access the pieces mapped since the last call. After an error it may be called again.

        Adjacent pieces share one call of the driver, because setting access takes most of the time of a rendezvous.
        """
        for run in _runs(self.pieces[self._opened :]):
            self._driver.allow(self._ordinal, *run)
        self._opened = len(self.pieces)

    def admit(self, ordinal: int) -> None:
        """Let another GPU of this process access what the first one may access."""
        if ordinal not in self._gpus:
            for run in _runs(self.pieces[: self._opened]):
                self._driver.allow(ordinal, *run)
            self._gpus.add(ordinal)

    def first_closed(self) -> int:
        """After an error, the index of the first piece that the GPU cannot access; else the number of pieces."""
        for index, piece in enumerate(self.pieces):
            try:
                self._driver.allow(self._ordinal, *piece)
            except SymmemError:
                return index
        return len(self.pieces)


def map_again(driver: Driver, ordinal: int, pointers: Sequence[int], nbytes: int) -> tuple[DeviceRange, int, int]:
    """Map memory that another library has mapped a second time, so that all ranks' memory is side by side.

    Args:
        driver: The driver.
        ordinal: The GPU that will access it.
        pointers: Address of every rank's memory in this process.
        nbytes: Bytes of every rank's memory.

    Returns:
        The range, the offset of the first rank's memory in it, and the bytes from one rank's memory to the next.

    Raises:
        UnsupportedError: The ranks' memory begins at different offsets of the driver's mappings.
        SymmemError: The driver cannot map it a second time.
    """
    pieces = [_mapped_pieces(driver, pointer, nbytes) for pointer in pointers]
    offsets = [pointer - first for pointer, ((first, _), *_rest) in zip(pointers, pieces, strict=True)]
    if len(set(offsets)) > 1:
        raise UnsupportedError(
            f"the library has placed the ranks' memory differently: {offsets} bytes after the beginning of a mapping",
            hint="use remote_tensor() for each rank, or the backend `native`",
        )
    stride = max(sum(size for _, size in each) for each in pieces)
    region = DeviceRange(driver, ordinal, len(pointers) * stride, driver.granularity(ordinal, False))
    for rank, each in enumerate(pieces):
        at = rank * stride
        for address, size in each:
            handle = MemoryHandle(driver, driver.retain(address))
            try:
                region.map(at, handle, size)
            finally:
                handle.close()  # the mapping keeps the memory
            at += size
    region.open()
    return region, offsets[0], stride


def _mapped_pieces(driver: Driver, pointer: int, nbytes: int) -> list[tuple[int, int]]:
    """Address and bytes of the mappings, one after the other, that hold a piece of memory."""
    pieces = [driver.range_of(pointer)]
    while (end := sum(pieces[-1])) < pointer + nbytes:
        pieces.append(driver.range_of(end))
    return pieces


def _runs(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces in order of address, with adjacent pieces merged."""
    runs: list[tuple[int, int]] = []
    for address, nbytes in sorted(pieces):
        if runs and sum(runs[-1]) == address:
            runs[-1] = runs[-1][0], runs[-1][1] + nbytes
        else:
            runs.append((address, nbytes))
    return runs


@dataclass(frozen=True)
class _Remains:
    """The data to free a range that has no reference left."""

    driver: Driver
    gpus: set[int]  # that may access it
    address: int
    nbytes: int
    pieces: list[tuple[int, int]]
    afterwards: list[Callable[[], object]]
    process: int = field(default_factory=os.getpid)

    def give_back(self) -> bool:
        """Unmap and free it; False if that must wait for the end of a stream capture."""
        if self.process != os.getpid():
            return True  # the GPU's memory is the parent's
        try:
            with contextlib.ExitStack() as contexts:
                for gpu in self.gpus:
                    contexts.enter_context(self.driver.on(gpu))
                    if not self.driver.quiesce(gpu):
                        return False
                for piece in self.pieces:
                    quietly(self.driver.unmap, *piece)
                quietly(self.driver.unreserve, self.address, self.nbytes)
                for step in self.afterwards:
                    quietly(step)
        except SymmemError as error:  # the device has failed, and its memory is gone
            log.debug("cannot unmap %#x: %s", self.address, error)
        return True


_pending: deque[_Remains] = deque()  # ranges to free after a stream capture


@untraced
def _free(remains: _Remains) -> None:
    _pending.append(remains)
    free_pending()


def free_pending() -> None:
    """Unmap the ranges that lost their last reference during a stream capture, unless a capture is in progress."""
    for _ in range(len(_pending)):
        try:
            remains = _pending.popleft()
        except IndexError:  # another thread was faster
            return
        if not remains.give_back():
            _pending.append(remains)


@untraced
def _release(driver: Driver, process: int, handle: int) -> None:
    if process == os.getpid():
        quietly(driver.release, handle)


def quietly(function: Callable[..., object], *arguments: int) -> None:
    """Call a function that frees something, and log its error: a failed device refuses, and no caller can react."""
    try:
        function(*arguments)
    except SymmemError as error:
        log.debug("%s%s: %s", function, arguments, error)


@contextlib.contextmanager
def exchange_handles(
    driver: Driver,
    collective: Collective,
    step: str,
    metadata: dict[str, Any],
    handles: Sequence[MemoryHandle],
    fabric: bool,
) -> Iterator[list[tuple[dict[str, Any], tuple[Token, ...]]]]:
    """Give the metadata and handles of every rank to every rank. Collective.

    Args:
        driver: The driver.
        collective: The operation in progress.
        step: Its name in errors.
        metadata: Plain data.
        handles: Physical memory.
        fabric: Whether the handles can be exported to other hosts.

    Yields:
        Metadata and tokens of every rank, valid within the block.

    Raises:
        SymmemError: The same on all ranks. If ranks are on several hosts and not all have fabric handles, it names the
            hosts.
    """
    with contextlib.ExitStack() as undo:
        if fabric and not collective.passes_descriptors:
            metadata = metadata | {"fabric": [driver.export_fabric(handle.value).hex() for handle in handles]}
            received = undo.enter_context(collective.exchange(step, json.dumps(metadata).encode()))
            entries = [json.loads(contribution.payload) for contribution in received]
            yield [(entry, tuple(map(bytes.fromhex, entry.pop("fabric")))) for entry in entries]
            return
        descriptors = [handle.descriptor() for handle in handles]
        received = undo.enter_context(collective.exchange(step, json.dumps(metadata).encode(), descriptors))
        yield [(json.loads(contribution.payload), contribution.descriptors) for contribution in received]
