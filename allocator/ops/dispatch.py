"""Recognise ordinary eager calls, where the dispatcher would do nothing but call the device's kernel.

The dispatcher describes a call by a set of keys. Modes, tracing, functorch, fake and wrapped tensors, lazy conjugation
and other features have their own keys. So it is enough to know the few key sets of an ordinary eager call. Any other
set, now or in a later torch, goes through the dispatcher.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["USUAL_THREADS", "in_forward_mode", "is_usual", "is_usual_keyset"]


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


_DEVICES = ("CPU", "CUDA")
_IN_AUTOGRAD = frozenset(_keys(device, f"Autograd{device}") for device in _DEVICES)
_OF_TENSORS = frozenset(
    _keys(device, f"Autocast{device}", *more)
    for device in _DEVICES
    for more in ((f"Autograd{device}", "ADInplaceOrView"), ())  # (): a tensor made in inference mode
)
USUAL_THREADS = _keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")
"""The keys that a thread adds to ordinary calls: normally, and in inference mode."""
_CLASSES = (torch.Tensor, torch.nn.Parameter)


# Looked up once: together the lookups would add a microsecond to every call.
_is_compiling = torch.compiler.is_compiling
_keys_of_thread = torch._C._dispatch_tls_local_include_set
_keys_of_tensor = torch._C._dispatch_keys
_function_modes = torch._C._len_torch_function_stack
_is_profiling = torch._C._autograd._profiler_enabled


def in_forward_mode() -> bool:
    """Whether tensors may have tangents. No dispatch key shows this."""
    return forward_ad._current_level >= 0


def is_usual_keyset(keyset: torch._C.DispatchKeySet) -> bool:
    """Whether an Autograd kernel that received these keys may call the device's kernel directly."""
    return keyset.raw_repr() in _IN_AUTOGRAD


def is_usual(x: torch.Tensor, out: torch.Tensor | None = None) -> bool:
    """Whether a call with these tensors would only run their device's kernel, without a gradient.

    False while a profiler runs, because the dispatcher reports operators to it.
    """
    if _is_compiling():  # a compiler must see the operators; comes first, because it cannot trace the rest
        return False
    if _keys_of_thread().raw_repr() not in USUAL_THREADS or _function_modes() or _is_profiling() or in_forward_mode():
        return False
    return _is_usual_tensor(x) and (out is None or out is x or _is_usual_tensor(out))


def _is_usual_tensor(x: torch.Tensor) -> bool:
    if type(x) not in _CLASSES or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return _keys_of_tensor(x).raw_repr() in _OF_TENSORS
