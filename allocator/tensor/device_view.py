"""The tables and the struct through which kernels reach peers: for Triton, and for CUDA C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from symmem.backends.base import SIGNAL_CHANNELS, Capability
from symmem.backends.kernel_status import named
from symmem.backends.neutral import neutral_mode
from symmem.errors import InvalidArgumentError
from symmem.group.group import check_timeout

if TYPE_CHECKING:
    from symmem.backends.base import Mapping, RankGroup
    from symmem.memory.block import Block

__all__ = ["CustomSignals", "DeviceView", "View", "include_path"]


def include_path() -> str:
    """The folder of ``symmem.cuh`` and ``symmem_registry.h``, for ``-I``; ``symmem include-path`` prints it."""
    return str(Path(__file__).parents[1] / "include")


class View(ctypes.Structure):
    """``symmem::View`` of symmem.cuh, which describes the fields; 56 bytes."""

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


class CustomSignals(NamedTuple):
    """The user's memory for signal words: its mapping, the address on every rank, and this rank's tensor."""

    mapping: Mapping
    pointers: Sequence[int]
    tensor: torch.Tensor


class DeviceView:
    """Made by :meth:`SymmetricTensor.device_view`. It keeps the memory alive; keep the view while kernels use it.

    Triton (:mod:`symmem.triton`) takes :attr:`pointers`, :attr:`signals` and :attr:`rank`. In CUDA C++ (symmem.cuh)
    a parameter ``symmem::View`` takes ``bytes(view)``, or :attr:`struct` through ctypes. If a launcher cannot pass a
    struct by value (cuda.core, for example), declare ``const symmem::View *`` and pass ``struct_tensor.data_ptr()``.

    Attributes:
        rank: This rank, within the group.
        world_size: Ranks of the group.
        nbytes: Bytes of a rank's tensor, from the first element to the end of the last.
        channels: Signal channels: ``range(channels)``.
        pointers: int64 [world] on the device: address of every rank's first element; as ``remote_pointers``.
        signals: int64 [world + 4] on the device: address of every rank's signal words; then ``limit``, ``status``,
            ``group`` and ``channels`` as in :attr:`struct`.
        struct: The struct, for ctypes.
        struct_tensor: uint8 [56] on the device: the struct.
    """

    def __init__(
        self,
        mapping: Mapping,
        pointers: Sequence[int],
        nbytes: int,
        block: Block,
        custom: CustomSignals | None,
        timeout: float | None,
    ) -> None:
        """Use :meth:`SymmetricTensor.device_view`."""
        group, device = mapping.group, mapping.device
        _check_reachable(mapping, pointers)
        words, self.channels = _signal_words(mapping, block, custom)
        self._owners = block, mapping, custom
        self.rank, self.world_size, self.nbytes = group.rank, group.size, nbytes
        limit = int((group.settings.signal_timeout if timeout is None else check_timeout(timeout)) * 1e9)
        with named, neutral_mode():  # the tensors live as long as the view
            status, number = _status(group, device)
            self.pointers = torch.tensor(pointers, dtype=torch.int64, device=device)
            self.signals = torch.tensor(
                [*words, limit, status, number, self.channels], dtype=torch.int64, device=device
            )
            self.struct = View(
                pointers=self.pointers.data_ptr(),
                signals=self.signals.data_ptr(),
                status=status,
                nbytes=nbytes,
                limit=limit,
                rank=self.rank,
                world=self.world_size,
                channels=self.channels,
                group=number,
            )
            self.struct_tensor = torch.frombuffer(bytearray(self.struct), dtype=torch.uint8).to(device, copy=True)

    def __bytes__(self) -> bytes:
        return bytes(self.struct)


def _check_reachable(mapping: Mapping, pointers: Sequence[int]) -> None:
    """Raise UnsupportedError unless kernels of this rank can load and store all ranks' memory at these addresses."""
    if Capability.REMOTE_TENSOR not in mapping.backend.capabilities:
        mapping.unsupported("device view", "peers' memory is not load/store reachable")
    unreachable = [rank for rank, pointer in enumerate(pointers) if not pointer]
    if unreachable:
        mapping.unsupported("device view", f"ranks {unreachable} are not load/store reachable from here")
    # symmem.triton promises this to the compiler; it holds for all memory that is mapped by pages.
    if any((pointer - pointers[0]) % 16 for pointer in pointers):
        mapping.unsupported("device view", "its memory does not begin at the same address modulo 16 on all ranks")


def _signal_words(mapping: Mapping, block: Block, custom: CustomSignals | None) -> tuple[Sequence[int], int]:
    """Return the address of every rank's signal words, and the number of channels."""
    world = mapping.group.size
    if Capability.SIGNALS in mapping.backend.capabilities:
        # Made even if they stay unused: SymmetricTensor.synchronize() asks them whether a kernel failed.
        signals = block.signals(mapping)
        pads = [signals.signal_pad(rank)[0] for rank in range(world)]
        if custom is None:
            return pads, SIGNAL_CHANNELS
    if custom is None:
        mapping.unsupported("signal pads", "give the device view `signals` of your own")
    tensor, shape = custom.tensor, tuple(custom.tensor.shape)
    if len(shape) != 2 or shape[1] != world or tensor.dtype != torch.int32 or not tensor.is_contiguous():
        raise InvalidArgumentError(
            f"signals must be contiguous, int32 and [channels, {world}], not {tensor.dtype} of shape {shape}",
            hint="symmem.allocate((channels, world_size), torch.int32), filled with zeros before a barrier()",
            rank=mapping.group.rank,
            group=mapping.group.name,
            step="device_view",
        )
    _check_reachable(custom.mapping, custom.pointers)
    return custom.pointers, shape[0]


def _status(group: RankGroup, device: torch.device) -> tuple[int, int]:
    """The address where a kernel reports a failed wait, and its number for the group; zeros on the CPU."""
    if device.type != "cuda":
        return 0, 0
    from symmem.backends.cuda_signals import device_of

    signals = device_of(torch.cuda.current_device() if device.index is None else device.index)
    return signals.status_address, signals.enter(group)
