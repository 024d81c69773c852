"""The checked mode of collective operations: ranks compare their calls before they launch anything."""

from __future__ import annotations

from collections.abc import Callable

import torch

from symmem.errors import SymmemError
from symmem.group.compare import SAME_CALLS, compare
from symmem.group.group import Group
from symmem.ops.engines.base import Engine

__all__ = ["CheckedEngine"]

_HINT = f"{SAME_CALLS}, with the same shapes and dtypes"


class CheckedEngine:
    """A :class:`symmem.ops.engines.base.Engine` whose ranks compare operation, options, shape and dtype first.

    Every operation begins with a round of messages, and the host waits for it. For a CUDA graph this happens at the
    capture. If ranks differ, all raise MismatchError, which names them, and nothing is launched. If the kernels of an
    earlier operation gave up, all ranks raise its error.

    Args:
        engine: The engine that runs the operations.
        group: The engine's group.
    """

    def __init__(self, engine: Engine, group: Group) -> None:
        self.engine, self._group = engine, group

    def _compare(self, operation: str, source: torch.Tensor, **options: object) -> None:
        if self._group.size == 1:
            return
        call = {**options, "shape of x": list(source.shape), "dtype": source.dtype, "device": source.device.type}
        gave_up = getattr(self.engine, "gave_up", False)
        with self._group.collective("comparison", self._group.settings.signal_timeout) as collective:
            values, state = {"operation": operation, **call}, {"line": collective.line, "gave_up": gave_up}
            ranks = compare(collective, values, state, hint=_HINT, step=operation)
        if any(rank["gave_up"] for rank in ranks):  # in an earlier operation; all ranks are here
            resume: Callable[[], None] = self.engine.resume_and_raise  # type: ignore[attr-defined]
            resume()

    def all_reduce(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_reduce`."""
        self._compare("all_reduce", source, reduction=reduction)
        self.engine.all_reduce(source, out, reduction)

    def all_gather(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_gather`."""
        self._compare("all_gather", source)
        self.engine.all_gather(source, out)

    def reduce_scatter(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.reduce_scatter`."""
        self._compare("reduce_scatter", source, reduction=reduction)
        self.engine.reduce_scatter(source, out, reduction)

    def all_reduce_tree(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_reduce_tree`."""
        self._compare("all_reduce_tree", source, reduction=reduction)
        self.engine.all_reduce_tree(source, out, reduction)

    def reduce_scatter_tree(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.reduce_scatter_tree`."""
        self._compare("reduce_scatter_tree", source, reduction=reduction)
        self.engine.reduce_scatter_tree(source, out, reduction)

    def all_to_all(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_to_all`."""
        self._compare("all_to_all", source)
        self.engine.all_to_all(source, out)

    def broadcast(self, source: torch.Tensor, out: torch.Tensor, root: int) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.broadcast`."""
        self._compare("broadcast", source, root=root)
        self.engine.broadcast(source, out, root)

    def barrier(self, channel: int) -> None:
        """See :meth:`symmem.ops.engines.host.HostEngine.barrier`, which compares the calls itself."""
        self.engine.barrier(channel)  # type: ignore[attr-defined]

    def refuse(self, operation: str, error: SymmemError) -> None:
        """Raise this rank's error in the other ranks' comparison, because it does not take part. Does not wait."""
        self._group.fail(operation, error)
