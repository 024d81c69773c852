"""For the CPU: a dispatch mode that moves the results of ops into an arena.

It runs every op, and then replaces the storage of new tensors by memory of the arena. Ops that only allocate get memory
of the arena directly. The mode works below autograd, so autograd sees ordinary ops.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from symmem.backends.base import storage_at
from symmem.backends.untraced import untraced
from symmem.memory.layout import Layout

if TYPE_CHECKING:
    from symmem.arena.arena import Arena

__all__ = ["ArenaMode", "caller", "flags"]


def caller() -> FrameType:
    """Return the innermost frame outside of torch and symmem; the innermost of all if there is no such frame."""
    first = sys._getframe(1)
    frame: FrameType | None = first
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "symmem"):
            return frame
        frame = frame.f_back
    return first


class ArenaMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves the results of one thread's ops into an arena."""

    supports_higher_order_operators = True

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arena = arena
        self._paused = False

    def start(self) -> None:
        """Start on this thread."""
        flags.enter(self)

    def stop(self) -> None:
        """Stop, on the thread that started."""
        flags.leave(self)

    def pause(self) -> None:
        """Do nothing until :meth:`resume`."""
        self._paused = True

    def resume(self) -> None:
        """End a pause."""
        self._paused = False

    def cause_of(self, error: BaseException | None) -> BaseException | None:
        """Return the error to raise instead; always None, because ops raise their errors themselves."""
        return None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # with True, torch wraps the next method, and the wrapper imports the compiler at the first op

    @untraced
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        has_other_modes = any(not isinstance(mode, ArenaMode) for mode in _modes())
        if not has_other_modes and any(_has_dispatch(kind) for kind in types):
            return NotImplemented  # the subclass runs ops on the tensors that it wraps; those come here
        if self._paused or kwargs.get("pin_memory") or os.getpid() != self.arena.process:
            return func(*args, **kwargs)  # a forked child, such as a data loader's worker, has inherited the mode
        if func in _FILLS and not has_other_modes:
            filled = self._fill(func, args, kwargs)
            if filled is not None:
                return filled
        old = set() if func in _FRESH else set(_storages((args, kwargs)))
        result = func(*args, **kwargs)
        if func.namespace in _ASYNCHRONOUS:
            # A thread of torch still writes the result, and torch finds the pending work by the result's storage.
            for tensor in _tensors(result):
                torch.ops._c10d_functional.wait_tensor(tensor)
        new: dict[int, list[torch.Tensor]] = {}
        for tensor in _tensors(_without_views(func, result)):
            if (key := _storage(tensor)._cdata) not in old:
                new.setdefault(key, []).append(tensor)
        if new:
            with torch._C._DisableTorchDispatch():
                for tensors in new.values():
                    self._move(tensors)
        return result

    def _fill(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
        """Run an op of ``_FILLS`` in memory of the arena; None if its result cannot be in an arena."""
        like = args[0] if args and isinstance(args[0], torch.Tensor) else None
        device = kwargs.get("device") or (like.device if like is not None else self.arena.device)
        if torch.device(device).type != "cpu":
            return None
        model = func(*args, **{**kwargs, "device": "meta"})
        if model.layout != torch.strided or model.is_quantized or not model.numel():
            return None
        layout = Layout.of(model, 0)
        storage = self._allocate(layout, layout.nbytes)
        out = torch.empty(0, dtype=model.dtype, device="cpu").set_(storage, 0, model.size(), model.stride())
        fill = _FILLS[func]
        if fill is not None:
            out.fill_(fill if not isinstance(fill, str) else kwargs.get(fill, args[-1]))
        return out

    def _move(self, tensors: list[torch.Tensor]) -> None:
        """Move tensors that share a storage into the arena; afterwards they share the new storage."""
        storage = _storage(tensors[0])
        start, nbytes, layout = 0, storage.nbytes(), None
        if len(tensors) == 1:
            layout = Layout.of(tensors[0], 0)
            start, nbytes = int(tensors[0].storage_offset()) * layout.dtype.itemsize, layout.nbytes
        moved = self._allocate(layout, nbytes)
        _bytes(moved, 0, nbytes).copy_(_bytes(storage, start, nbytes))
        for tensor in tensors:
            offset = tensor.storage_offset() - start // tensor.dtype.itemsize
            # The tensor object stays the same, and so do attributes that the op has set on it.
            tensor.set_(moved, offset, tensor.size(), tensor.stride())

    def _allocate(self, layout: Layout | None, nbytes: int) -> Any:
        """Allocate a storage in the arena."""
        if layout is None or layout.overlaps:
            layout = Layout((nbytes,), (1,), torch.uint8)
        block = self.arena.sub_allocate(layout, None, caller())
        return storage_at(block.pointer, nbytes, self.arena.device, block)


def _modes() -> list[Any]:
    """Return the modes that run after this one; the running mode is not in torch's stack."""
    return _python_dispatch._get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []


def _has_dispatch(kind: type) -> bool:
    """Whether a subclass of tensors defines a dispatch; most of these subclasses have no memory."""
    return getattr(kind, "__torch_dispatch__", _NO_DISPATCH) is not _NO_DISPATCH


_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()


def _bytes(storage: Any, start: int, nbytes: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, start, (nbytes,), (1,))


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether torch allocated the tensor's memory on the CPU; not so for symmetric memory and for foreign memory."""
    if (
        tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or tensor.is_quantized
        or _has_dispatch(type(tensor))
    ):
        return False
    if tensor.is_nested:
        return False
    storage = _storage(tensor)
    # An empty storage has no address, and an op may still resize it.
    return bool(storage.nbytes() > 0 and storage.resizable())


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values in an op's arguments or results, without their tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Return the tensors in an op's results that can be moved."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor) and _has_memory(leaf))


def _without_views(func: Any, result: Any) -> Any:
    """Return an op's results without views, because views use the memory of an argument."""
    if func in _FRESH:
        return result
    views = [item.alias_info is not None and not item.alias_info.is_write for item in func._schema.returns]
    if not any(views):
        return result
    return [item for item, view in zip(result, views, strict=False) if not view] if len(views) > 1 else ()


def _storages(value: Any) -> Iterator[int]:
    """Yield the storages in an op's arguments, and the storages of its tensors."""
    for leaf in _leaves(value):
        if isinstance(leaf, torch.Tensor):
            if _has_memory(leaf):
                yield _storage(leaf)._cdata
        elif isinstance(leaf, torch.UntypedStorage | torch.TypedStorage):  # an argument of set_()
            yield leaf._cdata


_ASYNCHRONOUS = ("_c10d_functional", "_c10d_functional_autograd")
_aten = torch.ops.aten
_FILLS: dict[Any, int | str | None] = {
    **dict.fromkeys((_aten.empty.memory_format, _aten.empty_strided.default), None),
    **dict.fromkeys((_aten.empty_like.default, _aten.new_empty.default, _aten.new_empty_strided.default), None),
    **dict.fromkeys((_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default), 0),
    **dict.fromkeys((_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default), 1),
    **dict.fromkeys((_aten.full.default, _aten.full_like.default, _aten.new_full.default), "fill_value"),
}
"""Ops that need only sizes, and the value that they fill with: None, a number, or the name of an argument."""

_FRESH = {_aten.lift_fresh.default}
"""Ops whose argument is new and unshared: torch.tensor() makes its tensor without an op and then calls this one."""


class _Flags:
    """Torch's process-wide flags that keep its compiler away while a dispatch mode is active.

    A mode saves the flags when it starts and restores them when it stops. If the modes of two threads overlap, the last
    one to stop would restore a flag that the other one had set, and it would stay set. This class restores the flags
    from before the first mode.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: dict[str, bool] = {}

    def enter(self, mode: ArenaMode) -> None:
        with self._lock:
            if not self._inside:
                self._before = self._now()
            mode.__enter__()  # type: ignore[no-untyped-call]
            self._inside += 1

    def leave(self, mode: ArenaMode) -> None:
        with self._lock:
            now = self._now()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._inside -= 1
            for name, before in self._before.items():
                setattr(_python_dispatch, name, bool(self._inside) or (before and now[name]))

    def _now(self) -> dict[str, bool]:
        return {name: getattr(_python_dispatch, name) for name in _FLAGS if hasattr(_python_dispatch, name)}


_FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)

flags = _Flags()
