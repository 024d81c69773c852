"""The handle of :mod:`symmem.torch_compat`: the interface of PyTorch's ``_SymmetricMemory``, on every backend."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from symmem.backends.base import SIGNAL_CHANNELS, storage_at, tensor_at
from symmem.backends.neutral import is_in_mode, neutral, neutral_mode
from symmem.backends.untraced import untraced, untraced_methods
from symmem.errors import GroupError, InvalidArgumentError, MulticastUnavailableError, UnsupportedError
from symmem.group.group import Group
from symmem.group.resolve import GroupLike, group_named, name_of, resolve_group
from symmem.memory.layout import Layout
from symmem.memory.registry import block_at
from symmem.tensor import torch_memory
from symmem.tensor.arguments import check_integer, check_rank, check_tensor
from symmem.tensor.lookup import mapping_of, storage_address
from symmem.tensor.request import template
from symmem.tensor.tensor import SymmetricTensor

if TYPE_CHECKING:
    from torch.distributed import Store

    from symmem.backends.base import Mapping, Signals
    from symmem.memory.block import Block

__all__ = ["TorchHandle", "fill_words", "rendezvous"]

_WORDS = (torch.int32, torch.uint32)


class _Shared:
    """What the handles of one block and mapping share. It must not refer to either, and outlives the handles."""

    def __init__(self) -> None:
        self.arrays: dict[str, torch.Tensor] = {}
        self.signals: Signals | None = None


_shared: weakref.WeakKeyDictionary[Block, weakref.WeakKeyDictionary[Mapping, _Shared]] = weakref.WeakKeyDictionary()
_groups_by_store: dict[str, Group] = {}


@untraced
def rendezvous(tensor: torch.Tensor, group: GroupLike = None) -> TorchHandle:
    """See :func:`symmem.torch_compat.rendezvous`. Later calls are local and take a few microseconds."""
    check_tensor(tensor, "rendezvous")
    address = storage_address(tensor)
    block = block_at(address)
    if block is None:
        return None  # type: ignore[return-value]  # the annotation is PyTorch's, so that typed programs stay as they are
    resolved = resolve_group(torch_memory.group_of(block) if group is None else group)
    layout, offset = block.layout, address - block.pointer
    if offset:  # in a memory pool a storage begins within a block; ranks compare where
        layout = Layout((block.nbytes - offset,), (1,), torch.uint8, offset)
    if block.first is None or block.key(resolved, layout) not in block.compared:
        SymmetricTensor(block, layout).rendezvous(resolved)
        block.before_access(resolved)
    return TorchHandle(block, resolved, mapping_of(block, "rendezvous", resolved), offset)


class _SignalPadSize(type):
    """The attribute ``signal_pad_size`` of the class, which differs from that of a handle."""

    @property
    def signal_pad_size(cls) -> int:
        """Bytes of the signal pads of later allocations. May be set."""
        return torch_memory.signal_pad_size()

    @signal_pad_size.setter
    def signal_pad_size(cls, size: int) -> None:
        torch_memory.set_signal_pad_size(size)


@untraced_methods
class TorchHandle(metaclass=_SignalPadSize):
    """The interface of PyTorch's ``_SymmetricMemory``, over one allocation and group. Made by :func:`rendezvous`.

    Pointers and offsets start at the beginning of the allocation, as in PyTorch, even if the handle was made from a
    view. Tensors and pointers from this handle stay valid as long as any tensor over the memory does.

    The attribute ``signal_pad_size`` of the class is the size for later allocations, and may be set.
    """

    empty_strided_p2p = staticmethod(torch_memory.empty_strided)
    set_backend = staticmethod(torch_memory.set_backend)
    get_backend = staticmethod(torch_memory.backend_name)
    has_multicast_support = staticmethod(torch_memory.has_multicast_support)

    def __init__(self, block: Block, group: Group, mapping: Mapping, offset: int) -> None:
        """Use :func:`rendezvous`."""  # it makes one for each call, so this does little
        self._block, self._group, self._mapping, self._offset = block, group, mapping, offset
        self._storages: dict[int, Any] = {}

    @staticmethod
    def rendezvous(tensor: torch.Tensor, group_name: GroupLike = None) -> TorchHandle:
        """:func:`symmem.torch_compat.rendezvous`."""
        return rendezvous(tensor, group_name)

    @staticmethod
    def is_symm_mem_tensor(tensor: torch.Tensor) -> bool:
        """Whether a tensor or view, also an empty one, is in symmetric memory. Local, O(log n)."""
        check_tensor(tensor, "is_symm_mem_tensor")
        block = block_at(storage_address(tensor))
        return block is not None and not block.closed

    @staticmethod
    def set_group_info(group_name: str, rank: int, world_size: int, store: Store) -> None:
        """Give a name to ranks that share a store. Not needed for process groups, which are known by their names.

        Args:
            group_name: The name, for :meth:`rendezvous`.
            rank: This process's rank.
            world_size: Number of ranks.
            store: All these ranks share it.

        Raises:
            GroupError: A group of that name has another rank or size, or an argument is wrong.
        """
        try:
            known = group_named(group_name)
        except GroupError:
            known = Group.from_store(rank, world_size, store, group_name)
            _groups_by_store[name_of(known)] = known
        if (known.rank, known.size) != (rank, world_size):
            raise GroupError(
                f"the group {group_name!r} has rank {known.rank} of {known.size} here, not {rank} of {world_size}",
                hint="give the ranks another name",
                rank=known.rank,
                group=group_name,
                step="set_group_info",
            )

    @staticmethod
    def get_mempool_allocator(device: torch.device | str | int) -> NoReturn:
        """Raise UnsupportedError: a pool of PyTorch's cannot take memory from symmem's backends."""
        raise UnsupportedError(
            f"symmem has no allocator for a torch.cuda.MemPool on {device}",
            hint="run the code within symmem.use_symmetric_memory(group), or allocate with empty()",
            step="get_mempool_allocator",
        )

    def boxed(self) -> NoReturn:
        """Raise UnsupportedError: there is no TorchBind object, because this handle is an object of Python."""
        raise UnsupportedError(
            "this handle cannot be an argument of an operator of PyTorch",
            hint="call the handle's methods, symmem.torch_compat.put_signal() or wait_signal()",
            rank=self.rank,
            group=self._group.name,
            step="boxed",
        )

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
        return self._block.allocation.device

    @property
    def offset(self) -> int:
        """Bytes from the beginning of the allocation to the tensor's storage; 0 except in a memory pool."""
        return self._offset

    # Memory.

    @property
    def buffer_size(self) -> int:
        """Bytes of a rank's allocation, without the signal pad."""
        return self._block.nbytes

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
        """The multicast address of the tensor's storage; 0 if there is none, as in PyTorch.

        :attr:`SymmetricTensor.multicast_ptr` raises an error with the reason instead. The first use may be collective.
        """
        with contextlib.suppress(MulticastUnavailableError):
            return self._mapping.multicast() + self._block.offset + self._offset
        return 0

    def get_buffer(
        self, rank: int, sizes: Iterable[int], dtype: torch.dtype, storage_offset: int | None = 0
    ) -> torch.Tensor:
        """A rank's memory as a contiguous tensor, with a storage of :attr:`buffer_size` bytes. It keeps the memory.

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
        return self._tensor(rank, tuple(sizes), dtype, (storage_offset or 0) * dtype.itemsize)

    def get_remote_tensor(self, peer: int, sizes: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """:meth:`get_buffer` at :attr:`offset`."""
        return self._tensor(peer, tuple(sizes), dtype, self._offset)

    def _tensor(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, begin: int) -> torch.Tensor:
        if is_in_mode():  # the tensor outlives the caller's modes
            with neutral_mode():
                return self._tensor(rank, shape, dtype, begin)
        storage = self._storages.get(rank) if type(rank) is int else None
        if storage is None:
            storage = self._storage(rank)
        width, nbytes = dtype.itemsize, self._block.nbytes
        if begin % width or not 0 <= begin <= begin + math.prod(shape) * width <= nbytes:
            raise InvalidArgumentError(
                f"get_buffer: {shape} of {dtype} at byte {begin} is not within {nbytes} bytes",
                rank=self.rank,
                group=self._group.name,
            )
        made: Any = template(dtype, storage.device).new()
        made.set_(storage, begin // width, shape)
        return made  # type: ignore[no-any-return]

    def _storage(self, rank: int) -> Any:
        rank = check_rank(rank, self._mapping, "get_buffer")
        pointer = self.buffer_ptrs[rank]
        if not pointer:
            self._mapping.unsupported("get_buffer", f"rank {rank}'s memory is not load/store reachable from here")
        storage = storage_at(pointer, self.buffer_size, self.device, (self._block, self._mapping))
        self._storages[rank] = storage
        return storage

    # Signals.

    @property
    def signal_pad_size(self) -> int:
        """Bytes of a rank's signal pad. For a tensor from :func:`empty`, the size of the class when it was allocated.

        The words and protocol are PyTorch's: word ``channel * world_size + source``, 0 when not in use. Kernels that
        use the pad and :meth:`put_signal` and :meth:`wait_signal` of this handle see each other's signals. A tensor
        from another function has the pad of its backend, for 64 channels.
        """
        return self._block.allocation.pad_nbytes or self._block_signals().signal_pad(self.rank)[1]

    @property
    def signal_pad_ptrs(self) -> list[int]:
        """Address of every rank's signal pad as seen from this rank; 0 if it is not load/store reachable."""
        allocation, pointers = self._block.allocation, self._mapping.pointers
        if allocation.pad_nbytes:
            return [pointer + allocation.pad if pointer else 0 for pointer in pointers]
        signals = self._block_signals()
        return [signals.signal_pad(rank)[0] if pointer else 0 for rank, pointer in enumerate(pointers)]

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
        dtype = torch.uint32 if dtype is None else dtype
        address = self.signal_pad_ptrs[check_rank(rank, self._mapping, "get_signal_pad")]
        if not address:
            self._mapping.unsupported("signal pad", f"rank {rank}'s memory is not load/store reachable from here")
        nbytes, begin = self.signal_pad_size, (storage_offset or 0) * dtype.itemsize
        shape = tuple(sizes) or (nbytes // dtype.itemsize,)
        end = begin + math.prod(shape) * dtype.itemsize
        if not 0 <= begin <= end <= nbytes:
            raise InvalidArgumentError(
                f"get_signal_pad: {shape} of {dtype} at element {storage_offset} is not within {nbytes} bytes",
                hint="set a larger signal_pad_size before the allocation",
                rank=self.rank,
                group=self._group.name,
            )
        return _part(tensor_at(address, nbytes, self.device, (self._block, self._mapping)), begin, end, dtype, shape)

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """:meth:`SymmetricTensor.barrier`, with words of its own; a timeout of 0 is the setting ``signal_timeout``."""
        self._symmetric().barrier(channel, _seconds(timeout_ms), group=self._group)

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """Wait until the word of this rank and channel in the pad of ``dst_rank`` is 0, and set it to 1.

        It makes earlier stores visible. On CUDA it is work on the current stream.

        Args:
            dst_rank: The rank to signal.
            channel: ``0 <= channel < 64``, and the pad must have its words: :attr:`world_size` of 4 bytes a channel.
            timeout_ms: 0 is the setting ``signal_timeout``.

        Raises:
            RankError, InvalidArgumentError: No such rank or channel.
            PeerTimeoutError, PeerLostError: See :meth:`SymmetricTensor.put_signal`.
        """
        self._signal("put_signal", dst_rank, channel, timeout_ms)

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """Wait until the word of ``src_rank`` and the channel in this rank's pad is set, and set it to 0.

        Args:
            src_rank: The rank that signals.
            channel: See :meth:`put_signal`.
            timeout_ms: 0 is the setting ``signal_timeout``.

        Raises:
            RankError, InvalidArgumentError, PeerTimeoutError, PeerLostError: See :meth:`put_signal`.
        """
        self._signal("wait_signal", src_rank, channel, timeout_ms)

    def _signal(self, operation: str, peer: int, channel: int, timeout_ms: int) -> None:
        tensor = self._symmetric()
        mapping, channel, seconds = tensor._signals(operation, channel, _seconds(timeout_ms), self._group)
        peer = check_rank(peer, mapping, operation)
        tensor._wait(mapping, getattr(self._signals(operation, channel), operation), peer, channel, seconds)

    def _signals(self, operation: str, channel: int) -> Signals:
        """Signals over the pads of :attr:`signal_pad_ptrs`."""
        nbytes = self._block.allocation.pad_nbytes
        if not nbytes:
            return self._block_signals()
        channels = nbytes // (4 * self.world_size)
        if channel >= channels:
            raise InvalidArgumentError(
                f"the signal pad of {nbytes} bytes has room for {min(channels, SIGNAL_CHANNELS)} channels of "
                f"{self.world_size} ranks, so there is no channel {channel}",
                hint="set a larger signal_pad_size before the allocation, or use a lower channel",
                rank=self.rank,
                group=self._group.name,
                step=operation,
            )
        shared = self._shared
        if shared.signals is None:
            # Only the flags are used. A barrier has more words, and uses the backend's pads.
            shared.signals = self._mapping.signals_at(self.signal_pad_ptrs)
        return shared.signals

    def _block_signals(self) -> Signals:
        return self._block.signals(self._mapping)

    def _symmetric(self) -> SymmetricTensor:
        return SymmetricTensor(self._block, self._block.layout)

    @functools.cached_property
    def _shared(self) -> _Shared:
        of_block = _shared.setdefault(self._block, weakref.WeakKeyDictionary())
        return of_block.setdefault(self._mapping, _Shared())

    def _on_device(self, kind: str, pointers: list[int]) -> int:
        # The array lives as long as the block, because callers keep the address and drop the handle.
        arrays = self._shared.arrays
        if kind not in arrays:
            with neutral_mode():
                arrays[kind] = torch.tensor(pointers, dtype=torch.int64, device=self.device)
        return arrays[kind].data_ptr()

    @staticmethod
    def memset32(input: torch.Tensor, offset: int, val: int, count: int = 1) -> torch.Tensor:
        """Fill ``count`` words with a value; on CUDA, work on the current stream.

        Args:
            input: Contiguous, of one dimension, uint32 or int32.
            offset: The first word, in elements.
            val: ``0 <= val < 2**32``.
            count: At least 1.

        Returns:
            ``input``.

        Raises:
            InvalidArgumentError: An argument is wrong, or a word is not in the tensor. Nothing is written.
        """
        return fill_words(input, offset, val, count, "memset32")

    @staticmethod
    def stream_write_value32(input: torch.Tensor, offset: int, val: int) -> torch.Tensor:
        """:meth:`memset32` of one word."""
        return fill_words(input, offset, val, 1, "stream_write_value32")


class _WordsError(InvalidArgumentError, RuntimeError):
    """The error of PyTorch's kernels for memory of 32-bit words, which is a RuntimeError."""


def fill_words(words: torch.Tensor, offset: int, value: int, count: int, operation: str) -> torch.Tensor:
    """Fill words as :meth:`TorchHandle.memset32` does. The texts of errors are PyTorch's, which programs may match."""
    for name, number in (("offset", offset), ("val", value), ("count", count)):
        check_integer(number, name, operation)
    if words.dim() != 1 or not words.is_contiguous() or words.dtype not in _WORDS:
        shape = list(words.shape)
        problem = f"input must be a flat, contiguous uint32 tensor, or int32, not {shape} of {words.dtype}"
    elif offset < 0:
        problem = f"offset must be greater than or equal to 0, not {offset}"
    elif not 0 <= value < 2**32:
        problem = f"val must be in the range of 0 to {2**32 - 1} (uint32_t), not {value}"
    elif count < 1:
        problem = f"count must be a positive integer, not {count}"
    elif offset + count > words.numel():
        problem = f"offset + count is {offset + count}, which exceeded the numel of the input, {words.numel()}"
    else:
        words.view(torch.int32)[offset : offset + count] = value - 2**32 if value >= 2**31 else value
        return words
    raise _WordsError(f"{operation}: {problem}", step=operation)


@neutral
def _part(memory: torch.Tensor, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return memory[begin:end].view(dtype).view(shape)


def _seconds(timeout_ms: int) -> float | None:
    return timeout_ms / 1000 if timeout_ms else None
