"""The handle of symmetric memory: :class:`SymmetricTensor`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from symmem.arena.arena import compare_arenas
from symmem.backends.base import SIGNAL_CHANNELS, tensor_at
from symmem.backends.kernel_status import named, raise_failure
from symmem.backends.neutral import is_in_mode, neutral, neutral_mode
from symmem.backends.untraced import untraced, untraced_methods
from symmem.errors import GroupError, InvalidArgumentError, NotSymmetricError, PeerTimeoutError
from symmem.group.call_site import caller
from symmem.group.group import check_timeout
from symmem.group.ledger import explained
from symmem.group.resolve import GroupLike, default_group, resolve_group
from symmem.memory import cuda_graphs
from symmem.memory.block import Block
from symmem.memory.registry import block_at, register
from symmem.tensor.arguments import check_channel, check_flag, check_like, check_name, check_rank, check_tensor
from symmem.tensor.block_handle import BlockHandle
from symmem.tensor.copies import copy_elements, get_bytes, put_bytes
from symmem.tensor.lookup import address_of, check_open, check_process, locate, mapping_of
from symmem.tensor.request import arena_of, check_not_fake, resolve_request, tensor_over

if TYPE_CHECKING:
    from symmem.backends.base import Mapping
    from symmem.memory.layout import Layout
    from symmem.tensor.device_view import DeviceView

__all__ = ["SymmetricTensor", "allocate", "find"]


@untraced_methods
class SymmetricTensor(BlockHandle):
    """A tensor that every rank of a group has, at the same offset of memory that the other ranks can reach.

    This is a handle; :attr:`tensor` is a plain tensor. Make a handle with :meth:`allocate`, let the ranks call
    :meth:`rendezvous`, then use peers' memory. The memory lives as long as a handle or any tensor over it does, on
    this rank or a peer. :meth:`close` ends its use through handles at once.

    If ``group`` is None, methods use the group of the first :meth:`rendezvous`; without a rendezvous, they use the
    arena's group. Ranks are numbered within that group.
    """

    def __init__(self, block: Block, layout: Layout, tensor: torch.Tensor | None = None) -> None:
        """Use :meth:`allocate`, :meth:`wrap` or :func:`find`."""
        self._block = block
        self._layout = layout
        self._address = block.pointer + layout.offset
        self._tensor = tensor  # made when first used: that takes as long as a barrier of one rank

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
        """Allocate memory. All ranks of the group must make the same allocations in the same order.

        With a group (given, or the default process group) the memory comes from the group's arena. It is already
        rendezvoused and not zeroed. Nothing is communicated, unless the arena must grow; growth is collective over the
        group. Outside an arena the memory is zeroed, and the ranks then must call :meth:`rendezvous`. That allocation
        is local, unless the backend has ``COLLECTIVE_ALLOCATION``.

        The arena keeps an unused block until all ranks have dropped theirs; see :func:`symmem.collect`. If a CUDA
        graph's capture allocates a tensor or uses its handle, the memory stays as long as the graph lives.

        Args:
            sizes: Shape: an integer, or integers; ``()`` for no dimensions; a size may be 0.
            dtype: Any but the quantized ones; default ``torch.get_default_dtype()``.
            device: Default: the backend's; with ``auto``, the current CUDA device if there is one, else CPU.
            strides: In elements; default contiguous. Gaps are allowed; elements must not share memory.
            group: The group whose arena and settings apply. If given, an error here is also raised on the other ranks,
                by the group's next collective, so they need not wait for the timeout.
            backend: A name, or names in order of preference; default: the configuration's.
            arena: False for memory outside the arena; True for the arena, or an error; None for the arena if there is
                a group and the backend can have one.
            name: For :func:`symmem.memory_snapshot`; must be the same on all ranks. If they allocate the tensor on
                different lines, they must name it.

        Raises:
            InvalidArgumentError: Sizes, strides, dtype, device, arena or name.
            DivergenceError: Ranks made different allocations in the arena; names the first, and each rank's call site.
                On one host, a difference is logged at once. All ranks raise it where they use peers' memory next; here,
                if the arena must grow or the backend has ``COLLECTIVE_ALLOCATION``. Several hosts raise it when the
                ranks communicate, or here with ``allocation_check(each)``.
            UnsupportedError: The arena would have to grow during the capture of a CUDA graph; or a FakeTensorMode is
                active.
            ConfigError: Unknown backend, or an error in the environment or the cluster file.
            BackendUnavailableError: No requested backend works here; says why for each.
            OutOfMemoryError, ResourceLimitError: A limit was reached; nothing is left behind.
        """
        if is_in_mode():
            return _allocate_in_mode(sizes, dtype, device, strides, group, backend, arena, name)
        resolved = default_group() if group is None else resolve_group(group)
        try:
            source, layout, make_tensor = resolve_request(resolved, (sizes, dtype, device, strides, backend))
            if name is not None:
                check_name(name, "name", "allocate")
            if source.arena is not None if arena is None else check_flag(arena, "arena", "allocate"):
                block: Block = (source.arena or arena_of(source, resolved)).sub_allocate(layout, name, sys._getframe(1))
                if source.is_cuda and cuda_graphs.is_capturing_cuda():
                    cuda_graphs.keep(block)
            else:
                allocation = source.backend.allocate(layout.nbytes, source.device, resolved)
                block = Block(allocation, layout, site=caller(sys._getframe(1)), name=name)
                register(block)
        except Exception as error:
            # All ranks already know an error from a collective: arena growth, or a backend's collective allocation.
            if resolved is not None and group is not None and getattr(error, "propagated_to", None) is None:
                resolved.fail("allocate", error)
            raise
        return cls(block, layout, make_tensor(block))

    @classmethod
    def wrap(cls, tensor: torch.Tensor, *, backend: str | None = None) -> SymmetricTensor:
        """Return the handle for a tensor or view in symmetric memory. Local.

        It shares the memory and the rendezvous with the original handle. Peers are reached at the same offset;
        :meth:`rendezvous` on the new handle checks that all ranks use this offset.

        Args:
            tensor: A plain tensor.
            backend: The backend that the memory must come from; None for any.

        Raises:
            NotSymmetricError: It is not; names the check that failed: ``type``, ``layout``, ``address``, ``extent``,
                ``strides`` or ``backend``.
            ClosedError: Its handle was closed.
        """
        block, layout = locate(tensor, backend)
        check_open(block, "wrap")
        return cls(block, layout, tensor_over(block, layout))

    # Properties.

    @property
    def tensor(self) -> torch.Tensor:
        """This rank's tensor: plain, of :attr:`shape` and :attr:`dtype`; the same object each time."""
        if self._block.closed:
            check_open(self._block, "tensor")
        tensor = self._tensor
        if tensor is None:
            tensor = self._tensor = tensor_over(self._block, self._layout)
        if tensor.data_ptr() != self._address and tensor.numel():
            raise NotSymmetricError(
                "this handle's tensor was given other memory (by share_memory_(), sending it to another process, "
                "set_(), resize_() or an assignment to .data); peers do not see that memory",
                hint="send or resize a clone(); SymmetricTensor.wrap() a view of the memory for another shape",
                step="tensor",
            )
        return tensor

    # Rendezvous.

    def rendezvous(self, group: GroupLike = None, timeout: float | None = None) -> SymmetricTensor:
        """Let the ranks of a group reach each other's memory. Collective over the group, the first time.

        Later calls with the same group return at once, and so does the first call for a tensor of that group's arena.
        All ranks fail alike, and may try again after a failure. A second group may rendezvous the same tensor; it then
        has separate signals.

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
            UnsupportedError: The backend supports only one group per tensor.
            SymmemError: Any other error on any rank; all ranks raise it.
        """
        block = self._block
        if group is None and timeout is None and self._layout is block.layout and not block.inherited:
            known = default_group()  # the usual case: a tensor of the default group's arena
            if known in block.compared:  # close() empties `compared`
                if block.first is None:
                    block.first = known
                return self
        try:
            check_open(block, "rendezvous")
            resolved = resolve_group(group)
            if timeout is not None:
                check_timeout(timeout)
            check_process(block, "rendezvous")
            if block.key(resolved, self._layout) not in block.compared:
                from symmem.tensor.rendezvous import rendezvous

                rendezvous(block, self._layout, resolved, timeout)
        except BaseException as error:
            with contextlib.suppress(GroupError):  # there is no such group to tell
                resolve_group(group).fail("rendezvous", error)  # unless all ranks have it already
            raise
        if block.first is None:
            block.first = resolved
        return self

    def _mapping(self, operation: str, group: GroupLike) -> Mapping:
        return mapping_of(self._block, operation, group)

    # Peers' memory.

    def remote_tensor(self, rank: int, *, group: GroupLike = None) -> torch.Tensor:
        """Return a rank's tensor as a plain tensor of the same shape, strides and dtype. Local.

        On one host, it waits a second at most if the rank has not allocated the tensor yet, and not again for a rank
        that stands still.

        The tensor and its views keep the memory mapped. Loads and stores go to the peer's memory directly; order them
        with :meth:`barrier` or signals.

        Raises:
            RankError: Not ``0 <= rank < world_size``.
            UnsupportedError: The rank's memory is not load/store reachable from here; use :meth:`put`/:meth:`get`.
        """
        mapping = self._mapping("remote_tensor", group)
        return self._remote(mapping, check_rank(rank, mapping, "remote_tensor"))

    @neutral
    def _remote(self, mapping: Mapping, rank: int) -> torch.Tensor:
        if rank == mapping.group.rank:
            return self.tensor
        self._block.before_access(mapping.group, rank)
        return self._layout.view(self._block.part(mapping.tensor(rank, self._block.end, self._block)))

    @property
    def _offset(self) -> int:
        """Bytes from the beginning of the allocation to the first element."""
        return self._block.offset + self._layout.offset

    @property
    def remote_pointers(self) -> torch.Tensor:
        """Address of every rank's first element as seen from this rank: int64 tensor of shape [world] on the device.

        For the group of the first rendezvous; 0 if a rank's memory is not load/store reachable. Waits like
        :meth:`remote_tensor`.
        """
        return self.pointers_of(None)

    @neutral
    def pointers_of(self, group: GroupLike) -> torch.Tensor:
        """:attr:`remote_pointers` for a given group."""
        mapping = self._mapping("remote_pointers", group)
        self._block.before_access(mapping.group)
        pointers = self._pointers(mapping)
        with named:
            return torch.tensor(pointers, dtype=torch.int64, device=self.device)

    def _pointers(self, mapping: Mapping) -> list[int]:
        offset = self._offset
        return [pointer + offset if pointer else 0 for pointer in mapping.pointers]

    def device_view(
        self, signals: SymmetricTensor | None = None, timeout: float | None = None, *, group: GroupLike = None
    ) -> DeviceView:
        """Return what kernels need to reach peers with :mod:`symmem.triton` or symmem.cuh. Local.

        Waits for the other ranks like :meth:`remote_tensor`.

        A capture of a CUDA graph may include kernels that use a view, but cannot make one.

        Args:
            signals: Memory for the kernels' barriers and signals. Default: this tensor's signal pads, with 64 channels
                that :meth:`put_signal` and :meth:`wait_signal` use too. Must be int32 [channels, world], rendezvoused
                by the group, and filled with zeros on all ranks before the first use.
            timeout: Seconds that a wait in a kernel may take; default the setting ``signal_timeout``.
            group: See the class.

        Raises:
            UnsupportedError: Some rank's memory is not load/store reachable from here.
            InvalidArgumentError: ``signals`` have another shape or dtype.
        """
        from symmem.tensor.device_view import CustomSignals, DeviceView

        mapping = self._mapping("device_view", group)
        self._block.before_access(mapping.group)
        custom = None
        if signals is not None:
            if not isinstance(signals, SymmetricTensor):
                raise InvalidArgumentError(
                    f"signals must be a SymmetricTensor, not a {type(signals).__name__}",
                    hint="leave it out to use this tensor's own signal pads",
                    step="device_view",
                )
            own = signals._mapping("device_view", mapping.group)  # type: ignore[arg-type]
            custom = CustomSignals(own, signals._pointers(own), signals.tensor)
        return DeviceView(mapping, self._pointers(mapping), self.nbytes, self._block, custom, timeout)

    @neutral
    def contiguous_view(self, *, group: GroupLike = None) -> torch.Tensor:
        """Return all ranks' tensors as one, of shape [world, *shape]; ``[r]`` is rank r's memory. Local.

        With ``host`` and ``native``, the view is contiguous if the bytes of a tensor outside of an arena are a multiple
        of the granularity (host: 4096). Otherwise its first stride skips what is between the tensors. The first call
        may map the memory of the ranks a second time.

        Raises:
            UnsupportedError: The backend cannot map all ranks' memory side by side.
            BackendUnavailableError: It is memory of torch or NVSHMEM, and ``cuda-python`` is not installed.
        """
        mapping = self._mapping("contiguous_view", group)
        self._block.before_access(mapping.group)
        address, stride = mapping.contiguous()
        world = mapping.group.size
        memory = tensor_at(address, world * stride, self.device, (self._block, mapping))
        return self._layout.view_all(memory[self._block.offset :], world, stride)

    @property
    def multicast_ptr(self) -> int:
        """The multicast address, which stores to all ranks at once or reduces over them. Never 0.

        For the group of the first rendezvous. The first use sets it up, and is collective.

        Raises:
            MulticastUnavailableError: There is none; says why.
        """
        return self._mapping("multicast_ptr", None).multicast() + self._offset

    @neutral
    def signal_pad(self, rank: int, *, group: GroupLike = None) -> torch.Tensor:
        """Return a rank's signal pad: uint32 tensor of shape [channels, world]; source rank s sets element [c, s]."""
        mapping = self._mapping("signal_pad", group)
        rank = check_rank(rank, mapping, "signal_pad")
        self._block.before_access(mapping.group, rank)
        words = SIGNAL_CHANNELS * mapping.group.size
        address, _nbytes = self._block.signals(mapping).signal_pad(rank)
        pad = tensor_at(address, 4 * words, self.device, (self._block, mapping))
        return pad.view(torch.uint32).view(SIGNAL_CHANNELS, mapping.group.size)

    # Signals. On CUDA they are work on the current stream; on the CPU they are complete when the call returns.

    def _wait(self, mapping: Mapping, wait: Callable[..., None], *arguments: object) -> None:
        """Wait for peers. If that times out because the ranks do different things, raise DivergenceError."""
        try:
            wait(*arguments)
        except PeerTimeoutError as error:
            is_barrier = str(error.step).startswith("barrier")
            self._block.check_acts(error.peers if is_barrier else (), mapping.group)
            compare_arenas(mapping.group)
            raise explained(mapping.group, error, error.step, is_barrier) from None

    def barrier(self, channel: int = 0, timeout: float | None = None, *, group: GroupLike = None) -> None:
        """Wait for all ranks. Afterwards all earlier stores of all ranks, to any rank's memory, are visible to all.

        Args:
            channel: ``0 <= channel < 64``; barriers of different channels are independent.
            timeout: Seconds; default the setting ``signal_timeout``.
            group: See the class.

        Raises:
            PeerTimeoutError: Names the rank that did not come. On the CPU it raises as well, when it comes. The next
                barrier of the others on this channel waits for that, and then raises too: it may have skipped a call.
            PeerLostError: Names the rank that died.
            RendezvousError: Names the rank that was interrupted in it (on the CPU) by an exception from a signal
                handler, such as KeyboardInterrupt. That rank raises the exception itself. The next barrier works.
        """
        mapping, channel, seconds = self._signals("barrier", channel, timeout, group)
        self._wait(mapping, self._block.signals(mapping).barrier, channel, seconds)

    def put_signal(self, rank: int, channel: int = 0, timeout: float | None = None, *, group: GroupLike = None) -> None:
        """Set this rank's flag at ``rank``, after ``rank`` took the previous one. It makes earlier stores visible.

        Raises:
            PeerTimeoutError, PeerLostError: ``rank`` did not take the previous flag. May be tried again.
        """
        mapping, channel, seconds = self._signals("put_signal", channel, timeout, group)
        rank = check_rank(rank, mapping, "put_signal")
        self._block.before_access(mapping.group, rank)
        self._wait(mapping, self._block.signals(mapping).put_signal, rank, channel, seconds)

    def wait_signal(
        self, rank: int, channel: int = 0, timeout: float | None = None, *, group: GroupLike = None
    ) -> None:
        """Wait for the flag from ``rank`` and take it; stores that ``rank`` made before it set the flag are visible.

        Raises:
            PeerTimeoutError, PeerLostError: ``rank`` did not set its flag. May be tried again.
        """
        mapping, channel, seconds = self._signals("wait_signal", channel, timeout, group)
        rank = check_rank(rank, mapping, "wait_signal")
        self._wait(mapping, self._block.signals(mapping).wait_signal, rank, channel, seconds)

    def synchronize(self, *, group: GroupLike = None) -> None:
        """Wait until the work on the current stream is done, and raise if a barrier or signal in it failed. Local.

        A barrier or signal that times out on CUDA stops the kernels of this process, so that no kernel continues with
        stale data. CUDA then reports a launch failure from any later call; this method raises the actual error.
        The process cannot use that GPU any more. If a rank's process ended, kernels give up instead, and the process
        can go on without the rank. On the CPU there is nothing to wait for.

        Also raises, once, the error of operators on CUDA that gave up: see :mod:`symmem.ops.collectives`.

        Raises:
            PeerTimeoutError, PeerLostError: A barrier or signal failed; names the rank, its peer and the channel.
            SymmemError: A rank came too late to an operator of the group, or refused it.
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
        checked = check_channel(channel, mapping.group, operation)
        if timeout is None:
            return mapping, checked, mapping.group.settings.signal_timeout
        return mapping, checked, check_timeout(timeout)

    # One-sided copies.

    def put(self, source: torch.Tensor, rank: int, *, group: GroupLike = None) -> None:
        """Copy ``source`` into a rank's tensor; on CUDA, work on the current stream. The peer makes no call.

        Args:
            source: A tensor of this tensor's shape and dtype, on its device.
            rank: The target rank.
            group: See the class.

        Raises:
            InvalidArgumentError: Another shape, dtype or device; or source and target are overlapping parts of this
                rank's memory. To copy a part, put through a handle of that part:
                ``SymmetricTensor.wrap(st.tensor[3:5])``.
        """
        mapping = self._mapping("put", group)
        rank = check_rank(rank, mapping, "put")
        check_like(source, self.tensor, "put")
        if mapping.pointers[rank]:
            copy_elements(self._remote(mapping, rank), source, mapping)
        else:
            put_bytes(mapping, rank, self._offset, self.tensor, source)

    def get(self, rank: int, out: torch.Tensor | None = None, *, group: GroupLike = None) -> torch.Tensor:
        """Copy a rank's tensor into ``out``, or into a new tensor; on CUDA, work on the current stream.

        Returns:
            ``out``, or the new tensor.

        Raises:
            InvalidArgumentError: ``out`` has another shape, dtype or device, overlaps with the memory that is read, or
                has elements that share memory.
        """
        mapping = self._mapping("get", group)
        rank = check_rank(rank, mapping, "get")
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device) if out is None else out
        check_like(out, self.tensor, "get")
        if mapping.pointers[rank]:
            copy_elements(out, self._remote(mapping, rank), mapping)
        else:
            get_bytes(mapping, rank, self._offset, self.tensor, out)
        return out

    # Closing.

    def close(self) -> None:
        """End the use of this memory through handles. Local; may be called again.

        Tensors that were taken from it stay valid. The memory is freed when the last of them is gone. Peers that
        have mapped the memory keep it.
        """
        self._block.close()
        self._tensor = None

    def __enter__(self) -> SymmetricTensor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


allocate = SymmetricTensor.allocate


def _allocate_in_mode(*arguments: Any) -> SymmetricTensor:
    """Allocate with no regard to this thread's modes, because the memory outlives them."""
    check_not_fake()
    sizes, dtype, device, strides, group, backend, arena, name = arguments
    with neutral_mode():
        return SymmetricTensor.allocate(
            sizes, dtype, device, strides=strides, group=group, backend=backend, arena=arena, name=name
        )


@untraced
def find(tensor: torch.Tensor) -> SymmetricTensor | None:
    """Return the handle of the allocation that contains a plain tensor or view, or None. Local, O(log n).

    The handle has the shape and dtype of the allocation; :meth:`SymmetricTensor.wrap` returns a handle for the view.
    Both find memory by this rank's own address. They do not find tensors from
    :meth:`SymmetricTensor.contiguous_view`, or from :meth:`SymmetricTensor.remote_tensor` of another rank.

    Raises:
        InvalidArgumentError: The argument is not a tensor.
    """
    check_tensor(tensor, "find")
    address = address_of(tensor)
    block = None if address is None else block_at(address)
    return None if block is None or block.closed else SymmetricTensor(block, block.layout)
