"""The public handle of symmetric memory, `SymmetricTensor`, and its views for kernels and for PyTorch programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from symmem._lazy import lazy_exports

if TYPE_CHECKING:
    from symmem.tensor.tensor import SymmetricTensor, allocate, find

__all__ = ["SymmetricTensor", "allocate", "find"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "SymmetricTensor": "symmem.tensor.tensor",
        "allocate": "symmem.tensor.tensor",
        "find": "symmem.tensor.tensor",
    },
)
