"""Repeat eager calls of the collective operators on CUDA in C.

In Python a call takes 8 to 13 microseconds besides the kernel launch. This is more than small messages take on the GPU.
So C code (``symmem/native/eager.c``) remembers the launch of a call, and makes the next call with the same shapes,
dtype and options without Python. It returns calls that differ in any way to Python. Calls through the dispatcher reach
it from kernels in C++ (``symmem/native/operators.cpp``). Without either, the operators do the same, only slower, and a
warning says why.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from symmem import native
from symmem.group.group import Group
from symmem.memory.registry import tables
from symmem.ops.dispatch import USUAL_THREADS
from symmem.ops.engines.base import Engines

log = logging.getLogger("symmem.ops")

__all__ = ["Given", "learn", "method", "register", "run"]

_NEW, _SAME, _OTHER = range(3)  # the destinations of results in eager.c


class Repeatable(Protocol):
    """What an operation needs to be repeated; see :class:`symmem.ops.collectives.OperatorKind`."""

    @property
    def name(self) -> str:
        """The name of the operator."""

    @property
    def option(self) -> str:
        """The declaration of the option in the schema; may be empty."""

    @property
    def in_place(self) -> object:
        """Not None if a call in place is more than a launch."""

    @property
    def like_x(self) -> bool:
        """Whether the result has the shape of ``x``."""


def _nothing(kind: Repeatable, x: torch.Tensor, group: object, option: object, out: torch.Tensor | None, /) -> Any:
    return None


run = _nothing
"""Repeat an earlier call: ``eager.run(kind, x, group, option, out)`` returns the result, or None.

None means that no earlier call matches, or that something intercepts the call; then nothing was done. This name is
bound to the function of the C module as soon as a call can be repeated.
"""


class Given(NamedTuple):
    """The arguments of a method that made the call; see :func:`method`.

    Attributes:
        method: What names the method in C.
        x: The argument as the method was given it: it may have another shape.
        out: The tensor for the result.
    """

    method: object
    x: torch.Tensor
    out: torch.Tensor


def learn(
    kind: Repeatable,
    group: Group,
    x: torch.Tensor,
    option: object,
    out: torch.Tensor | None,
    result: torch.Tensor,
    given: Given | None = None,
) -> bool:
    """Remember the launch of a call that was just made, if this launch is enough to repeat the call. Local.

    Returns whether the call can be repeated.

    Args:
        kind: The operation.
        group: The group of the call.
        x: The argument.
        option: The argument between tensor and group, if any.
        out: The argument ``out`` of the call.
        result: The tensor with the result.
        given: If a method made the call, its arguments: its next call is repeated, not the operator's.
    """
    engine: Any = group.extension(Engines).get(x.device)
    if not hasattr(engine, "sole_launch") or (out is x and kind.in_place is not None):
        return False
    found = engine.sole_launch(kind.name, x, result, option)
    if found is None or (module := _begun()) is None:
        return False
    launch, is_outside = found
    if engine.calls is None:
        process_group = group.process_group
        engine.calls = module.Calls(
            group=weakref.ref(group),
            process_group=None if process_group is None else weakref.ref(process_group),
            name=group.name,
            ordinal=engine.device.index,
            context=engine.context,
            status=engine.failure_words[0],
            given_up=engine.failure_words[1],
            last_stream=ctypes.addressof(engine.last_stream),
        )
    call = type(launch.call)
    made: bool = engine.calls.add(
        kind=kind if given is None else given.method,
        option=option,
        x=x if given is None else given.x,
        form=_NEW if out is None else _SAME if out is x else _OTHER,
        out=result if given is None else given.out,
        new_shape=None if kind.like_x else result.shape,
        may_be_same=kind.in_place is None,
        is_outside=is_outside,
        function=int(launch.function),
        blocks=launch.blocks,
        threads=launch.threads,
        arguments=bytes(launch.call),
        source_at=call.source.offset,
        out_at=call.out.offset,
    )
    return made


def method(**parts: Any) -> Any:
    """Make a method of process groups that repeats calls in C; see ``Method`` in eager.c. None without the module.

    Args:
        parts: The layout of the arguments (0: ``([x], options)``, 1: ``(out, x, options)``, 2: with two empty lists
            before the options), the ``kind`` of :class:`Given`, the method in ``python``, the ``reductions`` by hash,
            whether the option ``has_root``, the key to ``count`` it by, and the ``work`` to return.
    """
    module = _begun()
    return None if module is None else module.Method(**parts)


def _driver() -> dict[str, int]:
    """Addresses of the driver functions that the module calls."""
    library = ctypes.CDLL("libcuda.so.1")
    names = {"launch": "cuLaunchKernel", "is_capturing": "cuStreamIsCapturing", "context": "cuCtxGetCurrent"}
    return {name: ctypes.cast(getattr(library, of), ctypes.c_void_p).value or 0 for name, of in names.items()}


_lock = threading.Lock()
_module: Any = None  # False if it cannot be used


def _begun() -> Any:
    """Load and initialise the module once; None if it cannot be used."""
    global _module, run
    with _lock:
        if _module is None:
            _module = native.module() or False
            try:
                if _module:
                    _begin(_module)
                    run = _module.run
                    _connect()
            except Exception as error:  # the operator itself has succeeded
                log.warning("collective operators use the slower calls through Python: %s", error)
                _module = False
        return _module or None


_library: Any = None  # False if it cannot be used


def register(kinds: Iterable[Repeatable]) -> None:
    """Let the dispatcher repeat calls of ``torch.ops.symmem.*`` on CUDA without Python. Local.

    Compiles a small library for the installed torch the first time on a machine, which takes some five seconds. If this
    fails, a warning says why, and the dispatcher calls the kernels in Python. Later calls do nothing.

    Args:
        kinds: The operations. They are kept alive.
    """
    global _library
    if _library is not None:
        return
    with _lock:
        if _library is None:
            try:
                library = native.operator_library()
                _register(library, kinds)
                _library = library
            except Exception as error:  # the operator itself has succeeded
                log.warning("torch.ops.symmem on CUDA use the slower calls through Python: %s", error)
                _library = False
            _connect()


_kept: list[object] = []


def _register(library: ctypes.CDLL, kinds: Iterable[Repeatable]) -> None:
    for kind in kinds:
        _kept.append(kind)
        for suffix, form in (("", _NEW), ("_", _SAME), ("_out", _OTHER)):
            if form == _SAME and kind.in_place is not None:  # it is never repeated
                continue
            name = f"symmem::{kind.name}{suffix}".encode()
            if library.symmem_register(name, ctypes.c_void_p(id(kind)), form, bool(kind.option)):
                raise RuntimeError(f"the dispatcher does not know {name.decode()}")


def _connect() -> None:
    """Let the library, if there is one, use the module."""
    if _library and _module:
        _library.symmem_use(ctypes.c_void_p(_module.repeat_address()))


def _begin(module: Any) -> None:
    world = dist.distributed_c10d._world
    module.begin(
        exchange=torch.Tensor.__dlpack_c_exchange_api__,
        **_driver(),
        usual_keys=USUAL_THREADS,
        tensor=torch.Tensor,
        parameter=torch.nn.Parameter,
        keys_of_thread=torch._C._dispatch_tls_local_include_set,
        function_modes=torch._C._len_torch_function_stack,
        is_profiling=torch._C._autograd._profiler_enabled,
        is_grad_enabled=torch.is_grad_enabled,
        increment_version=torch._C._increment_version,
        empty_like=torch.empty_like,
        world=world,
        process_groups=world.pg_map,
        forward_mode=torch.autograd.forward_ad,
        symmetric=tables(),
    )
