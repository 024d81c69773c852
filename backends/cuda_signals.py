"""Barrier and signals as work on a CUDA stream: three small kernels over the signal pads of all ranks.

The kernels are in :mod:`symmem.backends.signal_kernels`. They are compiled on first use. Their arguments never change,
so a captured CUDA graph can be replayed. A kernel that times out, or gives up because a rank is lost, writes the
awaited peer to host memory, and :meth:`CudaSignals.check` raises the named error.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch

from symmem.backends.base import SIGNAL_CHANNELS, RankGroup
from symmem.backends.cuda_compile import CompiledKernels
from symmem.backends.driver import Driver, load_driver
from symmem.backends.driver_errors import driver_error
from symmem.backends.kernel_status import raise_failure
from symmem.backends.kernel_words import NBYTES, KernelWords, name_steps
from symmem.backends.signal_kernels import FLAG_BARRIER, OPERATIONS, SOURCE, pad_nbytes, pad_words, torch_nbytes
from symmem.errors import UnsupportedError

__all__ = ["CudaSignals", "Device", "device_of", "name_steps"]

_LARGEST_WORLD = 480  # 8 bytes per rank in 4 KiB of arguments
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not used CUDA yet
_REMEMBERED = 4096  # the most launches to keep arguments of


class _Launch:
    """A kernel with its arguments in the layout of the driver, made once."""

    def __init__(self, function: Any, threads: int, call: ctypes.Structure) -> None:
        self.function, self.threads, self._call = function, threads, call
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(call))
        self.arguments = ctypes.addressof(self._arguments)


class Device(KernelWords):
    """The state that all signals on one GPU of this process share: kernels by number of ranks, and their reports.

    Attributes:
        driver: The driver.
    """

    def __init__(self, ordinal: int) -> None:
        self.driver: Driver = load_driver()
        with self.driver.on(ordinal):
            host, device = self.driver.pinned(NBYTES)
        super().__init__(ordinal, host, device)
        self._kernels: dict[int, CompiledKernels] = {}
        self._lock = threading.Lock()

    def kernels(self, world: int) -> dict[str, Any]:
        """The functions for so many ranks, compiled on first use. This takes about 60 ms."""
        with self._lock:
            if world not in self._kernels:
                self._kernels[world] = CompiledKernels(
                    self.driver,
                    self.ordinal,
                    SOURCE,
                    (*OPERATIONS, FLAG_BARRIER),
                    {"WORLD": str(world)},
                    purpose="barrier and signals",
                    needs="7.0",
                )
            return self._kernels[world].functions


@functools.cache
def device_of(ordinal: int) -> Device:
    """The state that signals and collective operations on one GPU of this process share."""
    return Device(ordinal)


class CudaSignals:
    """Signals of one group on one GPU. A call enqueues work on torch's current stream of that GPU and returns at once.

    A backend can use it if all ranks can load from and store to its signal pads.

    Args:
        group: Gives the rank, size, name and lost ranks.
        device: The GPU for the kernels.
        pads: Address of every rank's pad; 0 if the rank is not reachable. A pad has :meth:`nbytes` bytes or more, and
            is zeroed before any rank signals.
    """

    def __init__(self, group: RankGroup, device: torch.device, pads: Sequence[int]) -> None:
        self._group, self._pads = group, tuple(pads)
        self._ordinal = torch.cuda.current_device() if device.index is None else device.index
        self._device = device_of(self._ordinal)
        self._number = self._device.enter(group)
        self._status, self._given_up = self._device.status, self._device.given_up(self._number)
        self._launch_kernel = self._device.driver.bindings.cuLaunchKernel
        self._launches: dict[tuple[str, int, int, float], _Launch] = {}

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes of one pad in a group of ``size`` ranks."""
        return pad_nbytes(size)

    @staticmethod
    def torch_pads(pads: Sequence[int]) -> tuple[list[int], int]:
        """Where the ranks' pads have room for PyTorch's kernels, 0 for a rank that is not reachable; and its bytes."""
        before = 4 * pad_words(len(pads))
        return [pad + before if pad else 0 for pad in pads], torch_nbytes()

    def barrier(self, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.barrier`."""
        self._run("barrier", self._group.rank, channel, timeout)

    def put_signal(self, rank: int, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.put_signal`."""
        self._run("put_signal", rank, channel, timeout)

    def wait_signal(self, rank: int, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.wait_signal`."""
        self._run("wait_signal", rank, channel, timeout)

    def signal_pad(self, rank: int) -> tuple[int, int]:
        """See :meth:`Mapping.signal_pad`. The words behind the flags are private."""
        self._check_reachable("signal pad", rank)
        return self._pads[rank], 4 * SIGNAL_CHANNELS * self._group.size

    def check(self) -> None:
        """See :meth:`Mapping.check`. Raises for a signal that has stopped the kernels on this GPU, of any group.

        It also raises the error of collective operations of this group that gave up, once.
        """
        self.check_usable()
        if error := self._device.take_error(self._number):
            raise error

    def check_usable(self) -> None:
        """Raise if a kernel on this GPU has stopped, or the group has lost a rank."""
        if error := self._device.failure() or self._device.loss(self._number):
            raise error

    def words(self) -> tuple[int, ...]:
        """What code without Python needs to launch the kernels, for pads that hold flags alone.

        The functions of barrier, put and wait; the address of the status for kernels; the addresses of two words of
        host memory that are not 0 if :meth:`check_usable` may raise; the default timeout in nanoseconds; the number of
        the group. They are valid while this object lives.
        """
        functions = self._device.kernels(self._group.size)
        names = (FLAG_BARRIER, *OPERATIONS[1:])
        reports = [ctypes.addressof(words) for words in (self._status, self._given_up)]
        timeout = int(self._group.settings.signal_timeout * 1e9)
        return (*(int(functions[name]) for name in names), self._device.status_address, *reports, timeout, self._number)

    def _run(self, operation: str, peer: int, channel: int, timeout: float) -> None:
        if self._status[0] or self._given_up[0]:
            self.check_usable()  # signals work while collective operations do not
        key = (operation, peer, channel, timeout)
        launch = self._launches.get(key) or self._prepare(key)
        try:
            if torch._C._cuda_getDevice() == self._ordinal:
                self._launch(launch)
            else:
                with torch.cuda.device(self._ordinal):
                    self._launch(launch)
        except RuntimeError as error:
            raise_failure(error)
            raise

    def _launch(self, launch: _Launch) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._ordinal)
        threads, arguments = launch.threads, launch.arguments
        (code,) = self._launch_kernel(launch.function, 1, 1, 1, threads, 1, 1, 0, stream, arguments, 0)
        if code == _INVALID_CONTEXT:
            self._device.driver.enter(self._ordinal)
            (code,) = self._launch_kernel(launch.function, 1, 1, 1, threads, 1, 1, 0, stream, arguments, 0)
        if code:
            raise driver_error(code.name, f"the kernel of a signal cannot be launched: {code.name}").located(
                rank=self._group.rank, group=self._group.name, step="launch"
            )

    def _prepare(self, key: tuple[str, int, int, float]) -> _Launch:
        """Lay out the arguments of a launch and keep them. The driver copies them at the launch."""
        operation, peer, channel, timeout = key
        size = self._group.size
        self._check_reachable(operation, peer)
        function = self._device.kernels(size)[operation]
        call = _call_type(size)(
            pads=(ctypes.c_uint64 * size)(*self._pads),
            status=self._device.status_address,
            limit=int(timeout * 1e9),
            channel=channel,
            rank=self._group.rank,
            peer=peer,
            group=self._number,
        )
        if len(self._launches) >= _REMEMBERED:
            self._launches.clear()
        threads = -(-size // 32) * 32 if operation == "barrier" else 1
        launch = self._launches[key] = _Launch(function, threads, call)
        return launch

    def _check_reachable(self, operation: str, peer: int) -> None:
        needed = {"barrier": range(self._group.size), "wait_signal": ()}.get(operation, (peer,))
        unreachable = tuple(rank for rank in needed if not self._pads[rank])
        if unreachable or self._group.size > _LARGEST_WORLD:
            why = f"ranks {list(unreachable)} are not load/store reachable from here"
            raise UnsupportedError(
                f"no {operation}: {why if unreachable else f'the group has more than {_LARGEST_WORLD} ranks'}",
                hint="use a group of ranks that reach each other, within one host or NVLink fabric",
                rank=self._group.rank,
                group=self._group.name,
                step=operation,
                peers=unreachable,
            )


@functools.cache
def _call_type(world: int) -> type[ctypes.Structure]:
    """``struct Call`` of :data:`symmem.backends.signal_kernels.SOURCE`."""
    words = ("channel", "rank", "peer", "group", "strict")
    fields = [("pads", ctypes.c_uint64 * world), ("status", ctypes.c_uint64), ("limit", ctypes.c_uint64)]
    return type("Call", (ctypes.Structure,), {"_fields_": [*fields, *((word, ctypes.c_uint32) for word in words)]})
