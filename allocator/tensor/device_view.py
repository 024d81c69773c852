"""What a kernel gets to know of a symmetric tensor: tables for Triton, and a struct for CUDA C++."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from symmem.backends.base import SIGNAL_CHANNELS, Capability
from symmem.errors import InvalidArgumentError
from symmem.group.group import check_timeout

if TYPE_CHECKING:
    from symmem.backends.base import Group, Mapping
    from symmem.tensor.tensor import SymmetricTensor

__all__ = ["DeviceView", "View", "include_path"]


def include_path() -> str:
    """The folder of ``symmem.cuh``, for ``-I`` of nvcc or NVRTC; ``symmem include-path`` prints it."""
    return str(Path(__file__).parents[1] / "include")


class View(ctypes.Structure):
    """``symmem::View`` of symmem.cuh, of 56 bytes, which is where the fields are described."""

    _fields_: ClassVar = [
        ("pointers", ctypes.c_uint64),
        ("signals", ctypes.c_uint64),
        ("status", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("world", ctypes.c_uint32),
        ("channels", ctypes.c_uint32),
        ("group", ctypes.c_uint32),
    ]


class DeviceView:
    """Made by :meth:`SymmetricTensor.device_view`. It keeps the memory alive, and must live while kernels use it.

    Triton (:mod:`symmem.triton`) takes :attr:`pointers`, :attr:`signals` and :attr:`rank`. In CUDA C++ (symmem.cuh)
    a parameter ``symmem::View`` takes ``bytes(view)``, or :attr:`struct` through ctypes. Where a launcher cannot pass a
    struct by value, as that of cuda.core, declare ``const symmem::View *``, and pass ``struct_tensor.data_ptr()``.

    Attributes:
        rank: This rank, within the group.
        world_size: Ranks of the group.
        nbytes: Bytes of each rank's tensor, from the first element to the end of the last.
        channels: Signal channels: ``range(channels)``.
        pointers: int64 [world] on the device: address of each rank's first element; as ``remote_pointers``.
        signals: int64 [world + 4] on the device: address of each rank's signal words; then ``limit``, ``status``,
            ``group`` and ``channels`` as in :attr:`struct`.
        struct: The struct, for ctypes.
        struct_tensor: uint8 [56] on the device: the struct.
    """

    def __init__(
        self, tensor: SymmetricTensor, mapping: Mapping, signals: SymmetricTensor | None, timeout: float | None
    ) -> None:
        """Use :meth:`SymmetricTensor.device_view`."""
        group, device = mapping.group, tensor.device
        self._owners = tensor, signals, mapping
        self.rank, self.world_size, self.nbytes = group.rank, group.size, tensor.nbytes
        pointers = _reachable(tensor, mapping)
        self.pointers = torch.tensor(pointers, dtype=torch.int64, device=device)
        words, self.channels = _words(tensor, mapping, signals)
        limit = int((group.settings.signal_timeout if timeout is None else check_timeout(timeout)) * 1e9)
        status, number = _status(mapping.group, device)
        self.signals = torch.tensor([*words, limit, status, number, self.channels], dtype=torch.int64, device=device)
        self.struct = View(
            pointers=self.pointers.data_ptr(),
            signals=self.signals.data_ptr(),
            status=status,
            nbytes=self.nbytes,
            limit=limit,
            rank=self.rank,
            world=self.world_size,
            channels=self.channels,
            group=number,
        )
        self.struct_tensor = torch.frombuffer(bytearray(self.struct), dtype=torch.uint8).to(device, copy=True)

    def __bytes__(self) -> bytes:
        return bytes(self.struct)


def _reachable(tensor: SymmetricTensor, mapping: Mapping) -> list[int]:
    """Address of every rank's first element, if there is one of each."""
    if Capability.REMOTE_TENSOR not in mapping.backend.capabilities:
        mapping.unsupported("device view", "peers' memory is not load/store reachable")
    addresses = tensor._addresses(mapping)
    unreachable = [rank for rank, address in enumerate(addresses) if not address]
    if unreachable:
        mapping.unsupported("device view", f"ranks {unreachable} are not load/store reachable from here")
    # symmem.triton tells the compiler so; no memory that is mapped by pages is otherwise.
    if any((address - addresses[0]) % 16 for address in addresses):
        mapping.unsupported("device view", "its memory does not begin at the same address modulo 16 on all ranks")
    return addresses


def _words(tensor: SymmetricTensor, mapping: Mapping, signals: SymmetricTensor | None) -> tuple[list[int], int]:
    """Address of each rank's signal words, in its pad or in what the user allocated; and the number of channels."""
    ranks = range(mapping.group.size)
    if Capability.SIGNALS in mapping.backend.capabilities:
        # Asked for in any case: who has made them looks for failures in SymmetricTensor.synchronize().
        made = tensor._block.signals(mapping)
        pads = [made.signal_pad(rank)[0] for rank in ranks]
        if signals is None:
            return pads, SIGNAL_CHANNELS
    if signals is None:
        mapping.unsupported("signal pads", "give the device view `signals` of your own")
    shape, dtype = tuple(signals.shape), signals.dtype
    if len(shape) != 2 or shape[1] != len(ranks) or dtype != torch.int32 or not signals.tensor.is_contiguous():
        raise InvalidArgumentError(
            f"signals must be contiguous, int32 and [channels, {len(ranks)}], not {dtype} of shape {shape}",
            hint="symmem.allocate((channels, world_size), torch.int32), filled with zeros before a barrier()",
            rank=mapping.group.rank,
            group=mapping.group.name,
            step="device_view",
        )
    own = signals._mapping("device_view", mapping.group)  # type: ignore[arg-type]
    return _reachable(signals, own), shape[0]


def _status(group: Group, device: torch.device) -> tuple[int, int]:
    """Where a kernel says for whom it waited in vain, and the number by which it names the group; 0 on the CPU."""
    if device.type != "cuda":
        return 0, 0
    from symmem.backends.cuda_signals import device_of

    signals = device_of(torch.cuda.current_device() if device.index is None else device.index)
    return signals.status_address, signals.enter(group)
