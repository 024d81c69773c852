"""Launch the collective operations of a group on one GPU. The kernels are in :mod:`.collective_kernels`.

An engine has one workspace. All ranks rendezvous it at the first operation, and it serves one operation after the
other. A call chooses kernels by shape and launches them on the current stream. The arguments are prepared once per
dtype, size and operation; later calls change only the addresses.

All ranks call the same operations in the same order. They must also agree on the following:

* Calls of one engine on several streams run in the order of the calls: a call waits for the one before it, by an event.
  The program must order the replay of a graph, which counts as a call here.
* All-gather, all-to-all and broadcast store large parts directly into the peers' results, if the results are in
  symmetric memory. So the results must be in symmetric memory on all ranks, at the same offset of the same allocation,
  or in other memory on all ranks.

The kernels compare signatures of the calls; a difference ends in a MismatchError in the next call of every rank.

Kernels give up if a rank refuses the call, comes too late, or makes another call. From then on, the group's operations
give up on all ranks. A rank that knows it begins its next call with a collective operation: see
:meth:`CudaEngine.resume`. Every rank counts its calls: launched, replayed and refused ones. Ranks may learn of it in
different calls, because the host of a rank can be ahead of its GPU. So the earlier calls of the rank that is furthest
ahead have given up already, and raise on the other ranks. In its next call, every rank resets its workspace while no
kernel of the group runs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch

from symmem.backends.cuda_signals import device_of, name_steps
from symmem.backends.driver_errors import driver_error
from symmem.backends.gpu import finish_stream
from symmem.backends.kernel_status import raise_failure
from symmem.errors import MismatchError, PeerTimeoutError, SymmemError, UnsupportedError, from_wire, to_wire
from symmem.group.agreement import as_symmem_error
from symmem.group.call_site import CallSite, program_line
from symmem.group.compare import compare_in_group, different_calls, exchange_json
from symmem.group.group import Group
from symmem.memory import cuda_graphs
from symmem.memory.block import Block
from symmem.memory.registry import block_at
from symmem.ops.engines.arithmetic import Tree, sum_leaves
from symmem.ops.engines.base import describe, shape_text
from symmem.ops.engines.collective_kernels import (
    CALL,
    CAUSE,
    COMPARING,
    END,
    OPERATORS,
    STEPS,
    TYPES,
    WorkspaceLayout,
)
from symmem.ops.engines.cuda_programs import program
from symmem.ops.engines.cuda_tuning import BLOCKS, Choice, Table, grid, table_for
from symmem.redirect.cuda_pool import is_pooled
from symmem.tensor.tensor import SymmetricTensor

log = logging.getLogger("symmem.ops")

__all__ = ["CudaEngine", "Chunk", "chunks"]

_Method = TypeVar("_Method", bound=Callable[..., None])

_LANDING = 64 << 20  # bytes per parity that an operation can push to a rank
_STAGE = 8 << 20  # bytes per parity that a rank can publish
_LARGEST_WORLD = 64  # the kernels keep a set of ranks in 64 bits
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not used CUDA yet
_REMEMBERED = 4096  # maximum number of plans in the cache
_NO_ROOT = 0xFFFFFFFF
_UNIT = 16
_ONES = 0xFFFFFFFF
_NO_STREAM = (1 << 64) - 1

name_steps(STEPS)
_NUMBERS = {name: number for number, name in STEPS.items()}


class Chunk(NamedTuple):
    """The part of an operation that one launch handles, in bytes."""

    start: int
    nbytes: int


def chunks(nbytes: int, most: int) -> list[Chunk]:
    """Split ``nbytes`` (more than 0) into equal multiples of 16 of at most ``most``. Only the last may be smaller."""
    count = -(-nbytes // most)
    size = -(-nbytes // count // _UNIT) * _UNIT
    return [Chunk(start, min(size, nbytes - start)) for start in range(0, nbytes, size)]


@functools.cache
def call_type(world: int) -> type[ctypes.Structure]:
    """``struct Call`` of :data:`symmem.ops.engines.collective_kernels.SOURCE`."""
    arrays = [(name, ctypes.c_uint64 * world) for name in ("areas", "outs")]
    names = ("source", "out", "bytes", "slice", "stride", "out_stride", "limit", "status")
    longs = [(name, ctypes.c_uint64) for name in names]
    words = [
        (name, ctypes.c_uint32) for name in ("step", "rank", "group", "root", "nap", "signature", "counts", "unused")
    ]
    return type("Call", (ctypes.Structure,), {"_fields_": [*arrays, *longs, *words]})


class _PreparedKernel:
    """A kernel with its arguments. A launch adds the offset ``start`` to the addresses of the tensors."""

    __slots__ = ("_pointers", "arguments", "blocks", "call", "described", "function", "memory", "start", "threads")

    def __init__(
        self, function: Any, blocks: int, threads: int, call: Any, start: int, described: tuple[str, CallSite]
    ) -> None:
        self.function, self.blocks, self.threads, self.call = function, blocks, threads, call
        self.start, self.described = start, described
        self.memory: _SymmetricOut | None = None  # the result with its addresses in `call`, if any
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(call))
        self.arguments = ctypes.addressof(self._pointers)


def _operation(method: _Method) -> _Method:
    """Make a method report an error to the other ranks, unless it has launched its kernels."""

    @functools.wraps(method)
    def run(self: CudaEngine, *arguments: Any, **options: Any) -> None:
        self._is_launched = False
        try:
            method(self, *arguments, **options)
        except BaseException as error:
            if not self._is_launched:
                reason = as_symmem_error(error).located(rank=self._rank, group=self._group.name, step=method.__name__)
                self.refuse(method.__name__, reason)
            raise

    return cast("_Method", run)


class CudaEngine:
    """See :class:`symmem.ops.engines.base.Engine`. The constructor is local. The first operation waits for all ranks.

    Args:
        group: The participating ranks.
        device: This rank's GPU.

    Raises:
        UnsupportedError: From the first operation: a CUDA graph is being captured, a rank's memory is not load/store
            reachable, or the group has more than 64 ranks. From any operation: the dtype cannot be reduced.
        MismatchError: From the first operation: ranks have different tables of algorithms.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group, self._rank, self._world = group, group.rank, group.size
        self._ordinal = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", self._ordinal)
        self.layout = WorkspaceLayout.make(self._world, _LANDING, _STAGE, BLOCKS)
        self._state = device_of(self._ordinal)
        self._number = self._state.enter(group)
        self._status, self._given_up = self._state.status, self._state.given_up(self._number)
        # The host's addresses of two words that are not 0 after a kernel has stopped or given up.
        self.failure_words = ctypes.addressof(self._status), ctypes.addressof(self._given_up)
        self.last_stream = ctypes.c_uint64(_NO_STREAM)  # of the latest call
        self._last_captured = ctypes.c_uint64(_NO_STREAM)  # of the latest call that was captured
        self._launch_kernel = self._state.driver.bindings.cuLaunchKernel
        self._lock = threading.Lock()  # held while addresses are set, until the launch has copied them
        self._workspace: SymmetricTensor | None = None
        self._areas: tuple[int, ...] = ()
        self._plans: dict[Any, list[_PreparedKernel]] = {}
        self._memories: dict[tuple[int, int], _SymmetricOut] = {}
        self._described: dict[int, tuple[str, CallSite]] = {}  # by signature: the call, and where it was made first
        self.calls: Any = None  # calls that symmem.ops.eager can repeat
        self._is_launched = False  # the call in progress
        self._calls_before = 0  # calls that the workspace does not count: before its reset, or without a launch
        self._resume_at = 0  # the first call that all ranks can launch, as far as this rank knows
        self._refusal: SymmemError | None = None  # why this rank let the others' kernels give up
        self._reason: SymmemError | None = None  # why they gave up, as all ranks know
        self.use(table_for(self._world, group.settings.algorithms))

    def use(self, table: Table) -> None:
        """Use this table from now on. All ranks must switch before the same operation. Local."""
        self.table = table
        self._beyond = table.symmetric_beyond()
        self._plans.clear()
        if self.calls is not None:
            self.calls.clear()

    @property
    def context(self) -> int:
        """The CUDA context for this engine's launches, independent of the current one."""
        return int(self._state.driver.context(self._ordinal))

    # Operations.

    @_operation
    def all_reduce(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_reduce`."""
        key = ("all_reduce", source.shape, source.dtype, reduction)
        plan = self._plans.get(key)
        if plan is None:
            if self._is_trivial(source, out, source.nbytes):
                return
            functions = functools.partial(self._reducing, "all_reduce", source.dtype, reduction)
            called = functools.partial(describe, "all_reduce", reduction, shape_text(source.shape), source.dtype)
            plan = self._plan_all_reduce(source.nbytes, functions, called)
            self._remember(key, plan)
        address = source.data_ptr()
        self._run(plan, address, address if out is source else out.data_ptr())

    @_operation
    def reduce_scatter(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.reduce_scatter`."""
        nbytes = out.nbytes
        if self._is_trivial(source, out, nbytes):
            return
        key = ("reduce_scatter", source.shape, out.dtype, reduction)
        plan = self._plans.get(key)
        if plan is None:
            functions = functools.partial(self._reducing, "reduce_scatter", out.dtype, reduction)
            called = functools.partial(describe, "reduce_scatter", reduction, shape_text(source.shape), out.dtype)
            plan = self._plan_reduce_scatter(nbytes, functions, called)
            self._remember(key, plan)
        self._run(plan, source.data_ptr(), out.data_ptr())

    @_operation
    def all_reduce_tree(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_reduce_tree`."""
        self._tree("all_reduce_tree", source, out, reduction)

    @_operation
    def reduce_scatter_tree(self, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.reduce_scatter_tree`."""
        self._tree("reduce_scatter_tree", source, out, reduction)

    def _tree(self, name: str, source: torch.Tensor, out: torch.Tensor, reduction: str) -> None:
        """Sum the own leaves, let the kernels sum over ranks in the wide dtype, and round."""
        if out.numel() == 0:
            self._is_trivial(out, out, 0)
            return
        given = sum_leaves(source)
        if self._world == 1:
            total = given.view(out.shape)
        else:
            total = out if out.dtype == given.dtype else torch.empty_like(out, dtype=given.dtype)
            key = (name, source.shape, source.dtype, reduction)
            plan = self._plans.get(key)
            if plan is None:
                functions = functools.partial(self._reducing, name, given.dtype, "sum", tree=True)
                called = functools.partial(describe, name, reduction, shape_text(source.shape), source.dtype)
                make = self._plan_all_reduce if name == "all_reduce_tree" else self._plan_reduce_scatter
                plan = make(total.nbytes, functions, called)
                self._remember(key, plan)
            self._run(plan, given.data_ptr(), total.data_ptr())
        Tree(reduction, source.shape[0] * self._world).finish(total, out)

    @_operation
    def all_gather(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_gather`."""
        self._move("all_gather", source, out, source.nbytes, 0, source.nbytes)

    @_operation
    def all_to_all(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.all_to_all`."""
        part = source.nbytes // self._world
        self._move("all_to_all", source, out, part, part, part)

    @_operation
    def broadcast(self, source: torch.Tensor, out: torch.Tensor, root: int) -> None:
        """See :meth:`symmem.ops.engines.base.Engine.broadcast`."""
        self._move("broadcast", source, out, source.nbytes, 0, 0, root)

    def sole_launch(
        self, operation: str, source: torch.Tensor, out: torch.Tensor, option: Any
    ) -> tuple[_PreparedKernel, bool] | None:
        """The single kernel of a repeated call, and whether it is only for results outside of symmetric memory.

        None if the call takes several kernels, or if the kernel depends on the address of the result.
        """
        is_outside = False
        if operation in ("all_reduce", "reduce_scatter"):
            key: Any = (operation, source.shape, out.dtype, option)
        else:
            nbytes = source.nbytes // self._world if operation == "all_to_all" else source.nbytes
            if nbytes > self._beyond and nbytes % _UNIT == 0:
                is_outside = True
                if block_at(out.data_ptr()) is not None:
                    return None
            key = (operation, source.shape, source.dtype, _NO_ROOT if option is None else option, True)
        plan = self._plans.get(key, ())
        return (plan[0], is_outside) if len(plan) == 1 else None

    def check(self) -> None:
        """Raise the error of a failed kernel of this process, if any. Local and quick; does not wait.

        Raises:
            PeerTimeoutError, PeerLostError: Names the missing rank and the operation. A timeout is raised once.
            MismatchError: Ranks made different calls. Raised once.
            SymmemError: A rank refused a call. Raised once.
        """
        self._check_usable()
        if error := self._state.take_error(self._number):
            raise error

    def _check_usable(self) -> None:
        if error := self._state.failure() or self._state.loss(self._number):
            raise error

    # Calls that gave up.

    @property
    def gave_up(self) -> bool:
        """Whether this rank knows that kernels of the group have given up. Reads memory of the host only."""
        return bool(self._given_up[0])

    def refuse(self, operation: str, error: SymmemError) -> None:
        """Let the kernels of the other ranks give up, which wait for this rank in a call that it refuses.

        Waits for this rank's earlier operations and the current stream. Does nothing during the capture of a graph.

        Args:
            operation: The name of the operation or operator.
            error: What this rank raises. An error that a collective of the group raised is known to all ranks already.
        """
        if self._world == 1:
            return
        known = error.propagated_to == self._group.name
        if not self._areas:  # the others are about to make the workspace
            if not known:
                self._group.fail(operation, error)
            return
        try:
            if torch._C._cuda_isCurrentStreamCapturing():
                return
            self._calls_before += 1
            if not known and not self._is_broken():
                self._finish()
                if not self._is_broken():
                    self._end_peers(operation, error)
        except (SymmemError, RuntimeError) as reason:  # the caller raises its own error
            log.warning("the other ranks do not know that this rank refused %s: %s", operation, reason)

    def _is_broken(self) -> bool:
        return bool(self._status[0] or self._given_up[0])

    def _end_peers(self, operation: str, error: SymmemError) -> None:
        """End all ranks from this rank's turn on."""
        step = next(number for name, number in _NUMBERS.items() if operation.startswith(name))
        cause = self._state.refuse(self._number, step, self._rank)
        self._refusal = error
        stream = torch._C._cuda_getCurrentRawStream(self._ordinal)
        driver = self._state.driver
        turn = self._read(0, 8)
        with self._lock, driver.on(self._ordinal):
            for area in self._areas:
                driver.fill(area + CAUSE, cause, 4, stream)
                driver.fill(area + END, (2 * turn + 1) & _ONES, 4, stream)
        finish_stream(self.device)

    def _calls(self) -> int:
        """How many calls this rank has made, launched or not, also from graphs. Waits for this rank's calls."""
        self._finish()
        return self._calls_before + (self._read(0, 8) >> 32)

    def _read(self, offset: int, nbytes: int) -> int:
        """Read a word of this rank's workspace."""
        driver = self._state.driver
        with driver.on(self._ordinal):
            stream = torch._C._cuda_getCurrentRawStream(self._ordinal)
            return int.from_bytes(driver.read(self._areas[self._rank] + offset, nbytes, stream), "little")

    def _before_launch(self) -> None:
        """Bring the group back in step if its kernels gave up. Collective then, unless a graph is being captured."""
        self._check_usable()
        if torch._C._cuda_isCurrentStreamCapturing():
            return
        if error := self._state.take_error(self._number, PeerTimeoutError):
            raise error
        self.resume()

    def resume(self) -> SymmemError | None:
        """Bring the group back in step after its kernels gave up. Collective over the group.

        Returns:
            Why they gave up; None during the capture of a graph, when this method does nothing.

        Raises:
            MismatchError: They gave up because ranks made different calls. The text names every rank's call.
            SymmemError: Other ranks have launched the current call already, and it gave up. Raised once per such call.
            PeerTimeoutError, PeerLostError: A rank did not come. The next call tries again.
        """
        if torch._C._cuda_isCurrentStreamCapturing():
            return None
        calls = self._calls()
        while calls >= self._resume_at:
            if self._reset_if_in_step(calls):
                assert self._reason is not None
                if self._reason.propagated_to:
                    self._state.take_error(self._number)
                    raise self._reason
                return self._reason
        assert self._reason is not None
        self._state.take_error(self._number)  # this rank raises it here
        error = from_wire(to_wire(self._reason))
        error.what += ". This call gave up too, because other ranks had launched it before they knew"
        raise error

    def resume_and_raise(self) -> None:
        """The same, but raise why they gave up. For ranks that are all in the same call. Collective over the group."""
        if error := self.resume():
            self._state.take_error(self._number)
            raise error

    def _reset_if_in_step(self, calls: int) -> bool:
        """Reset the workspaces if all ranks are at the same call. Returns whether they are. Collective."""
        own = self._refusal or self._state.abandonment(self._number)
        timeout = self._group.settings.signal_timeout
        with self._group.collective("resumption of collective operations", timeout) as collective:
            told = {"calls": calls, "error": to_wire(own) if own else None, "refused": self._refusal is not None}
            states = exchange_json(collective, "calls", told)
            self._resume_at = max(state["calls"] for state in states)
            in_step = all(state["calls"] == self._resume_at for state in states)
            if in_step:
                calls_that_ended = exchange_json(collective, "no kernel runs", self._call_that_ended())
                self._clear(self._areas[self._rank])
                self._calls_before = calls
        first = max(states, key=lambda state: (state["refused"], state["error"] is not None))
        self._reason = from_wire(first["error"])
        if in_step:
            if isinstance(self._reason, MismatchError) and not first["refused"]:
                operations, lines = zip(*calls_that_ended, strict=True)
                error = different_calls(operations, lines, "first called")
                self._reason = error.located(rank=self._rank, group=self._group.name, step=self._reason.step or "")
                self._reason.propagated_to = self._group.name
            self._state.resume(self._number, self._reason)
            if first["refused"] and self._refusal is None:
                log.error("an operation of rank %d gave up, because a rank refused it: %s", self._rank, self._reason)
            self._refusal = None
            self._resume_at = 0
        return in_step

    def _call_that_ended(self) -> tuple[str, str | None]:
        """The first call of this rank that gave up, and the line of the program that made such a call first."""
        what, line = self._described.get(self._read(CALL, 4), ("another operation", None))
        return what, line and str(line)

    def _clear(self, area: int) -> None:
        """Bring this rank's workspace to its first state. No kernel of the group may run."""
        layout, driver = self.layout, self._state.driver
        with driver.on(self._ordinal):
            stream = torch._C._cuda_getCurrentRawStream(self._ordinal)
            driver.fill(area, 0, layout.landing, stream)
            driver.fill(area + layout.landing, _ONES, layout.stages - layout.landing, stream)
        finish_stream(self.device)

    # Plans: the launches of an operation, by shape.

    def _plan_all_reduce(
        self, nbytes: int, functions: Callable[[], dict[str, Any]], called: Callable[[int], str]
    ) -> list[_PreparedKernel]:
        """``called`` describes a piece of the call by its number."""
        choice, kernels = self.table.choose(nbytes), functions()
        half = self.layout.slot // 2 // _UNIT * _UNIT
        most = {"one_shot": self.layout.slot, "two_shot": self._world * half}[choice.kernel]
        plan: list[_PreparedKernel] = []
        for start, size in chunks(nbytes, most):
            part = size if choice.kernel == "one_shot" else -(-size // self._world // _UNIT) * _UNIT
            sizes = {"bytes": size, "slice": part, "stride": part}
            kernel, call = kernels[choice.kernel], called(len(plan))
            plan.append(self._launch("all_reduce", call, kernel, choice, part, start, sizes))
        return plan

    def _plan_reduce_scatter(
        self, nbytes: int, functions: Callable[[], dict[str, Any]], called: Callable[[int], str]
    ) -> list[_PreparedKernel]:
        """``nbytes`` is the size of the result."""
        choice, kernels = self.table.choose_reduce_scatter(nbytes), functions()
        plan: list[_PreparedKernel] = []
        for start, size in chunks(nbytes, self.layout.slot):
            sizes = {"bytes": (self._world - 1) * nbytes + size, "slice": size, "stride": nbytes}
            kernel, call = kernels[choice.kernel], called(len(plan))
            plan.append(self._launch("reduce_scatter", call, kernel, choice, size, start, sizes))
        return plan

    def _move(
        self,
        step: str,
        source: torch.Tensor,
        out: torch.Tensor,
        nbytes: int,
        stride: int,
        out_stride: int,
        root: int = _NO_ROOT,
    ) -> None:
        if self._is_trivial(source, out, nbytes):
            return
        # Only parts that are multiples of 16 bytes, so that every part begins at a multiple of 16.
        memory = None if nbytes <= self._beyond or nbytes % _UNIT else self._memory(out)
        key = (step, source.shape, source.dtype, root, memory is None)
        plan = self._plans.get(key)
        if plan is None:
            choice = self.table.choose_move(nbytes, memory is not None)
            plan = self._plan_move(step, source, nbytes, stride, out_stride, root, choice)
            self._remember(key, plan)
        self._run(plan, source.data_ptr(), out.data_ptr(), memory)

    def _plan_move(
        self,
        step: str,
        source: torch.Tensor,
        nbytes: int,
        stride: int,
        out_stride: int,
        root: int,
        choice: Choice,
    ) -> list[_PreparedKernel]:
        self._ready(step)
        functions = program(self._state, "move", self.layout.macros()).functions
        most = {
            "exchange": self.layout.slot // 2 // _UNIT * _UNIT,  # it needs twice the space
            "pull": self.layout.stage // (self._world if stride else 1) // _UNIT * _UNIT,
            "put": nbytes,
        }[choice.kernel]
        plan: list[_PreparedKernel] = []
        for start, size in chunks(nbytes, most):
            sizes = {"bytes": size, "slice": size, "stride": stride, "out_stride": out_stride, "root": root}
            work = size * 2 if choice.kernel == "exchange" else size
            call = describe(step, 0 if root == _NO_ROOT else root, shape_text(source.shape), source.dtype, len(plan))
            plan.append(self._launch(step, call, functions[choice.kernel], choice, work, start, sizes))
        return plan

    def _launch(
        self, step: str, described: str, function: Any, choice: Choice, work: int, start: int, sizes: dict[str, int]
    ) -> _PreparedKernel:
        call = call_type(self._world)(
            areas=(ctypes.c_uint64 * self._world)(*self._areas),
            limit=int(self._group.settings.signal_timeout * 1e9),
            status=self._state.status_address,
            step=_NUMBERS[step],
            rank=self._rank,
            group=self._number,
            nap=choice.nap,
            **{"root": _NO_ROOT, **sizes},
        )
        blocks = grid(choice, -(-work // _UNIT))
        described_at = described, program_line(sys._getframe(1))
        launch = _PreparedKernel(function, blocks, choice.threads + COMPARING, call, start, described_at)
        self._sign(launch, None)
        return launch

    def _sign(self, launch: _PreparedKernel, memory: _SymmetricOut | None) -> None:
        """Set what must be equal on all ranks: the call, and the place of its results in symmetric memory."""
        what, line = launch.described
        if memory is not None:
            launch.call.outs[:], launch.memory = memory.outs, memory
            what += f", into byte {memory.place}"
        launch.call.signature = signature = zlib.crc32(what.encode()) or 1
        if len(self._described) >= 2 * _REMEMBERED:
            self._described.clear()
        self._described.setdefault(signature, (what, line))

    def _remember(self, key: Any, plan: list[_PreparedKernel]) -> None:
        plan[-1].call.counts = 1  # all kernels of a plan are one call
        if len(self._plans) >= _REMEMBERED:
            self._plans.clear()
        self._plans[key] = plan

    def _reducing(self, step: str, dtype: torch.dtype, reduction: str, tree: bool = False) -> dict[str, Any]:
        if dtype not in TYPES:
            raise UnsupportedError(
                f"{step} of {dtype} on CUDA: only {', '.join(str(each) for each in TYPES)} can be reduced",
                hint="convert it first, or use torch.distributed for this dtype",
                rank=self._rank,
                group=self._group.name,
                step=step,
            )
        self._ready(step)
        macros = {"REDUCES": "1", f"TYPE_{TYPES[dtype]}": "1", f"OPERATOR_{OPERATORS[reduction]}": "1"}
        if tree:
            macros["TREE"] = "1"
        return program(self._state, "reduce", self.layout.macros() | macros).functions

    # The workspace.

    def _ready(self, step: str) -> None:
        """Make the workspace at the first operation. Collective over the group then."""
        if self._areas:
            return
        cuda_graphs.refuse(self.device, f"the first {step} of the group {self._group.name!r}")
        if self._world > _LARGEST_WORLD:
            raise UnsupportedError(
                f"{step} of {self._world} ranks: the kernels support {_LARGEST_WORLD} at most",
                rank=self._rank,
                group=self._group.name,
                step=step,
            )
        hint = "use the same setting `algorithms` on all ranks, or files with the same rows"
        compare_in_group(self._group, step, {"table of algorithms": self.table.fingerprint()}, hint)
        layout = self.layout
        workspace = SymmetricTensor.allocate(
            (layout.nbytes,), torch.uint8, self.device, group=self._group, arena=False, name="collective operations"
        )
        self._clear(workspace.tensor.data_ptr())  # peers may store there once the ranks have met
        workspace.rendezvous(self._group)
        areas = tuple(int(pointer) for pointer in workspace.pointers_of(self._group).tolist())
        unreachable = tuple(rank for rank, area in enumerate(areas) if not area)
        if unreachable:
            raise UnsupportedError(
                f"no {step}: the memory of ranks {list(unreachable)} is not load/store reachable from here",
                hint="use a group of ranks that reach each other, within one host or NVLink fabric",
                rank=self._rank,
                group=self._group.name,
                step=step,
                peers=unreachable,
            )
        self._workspace, self._areas, self._calls_before = workspace, areas, 0

    def _memory(self, out: torch.Tensor) -> _SymmetricOut | None:
        """All ranks' results, if they are in symmetric memory that this group has rendezvoused."""
        key = out.data_ptr(), out.nbytes
        memory = self._memories.get(key)
        if memory is None or (block := memory.block()) is None or block.closed:
            memory = self._find_memory(*key)
            if memory is None:
                return None
            if len(self._memories) >= _REMEMBERED:
                self._memories.clear()
            self._memories[key] = memory
        return memory

    def _find_memory(self, address: int, nbytes: int) -> _SymmetricOut | None:
        block = block_at(address)
        if block is None or block.closed or address % _UNIT or address + nbytes > block.pointer + block.nbytes:
            return None
        mapping = block.mappings.get(self._group)
        if mapping is None or not all(mapping.pointers) or is_pooled(block):
            return None
        offset = address - block.allocation.pointer
        place = f"{offset} of symmetric memory {mapping.serial}"
        return _SymmetricOut(tuple(pointer + offset for pointer in mapping.pointers), place, weakref.ref(block))

    # Launching.

    def _is_trivial(self, source: torch.Tensor, out: torch.Tensor, nbytes: int) -> bool:
        """Handle empty tensors and groups of one rank. True if the call is complete."""
        if nbytes == 0:
            self._calls_before += 1
            self._is_launched = True
            return True
        if self._world == 1 and source.data_ptr() != out.data_ptr():
            out.view(-1).copy_(source.reshape(-1))
        return self._world == 1

    def _run(self, plan: Sequence[_PreparedKernel], source: int, out: int, memory: _SymmetricOut | None = None) -> None:
        # One long function, because a Python call costs as much as a step of it.
        if self._status[0] or self._given_up[0]:
            self._before_launch()
        try:
            device, capturing = torch._C._cuda_getDevice(), torch._C._cuda_isCurrentStreamCapturing()
        except RuntimeError as error:
            raise_failure(error)
            raise
        if device != self._ordinal:
            with torch.cuda.device(self._ordinal):
                self._run(plan, source, out, memory)
            return
        stream = torch._C._cuda_getCurrentRawStream(self._ordinal)
        if capturing:
            self._keep(memory)
        with self._lock:
            if capturing or stream != self.last_stream.value:
                self._order(stream, capturing)
            for launch in plan:
                call = launch.call
                call.source, call.out = source + launch.start, out + launch.start
                if memory is not None and memory is not launch.memory:
                    self._sign(launch, memory)
                (code,) = self._launch_kernel(
                    launch.function, launch.blocks, 1, 1, launch.threads, 1, 1, 0, stream, launch.arguments, 0
                )
                if code:
                    self._failed(launch, stream, code)
        self._is_launched = True

    def _order(self, stream: int, capturing: bool) -> None:
        """Let a stream wait for the latest call, if that was on another stream.

        The kernels of the ranks pair by order. Without the wait, two GPUs could run calls on two streams in different
        orders.
        """
        last = self._last_captured if capturing else self.last_stream
        if last.value not in (stream, _NO_STREAM):
            with self._state.driver.on(self._ordinal):
                self._state.driver.order(last.value, stream, capturing)
        last.value = stream

    def _finish(self) -> None:
        """Wait on the host for the current stream and for this rank's calls on other streams."""
        self._order(torch._C._cuda_getCurrentRawStream(self._ordinal), capturing=False)
        finish_stream(self.device)

    def _keep(self, memory: _SymmetricOut | None) -> None:
        """Let the captured graph keep the memory of its kernels alive. It may outlive this engine and the tensors."""
        if self._workspace is not None:
            cuda_graphs.keep(self._workspace._block)
        block = memory.block() if memory else None
        if block is not None:
            cuda_graphs.keep(block)

    def _failed(self, launch: _PreparedKernel, stream: int, code: Any) -> None:
        """Enter the CUDA context and launch again if this helps, else raise."""
        if code == _INVALID_CONTEXT:
            self._state.driver.enter(self._ordinal)
            (code,) = self._launch_kernel(
                launch.function, launch.blocks, 1, 1, launch.threads, 1, 1, 0, stream, launch.arguments, 0
            )
            if not code:
                return
        self.check()
        error: SymmemError = driver_error(code.name, f"a collective kernel cannot be launched: {code.name}")
        raise error.located(rank=self._rank, group=self._group.name, step="launch")


class _SymmetricOut(NamedTuple):
    """All ranks' results in symmetric memory.

    Attributes:
        outs: Addresses by rank.
        place: Describes the place; it must be equal on all ranks.
        block: This rank's block. The addresses are valid until it is freed or closed.
    """

    outs: tuple[int, ...]
    place: str
    block: weakref.ref[Block]
