"""Costs of symmem.compile on the host: per registered argument of a call, and of compiling a function."""

from __future__ import annotations

import cProfile
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch._inductor.codecache import FxGraphCache
from torch._inductor.utils import fresh_cache

import symmem
from symmem.tools.bench import compiled_graphs as graphs
from symmem.tools.bench.compile import Compiling
from symmem.tools.bench.compiled_counts import Function, compiled
from symmem.tools.bench.compiled_graphs import BENCH
from symmem.tools.bench.contenders import WrongResultError
from symmem.tools.bench.timing import clock_of, in_turns, repeated

__all__ = ["compiling", "overhead"]

_ROUNDS = 15
_CALLS = 500  # per round
_ARGUMENTS = (1, 8)


@torch.no_grad()
def overhead(device_type: str) -> dict[tuple[str, int], float]:
    """Extra seconds of a call per registered argument, by kind and number of arguments. Runs on every rank.

    ``copy`` is the time of copies of plain inputs before a call of an operator that takes any memory.
    ``input_beside_copy`` is the extra time of symmem over that call and the copies together.
    """
    torch._dynamo.reset()
    clock, found = clock_of(device_type), {}
    for count in _ARGUMENTS:
        plain = [torch.ones(4, 4, device=device_type) for _ in range(count)]
        handles = [symmem.allocate((4, 4), torch.float32).rendezvous() for _ in range(count)]
        symmetric = [handle.tensor.fill_(1) for handle in handles]
        for kind, make, argument in (
            ("placed", graphs.intermediates, plain),
            ("input", graphs.inputs, plain),
            ("symmetric", graphs.inputs, symmetric),
        ):
            ours, theirs = (
                compiled(make(op), backend, None, argument)
                for op, backend in ((BENCH.take, "symmem"), (BENCH.take_any, "inductor"))
            )
            asked = ours.source.count(".graph.buffer(" if kind == "placed" else ".graph.place(")
            if asked != count or "symmem_" in theirs.source.replace("symmem_bench", ""):
                raise WrongResultError(f"{asked} of {count} arguments are placed in the code for {kind!r}")
            calls = [partial(made.call, argument) for made in (ours, theirs)]
            if kind == "input":
                calls.append(partial(_copy_and_call, symmetric, plain, theirs.call))
            clock.all_here()
            took = in_turns([partial(clock.seconds, repeated(each, _CALLS)) for each in calls], _ROUNDS)
            clock.all_here()
            rounds = [[each.host / _CALLS / count for each in times] for times in zip(*took, strict=True)]
            found[kind, count] = statistics.median(mine - other for mine, other, *_with_copies in rounds)
            if kind == "input":
                found["copy", count] = statistics.median(both - other for _mine, other, both in rounds)
                found["input_beside_copy", count] = statistics.median(mine - both for mine, _other, both in rounds)
    return found


def _copy_and_call(targets: Sequence[torch.Tensor], sources: list[torch.Tensor], call: Function) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
    call(sources)


@torch.no_grad()
def compiling(device_type: str, rounds: int) -> dict[str, list[Compiling]]:
    """The cost of compiling a function and calling it once, with symmem and stock Inductor. Runs on every rank."""
    weights = [torch.randn(64, 64, device=device_type) / 8 for _ in range(3)]
    x = torch.randn(8, 64, device=device_type)
    name = graphs.group()
    # Two operators, because torch 2.13 and later would place the registered one in stock Inductor, too.
    registered, same = (
        graphs.layers(lambda x: BENCH.same(torch.relu(x), name)),
        graphs.layers(lambda x: BENCH.same_any(torch.relu(x), name)),
    )
    found = {}
    with fresh_cache():
        for kind, functions in (("unregistered", (graphs.norms, graphs.norms)), ("registered", (registered, same))):
            pairs = list(zip(functions, ("symmem", "inductor"), strict=True))
            for pair in pairs:
                _cold(*pair, x, weights)  # compiles kernels, and imports modules
            calls = [_calls(partial(_cold, *pair, x, weights)) for pair in pairs]
            samples = in_turns([partial(_cold, *pair, x, weights) for pair in pairs], rounds)
            found[kind] = [Compiling(*each) for each in zip(calls, map(min, samples), strict=True)]
    return found


def _cold(function: Function, backend: str, *args: Any) -> float:
    """CPU seconds of this process, without the C++ compiler's; its results come from a cache."""
    torch._dynamo.reset()
    FxGraphCache.clear()
    AOTAutogradCache.clear()
    gc.collect()
    made = torch.compile(graphs.fresh_code(function), backend=backend)
    begin = time.process_time()
    made(*args)
    return time.process_time() - begin


def _calls(run: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(run)
    return sum(each.callcount for each in profile.getstats())
