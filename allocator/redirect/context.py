"""``symmem.use_symmetric_memory``: all tensors that ops make inside a ``with`` block are in symmetric memory.

On the CPU, a dispatch mode runs every op and moves new tensors into the group's arena (:mod:`.cpu_dispatch`). On CUDA,
torch's caching allocator gets its memory from the arena (:mod:`.cuda_pool`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import torch

from symmem.backends.untraced import untraced_methods
from symmem.errors import UnsupportedError
from symmem.group.interrupts import held_back, to_the_end
from symmem.group.resolve import GroupLike, default_group, resolve_group
from symmem.memory import cuda_graphs
from symmem.redirect.cpu_dispatch import ArenaMode
from symmem.redirect.cuda_pool import ArenaPool
from symmem.tensor.request import arena_of, choose_source

if TYPE_CHECKING:
    from symmem.arena.arena import Arena

__all__ = ["use_symmetric_memory"]


@untraced_methods
class use_symmetric_memory(contextlib.ContextDecorator):
    """Put this thread's new tensors into the symmetric memory of a group, for any op.

    A context manager, or a decorator. ``symmem.find(y)`` then returns a handle that the group has rendezvoused.
    All ranks of the group must enter it, and run the same ops in the same order. Local, unless the arena must grow;
    growth is collective over the group. It applies to the thread that entered it. One object can be used many times,
    also nested, and by several threads. If two are nested, the inner one decides.

    On the CPU: views and the targets of writes keep their memory. So does memory that no op allocates: from
    ``torch.load``, ``torch.from_numpy``, ``torch.frombuffer`` and ``copy.deepcopy``. A tensor cannot be resized beyond
    its memory. Functions of ``torch.compile`` run uncompiled, and temporaries inside a custom op are not in the arena.

    On CUDA: all memory that this thread's ops request on that device comes from the arena, in pieces of at least
    2 MiB. Torch cuts tensors from the pieces, and ``find`` returns the handle of the piece. ``backward()`` runs on this
    thread. After the last tensor of a ``with`` block is gone, the next entry or :func:`symmem.collect` returns the
    block's pieces to the arena. A CUDA graph cannot be captured inside.

    Args:
        group: The arena's group; None for the default process group.
        device: The tensors' device. Default: the backend's; with ``auto``, the current CUDA device if there is one,
            else CPU. Tensors on other devices are not affected.
        backend: A name, or names in order of preference; default: the configuration's.

    Raises:
        DivergenceError: Ranks made different allocations; see :meth:`SymmetricTensor.allocate`.
        GroupError: There is no such group.
        OutOfMemoryError, ResourceLimitError: The arena cannot grow. On the CPU the op raises these errors and
            DivergenceError. On CUDA the op raises ``torch.OutOfMemoryError``, and the end of the block replaces it.
        UnsupportedError: It was entered during the capture of a CUDA graph; or the backend cannot have an arena, or
            torch's allocator cannot have pools.
        SymmemError: Other errors of :meth:`SymmetricTensor.allocate` for these arguments.
    """

    def __init__(
        self,
        group: GroupLike = None,
        *,
        device: torch.device | str | int | None = None,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        self._group, self._device, self._backend = group, device, backend

    def __enter__(self) -> None:
        arena, entries = self._arena(), _thread.entries
        depth = len(entries)
        try:
            with held_back():  # an interrupt half-way would leave torch's mode or pool in use
                _begin(arena, sys._getframe(1))
        except BaseException:
            if len(entries) > depth:  # a handler has raised after it
                _end(entries.pop())
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended: list[ArenaMode | ArenaPool] = []

        def end() -> None:
            with held_back():
                if not ended:
                    ended.append(_thread.entries.pop())
                    _end(ended[0])

        interrupt = to_the_end(end)
        if (cause := ended[0].cause_of(error)) is not None:
            raise cause from error
        if interrupt is not None:
            raise interrupt

    def _arena(self) -> Arena:
        """Return the arena to use, or raise if it cannot be used now."""
        group = default_group() if self._group is None else resolve_group(self._group)
        try:
            source = choose_source(group, self._backend, self._device)
            if source.device.type not in ("cpu", "cuda"):
                raise UnsupportedError(f"use_symmetric_memory is for tensors on the CPU or CUDA, not {source.device}")
            if cuda_graphs.is_capturing(source.device):
                raise UnsupportedError(
                    "use_symmetric_memory cannot be entered during the capture of a CUDA graph: torch would reuse the "
                    "memory of the graph's tensors after the block ends",
                    hint="allocate with symmem.allocate, which works during a capture, and let ops write there "
                    "(out=, copy_)",
                )
            return arena_of(source, group)
        except Exception as error:
            # As in allocate(): the other ranks need not wait for the timeout.
            if group is not None and self._group is not None and getattr(error, "propagated_to", None) is None:
                group.fail("use_symmetric_memory", error)
            raise


class _Entries(threading.local):
    """The modes and pools that this thread has entered, the innermost last. Nested entries may repeat one."""

    def __init__(self) -> None:
        self.entries: list[ArenaMode | ArenaPool] = []


_thread = _Entries()


def _begin(arena: Arena, frame: FrameType) -> None:
    """Let new tensors of this thread be in an arena."""
    outer = _innermost(arena.device)
    if outer is not None and outer.arena is arena:
        _thread.entries.append(outer)
        return
    arena.enter("use_symmetric_memory", frame)
    entry = ArenaPool(arena) if arena.device.type == "cuda" else ArenaMode(arena)
    if outer is not None:
        outer.pause()
    try:
        entry.start()
    except BaseException:
        if outer is not None:
            outer.resume()
        raise
    _thread.entries.append(entry)


def _end(entry: ArenaMode | ArenaPool) -> None:
    """End an entry that is no longer in the list, unless an outer one is the same."""
    if entry in _thread.entries:
        return
    try:
        entry.stop()
    finally:
        outer = _innermost(entry.arena.device)
        if outer is not None:
            outer.resume()


def _innermost(device: torch.device) -> ArenaMode | ArenaPool | None:
    return next((entry for entry in reversed(_thread.entries) if entry.arena.device == device), None)
