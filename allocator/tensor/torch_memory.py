"""The memory of :mod:`symmem.torch_compat`: separate allocations, each with a signal pad for PyTorch's kernels."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch._C._distributed_c10d import _SymmetricMemory

from symmem.backends import get_backend, select_backend
from symmem.backends.base import Backend, Capability, storage_at
from symmem.backends.libc import round_up
from symmem.backends.neutral import neutral
from symmem.backends.torch_transport import BACKENDS as _TORCH_NAMES
from symmem.backends.untraced import untraced
from symmem.config import load_settings
from symmem.errors import BackendUnavailableError, InvalidArgumentError
from symmem.group.call_site import caller
from symmem.group.resolve import GroupLike, default_group, resolve_group
from symmem.memory.block import Block
from symmem.memory.layout import Layout, integer
from symmem.memory.registry import register
from symmem.tensor.request import check_not_fake, resolve_request, template, tensor_over

__all__ = [
    *("backend_name", "empty_strided", "group_of", "has_multicast_support", "set_backend", "set_signal_pad_size"),
    "signal_pad_size",
]

_ALIGNMENT = 256  # bytes; of the signal pad behind a tensor

_backend: str | None = None
_groups: weakref.WeakKeyDictionary[Block, str] = weakref.WeakKeyDictionary()


class _Lease:
    """Keeps a block for one tensor. The tensor's storage refers to it, so it ends with the tensor and its views."""

    def __init__(self, block: Block) -> None:
        self.block = block


@dataclass
class _Persistent:
    """Memory that is kept for an ``alloc_id``, and its last tensor."""

    block: Block
    lease: weakref.ref[_Lease]


_persistent: dict[int, _Persistent] = {}
_lock = threading.RLock()


def signal_pad_size() -> int:
    """Bytes of the signal pads of later allocations."""
    # PyTorch's own value, because libraries of kernels set it on PyTorch's class.
    return _SymmetricMemory.signal_pad_size


def set_signal_pad_size(size: int) -> None:
    """Set the signal pads' bytes for later allocations, and for those of PyTorch; must be the same on all ranks.

    Raises:
        InvalidArgumentError: Not a positive integer.
    """
    try:
        size = integer(size)
    except TypeError:
        size = 0
    if size < 1:
        raise InvalidArgumentError(f"a signal pad must have at least 1 byte, not {size!r}")
    _SymmetricMemory.signal_pad_size = size


def set_backend(name: str) -> None:
    """Choose the backend for later allocations, instead of the configuration's.

    Args:
        name: PyTorch's ``CUDA``, ``NCCL`` or ``NVSHMEM``, or a backend of symmem.

    Raises:
        ConfigError: There is no such backend.
    """
    global _backend
    name = _TORCH_NAMES.get(name, name)
    get_backend(name)
    _backend = name


def _chosen(device: torch.device) -> Backend | None:
    try:
        return select_backend((_backend,) if _backend else load_settings().backend, device.type)
    except BackendUnavailableError:
        return None


def backend_name(device: torch.device | str | int) -> str | None:
    """Return the backend that allocates for a device; None if none works. Probes it. Local.

    The name is PyTorch's if PyTorch has one.
    """
    backend = _chosen(torch.device(device))
    if backend is None:
        return None
    return next((theirs for theirs, ours in _TORCH_NAMES.items() if ours == backend.name), backend.name)


def has_multicast_support(device_type: object, device_index: int) -> bool:
    """Whether memory on a device may have a multicast address. Local; allocates nothing.

    Args:
        device_type: PyTorch's ``DeviceType``, or its name.
        device_index: The GPU.

    Raises:
        BackendUnavailableError: The driver of the GPU cannot be asked.
    """
    device = torch.device(getattr(device_type, "name", str(device_type)).lower(), device_index)
    backend = _chosen(device)
    if backend is None or Capability.MULTICAST not in backend.capabilities:
        return False
    from symmem.backends.driver import load_driver
    from symmem.backends.multicast import why_not

    return not why_not(load_driver(), device_index, load_settings())


def group_of(block: Block) -> str | None:
    """The name of the group that an allocation named; None if it named none."""
    return _groups.get(block)


@untraced
def empty_strided(
    size: Iterable[int],
    stride: Iterable[int] | None,
    dtype: torch.dtype,
    device: torch.device | str | int,
    group_name: str | None = None,
    alloc_id: int | None = None,
) -> torch.Tensor:
    """Allocate a tensor in symmetric memory, with a signal pad behind it. Both are zeroed.

    Local, unless the backend has ``COLLECTIVE_ALLOCATION``. Not from an arena: PyTorch's memory is zeroed, has no group
    yet, and any rank may allocate alone.

    Args:
        size: Shape.
        stride: In elements; None for contiguous.
        dtype: Element type.
        device: Where.
        group_name: The group of a rendezvous that names none.
        alloc_id: With an id, the memory is kept for good, and later calls with the id get the same memory, not zeroed.

    Raises:
        InvalidArgumentError: A tensor of this ``alloc_id`` is still alive, or its memory has another size or device.
        SymmemError: See :meth:`SymmetricTensor.allocate`.
    """
    check_not_fake()
    return _empty_strided(tuple(size), stride, dtype, device, group_name, alloc_id)


@neutral  # the tensor outlives the caller's modes
def _empty_strided(
    size: tuple[int, ...],
    stride: Iterable[int] | None,
    dtype: torch.dtype,
    device: torch.device | str | int,
    group_name: str | None,
    alloc_id: int | None,
) -> torch.Tensor:
    if alloc_id is None:
        return tensor_over(*_allocate(size, stride, dtype, device, group_name))
    with _lock:
        known = _persistent.get(alloc_id)
        if known is None:
            block, layout = _allocate(size, stride, dtype, device, group_name)
        else:
            block, layout = known.block, Layout.make(size, dtype, stride)
            _check_reuse(known, layout, torch.device(device), alloc_id)
        lease = _Lease(block)
        _persistent[alloc_id] = _Persistent(block, weakref.ref(lease))
    where = block.allocation.device
    storage = storage_at(block.pointer, block.nbytes, where, lease)
    return template(dtype, where).new().set_(storage, 0, layout.sizes, layout.strides)


def _allocate(
    size: tuple[int, ...],
    stride: Iterable[int] | None,
    dtype: torch.dtype,
    device: torch.device | str | int,
    group_name: GroupLike,
) -> tuple[Block, Layout]:
    group = default_group() if group_name is None else resolve_group(group_name)
    source, layout, _factory = resolve_request(group, (size, dtype, device, stride, _backend))
    begin, pad_nbytes = round_up(layout.nbytes, _ALIGNMENT), signal_pad_size()
    allocation = source.backend.allocate(begin + pad_nbytes, source.device, group)
    allocation.pad, allocation.pad_nbytes = begin, pad_nbytes
    # Ranks compare bytes at the rendezvous, as PyTorch does, not shapes: memory of an alloc_id takes several shapes.
    memory = Layout((layout.nbytes,), (1,), torch.uint8)
    block = Block(allocation, memory, nbytes=layout.nbytes, site=caller(sys._getframe(1)))
    register(block)
    if isinstance(group_name, str):
        _groups[block] = group_name
    return block, layout


def _check_reuse(known: _Persistent, layout: Layout, device: torch.device, alloc_id: int) -> None:
    where = known.block.allocation.device
    if known.lease() is not None:
        problem, hint = "a tensor of this id is still alive", "drop it and its views first, or use another alloc_id"
    elif layout.nbytes != known.block.nbytes or device.type != where.type or device.index not in (None, where.index):
        problem = f"its memory has {known.block.nbytes} bytes on {where}, and {layout.nbytes} on {device} are asked for"
        hint = "use another alloc_id for another size or device"
    else:
        return
    raise InvalidArgumentError(f"alloc_id {alloc_id} cannot be used: {problem}", hint=hint, step="empty_strided_p2p")
