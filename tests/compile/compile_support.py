"""The registry of cases, and helpers that cases share.

Importing it, or a module of cases, loads no Inductor and defines no operator, so that pytest collects cases quickly.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from compile_operators import POINTERS, define_operators

import symmem
from symmem.compile.report import Report
from symmem.tools.ranks import RankPool

PATIENCE = 300.0
"""Seconds that a case may take. Compiling a kernel takes seconds, or a minute on a busy machine."""

# The registry.


class Case(NamedTuple):
    """A function that tests run on two ranks.

    Attributes:
        function: It takes no arguments, and raises if the case fails.
        gpu: Whether it runs on GPUs too.
    """

    function: Callable[[], None]
    gpu: bool


CASES: list[Case] = []


def case(*, gpu: bool = True) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a case.

    Args:
        gpu: Whether it runs on GPUs too. False if it needs the CPU or compiles for a long time.
    """

    def register(function: Callable[[], None]) -> Callable[[], None]:
        CASES.append(Case(function, gpu))
        return function

    return register


def cases_of(module: ModuleType, *, gpu: bool = False) -> list[Callable[[], None]]:
    """The cases of a module; with ``gpu``, only the cases that run on GPUs too."""
    found = [known for known in CASES if known.function.__module__ == module.__name__]
    return [known.function for known in found if known.gpu or not gpu]


@contextmanager
def case_pool(env: Mapping[str, str], timeout: float = PATIENCE) -> Iterator[RankPool]:
    """Two ranks that have the operators of the cases."""
    with RankPool(2, env=env, timeout=timeout) as pool:
        pool.run(define_operators)
        yield pool


# Helpers.


class Deferred:
    """A module that is imported at its first use, because Inductor takes seconds and only ranks need it."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_mock_name":  # pytest looks for some when it collects
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


explanation = Deferred("symmem.compile.explanation")
current_graph = Deferred("symmem.compile.run.current_graph")
ct = torch.ops.ct


def group() -> str:
    return symmem.resolve_group().name


def device() -> torch.device:
    return torch.device(os.environ.get("SYMMEM_TEST_DEVICE", "cpu"), *([dist.get_rank()] if on_cuda() else []))


def on_cuda() -> bool:
    return os.environ.get("SYMMEM_TEST_DEVICE") == "cuda"


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(17 * seed + dist.get_rank())
    return torch.randn(shape, generator=generator).to(device())


def summed(x: torch.Tensor) -> torch.Tensor:
    """The expected result of ``total``, by gloo."""
    x = x.clone()
    dist.all_reduce(x)
    return x


def peer(x: torch.Tensor) -> torch.Tensor:
    """The expected result of ``echo``, by gloo."""
    data = x.resolve_conj().resolve_neg().contiguous().clone().view(-1).view(torch.uint8)
    parts = [torch.empty_like(data) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, data)
    return parts[(dist.get_rank() + 1) % len(parts)].view(x.dtype).view(x.shape)


def compiled(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(f, backend="symmem", **options)


def check(
    f: Callable[..., Any], make: Callable[[int], tuple[Any, ...]], expected: Callable[..., Any], **options: Any
) -> Report:
    """Run a compiled function on three sets of values, compare every result, and return the report."""
    torch._dynamo.reset()
    POINTERS.clear()
    with explanation.reporting() as report:
        run = compiled(f, **options)
        for step in range(3):
            args = make(step)
            wanted = expected(*(value.clone() if isinstance(value, torch.Tensor) else value for value in args))
            torch.testing.assert_close(run(*args), wanted)
    assert isinstance(report, Report)
    return report


def outcomes(report: Report) -> list[str]:
    return [decision.outcome for graph in report.graphs for decision in graph.decisions]
