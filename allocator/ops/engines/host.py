"""Collective operations of processes on one host, over shared memory.

A group has one workspace. In it every rank has two regions, and per region a line that describes the rank's current
operation. An operation has one or more steps. In a step, a rank fills its region with the data for the others, enters a
barrier, and reads the others' regions. Steps alternate between the two regions. While a rank fills a region in step
n + 1, others may still read the other region of step n, and no rank can be further ahead. So one barrier per step is
enough, and a small operation is one step.

Larger operations pass through the regions in pieces. A piece fits a cache, and the workspace never grows.

After the barrier of a step, all ranks compare their lines (operation, dtype, elements, piece). If the lines differ, all
ranks raise before they read a region. The comparison needs no message. A rank that refuses an operation, or is
interrupted in it, leaves its error in the workspace and refuses the barrier: all ranks raise that error. After any
error but a death, the ranks are in step again (see :mod:`symmem.backends.signals`).

Elements are combined in rank order, for all sizes and algorithms. An element's bits depend on nothing but the elements
of that place. So results are bitwise equal on all ranks, and from run to run. For what NaNs do, see
:mod:`symmem.ops.engines.arithmetic`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import operator
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch

from symmem import native
from symmem.arena.arena import compare_arenas, is_missed_elsewhere
from symmem.backends import get_backend
from symmem.backends.base import tensor_at
from symmem.backends.libc import PAGE, round_up
from symmem.backends.neutral import neutral_mode
from symmem.backends.signals import SharedSignals
from symmem.errors import (
    ForkedError,
    GroupError,
    PeerTimeoutError,
    RendezvousError,
    SymmemError,
    from_wire,
    to_wire,
)
from symmem.group.agreement import as_symmem_error
from symmem.group.call_site import program_line
from symmem.group.compare import different_calls
from symmem.group.group import Group
from symmem.group.ledger import explained
from symmem.ops.engines.arithmetic import SIGNED_ZEROS, Tree, divided, sign_zeros, sum_leaves
from symmem.ops.engines.base import REDUCTIONS, describe, shape_text

__all__ = ["HostEngine"]

REGION = 2 << 20
"""Bytes of a region. It is small enough for a cache, and so large that the copies cost far more than a barrier."""

TWO_SHOT = 128 << 10
"""From this size in bytes on, three or more ranks reduce one part per rank and share it, instead of reducing all."""

_Method = TypeVar("_Method", bound=Callable[..., None])

_CPU = torch.device("cpu")
_CHANNEL = 0  # of the signals of the workspace
_LINES_CHANNEL = 1  # for an error that names the lines of the program
_BRIEF = 1.0  # seconds that a rank waits for the lines
_SHAPE_NBYTES = 32
_LINE = struct.Struct(f"<4H{_SHAPE_NBYTES}sqq")  # operation, reduction, dtype, root; shape, piece, number of the step
_LINE_STRIDE = 64  # bytes: one cache line
_ERROR_NBYTES = 1024  # for the text of an error; zeros follow the text
_MAX_KNOWN = 512

_OPERATIONS = (
    *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier"),
    *("all_reduce_tree", "reduce_scatter_tree"),
)
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
"""Dtypes that torch can copy. For others, the bytes are copied."""
_COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


def _operation(method: _Method) -> _Method:
    """Make a method that holds the engine. If this rank stops before the last step, it reports why to the others."""

    @functools.wraps(method)
    def run(self: HostEngine, *arguments: Any) -> None:
        turn = self._turn
        this = turn.check()
        with turn.lock:
            try:
                turn.owner = this
                self._begin()
                method(self, *arguments)
            except BaseException as error:
                if self._is_awaited():
                    reason = as_symmem_error(error)
                    with contextlib.suppress(SymmemError):  # the caller gets its own error
                        self._refuse(reason.located(rank=self._rank, group=self._name, step=method.__name__))
                raise
            finally:
                turn.owner = None

    return cast("_Method", run)


class HostEngine:
    """The :class:`symmem.ops.engines.base.Engine` of one group on the CPU.

    The constructor is collective over the group. The operations of a group run one after the other, from any thread.
    After a PeerLostError the group cannot run collective operations any more. After any other error it can.

    Args:
        group: All its ranks must be on one host.

    Raises:
        SymmemError: A rank failed. All ranks raise its error.
    """

    def __init__(self, group: Group) -> None:
        self._rank, self._world, self._name = group.rank, group.size, group.name
        self._group = group
        self._timeout = group.settings.signal_timeout
        self._turn = _Turn(group)
        self._number = 0  # number of the next step
        self._prepared: int | None = None  # number of the step that this rank prepares, or was in last
        self._is_last = True  # whether that is the last step of the operation
        lines = round_up(SharedSignals.nbytes(group.size), _LINE_STRIDE)
        errors = lines + 2 * _LINE_STRIDE
        begin = round_up(errors + 2 * _ERROR_NBYTES, PAGE)
        backend = get_backend("host")
        with group.collective("workspace of collective operations") as collective:
            allocation = backend.allocate(begin + 2 * REGION, _CPU, group)
            mapping = backend.rendezvous(allocation, collective)
        # The engine holds the memory, not the tensors, which never leave the engine. The garbage collector cannot see
        # references that torch holds, so a cycle through the mapping's group would never be freed.
        self._memory = allocation, mapping
        pointers = mapping.pointers
        self._lines = [
            [_view(pointer + lines + turn * _LINE_STRIDE, _LINE.size) for pointer in pointers] for turn in range(2)
        ]
        self._errors = [
            [_view(pointer + errors + turn * _ERROR_NBYTES, _ERROR_NBYTES) for pointer in pointers] for turn in range(2)
        ]
        own = [lines_of_turn[group.rank] for lines_of_turn in self._lines]
        self._describe = functools.partial(_describe_latest, own)
        self._signals = SharedSignals(group, pointers, mapping, self._describe, self._refusal)
        self._signals.stopped = lambda: group.closed or is_missed_elsewhere(group)  # closed by another thread
        if module := native.module():
            self._signals.quicken(_CHANNEL, module)
        self._region_offsets = [begin, begin + REGION]
        self._pointers = pointers
        self._side_by_side, self._stride = mapping.contiguous()
        self._known_parts: dict[_Place, list[torch.Tensor]] = {}
        self._known_rows: dict[_Place, torch.Tensor] = {}
        self._wide = torch.empty((2, REGION // 4), dtype=torch.float32, device=_CPU)

    # Operations. Tensors that fit a region are passed whole: splitting them would cost as much as all the rest.

    @_operation
    def all_reduce(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_reduce`."""
        key = _key("all_reduce", source, reduction)
        if self._world > 2 and source.nbytes >= TWO_SHOT:
            self._two_shot(key, source.view(-1), out.view(-1), reduction)
        elif source.numel() <= _most(source.dtype):
            self._one_shot(key, 0, source, out, reduction)
        else:
            given, taken = source.view(-1), out.view(-1)
            for piece, at in self._pieces(given.numel(), _most(source.dtype)):
                self._one_shot(key, piece, given[at], taken[at], reduction)

    @_operation
    def all_gather(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_gather`."""
        key = _key("all_gather", source)
        if source.nbytes <= REGION and source.dtype in _COPIED:
            self._gather(key, 0, source, out)
            return
        given, taken = _bytes(source), _bytes(out).view(self._world, source.nbytes)
        for piece, at in self._pieces(source.nbytes, REGION):
            self._gather(key, piece, given[at], taken[:, at])

    @_operation
    def reduce_scatter(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.reduce_scatter`."""
        key, most = _key("reduce_scatter", source, reduction), _most(source.dtype) // self._world
        if out.numel() <= most:
            self._reduce_scatter(key, 0, source, out, reduction)
            return
        given, taken = source.view(self._world, out.numel()), out.view(-1)
        for piece, at in self._pieces(out.numel(), most):
            self._reduce_scatter(key, piece, given[:, at], taken[at], reduction)

    @_operation
    def all_reduce_tree(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_reduce_tree`."""
        key, tree = _key("all_reduce_tree", source, reduction), Tree(reduction, source.shape[0] * self._world)
        given, taken = sum_leaves(source).view(-1), out.view(-1)
        if self._world > 2:
            self._two_shot(key, given, taken, tree)
            return
        for piece, at in self._pieces(given.numel(), _most(given.dtype)):
            self._one_shot(key, piece, given[at], taken[at], tree)

    @_operation
    def reduce_scatter_tree(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.reduce_scatter_tree`."""
        key, tree = _key("reduce_scatter_tree", source, reduction), Tree(reduction, source.shape[0] * self._world)
        given, taken = sum_leaves(source).view(self._world, out.numel()), out.view(-1)
        for piece, at in self._pieces(out.numel(), _most(given.dtype) // self._world):
            self._reduce_scatter(key, piece, given[:, at], taken[at], tree)

    @_operation
    def all_to_all(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_to_all`."""
        key, size = _key("all_to_all", source), source.nbytes // self._world
        if source.nbytes <= REGION and source.dtype in _COPIED:
            self._all_to_all(key, 0, source, out)
            return
        given, taken = (_bytes(tensor).view(self._world, size) for tensor in (source, out))
        for piece, at in self._pieces(size, REGION // self._world):
            self._all_to_all(key, piece, given[:, at], taken[:, at])

    @_operation
    def broadcast(self, source: torch.Tensor, out: torch.Tensor, root: int) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.broadcast`."""
        key = _key("broadcast", source, root=root)
        if source.nbytes <= REGION and source.dtype in _COPIED:
            self._broadcast(key, 0, source, out, root)
            return
        given, taken = _bytes(source), _bytes(out)
        for piece, at in self._pieces(source.nbytes, REGION):
            self._broadcast(key, piece, given[at], taken[at], root)

    @_operation
    def barrier(self, channel: int) -> None:
        """Wait for all ranks, which must name the same channel. It orders no memory."""
        self._step((_OPERATION_CODES["barrier"], 0, 0, channel, b""), 0)

    def refuse(self, operation: str, error: SymmemError) -> None:
        """Make the matching operation fail on the other ranks with this rank's error.

        It waits for them only if they have not come to the call that this rank refused before.
        """
        this = self._turn.check()
        with self._turn.lock:
            try:
                self._turn.owner = this
                self._begin()
                self._refuse(error)
            finally:
                self._turn.owner = None

    def _refuse(self, error: SymmemError) -> None:
        if self._world > 1:
            self._signals.prepare(_CHANNEL, self._timeout)  # until then, others may read an earlier error
            self._number = self._signals.number(_CHANNEL)
            self._errors[self._number & 1][self._rank][:] = _packed(error)
            self._signals.refuse(_CHANNEL, self._timeout)
            self._number += 1

    def _refusal(self, rank: int, number: int) -> SymmemError:
        """The error with which a rank has refused barrier ``number`` of the workspace."""
        return from_wire(json.loads(bytes(self._errors[number - 1 & 1][rank]).rstrip(b"\0")))

    def _pieces(self, total: int, most: int) -> Iterator[tuple[int, slice]]:
        for piece, at in _pieces(total, most):
            self._prepare(is_last=at.stop == total)
            yield piece, at

    # One piece of an operation. Only `_two_shot` handles all pieces itself.

    def _one_shot(self, key: _Key, piece: int, given: torch.Tensor, taken: torch.Tensor, reduction: str | Tree) -> None:
        """Every rank reduces everything."""
        parts = self._parts(given.dtype, 0, given.shape)
        parts[self._rank].copy_(given)
        self._step(key, piece)
        self._reduce(parts, taken, reduction)

    def _two_shot(self, key: _Key, source: torch.Tensor, out: torch.Tensor, reduction: str | Tree) -> None:
        """Every rank reduces its share of a piece, and passes it on together with its next whole piece."""
        dtype, half = source.dtype, REGION // 2
        nothing = slice(0, 0)
        given: list[torch.Tensor] = []
        before = nothing
        pieces = [at for _, at in _pieces(source.numel(), min(half // source.itemsize, _most(dtype)))]
        for piece, at in enumerate((*pieces, nothing)):
            self._prepare(is_last=piece == len(pieces))
            following = self._parts(dtype, 0, (at.stop - at.start,))
            following[self._rank].copy_(source[at])
            results = self._parts(dtype, half, (before.stop - before.start,))
            if given:
                share = _share(results[0].numel(), self._world, self._rank)
                self._reduce([part[share] for part in given], results[self._rank][share], reduction)
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

    def _reduce_scatter(
        self, key: _Key, piece: int, given: torch.Tensor, taken: torch.Tensor, reduction: str | Tree
    ) -> None:
        self._parts(given.dtype, 0, given.shape)[self._rank].copy_(given)
        parts = self._parts(given.dtype, self._rank * (given.nbytes // self._world), taken.shape)
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

    def _reduce(self, parts: Sequence[torch.Tensor], out: torch.Tensor, reduction: str | Tree) -> None:
        """Combine all ranks' parts, in rank order or as a tree, into ``out``, which must not overlap with them."""
        if isinstance(reduction, Tree):
            reduction.combine(parts, out)
            return
        world, combine = len(parts), _COMBINE[reduction]
        if world == 1:
            out.copy_(parts[0])
            return
        if _is_narrow(out.dtype) and not _is_exact(out.dtype, reduction, world):
            sums, wide = self._wide[:, : out.numel()].view(2, *out.shape)
            sums.copy_(parts[0])
            for part in parts[1:]:
                combine(sums, wide.copy_(part), out=sums)
            out.copy_(divided(sums, world) if reduction == "avg" else sums)
        else:
            combine(parts[0], parts[1], out=out)
            for part in parts[2:]:
                combine(out, part, out=out)
            if reduction == "avg":
                divided(out, world)
        if combine is not torch.add and out.dtype in SIGNED_ZEROS:
            sign_zeros(parts, out, reduction, self._wide)

    # Steps.

    def _parts(self, dtype: torch.dtype, offset: int, shape: Sequence[int]) -> list[torch.Tensor]:
        """All ranks' tensors at byte ``offset`` of their regions in the next step."""
        place = (self._number & 1, dtype, offset, shape)
        parts = self._known_parts.get(place)
        if parts is None:
            if len(self._known_parts) >= _MAX_KNOWN:
                self._known_parts.clear()
            begin, nbytes = self._region_offsets[place[0]] + offset, math.prod(shape) * dtype.itemsize
            with neutral_mode():
                flat = [tensor_at(pointer + begin, nbytes, _CPU, None) for pointer in self._pointers]
                parts = self._known_parts[place] = [part.view(dtype).view(shape) for part in flat]
        return parts

    def _rows(self, dtype: torch.dtype, offset: int, shape: Sequence[int]) -> torch.Tensor:
        """The same as one tensor, [world, *shape], so that one call can copy it."""
        place = (self._number & 1, dtype, offset, shape)
        rows = self._known_rows.get(place)
        if rows is None:
            if len(self._known_rows) >= _MAX_KNOWN:
                self._known_rows.clear()
            begin, count = self._region_offsets[place[0]] + offset, math.prod(shape)
            nbytes = (self._world - 1) * self._stride + count * dtype.itemsize
            strides = (self._stride // dtype.itemsize, 1)
            with neutral_mode():
                flat = tensor_at(self._side_by_side + begin, nbytes, _CPU, None).view(dtype)
                rows = flat.as_strided((self._world, count), strides).view(self._world, *shape)
            self._known_rows[place] = rows
        return rows

    def _begin(self) -> None:
        """Wait for the others first, or this rank could overwrite a region that they still read."""
        self._prepared = None
        self._number = self._signals.number(_CHANNEL)  # an interrupt may have come before it was noted
        if self._signals.is_unfinished(_CHANNEL):
            self._wait(self._signals.prepare, "a collective operation")
        self._prepare(is_last=True)

    def _prepare(self, *, is_last: bool) -> None:
        self._prepared = self._number  # first: from now on the others wait for this rank, whatever is_last was
        self._is_last = is_last

    def _is_awaited(self) -> bool:
        """Whether the others wait for this rank again in this operation."""
        if self._prepared is None:
            return False
        has_arrived = self._signals.number(_CHANNEL) != self._prepared
        return not has_arrived or not (self._is_last or self._signals.is_given_up(_CHANNEL))

    def _step(self, key: _Key, piece: int) -> None:
        """Publish that the own region is filled, and wait until the others are.

        Raises:
            MismatchError: Ranks are at different operations. All ranks raise.
            PeerTimeoutError, PeerLostError, RendezvousError: See :meth:`SharedSignals.barrier`.
        """
        if self._world == 1:
            return
        turn = self._number & 1
        line = self._lines[turn][self._rank][:] = _LINE.pack(*key, piece, self._number)
        self._wait(self._signals.barrier, _OPERATIONS[key[0]])
        for other in self._lines[turn]:
            if other != line:
                self._is_last = True  # all ranks raise
                raise self._mismatch(turn, _OPERATIONS[key[0]])

    def _wait(self, wait: Callable[[int, float], None], operation: str) -> None:
        try:
            wait(_CHANNEL, self._timeout)
        except BaseException as raised:
            if raised is self._signals.told:
                self._prepared = None  # all ranks have left the step
            if not isinstance(raised, RendezvousError):
                raise
            error: SymmemError = raised
            if self._group.closed:
                text = f"the group {self._name!r} was closed while this rank waited"
                error = GroupError(text, hint="wait for the operations of a group before it is destroyed")
                error.located(rank=self._rank, group=self._name, step=operation)
            elif isinstance(raised, PeerTimeoutError):
                compare_arenas(self._group)
                error = explained(self._group, raised, self._describe())
            error.step = operation
            error.what = error.what.replace("barrier on this channel", "collective operation")
            raise error from None
        finally:
            self._number = self._signals.number(_CHANNEL)

    def _program_lines(self, turn: int) -> list[str]:
        """The line of the program that every rank called. All ranks are here; empty if one is late."""
        views, own = self._errors[turn], str(program_line(sys._getframe(1))).encode()[:_ERROR_NBYTES]
        views[self._rank][:] = own.ljust(_ERROR_NBYTES, b"\0")
        try:
            self._signals.barrier(_LINES_CHANNEL, _BRIEF)
        except RendezvousError:
            return []
        return [bytes(view).rstrip(b"\0").decode(errors="replace") for view in views]

    def _mismatch(self, turn: int, operation: str) -> SymmemError:
        """Make the error for a step in which the ranks' lines differ."""
        found = [_LINE.unpack(line) for line in self._lines[turn]]
        texts = [_describe(*line) for line in found]
        calls = texts if len(set(texts)) > 1 else [f"step {line[-1]}" for line in found]
        error = different_calls(calls, self._program_lines(turn))
        return error.located(rank=self._rank, group=self._name, step=operation)


def _packed(error: SymmemError) -> bytes:
    """An error as text of the size of its place in the workspace."""
    wire = to_wire(error)
    for most in (len(error.what), 200, 50):
        what = error.what if most >= len(error.what) else f"{error.what[:most]} ... (see the log of this rank)"
        text = json.dumps(wire | {"what": what}, ensure_ascii=False).encode()
        if len(text) <= _ERROR_NBYTES:
            break
        wire |= {"hint": None}
    else:
        text = json.dumps({"type": wire["type"], "what": "see the log of this rank", "rank": error.rank}).encode()
    return text.ljust(_ERROR_NBYTES, b"\0")


class _Turn:
    """The right to run an operation; one thread has it at a time.

    Attributes:
        lock: The holder's. In ``with lock``, no exception of a signal handler comes between the lock and its release.
        owner: The holder sets it to its thread. It may be out of date if the lock is free.
    """

    def __init__(self, group: Group) -> None:
        self._rank, self._name = group.rank, group.name
        self._process = os.getpid()
        self.lock = threading.Lock()
        self.owner: int | None = None

    def check(self) -> int:
        """Return this thread, if it may wait for the lock.

        Raises:
            GroupError: This thread is already inside an operation. A finalizer or a signal handler began another.
            ForkedError: The process was forked since the group was made.
        """
        if self._process != os.getpid():
            raise ForkedError(
                f"the group {self._name!r} was made before this process was forked",
                hint="make a group in the child, or start workers with the 'spawn' method",
            )
        this = threading.get_ident()
        if self.owner == this and self.lock.locked():
            raise GroupError(
                "this thread began a collective operation inside another one of the same group",
                hint="make no collective call from a finalizer, a signal handler or another callback",
                rank=self._rank,
                group=self._name,
            )
        return this


_Place = tuple[int, torch.dtype, int, Sequence[int]]
"""Index of the region, then dtype, byte offset and shape of a tensor in it."""

_Key = tuple[int, int, int, int, bytes]
"""Values that must be equal on all ranks: codes of the operation, reduction and dtype; the root; the shape."""


def _key(operation: str, source: torch.Tensor, reduction: str = "", root: int = 0) -> _Key:
    codes = _OPERATION_CODES[operation], _REDUCTION_CODES[reduction], _DTYPE_CODES[source.dtype]
    return *codes, root, _shape_bytes(source.shape)


@functools.lru_cache(maxsize=1024)
def _shape_bytes(shape: Sequence[int]) -> bytes:
    """A shape as text of at most _SHAPE_NBYTES bytes. Long ones end with a hash."""
    text = shape_text(shape).encode()
    return text if len(text) <= _SHAPE_NBYTES else text[:20] + b"...#%08x" % zlib.crc32(text)


def _describe(operation: int, reduction: int, dtype: int, root: int, shape: bytes, piece: int, number: int) -> str:
    """The text for a line."""
    name = _OPERATIONS[operation]
    if name == "barrier":
        return f"barrier of no tensor on channel {root}"
    text = shape.rstrip(b"\0").decode()
    return describe(name, _REDUCTIONS[reduction] or root, text, _DTYPES[dtype], piece)


def _describe_latest(lines: Sequence[memoryview]) -> str:
    """Describe a rank's current operation, from the later of its two lines."""
    return _describe(*max((_LINE.unpack(line) for line in lines), key=operator.itemgetter(-1)))


def _view(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _pieces(total: int, most: int) -> Iterator[tuple[int, slice]]:
    """Number and slice of pieces of at most ``most``. Always yields one, maybe empty, so that ranks always meet."""
    most = max(most, 1)
    for piece, begin in enumerate(range(0, max(total, 1), most)):
        yield piece, slice(begin, min(begin + most, total))


def _share(total: int, world: int, rank: int) -> slice:
    """The part of a piece that a rank reduces. It is whole cache lines for all dtypes."""
    size = round_up(-(-total // world), _LINE_STRIDE)
    return slice(min(rank * size, total), min((rank + 1) * size, total))


def _most(dtype: torch.dtype) -> int:
    """Maximum number of elements of a piece to reduce. For a narrow dtype, the float32 sums are the limit."""
    return REGION // max(dtype.itemsize, 4)


def _is_narrow(dtype: torch.dtype) -> bool:
    """Whether sums are computed in float32."""
    return dtype.is_floating_point and dtype.itemsize < 4


def _is_exact(dtype: torch.dtype, reduction: str, world: int) -> bool:
    """Whether a narrow dtype's own arithmetic equals float32: minima, maxima, and sums of two values round once."""
    return dtype.itemsize == 2 and (reduction in ("min", "max") or (world == 2 and reduction == "sum"))
