"""The handle of :mod:`symmem.torch_compat`: the interface of PyTorch's ``_SymmetricMemory``, on every backend."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from symmem.backends.base import tensor_at
from symmem.backends.neutral import neutral, neutral_mode
from symmem.backends.untraced import untraced_methods
from symmem.errors import InvalidArgumentError, MulticastUnavailableError
from symmem.group.resolve import GroupLike, resolve_group
from symmem.tensor.arguments import check_rank

if TYPE_CHECKING:
    from symmem.backends.base import Mapping
    from symmem.memory.block import Block
    from symmem.tensor.tensor import SymmetricTensor

__all__ = ["TorchHandle", "reserve"]

_reserved: weakref.WeakKeyDictionary[Block, tuple[int, int]] = weakref.WeakKeyDictionary()
_arrays: weakref.WeakKeyDictionary[Block, dict[tuple[Mapping, str], torch.Tensor]] = weakref.WeakKeyDictionary()


def reserve(block: Block, begin: int, nbytes: int) -> None:
    """Record that a block's signal pad of ``nbytes`` bytes begins at ``begin``, after the user's bytes."""
    _reserved[block] = begin, nbytes


@untraced_methods
class TorchHandle:
    """The interface of PyTorch's ``_SymmetricMemory``, over one allocation and group. Made by :func:`rendezvous`.

    Offsets and pointers start at the beginning of the allocation, as in PyTorch, even if the handle was made from a
    view. Tensors and pointers from this handle stay valid as long as any tensor over the memory does.
    """

    def __init__(self, tensor: SymmetricTensor, group: GroupLike) -> None:
        """Use :func:`rendezvous`."""
        self._tensor = tensor
        self._block = tensor._block
        self._group = resolve_group(group)
        self._mapping = tensor._mapping("rendezvous", self._group)

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
        """The device of the memory."""
        return self._tensor.device

    @property
    def offset(self) -> int:
        """Bytes from the beginning of the allocation to the tensor's storage: 0."""
        return 0

    # Memory.

    @property
    def buffer_size(self) -> int:
        """Bytes of a rank's allocation, without the signal pad."""
        begin, _nbytes = _reserved.get(self._block, (self._block.nbytes, 0))
        return begin

    @property
    def buffer_ptrs(self) -> list[int]:
        """Address of every rank's allocation as seen from this rank; 0 if it is not load/store reachable."""
        offset = self._block.offset
        return [pointer + offset if pointer else 0 for pointer in self._mapping.pointers]

    @property
    def buffer_ptrs_dev(self) -> int:
        """Address, on the device, of an array of :attr:`buffer_ptrs` (8 bytes each)."""
        return self._on_device("buffer", self.buffer_ptrs)

    @property
    def multicast_ptr(self) -> int:
        """The multicast address of the allocation; 0 if there is none, as in PyTorch.

        :attr:`SymmetricTensor.multicast_ptr` raises an error with the reason instead. The first use may be collective.
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
            rank: The rank that owns the memory.
            sizes: Shape.
            dtype: Element type.
            storage_offset: In elements, from the beginning of the allocation.

        Raises:
            RankError: No such rank.
            InvalidArgumentError: The tensor would end after :attr:`buffer_size`.
            UnsupportedError: The rank's memory is not load/store reachable.
        """
        memory = self._memory(rank)[: self.buffer_size]
        return _view("get_buffer", memory, sizes, dtype, storage_offset)

    def get_remote_tensor(self, peer: int, sizes: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """:meth:`get_buffer` at :attr:`offset`."""
        return self.get_buffer(peer, sizes, dtype)

    # Signals.

    @property
    def signal_pad_size(self) -> int:
        """Bytes of a rank's signal pad: at least :func:`get_signal_pad_size` for a tensor from :func:`empty`.

        On a GPU it is the pad that :meth:`barrier` and the signals below use, if that is large enough. The words and
        protocol are PyTorch's: word ``channel * world_size + source``, 0 when not in use. Otherwise the pad is
        separate memory behind the tensor.
        """
        return self._pads()[1]

    @property
    def signal_pad_ptrs(self) -> list[int]:
        """Address of every rank's signal pad as seen from this rank; 0 if it is not load/store reachable."""
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
            rank: The rank that owns the pad.
            sizes: Shape; default one dimension, the whole pad.
            dtype: Element type; default uint32.
            storage_offset: In elements.

        Raises:
            RankError, InvalidArgumentError, UnsupportedError: See :meth:`get_buffer`.
        """
        pointers, nbytes = self._pads()
        dtype = torch.uint32 if dtype is None else dtype
        address = pointers[check_rank(rank, self._mapping, "get_signal_pad")]
        if not address:
            self._mapping.unsupported("signal pad", f"rank {rank}'s memory is not load/store reachable from here")
        memory = tensor_at(address, nbytes, self.device, (self._block, self._mapping))
        shape = tuple(sizes) or (nbytes // dtype.itemsize,)
        return _view("get_signal_pad", memory, shape, dtype, storage_offset)

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """:meth:`SymmetricTensor.barrier`; a timeout of 0 is the setting ``signal_timeout``."""
        self._tensor.barrier(channel, _seconds(timeout_ms), group=self._group)

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """:meth:`SymmetricTensor.put_signal`; a timeout of 0 is the setting ``signal_timeout``."""
        self._tensor.put_signal(dst_rank, channel, _seconds(timeout_ms), group=self._group)

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """:meth:`SymmetricTensor.wait_signal`; a timeout of 0 is the setting ``signal_timeout``."""
        self._tensor.wait_signal(src_rank, channel, _seconds(timeout_ms), group=self._group)

    @neutral
    def _memory(self, rank: int) -> torch.Tensor:
        block = self._block
        if check_rank(rank, self._mapping, "get_buffer") == self.rank:
            return block.tensor()
        return block.part(self._mapping.tensor(rank, block.end, block))

    def _pads(self) -> tuple[tuple[int, ...], int]:
        """Return the address of every rank's signal pad, and the bytes of a pad."""
        begin, wanted = _reserved.get(self._block, (0, 0))
        if wanted and (self.device.type == "cpu" or self._shared_pad_nbytes() < wanted):
            return tuple(pointer + begin if pointer else 0 for pointer in self.buffer_ptrs), wanted
        signals = self._block.signals(self._mapping)
        pads = [signals.signal_pad(rank)[0] if pointer else 0 for rank, pointer in enumerate(self._mapping.pointers)]
        return tuple(pads), self._shared_pad_nbytes()

    def _shared_pad_nbytes(self) -> int:
        return self._block.signals(self._mapping).signal_pad(self.rank)[1]

    def _on_device(self, kind: str, pointers: list[int]) -> int:
        # The array lives as long as the block, because callers keep the address and drop the handle.
        arrays = _arrays.setdefault(self._block, {})
        key = self._mapping, kind
        if key not in arrays:
            with neutral_mode():
                arrays[key] = torch.tensor(pointers, dtype=torch.int64, device=self.device)
        return arrays[key].data_ptr()

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
        return TorchHandle.memset32(tensor, offset, val)


@neutral
def _view(
    operation: str, memory: torch.Tensor, sizes: Iterable[int], dtype: torch.dtype, storage_offset: int | None
) -> torch.Tensor:
    shape = tuple(sizes)
    begin = (storage_offset or 0) * dtype.itemsize
    end = begin + math.prod(shape) * dtype.itemsize
    if not 0 <= begin <= end <= memory.numel():
        raise InvalidArgumentError(
            f"{operation}: {shape} of {dtype} at element {storage_offset} is not within {memory.numel()} bytes"
        )
    return memory[begin:end].view(dtype).view(shape)


def _seconds(timeout_ms: int) -> float | None:
    return timeout_ms / 1000 if timeout_ms else None
