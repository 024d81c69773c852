"""``symmem bench compile``: functions compiled with symmem.compile, beside stock Inductor and eager code.

``chain``: 8 layers of a product and a sum over all ranks. ``input``: an argument that the compiler does not own.
``overhead``: extra time of a call per registered argument. ``compile``: time to compile.

Ranks import Inductor, which takes seconds; this module does not.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from symmem.backends import get_backend
from symmem.tools.bench.collectives import with_backend
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.gpu import check_gpus
from symmem.tools.bench.progress import SILENT, Progress
from symmem.tools.bench.timing import slowest
from symmem.tools.ranks import RankPool

__all__ = ["BATCH", "LAYERS", "PARTS", "Compiling", "Copies", "Measured", "measure", "run"]

PARTS = ("overhead", "compile", "chain", "input")

LAYERS, BATCH = 8, 8
_HIDDEN = {"cpu": 1024, "cuda": 4096}
_MODES: dict[str, tuple[tuple[str, str | None], ...]] = {
    "cpu": (("", None),),
    "cuda": (("", None), ("_graph", "reduce-overhead")),
}
"""Endings of figure names, and modes of torch.compile."""


class Copies(NamedTuple):
    """Copies of one call by a GPU's copy engine, and by kernels. On the CPU, all copies count as kernels."""

    engine: int
    kernel: int


class Measured(NamedTuple):
    """One contender: its buffers, its copies, and seconds of one call in every round."""

    buffers: int
    copies: Copies
    seconds: list[float]


class Compiling(NamedTuple):
    """The cost of compiling a function.

    Attributes:
        calls: Number of calls of Python functions; nearly the same in every run, on any machine.
        seconds: CPU seconds of this process, in the fastest round.
    """

    calls: int
    seconds: float


def _figures(part: str, backend: str, world: int, nbytes: int, ending: str, results: Sequence[Any]) -> Iterator[Figure]:
    """Yield the figures of a chain or an input beside all peers. In every round the slowest rank counts."""
    first = results[0]
    measured: dict[tuple[str, str], dict[str, float]] = {
        ("_copies", "count"): {name: sum(first[name].copies) for name in first},
        ("_engine_copies", "count"): {name: first[name].copies.engine for name in first},
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


def _on_rank(module: str, function: str, *args: Any) -> Any:
    return getattr(importlib.import_module(f"symmem.tools.bench.compiled_{module}"), function)(*args)


def measure(
    backend: str, world: int, hidden: int | None, parts: Sequence[str], rounds: int, progress: Progress = SILENT
) -> Iterator[Figure]:
    """Yield all figures of a backend at one world size."""
    device_type = get_backend(backend).device_type
    hidden = hidden or _HIDDEN[device_type]
    with tempfile.TemporaryDirectory() as cache:
        env = {
            "SYMMEM_ENABLE": with_backend(backend),
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no worker processes beside the ranks
        }
        with RankPool(world, env=env, timeout=240) as pool:
            if "overhead" in parts:
                progress.step(f"host_overhead, {world} ranks")
                results = pool.run(_on_rank, "costs", "overhead", device_type)
                for kind, count in results[0]:
                    # Ranks do not communicate here, so a disturbance of one rank should not count.
                    value = statistics.median(each[kind, count] for each in results) * 1e6
                    yield Figure(f"host_overhead_{kind}_{count}", backend, world, 0, value, "us")
            if "compile" in parts:
                progress.step(f"compile_time, {world} ranks")
                results = pool.run(_on_rank, "costs", "compiling", device_type, rounds)
                for kind, (ours, theirs) in results[0].items():
                    named = partial(Figure, backend=backend, world=world, bytes=0, peer="inductor")
                    yield named(f"compile_calls_{kind}", value=ours.calls, unit="count", peer_value=theirs.calls)
                    took = [min(each[kind][who].seconds for each in results) * 1e6 for who in range(2)]
                    yield named(f"compile_time_{kind}", value=took[0], unit="us", peer_value=took[1])
            for part, function in (("chain", "chain"), ("input", "graph_input")):
                for ending, mode in _MODES[device_type] if part in parts else ():
                    progress.step(f"{part}{ending}, {world} ranks")
                    results = pool.run(_on_rank, "contenders", function, device_type, hidden, mode)
                    yield from _figures(part, backend, world, BATCH * hidden * 2, ending, results)


def run(
    backend: str,
    ranks: Sequence[int] | None,
    hidden: int | None,
    parts: Sequence[str],
    rounds: int,
    progress: Progress = SILENT,
) -> Iterator[Figure]:
    """Yield all figures. ``ranks`` defaults to the number of GPUs, and on the CPU to 2.

    Raises:
        UnsupportedError: See :func:`.gpu.check_gpus` and :func:`.compiled_counts.copies`.
        WrongResultError: A compiled function returns a wrong result.
    """
    device = get_backend(backend).device_type
    worlds = ranks or ((torch.cuda.device_count(),) if device == "cuda" else (2,))
    for world in worlds:
        if device == "cuda":
            check_gpus("compile", world)
        yield from measure(backend, world, hidden, parts, rounds, progress)
