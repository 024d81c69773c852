"""The neutral mode, in which lasting state is made: no mode of the caller applies to it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

from symmem.backends.untraced import untraced

__all__ = ["in_fake_mode", "is_in_mode", "neutral", "neutral_mode"]

P = ParamSpec("P")
T = TypeVar("T")

_c: Any = torch._C
# Looked up once; `tensor_at` and `allocate` call both.
_is_inference = torch.is_inference_mode_enabled
_dispatch_modes = _c._len_torch_dispatch_stack
_is_excluded = _c._dispatch_tls_is_dispatch_key_excluded
_PYTHON = _c.DispatchKey.Python  # excluded in the neutral mode, where the stack keeps its length


@contextlib.contextmanager
def neutral_mode() -> Iterator[None]:
    """Leave this thread's modes: inference mode, a default device, dispatch and function modes, functorch's transforms.

    Tensors that outlive a call are made here: an inference tensor could not be written later, and a fake tensor has no
    memory. Entering takes 3 us; :func:`is_in_mode` tells whether a factory needs it.
    """
    with torch.inference_mode(False), _c.DisableTorchFunction(), _c._DisableTorchDispatch(), _c._DisableFuncTorch():
        yield


def neutral(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that makes lasting tensors: it runs in the neutral mode if the caller is in another."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        if not is_in_mode():
            return function(*args, **options)
        with neutral_mode():
            return function(*args, **options)

    return untraced(run)


def is_in_mode() -> bool:
    """Whether a mode of this thread changes the tensors that factories make with an explicit device."""
    return _is_inference() or (_dispatch_modes() > 0 and not _is_excluded(_PYTHON))


def in_fake_mode() -> bool:
    """Whether this thread is in a FakeTensorMode, where tensors have no memory."""
    return is_in_mode() and _dispatch_modes() > 0 and _c._get_dispatch_mode(_c._TorchDispatchModeKey.FAKE) is not None
