"""The handle of :mod:`symmem.torch_compat`: PyTorch's ``_SymmetricMemory`` by another name, on every backend."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from symmem.backends.base import tensor_at
from symmem.errors import InvalidArgumentError, MulticastUnavailableError, RankError
from symmem.group.group import GroupLike, resolve_group

if TYPE_CHECKING:
    from symmem.backends.base import Mapping
    from symmem.memory.block import Block
    from symmem.tensor.tensor import SymmetricTensor

__all__ = ["Handle", "reserve"]

_reserved: weakref.WeakKeyDictionary[Block, tuple[int, int]] = weakref.WeakKeyDictionary()
_arrays: weakref.WeakKeyDictionary[Block, dict[tuple[Mapping, str], torch.Tensor]] = weakref.WeakKeyDictionary()


def reserve(block: Block, begin: int, nbytes: int) -> None:
    """Note that the user's bytes of a block end at ``begin``, and ``nbytes`` for a signal pad follow."""
    _reserved[block] = begin, nbytes


class Handle:
    """What PyTorch's ``_SymmetricMemory`` offers, over one allocation and group. Made by :func:`rendezvous`.

    Everything counts from the beginning of what was allocated, as in PyTorch, not from that of a view. Tensors and
    pointers from here stay valid as long as any tensor over the memory does.
    """

    def __init__(self, tensor: SymmetricTensor, group: GroupLike) -> None:
        """Use :func:`rendezvous`."""
        self._tensor = tensor
        self._block = tensor._block
        self._mapping = tensor._mapping("rendezvous", resolve_group(group))
        self._group = self._mapping.group

    @property
    def rank(self) -> int:
        """This process's rank within the group."""
        return self._group.rank

    @property
    def world_size(self) -> int:
        """Number of ranks of the group."""
        return self._group.size

    @property
    def device(self) -> torch.device:
        """Where the memory lies."""
        return self._tensor.device

    @property
    def offset(self) -> int:
        """Bytes from the beginning of the allocation to the tensor's storage: 0."""
        return 0

    # Memory.

    @property
    def buffer_size(self) -> int:
        """Bytes of each rank's allocation, without room for a signal pad."""
        begin, _nbytes = _reserved.get(self._block, (self._block.nbytes, 0))
        return begin

    @property
    def buffer_ptrs(self) -> list[int]:
        """Address of each rank's allocation as seen from this rank; 0 where it is not load/store reachable."""
        offset = self._block.offset
        return [pointer + offset if pointer else 0 for pointer in self._mapping.pointers]

    @property
    def buffer_ptrs_dev(self) -> int:
        """Address, on the device, of an array of :attr:`buffer_ptrs` (8 bytes each)."""
        return self._on_device("buffer", self.buffer_ptrs)

    @property
    def multicast_ptr(self) -> int:
        """The multicast address of the allocation; 0 where there is none, as in PyTorch.

        :attr:`SymmetricTensor.multicast_ptr` raises instead, and says why. May be collective the first time.
        """
        with contextlib.suppress(MulticastUnavailableError):
            return self._mapping.multicast() + self._block.offset
        return 0

    def has_multicast_support(self) -> bool:
        """Whether :attr:`multicast_ptr` is not 0."""
        return self.multicast_ptr != 0

    def get_buffer(
        self, rank: int, sizes: Iterable[int], dtype: torch.dtype, storage_offset: int | None = 0
    ) -> torch.Tensor:
        """A rank's memory as a contiguous tensor.

        Args:
            rank: Whose.
            sizes: Shape.
            dtype: Element type.
            storage_offset: In elements, from the beginning of the allocation.

        Raises:
            RankError: No such rank.
            InvalidArgumentError: It would end past :attr:`buffer_size`.
            UnsupportedError: The rank's memory is not load/store reachable.
        """
        memory = self._memory(rank)[: self.buffer_size]
        return _carve("get_buffer", memory, sizes, dtype, storage_offset)

    def get_remote_tensor(self, peer: int, sizes: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """:meth:`get_buffer` at :attr:`offset`."""
        return self.get_buffer(peer, sizes, dtype)

    # Signals.

    @property
    def signal_pad_size(self) -> int:
        """Bytes of each rank's signal pad: at least :func:`get_signal_pad_size` for a tensor from :func:`empty`.

        The pad is the one that :meth:`barrier` and the signals below use, with PyTorch's words and protocol (word
        ``channel * world_size + source``, 0 when not in use), if that is on a GPU and large enough. Otherwise it is
        room behind the tensor that nobody else uses.
        """
        return self._pads()[1]

    @property
    def signal_pad_ptrs(self) -> list[int]:
        """Address of each rank's signal pad as seen from this rank; 0 where it is not load/store reachable."""
        return list(self._pads()[0])

    @property
    def signal_pad_ptrs_dev(self) -> int:
        """Address, on the device, of an array of :attr:`signal_pad_ptrs` (8 bytes each)."""
        return self._on_device("signal pad", self.signal_pad_ptrs)

    def get_signal_pad(
        self,
        rank: int,
        sizes: Iterable[int] = (),
        dtype: torch.dtype | None = None,
        storage_offset: int | None = 0,
    ) -> torch.Tensor:
        """A rank's signal pad as a tensor; leave it filled with zeros.

        Args:
            rank: Whose.
            sizes: Shape; default one dimension, the whole pad.
            dtype: Element type; default uint32.
            storage_offset: In elements.

        Raises:
            RankError, InvalidArgumentError, UnsupportedError: See :meth:`get_buffer`.
        """
        pointers, nbytes = self._pads()
        dtype = torch.uint32 if dtype is None else dtype
        address = pointers[self._check_rank(rank)]
        if not address:
            self._mapping.unsupported("signal pad", f"rank {rank}'s memory is not load/store reachable from here")
        memory = tensor_at(address, nbytes, self.device, (self._block, self._mapping))
        shape = tuple(sizes) or (nbytes // dtype.itemsize,)
        return _carve("get_signal_pad", memory, shape, dtype, storage_offset)

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """:meth:`SymmetricTensor.barrier`; a timeout of 0 is the setting ``signal_timeout``."""
        self._tensor.barrier(channel, _seconds(timeout_ms), group=self._group)  # type: ignore[arg-type]

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """:meth:`SymmetricTensor.put_signal`; a timeout of 0 is the setting ``signal_timeout``."""
        self._tensor.put_signal(dst_rank, channel, _seconds(timeout_ms), group=self._group)  # type: ignore[arg-type]

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """:meth:`SymmetricTensor.wait_signal`; a timeout of 0 is the setting ``signal_timeout``."""
        self._tensor.wait_signal(src_rank, channel, _seconds(timeout_ms), group=self._group)  # type: ignore[arg-type]

    # Within.

    def _memory(self, rank: int) -> torch.Tensor:
        block = self._block
        if self._check_rank(rank) == self.rank:
            return block.tensor()
        return block.part(self._mapping.tensor(rank, block.end, block))

    def _pads(self) -> tuple[tuple[int, ...], int]:
        """Address of each rank's signal pad, and its bytes."""
        begin, wanted = _reserved.get(self._block, (0, 0))
        if wanted and (self.device.type == "cpu" or self._shared_pad_nbytes() < wanted):
            return tuple(pointer + begin if pointer else 0 for pointer in self.buffer_ptrs), wanted
        signals = self._block.signals(self._mapping)
        pads = [signals.signal_pad(rank)[0] if pointer else 0 for rank, pointer in enumerate(self._mapping.pointers)]
        return tuple(pads), self._shared_pad_nbytes()

    def _shared_pad_nbytes(self) -> int:
        return self._block.signals(self._mapping).signal_pad(self.rank)[1]

    def _on_device(self, what: str, pointers: list[int]) -> int:
        # Kept by the block, since callers keep the address and drop the handle.
        arrays = _arrays.setdefault(self._block, {})
        key = self._mapping, what
        if key not in arrays:
            arrays[key] = torch.tensor(pointers, dtype=torch.int64, device=self.device)
        return arrays[key].data_ptr()

    def _check_rank(self, rank: int) -> int:
        if isinstance(rank, int) and 0 <= rank < self.world_size:
            return rank
        raise RankError(f"rank {rank!r} is not in range({self.world_size})", rank=self.rank, group=self._group.name)

    @staticmethod
    def memset32(tensor: torch.Tensor, offset: int, val: int, count: int = 1) -> torch.Tensor:
        """Fill ``count`` elements of a contiguous 32-bit tensor from element ``offset``, on the current stream."""
        if not tensor.is_contiguous() or tensor.dtype.itemsize != 4 or not 0 <= offset <= tensor.numel() - count:
            raise InvalidArgumentError(
                f"memset32 of {count} elements at {offset} needs a contiguous 32-bit tensor that holds them, not "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        tensor.view(-1).view(torch.int32)[offset : offset + count] = val - 2**32 if val >= 2**31 else val
        return tensor

    @staticmethod
    def stream_write_value32(tensor: torch.Tensor, offset: int, val: int) -> torch.Tensor:
        """:meth:`memset32` of one element."""
        return Handle.memset32(tensor, offset, val)


def _carve(
    what: str, memory: torch.Tensor, sizes: Iterable[int], dtype: torch.dtype, storage_offset: int | None
) -> torch.Tensor:
    shape = tuple(sizes)
    begin = (storage_offset or 0) * dtype.itemsize
    end = begin + math.prod(shape) * dtype.itemsize
    if not 0 <= begin <= end <= memory.numel():
        raise InvalidArgumentError(
            f"{what}: {shape} of {dtype} at element {storage_offset} is not within {memory.numel()} bytes"
        )
    return memory[begin:end].view(dtype).view(shape)


def _seconds(timeout_ms: int) -> float | None:
    return timeout_ms / 1000 if timeout_ms else None
