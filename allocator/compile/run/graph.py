"""What compiled code calls: its persistent buffers in symmetric memory, and its inputs that are copied there.

A compiled graph has a :class:`Graph` here, which keeps its buffers from one call to the next: an address never changes
while shapes do not, and nothing is allocated in a warm call. It lives as long as the compiled function, which holds it;
the generated module, which torch never lets go, has no more than a record of each buffer and argument.

A graph's buffers hold nothing between two calls. One call must be over, on its stream, before another of the same graph
begins: threads take turns, an operator cannot call the function that calls it, and compiled functions that communicate
are not to be run on two streams at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from symmem.compile.run.inputs import CHANGES, Input, Made, block_of, nothing
from symmem.errors import NotSymmetricError
from symmem.group.group import Group
from symmem.memory import block as block_module
from symmem.memory import cuda_graphs
from symmem.memory.block import Block
from symmem.memory.registry import block_at
from symmem.ops.engines.select import group_named
from symmem.ops.registry.eager_checks import asked_locally, is_torchs
from symmem.redirect.context import use_symmetric_memory
from symmem.tensor.tensor import SymmetricTensor, find

__all__ = ["CHANGES", "Argument", "Buffer", "Graph"]


class Buffer(NamedTuple):
    """What a graph knows of one of its buffers when it is compiled; the shape comes with each call.

    Attributes:
        number: Which buffer of the graph.
        dtype: Of its elements.
        device: Where.
        groups: Names of the groups whose ranks reach it; the first one's memory it is.
        backend: Memory of its own, of this backend; None for the group's arena.
        keep: Whether memory that it has outgrown stays, for a CUDA graph that was captured with it.
    """

    number: int
    dtype: torch.dtype
    device: str
    groups: tuple[str, ...]
    backend: str | None
    keep: bool

    def allocate(self, sizes: Sequence[int], strides: Sequence[int], name: str) -> torch.Tensor:
        """A new tensor for it. Collective if an arena grows."""
        handle = SymmetricTensor.allocate(
            sizes,
            self.dtype,
            self.device,
            strides=strides,
            group=group_named(self.groups[0]),
            backend=self.backend,
            arena=None if self.backend is None else False,
            name=name,
        )
        for group in self.groups:
            handle.rendezvous(group_named(group))
        return handle.tensor


class Argument(NamedTuple):
    """What a graph knows of an argument that it looks after at run time.

    Attributes:
        number: Which argument of the graph.
        group: Name of the operator's group.
        backend: Of a copy: see :class:`Buffer`.
        way: ``"agree"``: the ranks compare; ``"own"``: what lies in symmetric memory is taken as it is, for it comes
            from an allocation that all ranks make alike; ``"strict"``: as that, and plain memory is an error;
            ``"copy"``: it is copied, wherever it lies.
        keep: Of a copy: see :class:`Buffer`.
        op: The operator and the argument, for messages.
    """

    number: int
    group: str
    backend: str | None
    way: str
    keep: bool
    op: str


class _Known(NamedTuple):
    """A group that has met, and how to see quickly that its name still means it.

    Attributes:
        group: The group.
        process_group: Its process group, while it is there; none of a group made from a store.
        registered: Where torch keeps process groups until they are destroyed.
    """

    group: Group
    process_group: Callable[[], object]
    registered: Container[object]

    @classmethod
    def now(cls, group: Group) -> _Known:
        """What there is to see now."""
        found = group.process_group
        if found is None:
            return cls(group, nothing, ())
        return cls(group, weakref.ref(found), dist.distributed_c10d._world.pg_map)


class Graph:
    """The persistent memory of one compiled graph."""

    def __init__(self) -> None:
        self._buffers: dict[int, Made] = {}
        self._inputs: dict[int, Input] = {}
        self._finished: dict[int, tuple[int, weakref.ref[Block]]] = {}
        self._kept: list[torch.Tensor] = []
        self._torchs: dict[int, int] = {}  # addresses of arguments in torch's own memory
        self._not_torchs: set[int] = set()
        self._groups: list[_Known] = []  # that have met for any of these

    def begin(self) -> None:
        """Called before each call: what groups have met for goes, if one of them was made anew under its name.

        Raises:
            GroupError: There is no group of that name any more.
        """
        for group, process_group, registered in self._groups:
            if (group.closed or process_group() not in registered) and group_named(group.name) is not group:
                self._kept += [made.tensor for made in self._buffers.values() if made.keep]
                for known in (self._buffers, self._inputs, self._finished, self._groups):
                    known.clear()
                return

    def _enter(self, name: str) -> Group:
        """The group of a name, which :meth:`begin` looks after."""
        group = group_named(name)
        if all(known.group is not group for known in self._groups):
            self._groups.append(_Known.now(group))
        return group

    def buffer(self, buffer: Buffer, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """The tensor of a buffer, the same one at each call while its shape stays. Collective when it is made or grows.

        Args:
            buffer: Which.
            sizes: Its shape.
            strides: In elements.
        """
        known = self._buffers.get(buffer.number)
        if known is not None and known.sizes == sizes and known.strides == strides:
            return known.tensor
        return self._make(buffer, sizes, strides).tensor

    def _make(self, buffer: Buffer, sizes: Sequence[int], strides: Sequence[int]) -> Made:
        reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        needed = 0 if 0 in sizes else 1 + reach
        # Compiled code runs with and without inference mode; a tensor made in it could not be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            known = self._buffers.get(buffer.number)
            if known is not None and needed <= known.capacity:
                tensor, capacity = known.tensor.as_strided(sizes, strides), known.capacity
            else:
                if known is not None and buffer.keep:
                    self._kept.append(known.tensor)
                tensor = cuda_graphs.apart(
                    torch.device(buffer.device),
                    "memory of compiled code cannot be allocated",
                    lambda: buffer.allocate(sizes, strides, f"compiled {buffer.number}"),
                )
                capacity = needed
        for name in buffer.groups:
            self._enter(name)
        made = self._buffers[buffer.number] = Made(tuple(sizes), tuple(strides), tensor, capacity, buffer.keep)
        return made

    def fresh(self, buffer: Buffer, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """A tensor that is returned, in memory that goes with it; see :meth:`buffer`. Collective if an arena grows."""
        return buffer.allocate(sizes, strides, "compiled result")

    def within(self, group: str, op: Callable[..., Any]) -> Callable[..., Any]:
        """An operator whose results lie in the symmetric memory of a group: see :func:`symmem.use_symmetric_memory`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with use_symmetric_memory(group_named(group)):
                return op(*args, **kwargs)

        return call

    def place(self, argument: Argument, x: torch.Tensor, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """An argument of an operator, in symmetric memory: itself if it lies there on all ranks, else a copy.

        Collective over the group at the first call, and when the address of what lies in symmetric memory changes.

        Args:
            argument: Which.
            x: The argument; dense.
            sizes: Its shape: compiled code knows it.
            strides: In elements.

        Raises:
            NotSymmetricError: It is plain memory, and a copy would be no use.
            PeerTimeoutError: A rank came with what was known already, and the others did not; names it.
        """
        known = self._inputs.get(argument.number)
        if known is not None:
            copy = known.copy
            if copy is None:
                if x.data_ptr() == known.address and known.block() is not None:
                    return x
            elif copy.sizes == sizes and copy.strides == strides:
                return copy.tensor.copy_(x)
        return self._look(argument, known, x, sizes, strides)

    def _look(
        self,
        argument: Argument,
        known: Input | None,
        x: torch.Tensor,
        sizes: Sequence[int],
        strides: Sequence[int],
    ) -> torch.Tensor:
        """What becomes of an argument that is not what it was in the call before; see :meth:`place`."""
        number, name, backend, way, keep, op = argument
        # Of torch's own memory, its operators find out by themselves whether it is the same on all ranks.
        if x.numel() == 0 or (backend is not None and self._is_torchs(number, x, name)):
            return x
        if way in ("agree", "copy"):
            if known is None:
                # What torch's operators need is torch's memory, which was asked for above.
                known = self._inputs[number] = Input(self._enter(name), copying=way == "copy" or backend is not None)
            if not known.copying and known.agree(x, group_named(name), op):
                return x
        elif backend is None and block_of(x, group_named(name)) is not None:
            return x
        if way == "strict":
            raise NotSymmetricError(
                f"{op} must be symmetric memory, and is a plain tensor of shape {tuple(x.shape)}, {x.dtype}, on "
                f"{x.device}; no copy is made for an operator that ranks call alone",
                hint=f"allocate it with symmem.allocate({tuple(x.shape)}, {x.dtype}, {str(x.device)!r}).tensor",
                step=op,
            )
        copy = self._buffers.get(number)
        if copy is None or copy.sizes != sizes or copy.strides != strides:
            copy = self._make(Buffer(number, x.dtype, str(x.device), (name,), backend, keep), sizes, strides)
        if known is not None and backend is None:  # else it may be torch's memory the next time
            known.copy = copy
        return copy.tensor.copy_(x)

    def _is_torchs(self, number: int, x: torch.Tensor, group: str) -> bool:
        """Whether an argument lies in symmetric memory of torch's, as far as that is asked."""
        if number in self._not_torchs or not is_torchs(x, lambda: group):
            if not asked_locally():  # another time it would warn again; and what is copied is right as well
                self._not_torchs.add(number)
            return False
        self._torchs[number] = x.data_ptr()
        return True

    def keeps(self, value: Any) -> bool:
        """Whether a value is a tensor on CUDA in symmetric memory, so that it has to stay where it is."""
        if not isinstance(value, torch.Tensor) or not value.is_cuda:
            return False
        address = value.data_ptr()
        return block_at(address) is not None or address in self._torchs.values()

    def finish(self, number: int, tensors: Sequence[torch.Tensor], group: str) -> None:
        """Wait for all ranks, on the stream: they have done with these arguments, which may then be written to again.

        Args:
            number: Which call of an operator of the graph.
            tensors: Its arguments.
            group: Name of its group.
        """
        known, reference = self._finished.get(number, _NONE)
        block = reference() if known == tensors[0].data_ptr() else None
        if block is None:
            first = next((each for each in tensors if each.numel() and find(each) is not None), None)
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
        else:  # that, in a third of the time
            block.signals(mapping).barrier(0, resolved.settings.signal_timeout)


_NONE: tuple[int, Callable[[], Block | None]] = (-1, nothing)
