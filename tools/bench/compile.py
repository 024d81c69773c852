"""``symmem bench compile``: what symmem.compile makes of a function, beside stock Inductor and eager code.

``chain``: 8 layers of a product and a sum over all ranks. ``input``: an argument that the compiler does not own.
``overhead``: what a call takes more for each registered argument. ``compile``: what compiling takes more.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import symmem
from symmem.backends import get_backend
from symmem.tools.bench import compiled_counts as counts
from symmem.tools.bench import compiled_graphs as graphs
from symmem.tools.bench.collectives import with_backend
from symmem.tools.bench.compiled_costs import compiling, overhead
from symmem.tools.bench.compiled_counts import Compiled, Function, compiled
from symmem.tools.bench.compiled_graphs import Chain
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.gpu import Torch, check_gpus
from symmem.tools.bench.timing import Clock, clock_of, enough, in_turns, mean, slowest
from symmem.tools.ranks import RankPool

__all__ = ["PARTS", "run"]

PARTS = ("overhead", "compile", "chain", "input")

_LAYERS, _BATCH = 8, 8
_HIDDEN = {"cpu": 1024, "cuda": 4096}
_ROUNDS = 15
_MODES: dict[str, tuple[tuple[str, str | None], ...]] = {
    "cpu": (("", None),),
    "cuda": (("", None), ("_graph", "reduce-overhead")),
}
"""Ending of a figure's name, and mode of torch.compile."""

log = logging.getLogger("symmem.bench")


class Found(NamedTuple):
    """Of one contender: buffers, copies, and seconds of one call in each round."""

    buffers: int
    copies: int
    seconds: list[float]


def attempted(name: str, make: Callable[[], Compiled]) -> Compiled | None:
    """What a peer makes of it; None, and a warning, if it cannot do it on some rank. Collective over all ranks."""
    made, failure = None, ""
    try:
        made = make()
    except Exception as error:  # whatever it is: torch's compiler wraps what went wrong, and so it is told
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        log.warning("%s is left out: %s", name, next(filter(None, failures)))
        return None
    return made


def line_up(
    functions: Mapping[str, tuple[Function, str | None]],
    mode: str | None,
    arguments: Callable[[str, int], tuple[Any, ...]],
    expected: Callable[[int], torch.Tensor],
) -> dict[str, Compiled]:
    """Compile all, and check what they return, before anything is timed. Collective over all ranks.

    Args:
        functions: What is compiled, and by what, by name.
        mode: Of torch.compile.
        arguments: Those of a contender in a step.
        expected: What all return in a step.

    Raises:
        WrongResultError: One returns something else.
    """
    found = {}
    for name, (function, backend) in functions.items():
        make = partial(compiled, function, backend, mode, *arguments(name, 0))
        made = attempted(f"{name}, mode {mode}", make) if backend == "inductor" else make()
        if made is not None:
            found[name] = made
            for step in range(4):  # a CUDA graph is captured by the second call, and replayed by the third
                graphs.compare(name, made.call(*arguments(name, step)), expected(step))
    return found


def sample(
    found: Mapping[str, Compiled], arguments: Callable[[str, int], tuple[Any, ...]], device_type: str
) -> dict[str, Found]:
    """Count what contenders allocate and copy, and time them in turns. Collective over all ranks."""
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
    return {name: Found(*counted[name], [each.device for each in times[name]]) for name in calls}


@torch.no_grad()
def chain(device_type: str, hidden: int, mode: str | None) -> dict[str, Found]:
    """On each rank: the 8 layers."""
    _prepare(device_type)
    data = Chain(_LAYERS, hidden, _BATCH, device_type, dist.get_rank(), dist.get_world_size())
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
def graph_input(device_type: str, hidden: int, mode: str | None) -> dict[str, Found]:
    """On each rank: one operator with an argument of the caller, in plain and in symmetric memory."""
    _prepare(device_type)
    rank, world = dist.get_rank(), dist.get_world_size()
    xs = [graphs.numbers(_BATCH, hidden, step, rank).to(device_type) for step in range(4)]
    sums = [
        torch.stack([graphs.numbers(_BATCH, hidden, step, each) for each in range(world)]).sum(0).to(device_type)
        for step in range(4)
    ]
    memory, keep = _symmetric(device_type, xs[0])
    total = graphs.total(device_type)
    peer = total if device_type == "cuda" else graphs.stock()
    functions: dict[str, tuple[Function, str | None]] = {
        "": (graphs.anew(lambda x: total(x)), "symmem"),
        "_symmetric": (graphs.anew(lambda x: total(x)), "symmem"),
        "inductor": (graphs.anew(lambda x: peer(x)), "inductor"),
        "eager": (lambda x: total(memory.copy_(x)), None),
    }

    def arguments(name: str, step: int) -> tuple[Any, ...]:
        return (memory.copy_(xs[step]) if name == "_symmetric" else xs[step],)

    found = sample(line_up(functions, mode, arguments, sums.__getitem__), arguments, device_type)
    del keep
    return found


def _symmetric(device_type: str, like: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Symmetric memory of the kind that :func:`.compiled_graphs.total` needs, and what keeps it mapped."""
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


# Figures.


def _figures(part: str, backend: str, world: int, nbytes: int, ending: str, results: Sequence[Any]) -> Iterator[Figure]:
    """Of a chain or an input: ours, each beside all peers. Of seconds, in each round those of the slowest rank."""
    first = results[0]
    measured: dict[tuple[str, str], dict[str, float]] = {
        ("_copies", "count"): {name: first[name].copies for name in first},
        ("", "us"): {name: statistics.median(slowest([r[name].seconds for r in results])) * 1e6 for name in first},
    }
    if part == "chain":
        measured = {("_buffers", "count"): {name: first[name].buffers for name in first}, **measured}
    ours = [name for name in first if not name or name.startswith("_")]
    for mine in ours:
        for (what, unit), values in measured.items():
            for peer in (name for name in first if name not in ours):
                figure = f"{part}{mine}{what}{ending}"
                yield Figure(figure, backend, world, nbytes, values[mine], unit, peer, values[peer])


def measure(backend: str, world: int, hidden: int | None, parts: Sequence[str], rounds: int) -> Iterator[Figure]:
    """All figures of a backend at one world size."""
    device_type = get_backend(backend).device_type
    hidden = hidden or _HIDDEN[device_type]
    with tempfile.TemporaryDirectory() as cache:
        env = {
            "SYMMEM_ENABLE": with_backend(backend),
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no processes beside the ranks
        }
        with RankPool(world, env=env, timeout=240) as pool:
            if "overhead" in parts:
                results = pool.run(overhead, device_type)
                for kind, count in results[0]:
                    value = max(each[kind, count] for each in results) * 1e6
                    yield Figure(f"host_overhead_{kind}_{count}", backend, world, 0, value, "us")
            if "compile" in parts:
                results = pool.run(compiling, device_type, rounds)
                for kind, (ours, theirs) in results[0].items():
                    named = partial(Figure, backend=backend, world=world, bytes=0, peer="inductor")
                    yield named(f"compile_calls_{kind}", value=ours.calls, unit="count", peer_value=theirs.calls)
                    took = [min(each[kind][who].seconds for each in results) * 1e6 for who in range(2)]
                    yield named(f"compile_time_{kind}", value=took[0], unit="us", peer_value=took[1])
            for part, function in (("chain", chain), ("input", graph_input)):
                for ending, mode in _MODES[device_type] if part in parts else ():
                    results = pool.run(function, device_type, hidden, mode)
                    yield from _figures(part, backend, world, _BATCH * hidden * 2, ending, results)


def run(
    backend: str, ranks: Sequence[int] | None, hidden: int | None, parts: Sequence[str], rounds: int
) -> Iterator[Figure]:
    """All figures of a backend; unless ``ranks`` says otherwise, at one rank a GPU, on the CPU with 2.

    Raises:
        UnsupportedError: See :func:`.gpu.check_gpus` and :func:`.compiled_counts.copies`.
        WrongResultError: What is compiled returns something wrong.
    """
    cuda = get_backend(backend).device_type == "cuda"
    for world in ranks or ((torch.cuda.device_count(),) if cuda else (2,)):
        if cuda:
            check_gpus("compile", world)
        yield from measure(backend, world, hidden, parts, rounds)
