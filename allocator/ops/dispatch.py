"""When nothing comes between a call of an operator and the kernel of its device, which can then be called at once.

The dispatcher says what a call has to pass as a set of keys: modes, tracing, functorch, fake and wrapped tensors, lazy
conjugation and more each have one. So it is enough to know the few sets that stand for the usual eager call; whatever
else there is, or will be, goes through the dispatcher.
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
    for more in ((f"Autograd{device}", "ADInplaceOrView"), ())  # the latter: of a tensor made in inference mode
)
USUAL_THREADS = _keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")
"""The keys that a thread adds to each call where nothing else takes part; the latter in inference mode."""
_CLASSES = (torch.Tensor, torch.nn.Parameter)


# Looked up once: together these take a microsecond of each call.
_is_compiling = torch.compiler.is_compiling
_keys_of_thread = torch._C._dispatch_tls_local_include_set
_keys_of_tensor = torch._C._dispatch_keys
_function_modes = torch._C._len_torch_function_stack
_is_profiling = torch._C._autograd._profiler_enabled


def in_forward_mode() -> bool:
    """Whether tensors may have tangents, which no key tells."""
    return forward_ad._current_level >= 0


def is_usual_keyset(keyset: torch._C.DispatchKeySet) -> bool:
    """Whether a kernel of an Autograd key, which was given these keys, may call that of the device itself."""
    return keyset.raw_repr() in _IN_AUTOGRAD


def is_usual(x: torch.Tensor, out: torch.Tensor | None = None) -> bool:
    """Whether a call with these tensors would do nothing but run the kernel of their device, with no gradient.

    False as well while a profiler runs, which is told of operators by the dispatcher.
    """
    if _is_compiling():  # which is to see the operators; asked first, since a compiler cannot follow the rest
        return False
    if _keys_of_thread().raw_repr() not in USUAL_THREADS or _function_modes() or _is_profiling() or in_forward_mode():
        return False
    return _is_usual_tensor(x) and (out is None or out is x or _is_usual_tensor(out))


def _is_usual_tensor(x: torch.Tensor) -> bool:
    if type(x) not in _CLASSES or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return _keys_of_tensor(x).raw_repr() in _OF_TENSORS
