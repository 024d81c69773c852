"""Counts allocations and copies of a function, in its generated code and in a profile of one call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._inductor.output_code import CompiledFxGraph
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from symmem.compile import hook
from symmem.errors import UnsupportedError
from symmem.tools.bench.compile import Copies

__all__ = [
    "Compiled",
    "Function",
    "allocations",
    "buffers",
    "compiled",
    "copies",
    "is_copy_kernel",
    "is_engine_copy",
    "sources",
]

Function = Callable[..., Any]

_ALLOCATED = re.compile(r"^\s*\w+ = (?:empty_strided\w*|symmem_running\.here\.graph\.(?:buffer|fresh))\(", re.MULTILINE)
_RETURNED = re.compile(r"^\s*\w+ = torch\.ops\.(\w+)\.(\w+)\.(\w+)\(", re.MULTILINE)
_FUSED = re.compile(r"^\s*(?:cpp_fused\w*|\w+\.run)\(", re.MULTILINE)
_COPY_KERNEL = re.compile(r"^(?!Memcpy).*[Cc]opy|^triton_(?!tem|mm)")
_OPERATOR = re.compile(r"^(?:symmem\w*|symm_mem|_c10d_functional|c10d)::")
_OURS = ("symmem::_place",)  # copies inside this operator belong to the compiled code


@contextmanager
def sources() -> Iterator[list[str]]:
    """Collect the code of functions that are compiled, or loaded from a cache, in the block."""
    hook.install()  # before the patch below, because it checks that torch is unpatched
    found: list[str] = []
    known: Any = CompiledFxGraph.post_compile

    def post_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.source_code or "")
        return known(self, *args, **kwargs)

    CompiledFxGraph.post_compile = post_compile  # type: ignore[method-assign]
    try:
        yield found
    finally:
        CompiledFxGraph.post_compile = known  # type: ignore[method-assign]


class Compiled(NamedTuple):
    """A compiled or eager function, and the generated code; empty for eager code."""

    call: Function
    source: str


def compiled(function: Function, backend: str | None, mode: str | None, *args: Any) -> Compiled:
    """Compile a function for these arguments, with ``"symmem"``, ``"inductor"``, or not at all with None."""
    if backend is None:
        return Compiled(function, "")
    made = torch.compile(function, backend=backend, mode=mode)
    with sources() as found:
        made(*args)
    return Compiled(made, "\n".join(found))


def buffers(source: str) -> int:
    """Count the buffers that generated code allocates, regular and symmetric, and the results of operators."""
    operators = [getattr(getattr(getattr(torch.ops, a), b), c) for a, b, c in _RETURNED.findall(source)]
    return len(_ALLOCATED.findall(source)) + sum(map(_made_by, operators))


def _made_by(op: Any) -> int:
    """Count the results of an operator that are new tensors."""
    if (
        op.namespace == "_c10d_functional" and op._opname == "wait_tensor"
    ):  # its result is its argument, but the schema does not say so
        return 0
    returns: Any = op._schema.returns
    return sum(1 for each in returns if str(each.type) == "Tensor" and each.alias_info is None)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += _made_by(func)
        return func(*args, **(kwargs or {}))


def allocations(call: Callable[[], object]) -> int:
    """Count the tensors that operators of eager code make in one call."""
    mode: Any = _Allocations
    with mode() as counting:
        call()
    return int(counting.count)


def copies(call: Callable[[], object], device_type: str, source: str = "") -> Copies:
    """Count the copies of one warm call of a function that computes only products and sums over all ranks.

    On CUDA: copies and generated kernels on the device, inside and outside of CUDA graphs. On the CPU: generated loops,
    and calls of the copy operator outside of collective operators.

    Args:
        call: The call.
        device_type: "cpu" or "cuda".
        source: The generated code; needed on the CPU.

    Raises:
        UnsupportedError: The profiler does not see the device.
    """
    cuda = device_type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        call()
        if cuda:
            torch.cuda.synchronize()
    events: Any = profiled.events()
    if not cuda:
        called = sum(1 for each in events if each.name == "aten::copy_" and not _within(each))
        return Copies(0, called + len(_FUSED.findall(source)))
    names = [each.name for each in events if each.device_type.name == "CUDA"]
    if not names:
        raise UnsupportedError(
            "the profiler saw nothing on the device, so copies cannot be counted",
            hint="allow CUPTI: stop other profilers, and see NVIDIA's page on ERR_NVGPUCTRPERM",
        )
    return Copies(sum(map(is_engine_copy, names)), sum(map(is_copy_kernel, names)))


def is_engine_copy(name: str) -> bool:
    """Whether this name of a device event is a copy by the copy engine."""
    return name.startswith("Memcpy DtoD")


def is_copy_kernel(name: str) -> bool:
    """Whether this name of a device event is a kernel that copies, or a generated loop."""
    return _COPY_KERNEL.search(name) is not None


def _within(event: Any) -> bool:
    """Whether an event is part of a collective operator."""
    parent = event.cpu_parent
    while parent is not None:
        if _OPERATOR.match(parent.name) and parent.name not in _OURS:
            return True
        parent = parent.cpu_parent
    return False
