"""The checked mode of collective operations: ranks compare their calls before they launch anything."""

from __future__ import annotations

import torch

from symmem.errors import SymmemError
from symmem.group.compare import SAME_CALLS, compare_in_group
from symmem.group.group import Group
from symmem.ops.engines.base import Engine

__all__ = ["CheckedEngine"]

_HINT = f"{SAME_CALLS}, with the same shapes and dtypes"


class CheckedEngine:
    """A :class:`symmem.ops.engines.base.Engine` whose ranks compare operation, options, shape and dtype first.

    Every operation begins with a round of messages, and the host waits for it. For a CUDA graph this happens at the
    capture. If ranks differ, all raise MismatchError, which names them, and nothing is launched.

    Args:
        engine: The engine that runs the operations.
        group: The engine's group.
    """

    def __init__(self, engine: Engine, group: Group) -> None:
        self.engine, self._group = engine, group

    def _compare(self, operation: str, source: torch.Tensor, **options: object) -> None:
        call = {**options, "shape of x": list(source.shape), "dtype": source.dtype, "device": source.device.type}
        compare_in_group(self._group, operation, call, _HINT)

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

    def all_to_all(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_to_all`."""
        self._compare("all_to_all", source)
        self.engine.all_to_all(source, out)

    def broadcast(self, source: torch.Tensor, out: torch.Tensor, root: int) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.broadcast`."""
        self._compare("broadcast", source, root=root)
        self.engine.broadcast(source, out, root)

    def refuse(self, operation: str, error: SymmemError) -> None:
        """Raise this rank's error in the other ranks' comparison, because it does not take part. Does not wait."""
        self._group.fail(operation, error)
