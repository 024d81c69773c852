"""``symmem.use_symmetric_memory``: what any op makes inside of a ``with`` block lies in symmetric memory.

On the CPU a dispatch mode lets each op run, and moves what is new in its result into the group's arena
(:mod:`.cpu_dispatch`). On CUDA torch's caching allocator gets its memory from the arena (:mod:`.cuda_pool`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from symmem.errors import UnsupportedError
from symmem.group.group import GroupLike, default_group, resolve_group
from symmem.memory import cuda_graphs
from symmem.redirect.cpu_dispatch import Moving
from symmem.redirect.cuda_pool import Pool
from symmem.tensor.request import arena_of, choose_source

if TYPE_CHECKING:
    from symmem.arena.arena import Arena

__all__ = ["use_symmetric_memory"]


class use_symmetric_memory(contextlib.ContextDecorator):
    """Within it, this thread's new tensors lie in the symmetric memory of a group, by whichever op they are made.

    A context manager, or a decorator. ``symmem.find(y)`` then gives the handle, which has rendezvoused over the group.
    All ranks of the group must run the same ops in the same order. Local, unless the arena must grow: that is
    collective over the group. One object can be used many times, also nested, and by several threads; it applies to
    the thread that entered it. Where two are nested, the inner one decides.

    On the CPU: views, and what ops write to, stay where they are. So does memory that comes from no op: of
    ``torch.load``, ``torch.from_numpy``, ``torch.frombuffer`` and ``copy.deepcopy``. A tensor cannot be resized beyond
    its memory. Functions of ``torch.compile`` run uncompiled, and a custom op's own temporaries are not in the arena.

    On CUDA: all memory that this thread's ops ask for on that device, in pieces of at least 2 MiB, of which torch cuts
    tensors; ``find`` gives the handle of the piece. ``backward()`` runs on this thread. Once all tensors of a block
    are gone, its pieces go back to the arena at the next entry, or at :func:`symmem.collect`. A CUDA graph cannot be
    captured inside.

    Args:
        group: Whose arena; None for the default process group.
        device: Of the tensors; default: that of the backend; with ``auto``, the current CUDA device if there is one,
            else CPU. Tensors on other devices are left alone.
        backend: A name, or names in order of preference; default: the configuration's.

    Raises:
        DivergenceError: Ranks have allocated differently; see :meth:`SymmetricTensor.allocate`.
        GroupError: There is no such group.
        OutOfMemoryError, ResourceLimitError: The arena cannot grow. Both, and DivergenceError, on the CPU by the op; on
            CUDA torch raises ``torch.OutOfMemoryError`` there, in the place of which they are raised where the block
            ends.
        UnsupportedError: It was entered amid the capture of a CUDA graph; or the backend cannot be used with an arena,
            or torch with pools.
        SymmemError: Whatever :meth:`SymmetricTensor.allocate` raises for these arguments.
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
        arena = self._arena()
        entries = _here.entries
        outer = _innermost(arena.device)
        if outer is not None and outer.arena is arena:
            entries.append(outer)
            return
        entry = Pool(arena) if arena.device.type == "cuda" else Moving(arena)
        if outer is not None:
            outer.pause()
        try:
            entry.start()
        except BaseException:
            if outer is not None:
                outer.resume()
            raise
        entries.append(entry)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entry = _here.entries.pop()
        if entry in _here.entries:
            return
        try:
            entry.stop()
        finally:
            outer = _innermost(entry.arena.device)
            if outer is not None:
                outer.resume()
        if (cause := entry.cause_of(error)) is not None:
            raise cause from error

    def _arena(self) -> Arena:
        """The arena to use, if it can be used now."""
        group = default_group() if self._group is None else resolve_group(self._group)
        try:
            source = choose_source(group, self._backend, self._device)
            if source.device.type not in ("cpu", "cuda"):
                raise UnsupportedError(f"use_symmetric_memory is for tensors on the CPU or CUDA, not {source.device}")
            if cuda_graphs.is_capturing(source.device):
                raise UnsupportedError(
                    "use_symmetric_memory cannot be entered during the capture of a CUDA graph: torch would give the "
                    "memory of the graph's tensors to others once the block ends",
                    hint="allocate with symmem.allocate, which may be called amid a capture, and let ops write there "
                    "(out=, copy_)",
                )
            return arena_of(source, group)
        except Exception as error:
            # As for allocate(): the others need not wait for this rank until the timeout.
            if group is not None and self._group is not None and getattr(error, "known_to", None) is None:
                group.fail("use_symmetric_memory", error)
            raise


class _Here(threading.local):
    """What this thread has entered, the innermost last. One that is entered again is listed again."""

    def __init__(self) -> None:
        self.entries: list[Moving | Pool] = []


_here = _Here()


def _innermost(device: torch.device) -> Moving | Pool | None:
    return next((entry for entry in reversed(_here.entries) if entry.arena.device == device), None)
