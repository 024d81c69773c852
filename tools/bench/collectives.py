"""``symmem bench collectives``: collective operators beside gloo, or NCCL and PyTorch, in the same processes.

On the CPU a figure has the operator's name. On CUDA an operator has three figures:

* ``all_reduce_graph``: time of one of many calls in a CUDA graph, by the clock of the stream.
* ``all_reduce_eager``: time of one of many calls from Python, by the clock of the stream.
* ``all_reduce_host``: time in Python of one of these calls, until it is on the stream.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from symmem.backends import get_backend
from symmem.config import BACKEND_OPTION, SETTINGS
from symmem.config.options import parse_options
from symmem.errors import InvalidArgumentError
from symmem.tools.bench.contenders import OPERATORS, Contender, check, contenders
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.gpu import check_gpus
from symmem.tools.bench.progress import SILENT, Progress
from symmem.tools.bench.timing import Clock, clock_of, enough, in_turns, mean, slowest
from symmem.tools.ranks import RankPool

__all__ = ["OPERATORS", "SIZES", "Samples", "for_all_worlds", "measure", "run", "sample"]

SIZES = {
    "cpu": tuple(1 << power for power in (10, 14, 16, 18, 20, 22, 24)),
    "cuda": tuple(1 << power for power in (11, 13, 15, 16, 17, 19, 21, 23, 25, 27)),
}
"""Sizes by type of device: bytes of the tensor, or of the tensor with a row per rank."""

Samples = dict[tuple[str, str], list[float]]
"""Seconds of one call in every round, by the figure's ending and the contender's name."""

_ROUNDS = 9
_IN_GRAPH = 20  # calls
_VECTOR = 16  # bytes


def sample(operator: str, found: Sequence[Contender], clock: Clock, rounds: int = _ROUNDS) -> Samples:
    """Check the results of the contenders, and time them in turns. Collective over all ranks."""
    for each in found:
        check(operator, each)
    counts = [enough(each.call, clock) for each in found]
    calls = [partial(mean, clock, each.call, count) for each, count in zip(found, counts, strict=True)]
    names = [each.name for each in found]
    eager = dict(zip(names, in_turns(calls, rounds), strict=True))
    if not clock.graphs:
        return {("", name): [times.device for times in eager[name]] for name in names}
    replays = [partial(_replayed, clock, clock.capture(each.call, _IN_GRAPH)) for each in found]
    graphs = dict(zip(names, in_turns(replays, rounds + 1), strict=True))
    clock.all_here()  # before the graphs and their memory are freed
    return {
        **{("_graph", name): graphs[name][1:] for name in names},  # the first replay uploads the graph
        **{("_eager", name): [times.device for times in eager[name]] for name in names},
        **{("_host", name): [times.host for times in eager[name]] for name in names},
    }


def _replayed(clock: Clock, replay: Callable[[], object]) -> float:
    clock.together()
    return clock.seconds(replay).device / _IN_GRAPH


def _on_rank(operator: str, nbytes: int, backend: str, largest: int) -> Samples:
    return sample(operator, contenders(operator, nbytes, backend, largest), clock_of(get_backend(backend).device_type))


def merged(results: Sequence[Samples]) -> dict[str, dict[str, float]]:
    """Median seconds by the figure's ending and contender. In every round the slowest rank counts."""
    medians: dict[str, dict[str, float]] = defaultdict(dict)
    for ending, name in results[0]:
        medians[ending][name] = statistics.median(slowest([result[ending, name] for result in results]))
    return medians


def with_backend(backend: str) -> str:
    """``SYMMEM_ENABLE`` with another backend. The operators use memory of the configured backend."""
    known = {setting.option for setting in SETTINGS.values()}
    options = parse_options(os.environ.get("SYMMEM_ENABLE", ""), "SYMMEM_ENABLE", known)
    kept = [f"{o.name}({','.join(a.text for a in o.args)})" for o in options if o.name != BACKEND_OPTION]
    return ", ".join([*kept, f"{BACKEND_OPTION}({backend})"])


def measure(
    backend: str,
    world: int,
    sizes: Sequence[int] = (),
    operators: Sequence[str] = OPERATORS,
    progress: Progress = SILENT,
    on_rank: Callable[[str, int, str, int], Samples] = _on_rank,
    prefix: str = "",
) -> Iterator[Figure]:
    """Yield all figures of a backend at one world size, in microseconds. ``sizes`` defaults to :data:`SIZES`.

    ``on_rank`` measures on every rank. The prefix is for the names of the figures.
    """
    sizes = sizes or SIZES[get_backend(backend).device_type]
    with RankPool(world, env={"SYMMEM_ENABLE": with_backend(backend)}, timeout=240) as pool:
        for operator in operators:
            for nbytes in sizes:
                progress.step(f"{operator}, {world} ranks, {nbytes} bytes")
                medians = merged(pool.run(on_rank, operator, nbytes, backend, max(sizes)))
                for ending, times in medians.items():
                    ours, *peers = times.items()
                    for peer, seconds in peers:
                        figure = f"{prefix}{operator}{ending}"
                        yield Figure(figure, backend, world, nbytes, ours[1] * 1e6, "us", peer, seconds * 1e6)


def run(
    backend: str,
    ranks: Sequence[int] | None,
    sizes: Sequence[int],
    operators: Sequence[str],
    progress: Progress = SILENT,
) -> Iterator[Figure]:
    """Yield all figures. ``ranks`` defaults to the number of GPUs, and on the CPU to 2 and 4.

    Raises:
        InvalidArgumentError: A size is no multiple of 16 bytes, or less than 16 bytes per rank.
        UnsupportedError: See :func:`.gpu.check_gpus`.
        WrongResultError: The result of a contender is wrong.
    """
    yield from for_all_worlds(backend, ranks, sizes, operators, progress)


def for_all_worlds(
    backend: str,
    ranks: Sequence[int] | None,
    sizes: Sequence[int],
    operators: Sequence[str],
    progress: Progress,
    suite: str = "collectives",
    on_rank: Callable[[str, int, str, int], Samples] = _on_rank,
    prefix: str = "",
) -> Iterator[Figure]:
    """See :func:`run`, and :func:`measure` for the last two arguments. The suite's name is for errors."""
    device = get_backend(backend).device_type
    sizes = sizes or SIZES[device]
    worlds = ranks or ((torch.cuda.device_count(),) if device == "cuda" else (2, 4))
    for world in worlds:
        if device == "cuda":
            check_gpus(suite, world)
        for nbytes in sizes:
            if nbytes < _VECTOR * world or nbytes % _VECTOR:
                least = f"a multiple of {_VECTOR} from {_VECTOR * world}"
                raise InvalidArgumentError(f"{nbytes} bytes among {world} ranks: expected {least}")
        yield from measure(backend, world, sizes, operators, progress, on_rank, prefix)
