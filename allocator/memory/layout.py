"""The layout of a tensor in a block of memory: sizes, strides, dtype, offset. Integers only, checked once."""

from __future__ import annotations

import functools
import math
import operator
import zlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import SupportsIndex

import torch

from symmem.backends.neutral import neutral
from symmem.errors import InvalidArgumentError

__all__ = ["Layout", "integer", "may_share_elements"]

_QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
_UNORDERED = (str, bytes, bytearray, memoryview, Set, Mapping)  # values to iterate over, but not sizes or strides
_MAX_STEPS = 10_000  # of may_share_elements
_MAX_NBYTES = 2**63 - 1 - 2**30  # the range of an int64, less some room to round up


@dataclass(frozen=True)
class Layout:
    """A strided tensor within a block of memory.

    Attributes:
        sizes: Elements per dimension.
        strides: Elements from one index to the next, per dimension.
        dtype: Any dtype except the quantized ones.
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
        """Check the arguments of a user and return the layout.

        Args:
            sizes: One size or several; an empty sequence for a tensor without dimensions.
            dtype: None for ``torch.get_default_dtype()``.
            strides: None for contiguous.

        Raises:
            InvalidArgumentError: A value is not an integer, is negative or too large. The strides let two elements
                share memory. Memory cannot be viewed as the dtype.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise InvalidArgumentError(f"dtype must be a torch.dtype, not {dtype!r}")
        if dtype in _QUANTIZED:
            raise InvalidArgumentError(
                f"memory cannot be viewed as {dtype}, because its elements need a scale",
                hint="allocate the integer dtype that stores it",
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
                    hint="allocate a dense tensor, then expand or unfold it",
                )
        # torch computes the extent of an empty tensor too, and counts a size of 0 as 1.
        reach = max(math.prod(max(size, 1) for size in checked), *layout.strides, 0) * dtype.itemsize
        if max(layout.nbytes, reach) > _MAX_NBYTES:
            raise InvalidArgumentError(f"sizes {checked} of {dtype} span too many bytes: {max(layout.nbytes, reach)}")
        return layout

    @classmethod
    def of(cls, tensor: torch.Tensor, offset: int) -> Layout:
        """The layout of a tensor that begins ``offset`` bytes into a block."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, offset)

    @functools.cached_property
    def fingerprint(self) -> int:
        """A hash of the layout; equal layouts have the same hash in every process."""
        return hash((self.sizes, self.strides, zlib.crc32(str(self.dtype).encode()), self.offset))

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last; 0 for an empty tensor."""
        if 0 in self.sizes:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    @functools.cached_property
    def flat(self) -> bool:
        """Whether the tensor has one dimension, is contiguous and is not empty."""
        return self.strides == (1,) and self.sizes[0] > 0

    @property
    def overlaps(self) -> bool:
        """Whether two elements may share memory. As in torch, dimensions must nest."""
        if 0 in self.sizes:
            return False
        reach = 0
        for stride, size in sorted(zip(self.strides, self.sizes, strict=True)):
            if size > 1:
                if stride <= reach:
                    return True
                reach += (size - 1) * stride
        return False

    @neutral
    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor over ``memory``, the block as a uint8 tensor of shape [at least offset + nbytes]."""
        elements = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        return elements.as_strided(self.sizes, self.strides)

    @neutral
    def view_all(self, memory: torch.Tensor, world: int, stride: int) -> torch.Tensor:
        """The tensors of all ranks as one tensor of shape [world, *sizes].

        Args:
            memory: All ranks' allocations side by side; uint8, shape [world * stride].
            world: Number of ranks.
            stride: Bytes from one rank's allocation to the next.
        """
        usable = (memory.numel() - self.offset) // self.dtype.itemsize * self.dtype.itemsize
        elements = memory[self.offset : self.offset + usable].view(self.dtype)
        return elements.as_strided((world, *self.sizes), (stride // self.dtype.itemsize, *self.strides))


def integer(value: SupportsIndex) -> int:
    """Convert a value of any integer type to int; TypeError for any other type, bool included."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is a bool, not an integer")
    return operator.index(value)


def _integers(name: str, values: Iterable[SupportsIndex]) -> tuple[int, ...]:
    try:
        if isinstance(values, _UNORDERED):
            raise TypeError(f"a {type(values).__name__} is no sequence of integers")
        checked = tuple(map(integer, values))
    except TypeError as error:
        raise InvalidArgumentError(f"{name} must be integers, not {values!r}") from error
    if any(value < 0 for value in checked):
        raise InvalidArgumentError(f"{name} must not be negative: {checked}")
    if any(value > 2**63 - 1 for value in checked):
        raise InvalidArgumentError(f"{name} must be below 2**63: {checked}")
    return checked


def may_share_elements(one: Layout, other: Layout, distance: int) -> bool:
    """Whether two tensors of one dtype share bytes, if ``other`` begins ``distance`` bytes after ``one``.

    Exact, except that it returns True if an answer would take more than 10,000 steps; views of one tensor take few.
    """
    if 0 in one.sizes or 0 in other.sizes:
        return False
    width = one.dtype.itemsize
    # Look for indices with sum(i * stride) - sum(j * stride) closer to `distance` than an element is wide.
    ranges: dict[int, tuple[int, int]] = {}
    for sign, layout in ((1, one), (-1, other)):
        for size, stride in zip(layout.sizes, layout.strides, strict=True):
            low, high = ranges.get(stride * width, (0, 0))
            last = sign * (size - 1)
            ranges[stride * width] = min(low, low + last), max(high, high + last)
    ranges.pop(0, None)
    strides = sorted(ranges, reverse=True)
    # The least and the greatest sum that the strides after each one can reach.
    reach = [(0, 0)]
    for stride in reversed(strides):
        low, high = ranges[stride]
        reach.append((reach[-1][0] + low * stride, reach[-1][1] + high * stride))
    reach.reverse()
    left = [(0, distance)]
    for _step in range(_MAX_STEPS):
        if not left:
            return False
        index, rest = left.pop()
        if index == len(strides):
            if abs(rest) < width:
                return True
            continue
        stride, (low, high), (least, most) = strides[index], ranges[strides[index]], reach[index + 1]
        first = -((most + width - 1 - rest) // stride)
        last = (rest - least + width - 1) // stride
        left += [(index + 1, rest - count * stride) for count in range(max(low, first), min(high, last) + 1)]
    return True
