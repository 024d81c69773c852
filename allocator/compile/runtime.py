"""What compiled code calls: its persistent buffers in symmetric memory, and its inputs that are copied there.

A compiled graph has a :class:`Graph` here, which keeps its buffers from one call to the next: an address never changes
while shapes do not, and nothing is allocated in a warm call. It lives as long as the compiled function, which holds it;
the generated module, which torch never lets go, has a :class:`Reference`.

A graph's buffers hold nothing between two calls. One call must be over, on its stream, before another of the same graph
begins: threads take turns, an operator cannot call the function that calls it, and compiled functions that communicate
are not to be run on two streams at once.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from symmem import capture
from symmem.config.settings import load_settings
from symmem.context import use_symmetric_memory
from symmem.errors import NotSymmetricError, UnsupportedError
from symmem.group import Group
from symmem.live import Block, block_at
from symmem.ops.checks import is_torchs
from symmem.ops.engines import group_named
from symmem.tensor import SymmetricTensor, find

__all__ = ["CHANGES", "Graph", "Reference", "bound", "finish", "is_kept", "reference", "write_back"]

log = logging.getLogger("symmem.compile")

CHANGES = 8
"""How often the address of an input in symmetric memory may change before it is copied from then on."""


class _Buffer(NamedTuple):
    """One persistent buffer, as it was last asked for.

    Attributes:
        sizes: Of the tensor.
        strides: Of the tensor, in elements.
        tensor: The tensor itself.
        capacity: Elements of its memory.
        group: Of its memory.
    """

    sizes: Sequence[int]
    strides: Sequence[int]
    tensor: torch.Tensor
    capacity: int
    group: Group


class _Input:
    """One place in a graph where an argument comes from memory that the compiler does not own.

    Attributes:
        copying: Whether it is copied at each call: from the first one on that the ranks did not all come with the same
            piece of symmetric memory.
        address: Of the argument that all ranks agreed on last; it is used as it is.
        block: The memory that it lies in.
        changes: How often the ranks have agreed on an address.
        each: Whether the ranks compare at each call.
    """

    __slots__ = ("address", "block", "changes", "copying", "each")

    def __init__(self, group: Group) -> None:
        self.copying, self.address, self.changes = False, 0, 0
        self.block: weakref.ref[Block] | None = None
        self.each = load_settings(group=group.name).allocation_check == "each"

    def holds(self, address: int) -> bool:
        """Whether all ranks have agreed on an address, and its memory is there still."""
        return not self.each and address == self.address and self.block is not None and self.block() is not None

    def agree(self, tensor: torch.Tensor, group: Group, place: str) -> bool:
        """Whether the argument is the same piece of symmetric memory on all ranks. Collective over the group."""
        block = _block_of(tensor, group)
        identity = repr(_identity(block, tensor, group)).encode()
        with group.collective(place) as collective:
            received = [each.payload for each in collective.exchange("where the argument lies", identity)]
        self.changes += 1
        alike = block is not None and len(set(received)) == 1
        if not alike or (self.changes > CHANGES and not self.each):
            self.copying = True
            log.debug("%s: copied from now on, %s", place, "its address changes" if alike else "not alike on all ranks")
            return False
        assert block is not None
        self.address, self.block = tensor.data_ptr(), weakref.ref(block)
        return True


def _block_of(tensor: torch.Tensor, group: Group) -> Block | None:
    """The symmetric memory that a tensor lies in, if the group has met for it."""
    block = block_at(tensor.data_ptr())
    if block is None or block.closed or block.allocation.device != tensor.device or not block.mapping_for(group):
        return None
    return block


def is_kept(value: Any) -> bool:
    """Whether a value is a tensor on CUDA in symmetric memory."""
    return isinstance(value, torch.Tensor) and value.is_cuda and block_at(value.data_ptr()) is not None


def _identity(block: Block | None, tensor: torch.Tensor, group: Group) -> Any:
    """What is the same on all ranks of symmetric memory, and of nothing else."""
    if block is None:
        return None
    mapping = block.mapping_for(group)
    assert mapping is not None
    within = tensor.data_ptr() - block.allocation.pointer
    return mapping.serial, within, tuple(tensor.shape), tensor.stride(), str(tensor.dtype)


class Graph:
    """The persistent memory of one compiled graph.

    Args:
        name: As the generated code has it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._buffers: dict[int, _Buffer] = {}
        self._inputs: dict[int, _Input] = {}
        self._kept: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of symmetric memory that it holds."""
        return sum(each.capacity * each.tensor.element_size() for each in self._buffers.values())

    def buffer(
        self,
        index: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: str,
        groups: Sequence[str],
        backend: str | None,
        keep: bool,
    ) -> torch.Tensor:
        """The tensor of a buffer, the same one at each call while its shape stays. Collective when it is made or grows.

        Args:
            index: Which buffer of the graph.
            sizes: Its shape.
            strides: In elements.
            dtype: Of its elements.
            device: Where.
            groups: Names of the groups whose ranks reach it; the first one's memory it is.
            backend: Memory of its own, of this backend; None for the group's arena.
            keep: Whether memory that it has outgrown stays, for a CUDA graph that was captured with it.
        """
        known = self._buffers.get(index)
        if known is not None and known.sizes == sizes and known.strides == strides and not known.group.closed:
            return known.tensor
        return self._make(index, sizes, strides, dtype, device, groups, backend, keep)

    def _make(
        self,
        index: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: str,
        groups: Sequence[str],
        backend: str | None,
        keep: bool,
    ) -> torch.Tensor:
        home = group_named(groups[0])
        needed = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        # Compiled code runs with and without inference mode; a tensor made in it could not be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            known = self._buffers.get(index)
            if known is not None and known.group is home and needed <= known.capacity:
                tensor, capacity = known.tensor.as_strided(sizes, strides), known.capacity
            else:
                if known is not None and keep:
                    self._kept.append(known.tensor)
                tensor = capture.apart(
                    torch.device(device),
                    "memory of compiled code cannot be allocated",
                    lambda: _allocate(sizes, strides, dtype, device, groups, backend, f"compiled {index}"),
                )
                capacity = needed
        self._buffers[index] = _Buffer(tuple(sizes), tuple(strides), tensor, capacity, home)
        return tensor

    def fresh(
        self,
        sizes: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: str,
        groups: Sequence[str],
        backend: str | None,
    ) -> torch.Tensor:
        """A tensor that is returned, in memory that goes with it; see :meth:`buffer`. Collective if an arena grows."""
        return _allocate(sizes, strides, dtype, device, groups, backend, "compiled result")

    def within(self, group: str, op: Callable[..., Any]) -> Callable[..., Any]:
        """An operator whose results lie in the symmetric memory of a group: see :func:`symmem.use_symmetric_memory`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with use_symmetric_memory(group_named(group)):
                return op(*args, **kwargs)

        return call

    def place(
        self, index: int, x: torch.Tensor, group: str, backend: str | None, way: str, keep: bool, op: str
    ) -> torch.Tensor:
        """An argument of an operator, in symmetric memory: itself if it lies there on all ranks, else a copy.

        Collective over the group at the first call, and when the address of what lies in symmetric memory changes.

        Args:
            index: Which argument of the graph.
            x: The argument; dense.
            group: Name of the operator's group.
            backend: See :meth:`buffer`.
            way: ``"agree"``: the ranks compare; ``"own"``: what lies in symmetric memory is taken as it is, for it
                comes from an allocation that all ranks make alike; ``"strict"``: as that, and plain memory is an error;
                ``"copy"``: it is copied, wherever it lies.
            keep: See :meth:`buffer`.
            op: The operator and the argument, for messages.

        Raises:
            NotSymmetricError: It is plain memory, and a copy would be no use.
            PeerTimeoutError: A rank came with what was known already, and the others did not; names it.
        """
        if x.numel() == 0 or (
            backend is not None and is_torchs(x, lambda: group)
        ):  # whose operators find out by themselves
            return x
        if way == "agree":
            known = self._inputs.get(index)
            if known is None:
                known = self._inputs[index] = _Input(group_named(group))
            if not known.copying and (known.holds(x.data_ptr()) or known.agree(x, group_named(group), op)):
                return x
        elif way != "copy" and _block_of(x, group_named(group)) is not None:
            return x
        if way == "strict":
            raise NotSymmetricError(
                f"{op} must be symmetric memory, and is a plain tensor of shape {tuple(x.shape)}, {x.dtype}, on "
                f"{x.device}; no copy is made for an operator that ranks call alone",
                hint=f"allocate it with symmem.allocate({tuple(x.shape)}, {x.dtype}, {str(x.device)!r}).tensor",
                step=op,
            )
        sizes, strides, copy = x.shape, x.stride(), self._buffers.get(index)
        if copy is not None and copy.sizes == sizes and copy.strides == strides and not copy.group.closed:
            return copy.tensor.copy_(x)
        return self._make(index, sizes, strides, x.dtype, str(x.device), (group,), backend, keep).copy_(x)


def _allocate(
    sizes: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: str,
    groups: Sequence[str],
    backend: str | None,
    name: str,
) -> torch.Tensor:
    handle = SymmetricTensor.allocate(
        sizes,
        dtype,
        device,
        strides=strides,
        group=group_named(groups[0]),
        backend=backend,
        arena=None if backend is None else False,
        name=name,
    )
    for group in groups:
        handle.rendezvous(group_named(group))
    return handle.tensor


class Reference(threading.local):
    """For generated code: the graph that is running now, of those that were compiled to this code.

    The same code may come out of a cache several times, and torch loads it as one module. Each compiled function has a
    graph of its own all the same: if they shared one, whether it is there still would depend on when the collector ran
    on a rank, and ranks would allocate differently.
    """

    def __init__(self, name: str) -> None:
        self.running = Graph(name)  # for a call from outside of a compiled function: nothing persists for long

    def __call__(self) -> Graph:
        """The graph."""
        return self.running


_references: dict[str, Reference] = {}


def reference(name: str) -> Reference:
    """The one reference of a name."""
    return _references.setdefault(name, Reference(name))


def bound(function: Callable[..., Any], graphs: Sequence[Graph]) -> Callable[..., Any]:
    """A compiled function that runs with graphs of its own, and keeps them alive.

    Raises:
        UnsupportedError: It is called by an operator that it calls itself.
    """
    for graph in graphs:
        function = _bound(function, reference(graph.name), graph)
    return function


def _bound(function: Callable[..., Any], known: Reference, graph: Graph) -> Callable[..., Any]:
    turn, owner = threading.Lock(), 0

    @functools.wraps(function)
    def call(inputs: Any) -> Any:
        nonlocal owner
        if owner == threading.get_ident():
            raise UnsupportedError(
                "a compiled function with registered operators is called within its own call, and would overwrite "
                "its buffers in symmetric memory",
                hint="let the operator that calls it call another function, compiled by itself",
            )
        with turn:
            owner, before = threading.get_ident(), known.running
            known.running = graph
            try:
                return function(inputs)
            finally:
                owner, known.running = 0, before

    return call


# Operators by which the graph says what it does with an argument, so that the compiler orders it with all else. Code in
# Python calls the functions themselves; these kernels are for code in C++.

LIBRARY: Any = torch.library.Library("symmem", "FRAGMENT")  # type: ignore[no-untyped-call]  # so are its methods


def write_back(x: torch.Tensor, placed: torch.Tensor) -> None:
    """Copy what an operator has written to the copy of an argument to the argument itself."""
    if placed.data_ptr() != x.data_ptr():
        x.copy_(placed)


def finish(tensors: Sequence[torch.Tensor], group: str) -> None:
    """Wait for all ranks, on the stream: they have done with these arguments, which may then be written to again."""
    handle = next((known for each in tensors if each.numel() and (known := find(each)) is not None), None)
    if handle is not None:
        handle.barrier(group=group_named(group))


def _place(
    x: torch.Tensor, name: str, index: int, group: str, backend: str | None, way: str, keep: bool, op: str
) -> torch.Tensor:
    placed = reference(name)().place(index, x, group, backend, way, keep, op)
    return x.view_as(x) if placed is x else placed


LIBRARY.define(
    "_place(Tensor(a) x, str name, int index, str group, str? backend, str way, bool keep, str op) -> Tensor(a)"
)
LIBRARY.impl("_place", _place, "CompositeExplicitAutograd")
torch.library.register_fake("symmem::_place", lambda x, *rest: x.view_as(x), lib=LIBRARY)
LIBRARY.define("_write_back(Tensor(a!) x, Tensor placed) -> ()")
LIBRARY.impl("_write_back", write_back, "CompositeExplicitAutograd")
torch.library.register_fake("symmem::_write_back", lambda x, placed: None, lib=LIBRARY)
LIBRARY.define("_finish(Tensor(a!)[] tensors, str group) -> ()")
LIBRARY.impl("_finish", finish, "CompositeExplicitAutograd")
torch.library.register_fake("symmem::_finish", lambda tensors, group: None, lib=LIBRARY)
