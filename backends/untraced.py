"""A mark for functions that torch's compiler must not trace. It imports no compiler and adds no time to a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["untraced"]

Function = TypeVar("Function", bound=Callable[..., Any])

_eval_frame: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)


def untraced(function: Function) -> Function:
    """Decorate a function: compiled code breaks its graph at a call, and neither the call nor its callees are traced.

    It is for functions that make state, communicate or depend on addresses. ``torch.compiler.disable`` does the same,
    but imports the compiler and wraps the function.
    """
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "symmem makes state or communicates here"
    if hasattr(_eval_frame, "set_code_exec_strategy"):
        skip = _eval_frame._FrameAction.SKIP
        _eval_frame.set_code_exec_strategy(marked.__code__, _eval_frame._FrameExecStrategy(skip, skip))
    return function
