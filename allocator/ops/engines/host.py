"""Collective operations of processes on one host, over shared memory.

A group has one workspace: on each rank two regions, each with a line that says what the rank is at. An operation is a
number of steps. In each step a rank fills its region with what the others need, comes to a barrier, and reads the
others' regions. Regions are used in turn: what a rank fills in step n + 1 is not what others still read in step n, and
nobody can be further than that. So there is one barrier a step, and a small operation is one step.

Larger ones go through the regions in pieces. These fit a cache, and the workspace never grows.

All ranks compare their lines (operation, dtype, elements, piece) after the barrier of each step: ranks that are not at
the same all raise, before a region is read, and that costs no message.

Elements are combined in the order of ranks, one rank after the other, whatever the size and the algorithm; so results
are bitwise the same on all ranks, and from run to run.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from symmem.backends import get_backend
from symmem.backends.base import tensor_at
from symmem.backends.libc import PAGE, round_up
from symmem.backends.signals import SharedSignals
from symmem.errors import ForkedError, GroupError, MismatchError, RendezvousError, SymmemError
from symmem.group.group import Group, differing
from symmem.ops.engines.base import REDUCTIONS

__all__ = ["HostEngine"]

REGION = 2 << 20
"""Bytes of a region. Small enough to stay in a cache, large enough that a barrier is little beside the copies."""

TWO_SHOT = 128 << 10
"""From so many bytes on, three ranks or more each reduce a part and pass it on, instead of each reducing all."""

_CPU = torch.device("cpu")
_CHANNEL = 0  # the only one that is used of the workspace's signals
_LINE = struct.Struct("<4Hqqq")  # operation, reduction, dtype, root; elements, piece, number of the step
_LINE_STRIDE = 64  # bytes: a cache line each
_MAX_KNOWN = 512

_REFUSED = "refused"
_OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", _REFUSED)
_REDUCTIONS = ("", *REDUCTIONS)
_DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
_OPERATION_CODES, _REDUCTION_CODES, _DTYPE_CODES = (
    {each: code for code, each in enumerate(names)} for names in (_OPERATIONS, _REDUCTIONS, _DTYPES)
)
_INTEGERS = {
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
}
_COPIED = frozenset(each for each in _DTYPES if each.is_floating_point or each.is_complex or each in _INTEGERS)
"""What torch can copy; of others, the bytes are copied."""
_COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


class HostEngine:
    """The :class:`symmem.ops.engines.base.Engine` of one group on the CPU.

    Making one is collective over the group. The operations of a group are done one after the other, whichever thread
    calls them. After a PeerLostError or PeerTimeoutError the group has no more collective operations; after a
    MismatchError it has.

    Args:
        group: All its ranks must be on one host.

    Raises:
        SymmemError: On all ranks: what failed on any of them.
    """

    def __init__(self, group: Group) -> None:
        self._rank, self._world, self._name = group.rank, group.size, group.name
        self._timeout = group.settings.signal_timeout
        self._turn = _Turn(group)
        self._number = 0  # of the step that is next
        self._owes = False  # whether this rank has arrived at a barrier, and has not waited for the others yet
        lines = round_up(SharedSignals.nbytes(group.size), _LINE_STRIDE)
        begin = round_up(lines + 2 * _LINE_STRIDE, PAGE)
        backend = get_backend("host")
        with group.collective("workspace of collective operations") as collective:
            allocation = backend.allocate(begin + 2 * REGION, _CPU, group)
            mapping = backend.rendezvous(allocation, collective)
        # Held here, not by the tensors: these never leave the engine, and what torch refers to for them, the collector
        # cannot follow. A cycle by way of the mapping's group would never end.
        self._memory = allocation, mapping
        pointers = mapping.pointers
        self._lines = [[_line(pointer + lines + turn * _LINE_STRIDE) for pointer in pointers] for turn in range(2)]
        own = [each[group.rank] for each in self._lines]
        self._signals = SharedSignals(group, pointers, mapping, functools.partial(_present, own))
        self._begins = [begin, begin + REGION]  # of the regions
        self._pointers = pointers
        self._side_by_side, self._stride = mapping.contiguous()
        self._known_parts: dict[_Where, list[torch.Tensor]] = {}
        self._known_rows: dict[_Where, torch.Tensor] = {}
        self._wide = torch.empty((2, REGION // 4), dtype=torch.float32)

    # Operations. What fits a region is passed on as it is: taking tensors apart would cost as much as all else.

    def all_reduce(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_reduce`."""
        key = _key("all_reduce", source, reduction)
        with self._turn:
            self._begin()
            if self._world > 2 and source.nbytes >= TWO_SHOT:
                self._two_shot(key, source.view(-1), out.view(-1), reduction)
            elif source.numel() <= _most(source.dtype):
                self._one_shot(key, 0, source, out, reduction)
            else:
                given, taken = source.view(-1), out.view(-1)
                for piece, at in _pieces(given.numel(), _most(source.dtype)):
                    self._one_shot(key, piece, given[at], taken[at], reduction)

    def all_gather(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_gather`."""
        key = _key("all_gather", source)
        with self._turn:
            self._begin()
            if source.nbytes <= REGION and source.dtype in _COPIED:
                self._gather(key, 0, source, out)
                return
            given, taken = _bytes(source), _bytes(out).view(self._world, source.nbytes)
            for piece, at in _pieces(source.nbytes, REGION):
                self._gather(key, piece, given[at], taken[:, at])

    def reduce_scatter(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.reduce_scatter`."""
        key, most = _key("reduce_scatter", source, reduction), _most(source.dtype) // self._world
        with self._turn:
            self._begin()
            if out.numel() <= most:
                self._reduce_scatter(key, 0, source, out, reduction)
                return
            given, taken = source.view(self._world, out.numel()), out.view(-1)
            for piece, at in _pieces(out.numel(), most):
                self._reduce_scatter(key, piece, given[:, at], taken[at], reduction)

    def all_to_all(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_to_all`."""
        key, size = _key("all_to_all", source), source.nbytes // self._world
        with self._turn:
            self._begin()
            if source.nbytes <= REGION and source.dtype in _COPIED:
                self._all_to_all(key, 0, source, out)
                return
            given, taken = (_bytes(each).view(self._world, size) for each in (source, out))
            for piece, at in _pieces(size, REGION // self._world):
                self._all_to_all(key, piece, given[:, at], taken[:, at])

    def broadcast(self, source: torch.Tensor, out: torch.Tensor, root: int) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.broadcast`."""
        key = _key("broadcast", source, root=root)
        with self._turn:
            self._begin()
            if source.nbytes <= REGION and source.dtype in _COPIED:
                self._broadcast(key, 0, source, out, root)
                return
            given, taken = _bytes(source), _bytes(out)
            for piece, at in _pieces(source.nbytes, REGION):
                self._broadcast(key, piece, given[at], taken[at], root)

    def refuse(self, operation: str, error: SymmemError) -> None:
        """Let the others' operation that goes with this rank's fail, since this rank raises instead of doing its own.

        They raise MismatchError, which names this rank, not its error. Does not wait for them.
        """
        with self._turn:
            self._begin()
            if self._world > 1:
                self._write((_OPERATION_CODES[_REFUSED], 0, 0, 0, 0), 0)
                self._signals.arrive(_CHANNEL)
                self._number, self._owes = self._number + 1, True

    # Of one piece, but for what makes pieces itself.

    def _one_shot(self, key: _Key, piece: int, given: torch.Tensor, taken: torch.Tensor, reduction: str) -> None:
        """Each rank reduces everything."""
        parts = self._parts(given.dtype, 0, given.shape)
        parts[self._rank].copy_(given)
        self._step(key, piece)
        self._reduce(parts, taken, reduction)

    def _two_shot(self, key: _Key, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """Each rank reduces a part of each piece, and passes it on together with the whole of its next piece."""
        dtype, half = source.dtype, REGION // 2
        nothing = slice(0, 0)
        given: list[torch.Tensor] = []
        before = nothing
        pieces = [at for _, at in _pieces(source.numel(), min(half // source.itemsize, _most(dtype)))]
        for piece, at in enumerate((*pieces, nothing)):
            following = self._parts(dtype, 0, (at.stop - at.start,))
            following[self._rank].copy_(source[at])
            results = self._parts(dtype, half, (before.stop - before.start,))
            if given:
                share = _share(results[0].numel(), self._world, self._rank)
                self._reduce([each[share] for each in given], results[self._rank][share], reduction)
            self._step(key, piece)
            for rank, result in enumerate(results):
                share = _share(result.numel(), self._world, rank)
                out[before][share].copy_(result[share])
            given, before = following, at

    def _gather(self, key: _Key, piece: int, given: torch.Tensor, taken: torch.Tensor) -> None:
        self._parts(given.dtype, 0, given.shape)[self._rank].copy_(given)
        rows = self._rows(given.dtype, 0, given.shape)
        self._step(key, piece)
        taken.copy_(rows)

    def _reduce_scatter(self, key: _Key, piece: int, given: torch.Tensor, taken: torch.Tensor, reduction: str) -> None:
        self._parts(given.dtype, 0, given.shape)[self._rank].copy_(given)
        parts = self._parts(given.dtype, self._rank * taken.nbytes, taken.shape)
        self._step(key, piece)
        self._reduce(parts, taken, reduction)

    def _all_to_all(self, key: _Key, piece: int, given: torch.Tensor, taken: torch.Tensor) -> None:
        self._parts(given.dtype, 0, given.shape)[self._rank].copy_(given)
        row = given.nbytes // self._world
        rows = self._rows(given.dtype, self._rank * row, given.shape[1:])
        self._step(key, piece)
        taken.copy_(rows)

    def _broadcast(self, key: _Key, piece: int, given: torch.Tensor, taken: torch.Tensor, root: int) -> None:
        part = self._parts(given.dtype, 0, given.shape)[root]
        if self._rank == root:
            part.copy_(given)
        self._step(key, piece)
        taken.copy_(part)

    def _reduce(self, parts: Sequence[torch.Tensor], out: torch.Tensor, reduction: str) -> None:
        """Combine ranks' parts, in the order of ranks, into ``out``, which shares memory with none of them."""
        world, combine = len(parts), _COMBINE[reduction]
        if world == 1:
            out.copy_(parts[0])
        elif _is_narrow(out.dtype) and not _is_exact(out.dtype, reduction, world):
            sums, wide = self._wide[:, : out.numel()].view(2, *out.shape)
            sums.copy_(parts[0])
            for part in parts[1:]:
                combine(sums, wide.copy_(part), out=sums)
            out.copy_(sums.div_(world) if reduction == "avg" else sums)
        else:
            combine(parts[0], parts[1], out=out)
            for part in parts[2:]:
                combine(out, part, out=out)
            if reduction == "avg":
                out.div_(world)

    # Steps.

    def _parts(self, dtype: torch.dtype, offset: int, shape: Sequence[int]) -> list[torch.Tensor]:
        """What lies at byte ``offset`` of each rank's region in the step that is next."""
        where = (self._number & 1, dtype, offset, shape)
        parts = self._known_parts.get(where)
        if parts is None:
            if len(self._known_parts) >= _MAX_KNOWN:
                self._known_parts.clear()
            begin, nbytes = self._begins[where[0]] + offset, math.prod(shape) * dtype.itemsize
            flat = [tensor_at(pointer + begin, nbytes, _CPU, None) for pointer in self._pointers]
            parts = self._known_parts[where] = [each.view(dtype).view(shape) for each in flat]
        return parts

    def _rows(self, dtype: torch.dtype, offset: int, shape: Sequence[int]) -> torch.Tensor:
        """The same as one tensor, [world, *shape]; copying it is one call."""
        where = (self._number & 1, dtype, offset, shape)
        rows = self._known_rows.get(where)
        if rows is None:
            if len(self._known_rows) >= _MAX_KNOWN:
                self._known_rows.clear()
            begin, count = self._begins[where[0]] + offset, math.prod(shape)
            nbytes = (self._world - 1) * self._stride + count * dtype.itemsize
            flat = tensor_at(self._side_by_side + begin, nbytes, _CPU, None).view(dtype)
            rows = flat.as_strided((self._world, count), (self._stride // dtype.itemsize, 1)).view(self._world, *shape)
            self._known_rows[where] = rows
        return rows

    def _begin(self) -> None:
        if self._owes:  # else a region could be filled anew that others still read
            self._wait(self._signals.complete, "a collective operation")
            self._owes = False

    def _step(self, key: _Key, piece: int) -> None:
        """Tell the others that the own region is filled, and wait until theirs are.

        Raises:
            MismatchError: On all ranks: they are not at the same operation.
            PeerTimeoutError, PeerLostError, RendezvousError: See :meth:`SharedSignals.barrier`.
        """
        if self._world == 1:
            return
        line = self._write(key, piece)
        self._wait(self._signals.barrier, _OPERATIONS[key[0]])
        lines = self._lines[self._number & 1]
        self._number += 1
        for other in lines:
            if other != line:
                raise self._mismatch(lines, _OPERATIONS[key[0]])

    def _write(self, key: _Key, piece: int) -> bytes:
        line = self._lines[self._number & 1][self._rank][:] = _LINE.pack(*key, piece, self._number)
        return line

    def _wait(self, wait: Callable[[int, float], None], operation: str) -> None:
        try:
            wait(_CHANNEL, self._timeout)
        except RendezvousError as error:
            error.step = operation
            if "gave up" in error.what:
                error.what = error.what.replace("a barrier on this channel", "a collective operation")
                error.hint = "the group has no more of them: restart the job, or make another group"
            raise

    def _mismatch(self, lines: Sequence[memoryview], operation: str) -> MismatchError:
        found = [_LINE.unpack(line) for line in lines]
        refused = [rank for rank, each in enumerate(found) if _OPERATIONS[each[0]] == _REFUSED]
        if refused:
            what = f"rank {refused[0]} refused its arguments, and did not take part"
            hint, peers = f"see the error that rank {refused[0]} raised", tuple(refused)
        else:
            told = [_told(*each) for each in found]
            text, peers = differing(told if len(set(told)) > 1 else [f"step {each[-1]}" for each in found])
            what = f"ranks are at different operations: {text}"
            hint = "all ranks of a group must make the same calls in the same order, with the same shapes and dtypes"
        return MismatchError(what, hint=hint, rank=self._rank, group=self._name, step=operation, peers=peers)


class _Turn:
    """Lets one operation run at a time; a ``with`` block.

    Raises:
        GroupError: It is begun amid another one, of the same thread: by a finalizer or a signal handler.
        ForkedError: The process was forked meanwhile.
    """

    def __init__(self, group: Group) -> None:
        self._rank, self._name = group.rank, group.name
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._process != os.getpid():
            raise ForkedError(
                f"the group {self._name!r} was made before this process was forked",
                hint="make a group in the child, or start workers with the 'spawn' method",
            )
        this = threading.get_ident()
        if self._owner == this:
            raise GroupError(
                "a collective operation was begun amid another one of the same group, on the same thread",
                hint="make no collective call from a finalizer, a signal handler or another callback",
                rank=self._rank,
                group=self._name,
            )
        self._lock.acquire()
        self._owner = this

    def __exit__(self, *exc: object) -> None:
        self._owner = None
        self._lock.release()


_Where = tuple[int, torch.dtype, int, Sequence[int]]
"""Which regions; dtype, byte in the region and shape of what lies there."""

_Key = tuple[int, int, int, int, int]
"""What must be the same on all ranks: codes of the operation, reduction and dtype; the root; elements."""


def _key(operation: str, source: torch.Tensor, reduction: str = "", root: int = 0) -> _Key:
    codes = _OPERATION_CODES[operation], _REDUCTION_CODES[reduction], _DTYPE_CODES[source.dtype]
    return *codes, root, source.numel()


def _told(operation: int, reduction: int, dtype: int, root: int, elements: int, piece: int, number: int) -> str:
    """A line in words."""
    options = f"({_REDUCTIONS[reduction]})" if reduction else f"(root {root})" if root else ""
    where = f", piece {piece}" if piece else ""
    return f"{_OPERATIONS[operation]}{options} of {elements} {_DTYPES[dtype]}{where}"


def _present(lines: Sequence[memoryview]) -> str:
    """What a rank is at, by its own lines: the later one of the two."""
    return _told(*max((_LINE.unpack(line) for line in lines), key=operator.itemgetter(-1)))


def _line(address: int) -> memoryview:
    return memoryview((ctypes.c_char * _LINE.size).from_address(address)).cast("B")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _pieces(total: int, most: int) -> Iterator[tuple[int, slice]]:
    """Number and place of pieces of at most ``most``; at least one, which may be empty: ranks meet for nothing too."""
    most = max(most, 1)
    for piece, begin in enumerate(range(0, max(total, 1), most)):
        yield piece, slice(begin, min(begin + most, total))


def _share(total: int, world: int, rank: int) -> slice:
    """The part of a piece that a rank reduces: whole cache lines, whatever the dtype."""
    size = round_up(-(-total // world), _LINE_STRIDE)
    return slice(min(rank * size, total), min((rank + 1) * size, total))


def _most(dtype: torch.dtype) -> int:
    """Elements of a piece that is to be reduced; of a narrow dtype, as many as the sums have room for."""
    return REGION // max(dtype.itemsize, 4)


def _is_narrow(dtype: torch.dtype) -> bool:
    """Whether sums are made in float32."""
    return dtype.is_floating_point and dtype.itemsize < 4


def _is_exact(dtype: torch.dtype, reduction: str, world: int) -> bool:
    """Whether a narrow dtype's own arithmetic gives what float32 would: extremes, or two values, rounded once."""
    return dtype.itemsize == 2 and (reduction in ("min", "max") or (world == 2 and reduction == "sum"))
