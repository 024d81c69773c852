"""Which bytes of an allocation a tensor takes: sizes, strides, dtype, offset; integers only, checked once."""

from __future__ import annotations

import functools
import math
import operator
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsIndex

import torch

from symmem.errors import InvalidArgumentError

__all__ = ["Layout", "integer"]

_QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
_MAX_NBYTES = 2**63 - 1 - 2**30  # what an int64 can address, less room for rounding up


@dataclass(frozen=True)
class Layout:
    """A strided tensor within a block of memory.

    Attributes:
        sizes: Elements of each dimension.
        strides: Elements from one index to the next, of each dimension.
        dtype: Any but the quantized dtypes.
        offset: Bytes from the beginning of the block to the first element.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0

    @classmethod
    def make(
        cls, sizes: SupportsIndex | Iterable[int], dtype: torch.dtype | None, strides: Iterable[int] | None
    ) -> Layout:
        """Check what a user asked for.

        Args:
            sizes: One size or several; none for a tensor of no dimensions.
            dtype: None for ``torch.get_default_dtype()``.
            strides: None for contiguous.

        Raises:
            InvalidArgumentError: A value is not an integer, negative, too large; strides that let two elements
                share memory; a dtype that memory cannot be viewed as.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise InvalidArgumentError(f"dtype must be a torch.dtype, not {dtype!r}")
        if dtype in _QUANTIZED:
            raise InvalidArgumentError(
                f"memory cannot be viewed as {dtype}: its elements mean nothing without a scale",
                hint="allocate the integer dtype that it is stored in",
            )
        checked = _integers("sizes", sizes if isinstance(sizes, Iterable) else (sizes,))
        if strides is None:
            steps, step = [], 1
            for size in reversed(checked):
                steps.append(step)
                step *= max(size, 1)
            layout = cls(checked, tuple(reversed(steps)), dtype)
        else:
            layout = cls(checked, _integers("strides", strides), dtype)
            if len(layout.strides) != len(checked):
                raise InvalidArgumentError(f"{len(checked)} sizes, but {len(layout.strides)} strides")
            if layout.overlaps:
                raise InvalidArgumentError(
                    f"with sizes {checked} and strides {layout.strides} two elements would share memory",
                    hint="allocate it dense, and expand or unfold the tensor afterwards",
                )
        # torch calculates with the sizes of an empty tensor as well, as if 0 were 1.
        reach = max(math.prod(max(size, 1) for size in checked), *layout.strides, 0) * dtype.itemsize
        if max(layout.nbytes, reach) > _MAX_NBYTES:
            raise InvalidArgumentError(
                f"sizes {checked} of {dtype} reach over {max(layout.nbytes, reach)} bytes: too many"
            )
        return layout

    @classmethod
    def of(cls, tensor: torch.Tensor, offset: int) -> Layout:
        """The layout of a tensor that lies ``offset`` bytes into a block."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, offset)

    @functools.cached_property
    def fingerprint(self) -> int:
        """A number that tells layouts apart; the same in every process."""
        return hash((self.sizes, self.strides, zlib.crc32(str(self.dtype).encode()), self.offset))

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last; 0 if there is none."""
        if 0 in self.sizes:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    @functools.cached_property
    def flat(self) -> bool:
        """Whether it is all of its bytes in order, in one dimension; some."""
        return self.strides == (1,) and self.sizes[0] > 0

    @property
    def overlaps(self) -> bool:
        """Whether two elements may share memory (as torch decides it: dimensions must nest)."""
        if 0 in self.sizes:
            return False
        reach = 0
        for stride, size in sorted(zip(self.strides, self.sizes, strict=True)):
            if size > 1:
                if stride <= reach:
                    return True
                reach += (size - 1) * stride
        return False

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor, over the uint8 tensor of the whole block, of shape [at least offset + nbytes]."""
        elements = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        return elements.as_strided(self.sizes, self.strides)

    def view_all(self, memory: torch.Tensor, world: int, stride: int) -> torch.Tensor:
        """The tensors of all ranks as one of shape [world, *sizes].

        Args:
            memory: Uint8, shape [world * stride]: all ranks' allocations side by side.
            world: Number of ranks.
            stride: Bytes from one rank's allocation to the next.
        """
        usable = (memory.numel() - self.offset) // self.dtype.itemsize * self.dtype.itemsize
        elements = memory[self.offset : self.offset + usable].view(self.dtype)
        return elements.as_strided((world, *self.sizes), (stride // self.dtype.itemsize, *self.strides))


def integer(value: SupportsIndex) -> int:
    """The integer that a value of any integer type is; TypeError for what is none, and for a truth value."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is a truth value, not an integer")
    return operator.index(value)


def _integers(what: str, values: Iterable[SupportsIndex]) -> tuple[int, ...]:
    try:
        checked = tuple(map(integer, values))
    except TypeError as error:
        raise InvalidArgumentError(f"{what} must be integers, not {values!r}") from error
    if any(value < 0 for value in checked):
        raise InvalidArgumentError(f"{what} must not be negative: {checked}")
    if any(value > 2**63 - 1 for value in checked):
        raise InvalidArgumentError(f"{what} must be below 2**63: {checked}")
    return checked
