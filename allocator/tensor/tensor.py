"""The front door: :class:`SymmetricTensor`."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch

from symmem.arena.arena import Arena, arena_for, carves
from symmem.backends import select_backend
from symmem.backends.base import SIGNAL_CHANNELS, Backend, Capability, storage_at, tensor_at
from symmem.backends.kernel_status import named, raise_failure
from symmem.config import load_settings
from symmem.errors import (
    ClosedError,
    ForkedError,
    GroupError,
    InvalidArgumentError,
    NotRendezvousedError,
    NotSymmetricError,
    RankError,
    UnsupportedError,
)
from symmem.group.group import Group, GroupLike, check_timeout, default_group, resolve_group
from symmem.memory import cuda_graphs
from symmem.memory.block import Block
from symmem.memory.call_site import caller
from symmem.memory.layout import Layout, integer
from symmem.memory.registry import block_at, register
from symmem.tensor.device_view import DeviceView
from symmem.tensor.rendezvous import rendezvous

if TYPE_CHECKING:
    from symmem.backends.base import Mapping

__all__ = ["SymmetricTensor", "allocate", "find"]

_REMEMBERED = 4096  # requests of a group that need not be checked again


class SymmetricTensor:
    """A tensor that every rank of a group has, at the same offset of memory that the others can reach.

    A handle, not a Tensor: :attr:`tensor` is a plain tensor. Make one with :meth:`allocate`, let the ranks meet
    with :meth:`rendezvous`, then use peers' memory. The memory lives as long as a handle or any tensor over it,
    this rank's or a peer's, does; :meth:`close` ends the use of it through handles at once.

    Methods that take ``group`` mean the group of the first :meth:`rendezvous` if it is None, or that of the arena if
    there was none. Ranks are ranks of that group.
    """

    def __init__(self, block: Block, layout: Layout, tensor: torch.Tensor | None = None) -> None:
        """Use :meth:`allocate`, :meth:`wrap` or :func:`find`."""
        self._block = block
        self._layout = layout
        self._address = block.pointer + layout.offset
        # Making a tensor takes as long as a barrier of one rank; who finds a handle mostly wants peers, or signals.
        self._tensor = tensor

    @classmethod
    def allocate(
        cls,
        sizes: int | Iterable[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        *,
        strides: Iterable[int] | None = None,
        group: GroupLike = None,
        backend: str | Sequence[str] | None = None,
        arena: bool | None = None,
        name: str | None = None,
    ) -> SymmetricTensor:
        """Allocate memory; every rank of the group must, alike and in the same order.

        With a group, given or the default process group, it is carved from the group's arena: it is rendezvoused
        already, is not zeroed, and nothing is communicated, unless the arena must grow. Growing is collective over
        the group. Outside of an arena it is zeroed memory of its own, which every rank then must :meth:`rendezvous`;
        allocating that is not collective, unless the backend has ``COLLECTIVE_ALLOCATION``.

        A tensor of an arena that is no longer used is kept until all ranks have dropped theirs; see
        :func:`symmem.collect`. On CUDA, one that was allocated, or whose handle was used, amid the capture of a graph
        is kept as long as the graph lives.

        Args:
            sizes: Shape: an integer, or integers; ``()`` for no dimensions; a size may be 0.
            dtype: Any but the quantized ones; default ``torch.get_default_dtype()``.
            device: Default: that of the backend; with ``auto``, the current CUDA device if there is one, else CPU.
            strides: In elements; default contiguous. Elements may have gaps between them, not share memory.
            group: Whose arena and settings apply. If given, an error here is also raised, on the other ranks, by the
                group's next collective: they need not wait for this rank until the timeout.
            backend: A name, or names in order of preference; default: the configuration's.
            arena: False for memory of its own; True for the arena, or an error; None for the arena if there is a
                group and the backend's memory can be in one.
            name: What the ranks call it, for :func:`symmem.memory_snapshot`; compared like the shape.

        Raises:
            InvalidArgumentError: Sizes, strides, dtype or device.
            DivergenceError: Ranks have allocated differently from the arena; names the first allocation, and where
                each rank made it. Found when the ranks meet, or at once with the setting ``allocation_check(each)``.
            UnsupportedError: The arena would have to grow during the capture of a CUDA graph.
            ConfigError: Unknown backend, or an error in the environment or the cluster file.
            BackendUnavailableError: No backend that was asked for works here; says why for each.
            OutOfMemoryError, ResourceLimitError: A limit was reached; nothing is left behind.
        """
        known = default_group() if group is None else resolve_group(group)
        try:
            place, layout, make = _request(known, (sizes, dtype, device, strides, backend))
            if arena or (arena is None and place.arena is not None):
                block: Block = (place.arena or _arena(place, known)).carve(layout, name, sys._getframe(1))
                if place.cuda and cuda_graphs.is_capturing_cuda():
                    cuda_graphs.keep(block)
            else:
                allocation = place.backend.allocate(layout.nbytes, place.device, known)
                block = Block(allocation, layout, site=caller(sys._getframe(1)), name=name)
                register(block)
        except Exception as error:
            # What came out of a collective (an arena that grows; some backends allocate together), all ranks know.
            if known is not None and group is not None and getattr(error, "known_to", None) is None:
                known.fail("allocate", error)
            raise
        return cls(block, layout, make(block))

    @classmethod
    def wrap(cls, tensor: torch.Tensor, *, backend: str | None = None) -> SymmetricTensor:
        """The handle for a tensor, or a view of one, that lies in symmetric memory. Local.

        It shares the memory, and what groups have rendezvoused it, with the handle it came from: peers are reached
        at the same offset. :meth:`rendezvous` on it checks that this holds on all ranks.

        Args:
            tensor: A plain tensor.
            backend: Which backend it must be of; None for any.

        Raises:
            NotSymmetricError: It is not; names the check that failed: ``type``, ``layout``, ``address``, ``extent``,
                ``strides`` or ``backend``.
            ClosedError: It was, and its handle was closed.
        """

        def failed(check: str, why: str) -> NoReturn:
            raise NotSymmetricError(
                f"not symmetric memory, by the check {check!r}: {why}",
                hint="allocate it with symmem.allocate(...), and use its .tensor or views of that",
            )

        if not isinstance(tensor, torch.Tensor):
            failed("type", f"a {type(tensor).__name__} is not a tensor")
        address = _address(tensor)
        if address is None:
            failed(
                "layout",
                f"a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device} has no address",
            )
        block = block_at(address)
        if block is None or block.allocation.device != tensor.device:
            failed("address", f"no live allocation on {tensor.device} holds {address:#x}")
        layout = Layout.of(tensor, address - block.pointer)
        if layout.offset + layout.nbytes > block.nbytes:
            failed("extent", f"it ends {layout.offset + layout.nbytes - block.nbytes} bytes past what was allocated")
        if layout.overlaps:
            failed("strides", f"with sizes {layout.sizes} and strides {layout.strides} elements share memory")
        if backend is not None and block.allocation.backend.name != backend:
            failed("backend", f"it is memory of {block.allocation.backend.name!r}, not of {backend!r}")
        handle = cls(block, layout, _tensor(block, layout))
        handle._check_open("wrap")
        return handle

    # What it is.

    @property
    def tensor(self) -> torch.Tensor:
        """This rank's tensor: plain, of :attr:`shape` and :attr:`dtype`; the same object each time."""
        if self._block.closed:
            self._check_open("tensor")
        tensor = self._tensor
        if tensor is None:
            with torch.inference_mode(False):  # it is for later as well
                tensor = self._tensor = _tensor(self._block, self._layout)
        if tensor.data_ptr() != self._address and tensor.numel():
            raise NotSymmetricError(
                "this handle's tensor was given other memory (by share_memory_(), sending it to another process, "
                "set_(), resize_() or an assignment to .data), which its peers do not see",
                hint="send or resize a clone(); SymmetricTensor.wrap() a view of the memory for another shape",
                step="tensor",
            )
        return tensor

    @property
    def shape(self) -> torch.Size:
        """Sizes, the same on all ranks."""
        return torch.Size(self._layout.sizes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in elements, the same on all ranks."""
        return self._layout.strides

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self._layout.dtype

    @property
    def device(self) -> torch.device:
        """Where this rank's memory lies."""
        return self._block.allocation.device

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last."""
        return self._layout.nbytes

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return self._block.allocation.backend.name

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that have rendezvoused it, the first one first."""
        return tuple(self._block.groups)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called on this handle or another of the same memory."""
        return self._block.closed

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"groups={[group.name for group in self.groups]}"
        return (
            f"SymmetricTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"backend={self.backend!r}, {state})"
        )

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a SymmetricTensor cannot be pickled or copied: it is this process's view of memory",
            hint="send its .tensor.clone(), or let each rank allocate its own and rendezvous",
        )

    # Meeting.

    def rendezvous(self, group: GroupLike = None, timeout: float | None = None) -> SymmetricTensor:
        """Let the ranks of a group reach each other's memory. Collective over the group, the first time.

        Once it has succeeded, further calls with the same group return at once, as does the first one for a tensor of
        that group's arena. After a failure, which is the same
        on all ranks, it may be tried again. A second group may rendezvous the same tensor; each has signals of
        its own.

        Args:
            group: A process group, its name, a one-dimensional DeviceMesh, a :class:`Group`; None for the default
                process group.
            timeout: Seconds; default the setting ``rendezvous_timeout``.

        Returns:
            This handle.

        Raises:
            MismatchError: Ranks disagree on shape, dtype, strides, backend or version; names them and the values.
            PeerTimeoutError, PeerLostError: Names the ranks that did not come, or died.
            GroupError: No such group, or this process is not in it.
            UnsupportedError: A second group, of a backend that knows but one.
            SymmemError: What else failed, on any rank: all raise that rank's error.
        """
        block = self._block
        if group is None and timeout is None and self._layout is block.layout and not block.inherited:
            known = default_group()  # the usual case: a tensor of the default group's arena
            if known in block.compared:  # nothing is, once it is closed
                if block.first is None:
                    block.first = known
                return self
        self._check_open("rendezvous")
        resolved = resolve_group(group)
        if timeout is not None:
            check_timeout(timeout)
        self._check_process("rendezvous")
        if self._block.key(resolved, self._layout) not in self._block.compared:
            self._check_second(resolved)
            rendezvous(self._block, self._layout, resolved, timeout)
        if block.first is None:
            block.first = resolved
        return self

    def _check_second(self, group: Group) -> None:
        """Whether the backend lets a group meet that is not the first; the same on all ranks, so no round is needed."""
        backend, groups = self._block.allocation.backend, self.groups
        if groups and group not in groups and Capability.SECOND_GROUP not in backend.capabilities:
            raise UnsupportedError(
                f"memory of the backend {backend.name!r} belongs to one group, and this is that of {groups[0].name!r}",
                hint="allocate another tensor for this group, or choose a backend that has `second_group` "
                "(`symmem doctor` lists what each can do)",
                rank=group.rank,
                group=group.name,
                step="rendezvous",
            )

    def _mapping(self, operation: str, group: GroupLike) -> Mapping:
        """The mapping that a group's rendezvous made."""
        self._check_open(operation)
        self._check_process(operation)
        if cuda_graphs.is_capturing(self._block.allocation.device):
            cuda_graphs.keep(self._block)
        mappings = self._block.mappings
        if group is None and mappings:
            return mappings[self._block.first or next(iter(mappings))]
        resolved = resolve_group(group)
        if resolved not in mappings:
            raise NotRendezvousedError(
                f"the group {resolved.name!r} has not rendezvoused this tensor",
                hint="let all its ranks call rendezvous(group) first",
                rank=resolved.rank,
                group=resolved.name,
                step=operation,
            )
        return mappings[resolved]

    # Peers' memory.

    def remote_tensor(self, rank: int, *, group: GroupLike = None) -> torch.Tensor:
        """A rank's tensor, as a plain tensor of the same shape, strides and dtype. Local.

        It and its views keep the memory mapped. Loads and stores go to the peer's memory directly; order them
        with :meth:`barrier` or signals.

        Raises:
            RankError: Not ``0 <= rank < world_size``.
            UnsupportedError: That rank's memory is not load/store reachable from here; use :meth:`put`/:meth:`get`.
        """
        mapping = self._mapping("remote_tensor", group)
        rank = _check_rank(rank, mapping, "remote_tensor")
        if rank == mapping.group.rank:
            return self.tensor
        return self._layout.view(self._block.part(mapping.tensor(rank, self._block.end, self._block)))

    @property
    def remote_pointers(self) -> torch.Tensor:
        """Address of every rank's first element as seen from this rank: int64 tensor of shape [world] on the device.

        For the group of the first rendezvous; 0 where a rank's memory is not load/store reachable.
        """
        return self.pointers_of(None)

    def pointers_of(self, group: GroupLike) -> torch.Tensor:
        """:attr:`remote_pointers` for a given group."""
        pointers = self._addresses(self._mapping("remote_pointers", group))
        with named:
            return torch.tensor(pointers, dtype=torch.int64, device=self.device)

    def _addresses(self, mapping: Mapping) -> list[int]:
        """Address of every rank's first element; 0 where it is not reachable."""
        offset = self._block.offset + self._layout.offset
        return [pointer + offset if pointer else 0 for pointer in mapping.pointers]

    def device_view(
        self, signals: SymmetricTensor | None = None, timeout: float | None = None, *, group: GroupLike = None
    ) -> DeviceView:
        """What kernels of the user's own need to reach peers: for :mod:`symmem.triton` and for symmem.cuh. Local.

        Not to be made amid the capture of a CUDA graph, which may well capture kernels that use it.

        Args:
            signals: Memory for the kernels' barriers and signals, if the 64 channels of this tensor's signal pads,
                which :meth:`put_signal` and :meth:`wait_signal` use too, are not enough or not wanted: int32
                [channels, world], rendezvoused by the group, and filled with zeros on all ranks before it is used.
            timeout: Seconds that a wait in a kernel may take; default the setting ``signal_timeout``.
            group: See the class.

        Raises:
            UnsupportedError: Some rank's memory is not load/store reachable from here.
            InvalidArgumentError: ``signals`` have another shape or dtype.
        """
        with named:
            return DeviceView(self, self._mapping("device_view", group), signals, timeout)

    def contiguous_view(self, *, group: GroupLike = None) -> torch.Tensor:
        """All ranks' tensors as one, of shape [world, *shape]; ``[r]`` is rank r's memory. Local.

        Where the bytes of a tensor are a multiple of the backend's granularity (host: 4096) it is contiguous
        throughout; otherwise its first stride skips the padding.

        Raises:
            UnsupportedError: The backend cannot map all ranks' memory side by side.
        """
        mapping = self._mapping("contiguous_view", group)
        address, stride = mapping.contiguous()
        world = mapping.group.size
        memory = tensor_at(address, world * stride, self.device, (self._block, mapping))
        return self._layout.view_all(memory[self._block.offset :], world, stride)

    @property
    def multicast_ptr(self) -> int:
        """An address that stores to all ranks of the first rendezvous's group at once, or reduces over them.

        Set up when it is first asked for, which is collective. Never 0.

        Raises:
            MulticastUnavailableError: There is none; says why.
        """
        return self._mapping("multicast_ptr", None).multicast() + self._block.offset + self._layout.offset

    def signal_pad(self, rank: int, *, group: GroupLike = None) -> torch.Tensor:
        """A rank's signal pad: uint32 tensor of shape [channels, world], element [c, s] set by source rank s."""
        mapping = self._mapping("signal_pad", group)
        rank = _check_rank(rank, mapping, "signal_pad")
        words = SIGNAL_CHANNELS * mapping.group.size
        address, _nbytes = self._block.signals(mapping).signal_pad(rank)
        pad = tensor_at(address, 4 * words, self.device, (self._block, mapping))
        return pad.view(torch.uint32).view(SIGNAL_CHANNELS, mapping.group.size)

    # Signals. On CUDA they are work on the current stream; on the CPU they are done when the call returns.

    def barrier(self, channel: int = 0, timeout: float | None = None, *, group: GroupLike = None) -> None:
        """Wait for all ranks; what each stored before, in any rank's memory, is visible to all afterwards.

        Args:
            channel: ``0 <= channel < 64``; barriers of different channels are independent.
            timeout: Seconds; default the setting ``signal_timeout``.
            group: See the class.

        Raises:
            PeerTimeoutError: Names the rank that did not come. The barrier of this channel is then abandoned: the
                other ranks raise as well, now or when they come to it.
            PeerLostError: Names the rank that died.
            RendezvousError: Names the rank that was interrupted in it, by an exception out of a signal handler such as
                KeyboardInterrupt (on the CPU). On that rank it goes on as itself, and the barrier is abandoned as well.
        """
        mapping, channel, seconds = self._signals("barrier", channel, timeout, group)
        self._block.signals(mapping).barrier(channel, seconds)

    def put_signal(self, rank: int, channel: int = 0, timeout: float | None = None, *, group: GroupLike = None) -> None:
        """Set this rank's flag at ``rank``; first waits until the one before was taken. What was stored is visible.

        Raises:
            PeerTimeoutError, PeerLostError: ``rank`` did not take the one before. May be tried again.
        """
        mapping, channel, seconds = self._signals("put_signal", channel, timeout, group)
        rank = _check_rank(rank, mapping, "put_signal")
        self._block.signals(mapping).put_signal(rank, channel, seconds)

    def wait_signal(
        self, rank: int, channel: int = 0, timeout: float | None = None, *, group: GroupLike = None
    ) -> None:
        """Wait for the flag from ``rank`` and take it; what ``rank`` stored before it set the flag is visible.

        Raises:
            PeerTimeoutError, PeerLostError: It was not set. May be tried again.
        """
        mapping, channel, seconds = self._signals("wait_signal", channel, timeout, group)
        rank = _check_rank(rank, mapping, "wait_signal")
        self._block.signals(mapping).wait_signal(rank, channel, seconds)

    def synchronize(self, *, group: GroupLike = None) -> None:
        """Wait until the work on the current stream is done, and raise if a barrier or signal in it failed. Local.

        On CUDA a barrier or signal that fails stops the kernels of this process, so that nothing goes on with stale
        data: CUDA then reports a launch failure wherever it is next asked, which this turns into the error below.
        The process cannot use that GPU any more. On the CPU there is nothing to wait for.

        Raises:
            PeerTimeoutError, PeerLostError: A barrier or signal failed; names the rank, its peer and the channel.
        """
        signals = self._block.signals(self._mapping("synchronize", group))
        signals.check()
        if self.device.type == "cuda":
            try:
                torch.cuda.current_stream(self.device).synchronize()
            except RuntimeError as error:
                signals.check()
                raise_failure(error)
                raise
        signals.check()

    def _signals(
        self, operation: str, channel: int, timeout: float | None, group: GroupLike
    ) -> tuple[Mapping, int, float]:
        mapping = self._mapping(operation, group)
        checked = _index(channel, SIGNAL_CHANNELS)
        if checked is None:
            raise InvalidArgumentError(
                f"channel must be in range({SIGNAL_CHANNELS}), not {channel!r}",
                rank=mapping.group.rank,
                group=mapping.group.name,
                step=operation,
            )
        if timeout is None:
            return mapping, checked, mapping.group.settings.signal_timeout
        return mapping, checked, check_timeout(timeout)

    # One-sided copies.

    def put(self, source: torch.Tensor, rank: int, *, group: GroupLike = None) -> None:
        """Copy ``source`` into a rank's tensor; on CUDA, work on the current stream. The peer does nothing.

        Args:
            source: Of this tensor's shape and dtype, on its device.
            rank: Whose.
            group: See the class.

        Raises:
            InvalidArgumentError: Another shape, dtype or device. To copy a part, put through a handle of that part:
                ``SymmetricTensor.wrap(st.tensor[3:5])``.
        """
        mapping = self._mapping("put", group)
        rank = _check_rank(rank, mapping, "put")
        self._check_like(source, "put")
        if mapping.pointers[rank]:
            _copy(self.remote_tensor(rank, group=mapping.group), source)  # type: ignore[arg-type]
        else:
            dense = source.resolve_conj().resolve_neg().contiguous()
            mapping.put(rank, self._block.offset + self._layout.offset, self._flat(dense, mapping, "put"))

    def get(self, rank: int, out: torch.Tensor | None = None, *, group: GroupLike = None) -> torch.Tensor:
        """Copy a rank's tensor into ``out``, or into a new tensor; on CUDA, work on the current stream.

        Returns:
            ``out``, or the new tensor.

        Raises:
            InvalidArgumentError: ``out`` has another shape, dtype or device.
        """
        mapping = self._mapping("get", group)
        rank = _check_rank(rank, mapping, "get")
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device) if out is None else out
        self._check_like(out, "get")
        if mapping.pointers[rank]:
            _copy(out, self.remote_tensor(rank, group=mapping.group))  # type: ignore[arg-type]
            return out
        plain = out.is_contiguous() and not _is_lazy(out)
        dense = out if plain else torch.empty(self.shape, dtype=self.dtype, device=self.device)
        mapping.get(rank, self._block.offset + self._layout.offset, self._flat(dense, mapping, "get"))
        if dense is not out:
            _copy(out, dense)
        return out

    def _flat(self, tensor: torch.Tensor, mapping: Mapping, operation: str) -> torch.Tensor:
        """The bytes of a contiguous tensor, which go to or come from contiguous memory."""
        if not self.tensor.is_contiguous():
            mapping.unsupported(operation, "peers that are not load/store reachable need a contiguous tensor")
        # Of a dimension of one element, a contiguous tensor may have any stride.
        return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)

    def _check_like(self, other: torch.Tensor, operation: str) -> None:
        _check_tensor(other, operation)
        mine, theirs = ((t.shape, t.dtype, t.device) for t in (self.tensor, other))
        if mine != theirs:
            names = "shape {}, dtype {}, device {}"
            raise InvalidArgumentError(
                f"{operation} needs {names.format(*mine)}, not {names.format(*theirs)}", step=operation
            )

    # The end.

    def close(self) -> None:
        """End the use of this memory through handles. Local; may be called again.

        Tensors that were taken from it stay valid; the memory is freed once the last of them is gone. Peers that
        have mapped it keep it.
        """
        self._block.close()
        self._tensor = None

    def __enter__(self) -> SymmetricTensor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self, operation: str) -> None:
        if self._block.closed:
            raise ClosedError(
                f"this symmetric tensor of shape {tuple(self.shape)} was closed",
                hint="allocate a new one, or close it later",
                step=operation,
            )

    def _check_process(self, operation: str) -> None:
        if self._block.inherited:
            raise ForkedError(
                "this symmetric tensor was allocated before this process was forked; the child is no rank",
                hint="use its .tensor, which is shared with the parent, or allocate in the child with a new group",
                step=operation,
            )


allocate = SymmetricTensor.allocate


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a request leads.

    Attributes:
        backend: Which makes the memory.
        device: Where it lies.
        arena: The arena there, if there is a group and the backend's memory can be in one.
        moves: Whether the same request leads elsewhere once another CUDA device is the current one.
        cuda: Whether its memory is of a CUDA device; ``device.type`` takes a part of a microsecond.
    """

    backend: Backend
    device: torch.device
    arena: Arena | None
    moves: bool
    cuda: bool


def _place(group: Group | None, backend: str | Sequence[str] | None, device: torch.device | str | int | None) -> _Place:
    """Choose the backend and the device. What a group's earlier requests led to is remembered."""
    if group is None:
        return _choose(None, backend, device)
    try:
        known: _Place | None = group.places.get((backend, device))
    except TypeError:  # a list, which is not worth remembering, or what is no device at all
        return _choose(group, backend, device)
    if known is None or (known.moves and known.device.index != torch._C._cuda_getDevice()):
        known = group.places[backend, device] = _choose(group, backend, device)
    return known


def _choose(
    group: Group | None, backend: str | Sequence[str] | None, device: torch.device | str | int | None
) -> _Place:
    overrides = {} if backend is None else {"backend": backend}
    settings = load_settings(overrides, group=group.name if group else None)
    wanted = _device(device)
    chosen = select_backend(settings.backend, wanted.type if wanted else None)
    if wanted is None:
        wanted = torch.device(chosen.device_type)
    if wanted.type == "cpu":
        wanted = torch.device("cpu")  # "cpu:0" is the same memory
    moves = wanted.type == "cuda" and wanted.index is None
    if moves:
        wanted = torch.device("cuda", torch.cuda.current_device())
    arena = arena_for(group, chosen, wanted) if group and carves(chosen) else None
    return _Place(chosen, wanted, arena, moves, wanted.type == "cuda")


def _arena(place: _Place, group: Group | None) -> Arena:
    """The arena of a place, or why it has none."""
    if place.arena is not None:
        return place.arena
    if group is None:
        raise GroupError(
            "an arena belongs to a group, and there is none",
            hint="call torch.distributed.init_process_group(), or pass group=; or allocate with arena=False",
            step="allocate",
        )
    return arena_for(group, place.backend, place.device)


_Asked: TypeAlias = tuple[
    int | Iterable[int],
    torch.dtype | None,
    torch.device | str | int | None,
    Iterable[int] | None,
    str | Sequence[str] | None,
]
"""What a user asks for: sizes, dtype, device, strides, backend."""

_Request: TypeAlias = tuple[_Place, Layout, Callable[[Block], torch.Tensor]]
"""Where that leads, what is allocated, and what makes the tensor over its block."""


def _request(group: Group | None, asked: _Asked) -> _Request:
    """Check what a user asked for. What the usual request led to is remembered by the group."""
    sizes, dtype, _device, strides, _backend = asked
    if group is None or dtype is None or strides is not None:
        return _examine(group, asked)
    for size in sizes if isinstance(sizes, tuple) else (sizes,):
        if type(size) is not int:  # True would be taken for the 1 that is remembered
            return _examine(group, asked)
    try:
        known: _Request | None = group.places.get(asked)
    except TypeError:  # a list of backends, which is not worth remembering, or what is no device at all
        return _examine(group, asked)
    if known is None or (known[0].moves and known[0].device.index != torch._C._cuda_getDevice()):
        if len(group.places) >= _REMEMBERED:
            group.places.clear()
        known = group.places[asked] = _examine(group, asked)
    return known


def _examine(group: Group | None, asked: _Asked) -> _Request:
    sizes, dtype, device, strides, backend = asked
    layout = Layout.make(sizes, dtype, strides)
    place = _place(group, backend, device)
    return place, layout, _maker(layout, place.device)


class _Memory(ctypes.c_ubyte * sys.maxsize):  # type: ignore[misc]
    """Memory from an address on, of which a tensor takes as much as it has elements; it keeps the owner alive."""

    __slots__ = ("owner",)


_on_cuda: Any = getattr(torch._C, "_construct_CUDA_Tensor_From_Storage_And_Metadata", None)
"""Makes a tensor over a storage in half the time of ``new()`` and ``set_``; only in a torch that has CUDA."""


@functools.lru_cache(256)
def _maker(layout: Layout, device: torch.device) -> Callable[[Block], torch.Tensor]:
    """What makes the tensor of a layout over all of a block, which the tensor keeps alive."""
    nbytes, dtype, sizes, strides = layout.nbytes, layout.dtype, layout.sizes, layout.strides
    if device.type == "cpu" and layout.flat:

        def flat(block: Block) -> torch.Tensor:  # in half the time of what is below
            memory = _Memory.from_address(block.pointer)
            memory.owner = block
            return torch.frombuffer(memory, dtype=dtype, count=sizes[0])

        return flat
    if device.type == "cuda" and _on_cuda is not None:
        parts = {"dtype": dtype, "size": sizes, "stride": strides, "storage_offset": 0}
        return lambda block: _on_cuda(parts, storage_at(block.pointer, nbytes, device, block))
    new: Any = _empty(dtype, device).new
    return lambda block: new().set_(storage_at(block.pointer, nbytes, device, block), 0, sizes, strides)


@functools.lru_cache(256)
def _empty(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of no elements, of which ``new()`` makes others in half the time that torch.empty takes."""
    return torch.empty(0, dtype=dtype, device=device)


def _tensor(block: Block, layout: Layout) -> torch.Tensor:
    """The tensor of a layout over a block's memory, which keeps the block alive."""
    if layout.offset or layout.nbytes != block.nbytes:
        return layout.view(block.tensor())
    return _maker(layout, block.allocation.device)(block)


def find(tensor: torch.Tensor) -> SymmetricTensor | None:
    """The handle of the allocation that a plain tensor or view lies in, or None. Local, O(log n).

    The handle has the shape and dtype of the allocation; :meth:`SymmetricTensor.wrap` gives one for the view.
    Neither knows a tensor by the addresses of a mapping: those out of :meth:`SymmetricTensor.contiguous_view`, and
    out of :meth:`SymmetricTensor.remote_tensor` of another rank, are not found.

    Raises:
        InvalidArgumentError: What was given is not a tensor.
    """
    _check_tensor(tensor, "find")
    address = _address(tensor)
    block = None if address is None else block_at(address)
    return None if block is None or block.closed else SymmetricTensor(block, block.layout)


def _address(tensor: torch.Tensor) -> int | None:
    """Address of the first element; None for a tensor that has none: sparse, meta, fake, a functional wrapper."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as bits: torch cannot copy all dtypes, and a copy must not touch their values."""
    return tensor.view(_RAW[tensor.dtype.itemsize])


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether its elements are the conjugates, or the negatives, of what lies in memory."""
    return tensor.is_conj() or tensor.is_neg()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    try:
        if _is_lazy(target):
            target.copy_(source)
        else:
            _raw(target).copy_(_raw(source.resolve_conj().resolve_neg()))
    except RuntimeError as error:
        raise_failure(error)
        raise


def _check_tensor(value: object, operation: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise InvalidArgumentError(f"{operation} needs a torch.Tensor, not a {type(value).__name__}", step=operation)


def _device(device: torch.device | str | int | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"{device!r} is not a device: {error}") from error


def _index(value: Any, size: int) -> int | None:
    """The value as an int, if it is of an integer type and in range(size)."""
    try:
        index = integer(value)
    except TypeError:
        return None
    return index if 0 <= index < size else None


def _check_rank(rank: Any, mapping: Mapping, operation: str) -> int:
    checked = _index(rank, mapping.group.size)
    if checked is not None:
        return checked
    raise RankError(
        f"rank {rank!r} is not in range({mapping.group.size})",
        hint="ranks are those of the group that rendezvoused, not global ranks",
        rank=mapping.group.rank,
        group=mapping.group.name,
        step=operation,
    )
