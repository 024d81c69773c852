"""The local properties of a handle: a block of symmetric memory, seen through a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from symmem.errors import UnsupportedError

if TYPE_CHECKING:
    from symmem.group.group import Group
    from symmem.memory.block import Block
    from symmem.memory.layout import Layout

__all__ = ["BlockHandle"]


class BlockHandle:
    """The part of :class:`SymmetricTensor` that needs neither peers nor the tensor."""

    _block: Block
    _layout: Layout

    @property
    def shape(self) -> torch.Size:
        """Sizes, the same on all ranks."""
        return torch.Size(self._layout.sizes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in elements, the same on all ranks."""
        return self._layout.strides

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self._layout.dtype

    @property
    def device(self) -> torch.device:
        """The device of this rank's memory."""
        return self._block.allocation.device

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last."""
        return self._layout.nbytes

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return self._block.allocation.backend.name

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that have rendezvoused the memory, in order; the arena's group counts."""
        return tuple(self._block.groups)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called on this handle or another of the same memory."""
        return self._block.closed

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"groups={[group.name for group in self.groups]}"
        return (
            f"SymmetricTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"backend={self.backend!r}, {state})"
        )

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a SymmetricTensor cannot be pickled or copied: it refers to memory of this process",
            hint="send its .tensor.clone(), or let each rank allocate its own and rendezvous",
        )
