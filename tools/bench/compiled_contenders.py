"""Checks, counts and times the contenders of ``symmem bench compile``: symmem, stock Inductor and eager code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor.cudagraph_trees import reset_cudagraph_trees

import symmem
from symmem.tools.bench import compiled_counts as counts
from symmem.tools.bench import compiled_graphs as graphs
from symmem.tools.bench.compile import BATCH, LAYERS, Measured
from symmem.tools.bench.compiled_counts import Compiled, Function, compiled
from symmem.tools.bench.compiled_graphs import Chain
from symmem.tools.bench.gpu import Torch
from symmem.tools.bench.timing import Clock, clock_of, enough, in_turns, mean

__all__ = ["attempted", "chain", "graph_input", "line_up", "sample"]

_ROUNDS = 15

log = logging.getLogger("symmem.bench")


def attempted(name: str, make: Callable[[], object]) -> bool:
    """Return whether ``make`` works on all ranks, and warn if not. Collective over all ranks."""
    failure = ""
    try:
        make()
    except Exception as error:  # any error, because torch's compiler wraps the cause
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    with symmem.resolve_group().collective(name) as collective:
        failures = [each.payload.decode() for each in collective.exchange("whether it compiles", failure.encode())]
    if any(failures):
        log.warning("%s is left out: %s", name, next(filter(None, failures)))
    return not any(failures)


def _forget() -> None:
    """Forget compiled functions, because a failed warm-up of a CUDA graph makes all CUDA graphs unusable."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        reset_cudagraph_trees()


def line_up(
    functions: Mapping[str, tuple[Function, str | None]],
    mode: str | None,
    arguments: Callable[[str, int], tuple[Any, ...]],
    expected: Callable[[int], torch.Tensor],
) -> dict[str, Compiled]:
    """Compile all functions, and check their results before anything is timed. Collective over all ranks.

    Stock Inductor may fail, and then all CUDA graphs of this process may be unusable. So its functions are tried first,
    and compiled again with the others if they work.

    Args:
        functions: Functions and backends of torch.compile, by name.
        mode: Mode of torch.compile.
        arguments: Returns the arguments of a contender in a step.
        expected: Returns the expected result of a step.

    Raises:
        WrongResultError: A function returns another result.
    """

    def make(name: str, check: bool = True) -> Compiled:
        function, backend = functions[name]
        made = compiled(function, backend, mode, *arguments(name, 0))
        for step in range(4):  # a CUDA graph is captured by the second call, and replayed by the third
            result = made.call(*arguments(name, step))
            if check:
                graphs.compare(name, result, expected(step))
        return made

    unable = set()
    for name in (each for each, (_function, backend) in functions.items() if backend == "inductor"):
        if not attempted(f"{name}, mode {mode}", partial(make, name, check=False)):
            unable.add(name)
        _forget()
    return {name: make(name) for name in functions if name not in unable}


def sample(
    found: Mapping[str, Compiled], arguments: Callable[[str, int], tuple[Any, ...]], device_type: str
) -> dict[str, Measured]:
    """Count allocations and copies of the contenders, and time them in turns. Collective over all ranks."""
    clock: Clock = clock_of(device_type)
    calls = {name: partial(made.call, *arguments(name, 0)) for name, made in found.items()}
    counted = {
        name: (
            counts.buffers(found[name].source) if found[name].source else counts.allocations(call),
            counts.copies(call, device_type, found[name].source),
        )
        for name, call in calls.items()
    }
    runs = [partial(mean, clock, call, enough(call, clock)) for call in calls.values()]
    times = dict(zip(calls, in_turns(runs, _ROUNDS), strict=True))
    clock.all_here()
    return {name: Measured(*counted[name], [each.device for each in times[name]]) for name in calls}


@torch.no_grad()
def chain(device_type: str, hidden: int, mode: str | None) -> dict[str, Measured]:
    """Measure the 8 layers. Runs on every rank."""
    _prepare(device_type)
    data = Chain(LAYERS, hidden, BATCH, device_type, dist.get_rank(), dist.get_world_size())
    total, stock = graphs.total(device_type), graphs.stock()
    functions: dict[str, tuple[Function, str | None]] = {
        "": (graphs.layers(graphs.own()), "symmem"),
        "_placed": (graphs.layers(total), "symmem"),
        "inductor": (graphs.layers(total if device_type == "cuda" else stock), "inductor"),
        "eager": (graphs.eager_chain(), None),
    }
    if device_type == "cuda":
        functions["inductor_nccl"] = graphs.layers(stock), "inductor"

    def arguments(name: str, step: int) -> tuple[Any, ...]:
        return data.x(step), data.weights

    return sample(line_up(functions, mode, arguments, data.expected), arguments, device_type)


@torch.no_grad()
def graph_input(device_type: str, hidden: int, mode: str | None) -> dict[str, Measured]:
    """Measure one operator with an argument of the caller, in plain and symmetric memory. Runs on every rank."""
    _prepare(device_type)
    rank, world = dist.get_rank(), dist.get_world_size()
    xs = [graphs.numbers(BATCH, hidden, step, rank).to(device_type) for step in range(4)]
    sums = [
        torch.stack([graphs.numbers(BATCH, hidden, step, each) for each in range(world)]).sum(0).to(device_type)
        for step in range(4)
    ]
    memory, keep = _symmetric(device_type, xs[0])
    total = graphs.total(device_type)
    peer = total if device_type == "cuda" else graphs.stock()
    functions: dict[str, tuple[Function, str | None]] = {
        "": (graphs.fresh_code(lambda x: total(x)), "symmem"),
        "_symmetric": (graphs.fresh_code(lambda x: total(x)), "symmem"),
        "inductor": (graphs.fresh_code(lambda x: peer(x)), "inductor"),
        "eager": (lambda x: total(memory.copy_(x)), None),
    }

    def arguments(name: str, step: int) -> tuple[Any, ...]:
        return (memory.copy_(xs[step]) if name == "_symmetric" else xs[step],)

    found = sample(line_up(functions, mode, arguments, sums.__getitem__), arguments, device_type)
    del keep
    return found


def _symmetric(device_type: str, like: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Symmetric memory for :func:`.compiled_graphs.total`, and the object that keeps it mapped."""
    if device_type == "cpu":
        handle = symmem.allocate(tuple(like.shape), like.dtype).rendezvous()
        return handle.tensor, handle
    transport = Torch("CUDA")
    memory = transport.allocate(like.nbytes)
    return memory.view(like.dtype).view(like.shape), transport.rendezvous(memory)


def _prepare(device_type: str) -> None:
    torch._dynamo.reset()
    if device_type == "cuda":
        Torch("CUDA")
