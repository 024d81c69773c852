"""Turn the arguments of a request for memory into a source of memory, a layout, and a factory for the tensor.

Programs repeat their requests, so every group remembers earlier results.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from symmem.arena.arena import Arena, arena_for, supports_arenas
from symmem.backends import select_backend
from symmem.backends.base import Backend, storage_at
from symmem.backends.neutral import in_fake_mode, neutral, neutral_mode
from symmem.config import load_settings
from symmem.errors import GroupError, InvalidArgumentError, UnsupportedError
from symmem.group.group import Group
from symmem.memory.block import Block
from symmem.memory.layout import Layout

__all__ = [
    *("Requests", "Source", "arena_of", "check_not_fake", "choose_source", "resolve_request", "template"),
    "tensor_over",
]

_REMEMBERED = 4096  # requests per group


@dataclass(frozen=True, slots=True)
class Source:
    """The source of a request's memory.

    Attributes:
        backend: The backend that allocates.
        device: The memory's device.
        arena: The group's arena for this backend and device. None without a group, or if the backend cannot have one.
        follows_current: The request named no CUDA device, so it needs another source when the current device changes.
        is_cuda: Whether the device is a CUDA device; looking up ``device.type`` takes a part of a microsecond.
    """

    backend: Backend
    device: torch.device
    arena: Arena | None
    follows_current: bool
    is_cuda: bool

    @property
    def is_current(self) -> bool:
        """Whether the same request would still get this source."""
        return not self.follows_current or self.device.index == torch._C._cuda_getDevice()


DeviceLike: TypeAlias = torch.device | str | int | None
BackendNames: TypeAlias = str | Sequence[str] | None

Arguments: TypeAlias = tuple[int | Iterable[int], torch.dtype | None, DeviceLike, Iterable[int] | None, BackendNames]
"""The user's arguments: sizes, dtype, device, strides, backend."""

Request: TypeAlias = tuple[Source, Layout, Callable[[Block], torch.Tensor]]
"""The source, the layout, and a factory for the tensor over the block."""


class Requests(dict[Any, Any]):
    """The requests and sources that one group remembers; kept in ``group.extensions``."""


def resolve_request(group: Group | None, arguments: Arguments) -> Request:
    """Check the user's arguments. The group remembers the results of usual requests.

    Raises:
        SymmemError: See :meth:`SymmetricTensor.allocate`.
    """
    sizes, dtype, _device, strides, _backend = arguments
    if group is None or dtype is None or strides is not None:
        return _examine(group, arguments)
    for size in sizes if isinstance(sizes, tuple) else (sizes,):
        if type(size) is not int:  # True equals 1, so it would find the remembered request of 1
            return _examine(group, arguments)
    try:
        request: Request | None = group.extensions[Requests].get(arguments)
    except KeyError:
        request = None  # the group's first request
    except TypeError:  # a list of backends, or an invalid device
        return _examine(group, arguments)
    if request is None or (request[0].follows_current and not request[0].is_current):
        requests = group.extension(Requests)
        if len(requests) >= _REMEMBERED:
            requests.clear()
        request = requests[arguments] = _examine(group, arguments)
    return request


def _examine(group: Group | None, arguments: Arguments) -> Request:
    sizes, dtype, device, strides, backend = arguments
    layout = Layout.make(sizes, dtype, strides)
    source = choose_source(group, backend, device)
    return source, layout, _factory(layout, source.device)


def choose_source(group: Group | None, backend: BackendNames, device: DeviceLike) -> Source:
    """Choose the backend and the device. The group remembers the result.

    Raises:
        SymmemError: See :meth:`SymmetricTensor.allocate`.
    """
    if group is None:
        return _choose(None, backend, device)
    requests = group.extension(Requests)
    try:
        source: Source | None = requests.get((backend, device))
    except TypeError:  # a list of backends, or an invalid device
        return _choose(group, backend, device)
    if source is None or not source.is_current:
        source = requests[backend, device] = _choose(group, backend, device)
    return source


def _choose(group: Group | None, backend: BackendNames, device: DeviceLike) -> Source:
    overrides = {} if backend is None else {"backend": backend}
    settings = load_settings(overrides, group=group.name if group else None)
    requested = _parse_device(device)
    chosen = select_backend(settings.backend, requested.type if requested else None)
    if requested is None:
        requested = torch.device(chosen.device_type)
    if requested.type == "cpu":
        requested = torch.device("cpu")  # "cpu:0" is the same memory
    follows_current = requested.type == "cuda" and requested.index is None
    if follows_current:
        requested = torch.device("cuda", torch.cuda.current_device())
    arena = arena_for(group, chosen, requested) if group and supports_arenas(chosen) else None
    return Source(chosen, requested, arena, follows_current, requested.type == "cuda")


def _parse_device(device: DeviceLike) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"{device!r} is not a device: {error}") from error


def arena_of(source: Source, group: Group | None) -> Arena:
    """Return the arena of a source.

    Raises:
        GroupError: There is no group, thus no arena.
        UnsupportedError: The backend cannot have an arena.
    """
    if source.arena is not None:
        return source.arena
    if group is None:
        raise GroupError(
            "an arena belongs to a group, and there is none",
            hint="call torch.distributed.init_process_group(), or pass group=; or allocate with arena=False",
            step="allocate",
        )
    return arena_for(group, source.backend, source.device)


def check_not_fake() -> None:
    """Raise UnsupportedError if this thread is in a FakeTensorMode."""
    if in_fake_mode():
        raise UnsupportedError(
            "there is no symmetric memory under a FakeTensorMode, where tensors have no memory",
            hint="allocate before the mode begins; or make a tensor of this shape with torch.empty",
            step="allocate",
        )


# Factories.


class _Bytes(ctypes.c_ubyte * sys.maxsize):  # type: ignore[misc]
    """A ctypes view that starts at an address; the tensor reads only the bytes it needs. It keeps the owner alive."""

    __slots__ = ("owner",)


_on_cuda: Any = getattr(torch._C, "_construct_CUDA_Tensor_From_Storage_And_Metadata", None)
"""Makes a tensor over a storage in half the time of ``new()`` and ``set_``; only a torch with CUDA has it."""


@neutral
def tensor_over(block: Block, layout: Layout) -> torch.Tensor:
    """Make the tensor of a layout within a block; it keeps the block alive."""
    if layout.offset or layout.nbytes != block.nbytes:
        return layout.view(block.tensor())
    return _factory(layout, block.allocation.device)(block)


@functools.lru_cache(256)
def _factory(layout: Layout, device: torch.device) -> Callable[[Block], torch.Tensor]:
    """Return a function that makes the tensor of a layout over a whole block; the tensor keeps the block alive."""
    nbytes, dtype, sizes, strides = layout.nbytes, layout.dtype, layout.sizes, layout.strides
    if device.type == "cpu" and layout.flat:

        def flat(block: Block) -> torch.Tensor:  # takes half the time of the general way below
            memory = _Bytes.from_address(block.pointer)
            memory.owner = block
            return torch.frombuffer(memory, dtype=dtype, count=sizes[0])

        return flat
    if device.type == "cuda" and _on_cuda is not None:
        metadata = {"dtype": dtype, "size": sizes, "stride": strides, "storage_offset": 0}
        return lambda block: _on_cuda(metadata, storage_at(block.pointer, nbytes, device, block))
    new: Any = template(dtype, device).new
    return lambda block: new().set_(storage_at(block.pointer, nbytes, device, block), 0, sizes, strides)


@functools.lru_cache(256)
def template(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor; its ``new()`` makes others in half the time of torch.empty."""
    with neutral_mode():
        return torch.empty(0, dtype=dtype, device=device)
