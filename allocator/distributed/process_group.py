"""The process group of the backend ``symmem``."""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from symmem.config.kinds import MAX_SECONDS
from symmem.distributed.hosts import Hosts
from symmem.distributed.methods import METHODS, REDUCING, REDUCTIONS, Method
from symmem.distributed.work import WorkQueue
from symmem.errors import BackendUnavailableError, GroupError, UnsupportedError
from symmem.group.group import Group, check_timeout
from symmem.group.observers import group_made
from symmem.group.resolve import GroupLike, resolve_group
from symmem.ops import eager
from symmem.ops import functions as ops
from symmem.ops.collectives import KINDS
from symmem.tensor.tensor import SymmetricTensor

__all__ = ["Served", "SymmemProcessGroup", "make_process_group", "meet", "report"]

_c10d: Any = torch._C._distributed_c10d  # its stubs lack much
_autograd: Any = torch.autograd
_ProcessGroup: Any = _c10d.ProcessGroup
_UNSET = timedelta(milliseconds=-1)  # the timeout of torch's options, if the program gives none


def make_process_group(options: Any, backend_options: Any) -> SymmemProcessGroup:
    """Make the process group for ``init_process_group("symmem")`` and ``new_group(backend="symmem")``.

    Args:
        options: torch's ``DistributedBackendOptions``.
        backend_options: The argument ``pg_options``, which must be None.

    Raises:
        UnsupportedError: There are options.
        BackendUnavailableError: This torch has no gloo.
    """
    if backend_options is not None:
        raise UnsupportedError(
            f"the backend symmem takes no options, such as this {type(backend_options).__name__}",
            hint="leave out pg_options",
            step="init_process_group",
        )
    return SymmemProcessGroup(options.store, options.group_rank, options.group_size, options.timeout)


class SymmemProcessGroup(_ProcessGroup):  # type: ignore[misc]
    """A process group with collective operations over shared memory.

    symmem's operators serve the methods in :data:`symmem.distributed.methods.METHODS`, if they have the reduction, the
    dtype and the form. The inner process group serves all other calls and methods. The operations of a group run in the
    order of their calls; for asynchronous ones see :mod:`symmem.distributed.work`.

    Making one is collective, and makes the inner group. The ranks meet in shared memory at the first operation.

    Args:
        store: All ranks share it.
        rank: This process's rank.
        size: Number of ranks.
        timeout: For every operation, unless the settings ``signal_timeout`` and ``rendezvous_timeout`` are set.

    Raises:
        BackendUnavailableError: This torch has no gloo.
        InvalidArgumentError: The timeout is not more than 0.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.seconds = check_timeout(min(timeout.total_seconds(), MAX_SECONDS))
        self.inner = _ProcessGroup(PrefixStore("inner/", store), rank, size)
        self.counts: Counter[tuple[str, str]] = Counter()
        self._group: Group | None = None
        self._lock = threading.Lock()  # threads of a rank meet the other ranks once
        self._queue = WorkQueue()
        weakref.finalize(self, self._queue.close)
        self._store = PrefixStore("hosts/", store)
        self._hosts: Hosts | None = None  # if the ranks are on several hosts
        # Torch's methods of this group find the backends of the inner group in this one.
        _register_inner((self, self.inner), PrefixStore("inner/", store), rank, size, timeout)

    def getBackendName(self) -> str:
        """The name of the backend, for torch."""
        return "symmem"

    @property
    def group(self) -> Group:
        """The :class:`symmem.Group` of the same ranks. They meet when it is first used."""
        with self._lock:
            if self._group is None:
                group = resolve_group(self)
                if meet(group):
                    self._hosts = Hosts(group, self._store, _make_rail)
                self._group = group
            return self._group

    def _serve(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run a method by symmem or by the inner group, and count it."""
        method = METHODS[name]
        if method.options is not None and len(arguments) == 2:
            arguments = (*arguments, method.options())
        if named or not arguments or not hasattr(arguments[-1], "asyncOp"):  # not as torch.distributed calls it
            plan: Callable[[], None] | str = "a call without options"
        else:
            plan = self._plan(method, arguments)
        if isinstance(plan, str):
            self.counts[method.operator, plan] += 1
            return getattr(self.inner, name)(*arguments, **named)
        self.counts[method.operator, ""] += 1
        work = self._run(method.operator, plan, arguments)
        if work is _LAUNCHED and method.layout is not None and self._hosts is None and self._group is not None:
            _remember(name, method, self._group, arguments)
        return work

    def serve_now(self, method: Method, arguments: tuple[Any, ...]) -> bool:
        """Run a call of a compiled graph behind the earlier ones, and count it. False if symmem does not serve it."""
        plan = self._plan(method, arguments)
        if isinstance(plan, str):
            return False
        self.counts[method.operator, ""] += 1
        self._run(method.operator, plan, arguments)
        return True

    def _plan(self, method: Method, arguments: tuple[Any, ...]) -> Callable[[], None] | str:
        """See :meth:`Method.plan`."""
        group = self._group or self.group
        plan = method.plan(self._hosts or ops, group, arguments)
        if self._hosts is not None and not isinstance(plan, str):
            return self._hosts.obstacle(method.operator, method.tensors(*arguments)) or plan
        return plan

    def _run(self, operator: str, call: Callable[[], None], arguments: tuple[Any, ...]) -> Any:
        """Run a call now or later, behind the earlier ones. A call on CUDA belongs to the current stream."""
        outputs, options = arguments[0], arguments[-1]
        if self._hosts is not None:
            call = functools.partial(self._hosts.run, operator, call)
        if _is_on_cuda(outputs):
            call()
            return _LAUNCHED
        profiling = _is_profiling()
        if not (options.asyncOp or profiling):
            self._queue.run(call)
            return _COMPLETE
        if profiling:
            call = _profiled(operator, call, arguments[1] if len(arguments) > 2 else outputs)
        work = self._queue.submit(call, [outputs] if isinstance(outputs, torch.Tensor) else outputs, profiling)
        if not options.asyncOp:
            work.wait()
        return work

    def barrier(self, opts: Any = None) -> Any:
        """Wait for all ranks. Devices other than the CPU, and a timeout of its own, need the inner group's barrier."""
        opts = opts or _c10d.BarrierOptions()
        group = self.group
        is_special = opts.timeout != _UNSET or (opts.device is not None and opts.device.type != "cpu")
        obstacle = "a timeout or a device of its own" if is_special else ""
        if self._hosts is not None:
            obstacle = obstacle or self._hosts.obstacle("barrier")
        self.counts["barrier", obstacle] += 1
        if obstacle:
            return self.inner.barrier(opts)
        functions: Any = self._hosts or ops
        return self._run("barrier", functools.partial(functions.barrier, None, group), ([], opts))

    def shutdown(self) -> None:
        """Leave the group. Local. Torch calls it in ``destroy_process_group``."""
        self._leave()
        self.inner.shutdown()

    def abort(self) -> None:
        """Leave the group, and end the operations of the inner group. Local."""
        self._leave()
        self.inner.abort()

    def _leave(self) -> None:
        self._queue.close()
        if self._hosts is not None:
            self._hosts.close()
        if self._group is not None:
            self._group.close()
        self._group = self._hosts = None  # their memory goes now, even if the program keeps the process group

    def _get_backend(self, device: torch.device) -> Any:
        """The inner group's backend for a device, which can also allocate symmetric memory."""
        return _Backend(self, self.inner._get_backend(device))


class _Backend:
    """A backend of the inner group, and the memory of the group's arena.

    FSDP2 asks for both after ``set_allocate_memory_from_process_group_for_comm(True)``.
    """

    def __init__(self, process_group: SymmemProcessGroup, backend: Any) -> None:
        self._process_group, self._backend = process_group, backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        """Whether :meth:`allocate_tensor` works. Collective over the group the first time."""
        return self._process_group.group.ledger is not None

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor of ``size`` elements in the arena of the group. All ranks allocate alike; see docs/arenas.md."""
        return SymmetricTensor.allocate((size,), dtype, device, group=self._process_group.group).tensor


class Served(NamedTuple):
    """How often an operation of a process group was called.

    Attributes:
        operation: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast`` or ``barrier``.
        by: ``"symmem"`` or ``"inner"``.
        why: Why symmem does not serve these calls; empty if it does.
        calls: Their number.
    """

    operation: str
    by: str
    why: str
    calls: int


def report(group: GroupLike = None) -> list[Served]:
    """Tell which calls of a process group symmem has served, and which ones the inner group. Local.

    Operations that symmem never serves are not counted: send, recv, gather, scatter, reduce, all_to_all of lists.

    Args:
        group: A process group of the backend ``symmem``, or what names one; default the default group.

    Raises:
        GroupError: The group has another backend.
    """
    process_group = resolve_group(group).process_group
    if not isinstance(process_group, SymmemProcessGroup):
        raise GroupError("the group is not of the backend symmem", hint='make it with backend="symmem"', step="report")
    counts = sorted(process_group.counts.items())
    return [Served(operation, "inner" if why else "symmem", why, calls) for (operation, why), calls in counts]


def meet(group: Group) -> str:
    """Let the ranks of a group meet in shared memory. Collective.

    Returns why symmem cannot serve the group; empty if it can.
    """
    with group.collective("process group"):
        pass
    if group.size > 1 and group.ledger is None:
        return "ranks that share no memory: on several hosts, or in several containers"
    return ""


def _remember(name: str, method: Method, group: Group, arguments: Sequence[Any]) -> None:
    """Let C repeat a call on CUDA that was just made. The first time, replace the method by a callable in C."""
    options = arguments[-1]
    option = options.rootRank if method.operator == "broadcast" else None
    if method.operator in REDUCING:
        option = REDUCTIONS[hash(options.reduceOp)]
    assert method.operands is not None, "a method with a layout has operands"
    x, result = method.operands(group, *arguments)
    tensors = method.tensors(*arguments)
    given = eager.Given(method, tensors[0], tensors[-1])
    known = eager.learn(KINDS[method.operator], group, x, option, given.out, result, given)
    python = vars(SymmemProcessGroup)[name]
    if not known or not isinstance(python, types.FunctionType):
        return
    made = eager.method(
        layout=method.layout,
        kind=method,
        python=python,
        reductions=REDUCTIONS if method.operator in REDUCING else None,
        has_root=method.operator == "broadcast",
        count=(method.operator, ""),
        work=_LAUNCHED,
    )
    setattr(SymmemProcessGroup, name, made)


def _is_on_cuda(tensors: Any) -> bool:
    return any(x.is_cuda for x in _flat(tensors))


def _profiled(operator: str, call: Callable[[], None], inputs: Any) -> Callable[[], None]:
    """Show a call to the profiler as one event until its end, as torch's backends do. The call is in another thread."""
    record = _autograd._record_function_with_args_enter(f"symmem:{operator}", *_flat(inputs))

    def run() -> None:
        try:
            call()
        finally:
            _autograd._record_function_with_args_exit(record)

    return run


def _flat(tensors: Any) -> Iterator[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        yield tensors
    else:
        for each in tensors:
            yield from _flat(each)


def _inner_backends(store: Store, rank: int, size: int, timeout: timedelta) -> Iterator[tuple[torch.device, Any, Any]]:
    """The inner backends: device, type, backend."""
    if not dist.is_gloo_available():
        raise BackendUnavailableError(
            "the backend symmem needs gloo for what it does not do itself, and this torch has none",
            hint="install a torch with gloo, as PyTorch's own packages are",
            rank=rank,
            step="init_process_group",
        )
    kinds = _ProcessGroup.BackendType
    gloo = dist.ProcessGroupGloo(PrefixStore("gloo/", store), rank, size, timeout)
    yield torch.device("cpu"), kinds.GLOO, gloo
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl = _c10d.ProcessGroupNCCL(PrefixStore("nccl/", store), rank, size, timeout)
        yield torch.device("cuda"), kinds.NCCL, nccl
    elif torch.cuda.is_available():
        yield torch.device("cuda"), kinds.GLOO, gloo


def _register_inner(groups: Sequence[Any], store: Store, rank: int, size: int, timeout: timedelta) -> None:
    """Make the inner backends, and give them to process groups."""
    for device, kind, backend in _inner_backends(store, rank, size, timeout):
        for group in groups:
            group._register_backend(device, kind, backend)
            group._set_default_backend(_ProcessGroup.BackendType.GLOO)


def _make_rail(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Make an inner process group. Collective over its ranks."""
    rail = _ProcessGroup(store, rank, size)
    _register_inner([rail], store, rank, size, timeout)
    return rail


def _completed() -> Any:
    """A handle of an operation that is complete."""
    future: Any = torch.futures.Future()
    future.set_result(None)
    return _c10d._create_work_from_future(future)


_COMPLETE = _completed()
_LAUNCHED = _completed()  # work on the current stream
_is_profiling = torch._C._autograd._profiler_enabled


def _take_timeout(group: Any) -> None:
    """Make the timeout of a process group the default of both timeouts of its :class:`symmem.Group`."""
    process_group, settings = group.process_group, group.settings
    if isinstance(process_group, SymmemProcessGroup):
        names = [name for name in ("rendezvous_timeout", "signal_timeout") if settings.origins[name] == "default"]
        origins = {**settings.origins, **dict.fromkeys(names, "timeout of the process group")}
        seconds: dict[str, Any] = dict.fromkeys(names, process_group.seconds)
        group.settings = dataclasses.replace(settings, **seconds, origins=origins)


group_made.append(_take_timeout)


def _make_method(name: str) -> Callable[..., Any]:
    def method(self: SymmemProcessGroup, *arguments: Any, **named: Any) -> Any:
        return self._serve(name, arguments, named)

    method.__name__ = name
    method.__doc__ = f"Call the operator {METHODS[name].operator} or the inner group. See :meth:`SymmemProcessGroup`."
    return method


for _name in METHODS:
    setattr(SymmemProcessGroup, _name, _make_method(_name))
