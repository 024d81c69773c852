"""On the CPU: a dispatch mode that moves what ops make into an arena.

It lets each op run, and gives what is new in the result another storage, in the arena; an op that only allocates is
served from the arena at once. It works below autograd, which sees ordinary ops.
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
from symmem.memory.layout import Layout

if TYPE_CHECKING:
    from symmem.arena.arena import Arena

__all__ = ["Moving", "caller"]


def caller() -> FrameType:
    """The innermost frame that is neither torch's nor of symmem; of a program that is all torch's, the innermost."""
    first = sys._getframe(1)
    frame: FrameType | None = first
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "symmem"):
            return frame
        frame = frame.f_back
    return first


class Moving(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves what ops make into an arena; of one thread."""

    supports_higher_order_operators = True

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arena = arena
        self._paused = False

    def start(self) -> None:
        """Begin, on this thread."""
        flags.enter(self)

    def stop(self) -> None:
        """End, on the thread that began."""
        flags.leave(self)

    def pause(self) -> None:
        """Leave allocations alone for now."""
        self._paused = True

    def resume(self) -> None:
        """Go on."""
        self._paused = False

    def cause_of(self, error: BaseException | None) -> BaseException | None:
        """What to raise in the place of an error: nothing, for ops have raised what there was."""
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        beneath = any(not isinstance(mode, Moving) for mode in _modes())
        if not beneath and any(_dispatches(kind) for kind in types):
            return NotImplemented  # its own ops, on the tensors that it wraps, come here again
        if self._paused or kwargs.get("pin_memory") or os.getpid() != self.arena.process:
            return func(*args, **kwargs)  # a forked child, such as a data loader's worker, has inherited the mode
        if func in _FILLS and not beneath:
            made = self._made(func, args, kwargs)
            if made is not None:
                return made
        old = set() if func in _FRESH else set(_storages((args, kwargs)))
        result = func(*args, **kwargs)
        if func.namespace in _ASYNCHRONOUS:
            # A thread of torch's still writes the result, and finds it by its storage when somebody waits for it.
            for each in _tensors(result):
                torch.ops._c10d_functional.wait_tensor(each)
        new: dict[int, list[torch.Tensor]] = {}
        for each in _tensors(_unaliased(func, result)):
            if (key := _storage(each)._cdata) not in old:
                new.setdefault(key, []).append(each)
        if new:
            with _python_dispatch._disable_current_modes():
                for tensors in new.values():
                    self._move(tensors)
        return result

    def _made(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
        """What a function that takes no data makes; None if that is nothing for an arena."""
        like = args[0] if args and isinstance(args[0], torch.Tensor) else None
        device = kwargs.get("device") or (like.device if like is not None else self.arena.device)
        if torch.device(device).type != "cpu":
            return None
        model = func(*args, **{**kwargs, "device": "meta"})
        if model.layout != torch.strided or model.is_quantized or not model.numel():
            return None
        layout = Layout.of(model, 0)
        storage = self._carve(layout, layout.nbytes)
        out = torch.empty(0, dtype=model.dtype).set_(storage, 0, model.size(), model.stride())
        fill = _FILLS[func]
        if fill is not None:
            out.fill_(fill if not isinstance(fill, str) else kwargs.get(fill, args[-1]))
        return out

    def _move(self, tensors: list[torch.Tensor]) -> None:
        """Move tensors that share a storage, as they are, into the arena."""
        storage = _storage(tensors[0])
        start, nbytes, layout = 0, storage.nbytes(), None
        if len(tensors) == 1:
            layout = Layout.of(tensors[0], 0)
            start, nbytes = int(tensors[0].storage_offset()) * layout.dtype.itemsize, layout.nbytes
        moved = self._carve(layout, nbytes)
        _bytes(moved, 0, nbytes).copy_(_bytes(storage, start, nbytes))
        for each in tensors:
            offset = each.storage_offset() - start // each.dtype.itemsize
            # The tensor itself, not another one: whatever the op has noted on it stays.
            each.set_(moved, offset, each.size(), each.stride())

    def _carve(self, layout: Layout | None, nbytes: int) -> Any:
        """A storage in the arena."""
        if layout is None or layout.overlaps:
            layout = Layout((nbytes,), (1,), torch.uint8)
        block = self.arena.carve(layout, None, caller())
        return storage_at(block.pointer, nbytes, self.arena.device, block)


def _modes() -> list[Any]:
    """The modes that are asked after this one; it is not among them while it is asked."""
    return _python_dispatch._get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []


def _dispatches(kind: type) -> bool:
    """Whether a class of tensors has a dispatch of its own; most that do have no memory."""
    return getattr(kind, "__torch_dispatch__", _NO_DISPATCH) is not _NO_DISPATCH


_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl


def _storage(each: torch.Tensor) -> Any:
    return each.untyped_storage()


def _bytes(storage: Any, start: int, nbytes: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (nbytes,), (1,))


def _has_memory(each: torch.Tensor) -> bool:
    """Whether a tensor has memory on the CPU that torch has allocated: not symmetric already, nor of anybody else."""
    if each.device.type != "cpu" or each.layout != torch.strided or each.is_quantized or _dispatches(type(each)):
        return False
    if each.is_nested:
        return False
    storage = _storage(each)
    # An empty one has no address, and an op may still resize it.
    return bool(storage.nbytes() > 0 and storage.resizable())


def _leaves(value: Any) -> Iterator[Any]:
    """What an op takes or returns, one by one."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _leaves(each)
    else:
        yield value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among what an op returns, that could be moved."""
    return (each for each in _leaves(value) if isinstance(each, torch.Tensor) and _has_memory(each))


def _unaliased(func: Any, result: Any) -> Any:
    """What an op returns, but for views: their memory is that of an argument, even where that has no storage itself."""
    if func in _FRESH:
        return result
    views = [each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns]
    if not any(views):
        return result
    return [each for each, view in zip(result, views, strict=False) if not view] if len(views) > 1 else ()


def _storages(value: Any) -> Iterator[int]:
    """The storages among what an op takes, and of the tensors there."""
    for each in _leaves(value):
        if isinstance(each, torch.Tensor):
            if _has_memory(each):
                yield _storage(each)._cdata
        elif isinstance(each, torch.UntypedStorage | torch.TypedStorage):  # of set_()
            yield each._cdata


_ASYNCHRONOUS = ("_c10d_functional", "_c10d_functional_autograd")
_aten = torch.ops.aten
_FILLS: dict[Any, int | str | None] = {
    **dict.fromkeys((_aten.empty.memory_format, _aten.empty_strided.default), None),
    **dict.fromkeys((_aten.empty_like.default, _aten.new_empty.default, _aten.new_empty_strided.default), None),
    **dict.fromkeys((_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default), 0),
    **dict.fromkeys((_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default), 1),
    **dict.fromkeys((_aten.full.default, _aten.full_like.default, _aten.new_full.default), "fill_value"),
}
"""Ops that need no input but sizes, and what they fill with: nothing, a number, or the argument of that name."""

_FRESH = {_aten.lift_fresh.default}
"""Ops that return an argument which nobody else has seen: torch.tensor() makes its tensor without any op."""


class _Flags:
    """What torch notes of dispatch modes for the whole process, so that its compiler keeps away.

    Each mode notes what it found and puts that back; where threads overlap, the last one to leave would put back, for
    ever, what another one had noted that left before it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: dict[str, bool] = {}

    def enter(self, mode: Moving) -> None:
        with self._lock:
            if not self._inside:
                self._before = self._now()
            mode.__enter__()  # type: ignore[no-untyped-call]
            self._inside += 1

    def leave(self, mode: Moving) -> None:
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
