"""Sub-allocation: divide a range of offsets into blocks. It uses integers only and touches no memory.

Every rank of a group makes the same calls on its own :class:`SubAllocator`, and gets the same offsets without
communication. So the calls alone must decide the place of a block. This is why free blocks are kept in dicts, which
remember the order of insertion, and never in sets.

The algorithm is two-level segregated fit (M. Masmano et al., "TLSF: a new dynamic memory allocator for real-time
systems", 2004). Free blocks are in bins by size. One integer has a bit for every bin that is not empty. Free blocks
that touch are merged at once. Up to 63 granules, a bin has blocks of a single size; above, every power of two is
divided into 32 bins.

The free space at the end is in no bin. It is used if no bin has room, and so it stays large (the "wilderness" of
D. Lea's malloc). While nothing else is free, an allocation from it takes a few steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from symmem.errors import InvalidArgumentError

__all__ = ["SubAllocator"]

_BITS = 6  # the leading bits of a size choose its bin, so sizes in a bin differ by at most 3%


class SubAllocator:
    """Allocates blocks of ``range(capacity)``.

    It has no lock, so calls must not overlap. For equal offsets, all ranks must make the same calls in the same order.

    Args:
        capacity: Bytes; rounded down to a multiple of ``granularity``.
        granularity: Bytes, a power of two. Offsets and sizes of blocks are multiples of it.

    Attributes:
        capacity: Total bytes.
        granularity: Bytes; see above.
        used: Bytes in live blocks.

    Raises:
        InvalidArgumentError: ``granularity`` is not a power of two, or ``capacity`` is smaller.
    """

    __slots__ = (
        "_bins",
        "_bitmap",
        "_ends",
        "_free",
        "_live",
        "_mask",
        "_most",
        "_refused",
        "_shift",
        "_tail",
        "capacity",
        "granularity",
        "used",
    )

    def __init__(self, capacity: int, granularity: int = 256) -> None:
        if granularity < 1 or granularity & (granularity - 1):
            raise InvalidArgumentError(f"the granularity must be a power of two, not {granularity}")
        if capacity < granularity:
            raise InvalidArgumentError(f"a capacity of {capacity} bytes is less than one granule of {granularity}")
        self.granularity = granularity
        self.capacity = capacity & -granularity
        self.used = 0
        self._mask = granularity - 1
        self._shift = granularity.bit_length() - 1
        self._live: dict[int, int] = {}  # bytes of the live blocks, by offset
        self._free: dict[int, int] = {}  # bin of the free blocks, by offset
        self._ends: dict[int, int] = {}  # offset of the free blocks, by their end
        self._bins: list[dict[int, int]] = [{} for _ in range(self._bin_of(self.capacity) + 1)]  # bytes by offset
        self._bitmap = 0
        self._most = 0  # upper bound of the blocks in bins; a close bound saves time
        self._tail = 0  # everything from here to the end is free
        self._refused = self.capacity + 1  # no block has room for this much, until one is freed

    def allocate(self, nbytes: int) -> int | None:
        """Allocate a block.

        Args:
            nbytes: Bytes; rounded up to a multiple of the granularity, and to at least one granule.

        Returns:
            The offset, or None if no free block has room.

        Raises:
            InvalidArgumentError: ``nbytes`` is negative.
        """
        if nbytes < 0:
            raise InvalidArgumentError(f"cannot allocate {nbytes} bytes")
        size = (nbytes + self._mask) & ~self._mask or self.granularity
        if size >= self._refused:
            return None
        if self._bitmap and size <= self._most and (found := self._from_bins(size)) is not None:
            return found
        offset = self._tail
        end = offset + size
        if end > self.capacity:
            found = self._search(size)
            if found is None:
                self._refused = size
            return found
        self._tail = end
        self._live[offset] = size
        self.used += size
        return offset

    def free(self, offset: int) -> None:
        """Free a block.

        Raises:
            InvalidArgumentError: No live block begins at the offset; nothing has changed.
        """
        size = self._live.pop(offset, 0)
        if not size:
            raise self._not_live(offset)
        self.used -= size
        self._merge(offset, offset + size)

    def free_many(self, offsets: Iterable[int]) -> None:
        """Free many blocks. The order of the offsets makes no difference.

        Raises:
            InvalidArgumentError: No live block begins at an offset, or an offset occurs twice; nothing has changed.
        """
        ordered, live = sorted(offsets), self._live
        start = end = total = 0
        last = -1
        for offset in ordered:
            if offset not in live:
                raise self._not_live(offset)
            if offset == last:
                raise InvalidArgumentError(f"offset {offset} occurs twice in the offsets to free")
            last = offset
        for offset in ordered:
            if offset != end:  # a run of adjacent blocks ends
                if end:
                    self._merge(start, end)
                start = offset
            size = live.pop(offset)
            total += size
            end = offset + size
        if end:
            self._merge(start, end)
        self.used -= total

    def size_of(self, offset: int) -> int:
        """Bytes of a live block, a multiple of the granularity.

        Raises:
            InvalidArgumentError: No live block begins at the offset.
        """
        size = self._live.get(offset, 0)
        if not size:
            raise self._not_live(offset)
        return size

    @property
    def free_bytes(self) -> int:
        """Bytes in free blocks."""
        return self.capacity - self.used

    @property
    def largest_free(self) -> int:
        """Bytes of the largest free block; 0 if there is none."""
        top = self._bitmap.bit_length() - 1  # -1 if all bins are empty, and so is the last one
        return max((self.capacity - self._tail, *self._bins[top].values()))

    @property
    def fragmentation(self) -> float:
        """The fraction of the free bytes outside of the largest free block; 0.0 if nothing is free."""
        return 1 - self.largest_free / self.free_bytes if self.free_bytes else 0.0

    def blocks(self) -> Iterator[tuple[int, int, bool]]:
        """Offset, bytes and whether the block is in use, for all blocks by offset. Together they fill the capacity."""
        live = [(offset, size, True) for offset, size in self._live.items()]
        free = [(offset, self._bins[index][offset], False) for offset, index in self._free.items()]
        tail = [(self._tail, self.capacity - self._tail, False)] if self._tail < self.capacity else []
        return iter(sorted(live + free + tail))

    def __len__(self) -> int:
        return len(self._live)

    def _bin_of(self, size: int) -> int:
        shift = max(size.bit_length() - _BITS, self._shift)
        return (shift - self._shift << _BITS - 1) + (size >> shift)

    def _from_bins(self, size: int) -> int | None:
        """Allocate from the newest block of the size's bin, or from a bin in which all blocks fit; None if neither."""
        # _bin_of() is repeated here and in _put(), because the calls would take a tenth of the time.
        shift = size.bit_length() - _BITS
        if shift < self._shift:
            shift = self._shift
        index = (shift - self._shift << _BITS - 1) + (size >> shift)
        chosen = self._bins[index]
        spare = -1
        if chosen:  # the newest free block often has this very size
            start, length = chosen.popitem()
            spare = length - size
            if spare < 0:
                chosen[start] = length
        if spare < 0:
            above = self._bitmap >> index + 1  # the bins in which every block has room
            if not above:
                return None
            index += (above & -above).bit_length()
            chosen = self._bins[index]
            start, length = chosen.popitem()
        return self._cut(index, start, length, size)

    def _search(self, size: int) -> int | None:
        """Allocate from the bin in which only some blocks have room.

        This is linear in the blocks of the bin. Failing costs more, because then all ranks communicate to get memory.
        """
        index = self._bin_of(size)
        for start, length in self._bins[index].items():
            if length >= size:
                del self._bins[index][start]
                return self._cut(index, start, length, size)
        return None

    def _cut(self, index: int, start: int, length: int, size: int) -> int:
        """Allocate from a free block that was just removed from a bin; returns the offset."""
        if not self._bins[index]:
            self._bitmap ^= 1 << index
        del self._free[start]
        end = start + size
        if size < length:
            self._put(end, start + length)
        else:
            del self._ends[end]
        self._live[start] = size
        self.used += size
        return start

    def _put(self, start: int, end: int) -> None:
        size = end - start
        if size > self._most or not self._bitmap:
            self._most = size
        shift = size.bit_length() - _BITS
        if shift < self._shift:
            shift = self._shift
        index = (shift - self._shift << _BITS - 1) + (size >> shift)
        chosen = self._bins[index]
        if not chosen:
            self._bitmap |= 1 << index
        chosen[start] = size
        self._free[start] = index
        self._ends[end] = start

    def _pull(self, start: int) -> int:
        index = self._free.pop(start)
        chosen = self._bins[index]
        size = chosen.pop(start)
        if not chosen:
            self._bitmap ^= 1 << index
        return size

    def _merge(self, start: int, end: int) -> None:
        """Free a range, and merge it with the free blocks that it touches."""
        self._refused = self.capacity + 1
        if start in self._ends:
            start = self._ends.pop(start)
            self._pull(start)
        if end == self._tail:
            self._tail = start
            return
        if end in self._free:
            end += self._pull(end)  # _put() overwrites the entry by end
        self._put(start, end)

    def _not_live(self, offset: int) -> InvalidArgumentError:
        for start, size, in_use in self.blocks():
            if start <= offset < start + size:
                if in_use:
                    return InvalidArgumentError(f"offset {offset} is inside the block of {size} bytes at {start}")
                return InvalidArgumentError(f"offset {offset} is free: it was freed twice, or never allocated")
        return InvalidArgumentError(f"offset {offset} is outside of the {self.capacity} bytes")
