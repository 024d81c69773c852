"""The runtime of a compiled graph: its persistent symmetric buffers, and copies of its inputs.

A compiled graph has a :class:`Graph`, which keeps buffers from call to call. An address changes only if a shape
changes, and a warm call allocates nothing. The compiled function owns its graph. The generated module, which torch
never unloads, holds only a record per buffer and argument.

The content of the buffers is not kept between calls. A call must be complete on its stream before the next call of
the same graph begins. Threads take turns, and an operator cannot call the function that calls it. Do not run a
compiled function that communicates on two streams at once.
"""

from __future__ import annotations

import ast
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from symmem.compile.records import ArgumentRecord, BufferRecord, Usage
from symmem.compile.run.inputs import Input, PersistentBuffer, block_of, dead_reference
from symmem.errors import NotSymmetricError
from symmem.group.group import Group
from symmem.group.resolve import group_named, is_current
from symmem.group.sync_points import SyncPoints
from symmem.memory import block as block_module
from symmem.memory import cuda_graphs
from symmem.memory.block import Block
from symmem.memory.registry import block_at
from symmem.ops.registry.eager_checks import asked_locally, is_torchs
from symmem.redirect.context import use_symmetric_memory
from symmem.tensor.tensor import SymmetricTensor, find

__all__ = ["Graph"]


def _allocate(record: BufferRecord, sizes: Sequence[int], strides: Sequence[int], name: str) -> torch.Tensor:
    """Allocate a tensor for a buffer. Collective if an arena grows."""
    handle = SymmetricTensor.allocate(
        sizes,
        record.dtype,
        record.device,
        strides=strides,
        group=group_named(record.groups[0]),
        backend=record.backend,
        arena=None if record.backend is None else False,
        name=name,
    )
    for group in record.groups:
        handle.rendezvous(group_named(group))
    return handle.tensor


class _Room(NamedTuple):
    """The memory of a buffer, as all ranks have agreed on it.

    Attributes:
        sizes: This rank's sizes when they agreed. They may differ by rank, for example the numbers of tokens.
        strides: This rank's strides, in elements.
        capacity: Number of elements that fit into the memory; the same on all ranks.
        alike: Whether all ranks have the same sizes and strides, and need the whole memory.
        is_returned: Whether the graph of any rank returns the buffer, so that all ranks allocate it at every call.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    capacity: int
    alike: bool
    is_returned: bool

    def allocate(self, record: BufferRecord) -> torch.Tensor:
        """Allocate the memory; returns a tensor with this rank's shape. Collective if an arena grows."""
        name = "compiled result" if self.is_returned else f"compiled {record.number}"
        if self.alike:
            return _allocate(record, self.sizes, self.strides, name)
        return _allocate(record, (self.capacity,), (1,), name).as_strided(self.sizes, self.strides)


def _agree_on_room(
    meet: Callable[[Group, str, str], None],
    record: BufferRecord,
    sizes: Sequence[int],
    strides: Sequence[int],
    needed: int,
    spare: int,
    is_returned: bool,
) -> _Room:
    """Agree on memory in which the largest shape of any rank fits. Collective.

    Args:
        meet: See :meth:`Graph._meet`.
        record: The buffer.
        sizes: This rank's sizes.
        strides: This rank's strides, in elements.
        needed: Number of elements that this rank needs.
        spare: Number of elements to allocate if no rank needs more; the same on all ranks.
        is_returned: Whether this rank's graph returns the buffer.
    """
    group, shape = group_named(record.groups[0]), (tuple(sizes), tuple(strides))
    answers = [(max(needed, spare), is_returned, shape)]
    if group.size > 1:
        step = f"the allocation of memory for {record.op or f'compiled {record.number}'}"
        meet(group, step, f"this rank needs {needed} elements")
        with group.collective(step) as collective:
            received = collective.exchange("size", repr(answers[0]).encode())
            answers = [ast.literal_eval(answer.payload.decode()) for answer in received]
    capacity = max(answer[0] for answer in answers)
    alike = capacity == needed and len({answer[2] for answer in answers}) == 1
    return _Room(*shape, capacity, alike, any(answer[1] for answer in answers))


class Graph:
    """The persistent memory of one compiled graph."""

    def __init__(self) -> None:
        self._buffers: dict[int, PersistentBuffer] = {}
        self._returned: dict[int, _Room] = {}
        self._inputs: dict[int, Input] = {}
        self._finished: dict[int, tuple[int, weakref.ref[Block]]] = {}
        self._kept: list[torch.Tensor] = []  # outgrown memory that CUDA graphs may still use
        self._in_torchs_memory: dict[int, int] = {}  # address by number of the argument
        self._not_in_torchs_memory: set[int] = set()
        self.usage: dict[int, Usage] = {}  # by number of the argument; reports show it
        self._calls = 0  # the same on all ranks
        self._compares = False  # whether the ranks compare the arguments again that they copy
        # The groups of this memory, their marks and synchronisation points: see `symmem.group.sync_points`.
        self._groups: list[tuple[Group, Sequence[int], SyncPoints | None]] = []
        self._begins = False  # whether this is the beginning of a call
        self._process_groups: list[weakref.ref[Any]] = []  # theirs; they drop the memory when they are collected

    def begin(self) -> None:
        """Begin a call: drop all buffers if a group was closed or its name refers to a new group.

        At calls 2, 4, 8 and so on, the ranks compare the arguments that they have copied so far, and use those in place
        that have become the same symmetric memory on all ranks.

        Raises:
            GroupError: There is no group of that name any more.
            DivergenceError: Another rank must compare or allocate in an earlier call. On all ranks.
        """
        for group, mark, points in self._groups:
            if mark[0] and points is not None:
                self._look(points)
            if not is_current(group):
                self._drop_all()
                break
        self._calls += 1
        self._compares = self._calls & (self._calls - 1) == 0

    def _look(self, points: SyncPoints) -> None:
        self._begins = True
        try:
            points.look()
        finally:
            self._begins = False

    def has_passed(self, call: int, waits: bool) -> bool:
        """See :meth:`symmem.group.sync_points.Stateful.has_passed`."""
        return self._calls >= call

    def forget(self) -> None:
        """Begin anew after an error. So ranks that knew different addresses or sizes agree in the next call."""
        for _group, _mark, points in list(self._groups):
            if points is not None:
                points.absorb()
        self._drop_all()
        self._calls = 0

    def _meet(self, group: Group, step: str, why: str) -> None:
        """Wait until all ranks have come to a collective step of this graph. Without shared memory, do nothing.

        Raises:
            DivergenceError: A rank went on without. On all ranks, and the next call is like the first one.
        """
        if (points := group.sync_points) is not None:
            points.meet(self, self._calls, step, why, group.settings.rendezvous_timeout)

    def _drop_all(self) -> None:
        """Drop all buffers, except for memory that CUDA graphs may still use, and forget the groups."""
        self._kept += [buffer.tensor for buffer in self._buffers.values() if buffer.keep]
        for known in (self._buffers, self._returned, self._inputs, self._finished, self._groups, self._process_groups):
            known.clear()

    def _enter(self, name: str) -> Group:
        """The group of a name. :meth:`begin` checks it from now on."""
        group = group_named(name)
        points = group.sync_points  # None before the first collective operation of the group
        entry = group, _UNMARKED if points is None else points.mark, points
        known = next((index for index, (each, *_) in enumerate(self._groups) if each is group), None)
        if known is not None:
            self._groups[known] = entry
        else:
            self._groups.append(entry)
            if (process_group := group.process_group) is not None:
                drop_all = weakref.WeakMethod(self._drop_all)
                self._process_groups.append(weakref.ref(process_group, lambda _: (drop_all() or dead_reference)()))
        return group

    def buffer(self, record: BufferRecord, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """The tensor of a buffer. It is the same tensor while the shape stays. Collective if it is made or grows.

        The sizes may differ by rank. The buffer has room for the largest ones, so all ranks allocate the same.

        Args:
            record: The buffer.
            sizes: Its sizes.
            strides: Its strides, in elements.
        """
        known = self._buffers.get(record.number)
        if known is not None and known.sizes == sizes and known.strides == strides:
            return known.tensor
        if record.number in self._returned:  # by the graph of another rank
            return self.fresh(record, sizes, strides)
        return self._make(record, sizes, strides).tensor

    def _make(
        self, record: BufferRecord, sizes: Sequence[int], strides: Sequence[int], is_returned: bool = False
    ) -> PersistentBuffer:
        reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        needed = 0 if 0 in sizes else 1 + reach
        # Calls in and outside of inference mode share the tensor. Outside, nothing can write to an inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            known = self._buffers.get(record.number)
            if known is not None and needed <= known.capacity:
                tensor, capacity = known.tensor.as_strided(sizes, strides), known.capacity
            else:
                if known is not None and record.keep:
                    self._kept.append(known.tensor)
                # Dynamic sizes grow often, so that more than needed saves growth, which is collective.
                spare = 0 if known is None else known.capacity + known.capacity // 2

                def allocate() -> tuple[torch.Tensor, _Room]:
                    room = _agree_on_room(self._meet, record, sizes, strides, needed, spare, is_returned)
                    return room.allocate(record), room

                tensor, room = cuda_graphs.apart(
                    torch.device(record.device), "memory of compiled code cannot be allocated", allocate
                )
                capacity = room.capacity
                if room.is_returned:
                    self._returned[record.number] = room
        for name in record.groups:
            self._enter(name)
        made = PersistentBuffer(tuple(sizes), tuple(strides), tensor, capacity, record.keep)
        if record.number not in self._returned:
            self._buffers[record.number] = made
        return made

    def fresh(self, record: BufferRecord, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """Allocate a tensor that the graph returns. Collective at the first call, if a size changes or an arena grows.

        The arguments are as for :meth:`buffer`. The sizes may differ by rank too.
        """
        room = self._returned.get(record.number)
        if room is not None and room.sizes == sizes and room.strides == strides:
            return room.allocate(record)
        return self._make(record, sizes, strides, is_returned=True).tensor

    def within(self, group: str, op: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap an operator so that it runs within :func:`symmem.use_symmetric_memory` of a group."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with use_symmetric_memory(group_named(group)):
                return op(*args, **kwargs)

        return call

    def place(
        self, record: ArgumentRecord, x: torch.Tensor, sizes: Sequence[int], strides: Sequence[int]
    ) -> torch.Tensor:
        """Return an argument in symmetric memory: the argument itself if it is symmetric on all ranks, else a copy.

        Collective over the group at the first call, and when the address of a symmetric argument is new.

        Args:
            record: The argument.
            x: Its value, a dense tensor.
            sizes: Its sizes, which compiled code knows.
            strides: Its strides, in elements.

        Raises:
            NotSymmetricError: The argument is plain memory, and its operator does not work on a copy.
            DivergenceError: The address changed on some ranks only, or ranks use different ones of several tensors that
                take turns. On all ranks, and the next call works.
            PeerTimeoutError: The same if the ranks are on several hosts; names a rank that did not come.
        """
        known = self._inputs.get(record.number)
        if known is not None:
            copy = known.copy
            if copy is None:
                if x.data_ptr() == known.address and known.block() is not None:
                    known.usage.in_place += 1
                    return x
            elif copy.sizes == sizes and copy.strides == strides and not (self._compares and not known.always):
                known.usage.copied += 1
                known.usage.nbytes += x.nbytes
                return copy.tensor.copy_(x)
        placed = self._check(record, known, x, sizes, strides)
        usage = self._usage_of(record.number)
        if placed is x:
            usage.in_place += 1
        else:
            usage.copied += 1
            usage.nbytes += x.nbytes
        return placed

    def _usage_of(self, number: int) -> Usage:
        return self.usage.setdefault(number, Usage())

    def _check(
        self,
        record: ArgumentRecord,
        known: Input | None,
        x: torch.Tensor,
        sizes: Sequence[int],
        strides: Sequence[int],
    ) -> torch.Tensor:
        """Decide about an argument that differs from the last call; see :meth:`place`."""
        number, name, backend, policy, keep, op = record
        if known is not None and len(known.agreed) > 1 and self._takes_turns(record, known, x):
            return x
        # Torch's operators check by themselves that torch's memory is the same on all ranks.
        if backend is not None and self._is_torchs(number, x, name):
            return x
        # Another rank may have elements, and compare or copy, which is collective.
        if x.numel() == 0 and (backend is not None or policy not in ("agree", "copy")):
            return x
        if policy in ("agree", "copy"):
            if known is None:
                # An operator of torch needs torch's memory, which was checked above, so other memory is copied.
                known = self._inputs[number] = Input(
                    self._enter(name), policy == "copy" or backend is not None, self._usage_of(number)
                )
            again = self._compares and not known.always
            if again or not known.copying:
                group = group_named(name)
                why = "its address changed" if known.changes else "this rank compares it for the first time"
                why = "it was copied so far" if known.copying else why
                self._meet(group, f"the comparison of {op}", why)
                same = known.agree(x, group, op)
                self._enter(name)
                if same:
                    return x
        elif backend is None and block_of(x, group_named(name)) is not None:
            return x
        if policy == "strict":
            raise NotSymmetricError(
                f"{op} must be symmetric memory, but is a plain tensor of shape {tuple(x.shape)}, {x.dtype}, on "
                f"{x.device}; a one-sided operator does not work on a copy, because peers do not know its address",
                hint=f"allocate it with symmem.allocate({tuple(x.shape)}, {x.dtype}, {str(x.device)!r}).tensor",
                step=op,
            )
        copy = self._buffers.get(number)
        if copy is None or copy.sizes != sizes or copy.strides != strides:
            copy = self._make(BufferRecord(number, x.dtype, str(x.device), (name,), backend, keep, op), sizes, strides)
        if known is not None and backend is None:  # with a backend, the next argument may be in torch's memory
            known.copy = copy
        return copy.tensor.copy_(x)

    def _takes_turns(self, record: ArgumentRecord, known: Input, x: torch.Tensor) -> bool:
        """Whether an argument is at one of several addresses on which all ranks agreed.

        The ranks compare which one it is, without a message.
        """
        reference, number = known.agreed.get(x.data_ptr(), (dead_reference, 0))
        points = known.points
        if reference() is None or points is None or not points.acts_left:
            return False
        points.act(self, number << 12 & 0xFFFFF000 | record.number & 0xFFF, record.op)
        known.changes = 0
        return True

    def _is_torchs(self, number: int, x: torch.Tensor, group: str) -> bool:
        """Whether an argument is in torch's symmetric memory."""
        if number in self._not_in_torchs_memory or not is_torchs(x, lambda: group):
            if not asked_locally():  # asking again would warn again; a copy is correct too
                self._not_in_torchs_memory.add(number)
            return False
        self._in_torchs_memory[number] = x.data_ptr()
        return True

    def keeps(self, value: Any) -> bool:
        """Whether a value is a CUDA tensor in symmetric memory, so that it must keep its address."""
        if not isinstance(value, torch.Tensor) or not value.is_cuda:
            return False
        address = value.data_ptr()
        return block_at(address) is not None or address in self._in_torchs_memory.values()

    def finish(self, number: int, tensors: Sequence[torch.Tensor], group: str) -> None:
        """Wait on the stream until all ranks are done with the arguments of an operator, so that they can be reused.

        Args:
            number: Number of the call within the graph.
            tensors: Arguments of the operator.
            group: Name of its group.
        """
        known, reference = self._finished.get(number, _NONE)
        block = reference() if known == tensors[0].data_ptr() else None
        if block is None:
            first = next((tensor for tensor in tensors if tensor.numel() and find(tensor) is not None), None)
            if first is None:
                return
            block = block_at(first.data_ptr())
            assert block is not None
            if first is tensors[0]:
                self._finished[number] = first.data_ptr(), weakref.ref(block)
        resolved = group_named(group)
        mapping = block.mappings.get(resolved)
        capturing = tensors[0].is_cuda and cuda_graphs.is_capturing(tensors[0].device)
        if mapping is None or capturing or block.process != block_module.current_process:
            SymmetricTensor(block, block.layout).barrier(group=resolved)
        else:  # the same barrier in a third of the time
            block.signals(mapping).barrier(0, resolved.settings.signal_timeout)


_UNMARKED = (0,)
_NONE: tuple[int, Callable[[], Block | None]] = (-1, dead_reference)
