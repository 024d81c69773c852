"""Marks for functions that torch's compiler must not trace. They import no compiler and add no time to a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from symmem import _lazy

__all__ = ["untraced", "untraced_methods"]

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

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


def untraced_methods(cls: Class) -> Class:
    """Decorate a class: all its methods and properties are :func:`untraced`."""
    found: Any
    for value in vars(cls).values():
        for found in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
            if hasattr(found, "__code__") and not hasattr(found, "__wrapped__"):  # a wrapper's code is shared
                untraced(found)
    return cls


# A program's first use of symmem may be in compiled code, and imports modules, which call these functions.
for _function in (_lazy.load, untraced, untraced_methods):
    untraced(_function)
