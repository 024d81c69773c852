"""Timing of calls: on the CPU by the host's clock, on a GPU by the stream's clock, eager and in a CUDA graph."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

__all__ = [
    "Clock",
    "CudaClock",
    "HostClock",
    "Times",
    "alternate",
    "clock_of",
    "enough",
    "in_turns",
    "mean",
    "pinned",
    "repeated",
    "slowest",
]

T = TypeVar("T")
Call = Callable[[], object]

_RUN = 0.01  # seconds that a run of many calls should take
_LEAD = 5  # calls before a run
_HEAD_START = 1_000_000  # cycles, half a millisecond, in which the host puts the timed calls on the stream


class Times(NamedTuple):
    """Seconds on the device, and seconds until the host was done; on the CPU they are the same."""

    device: float
    host: float


class Clock(Protocol):
    """Times calls of this rank. There is a clock for the CPU, one for CUDA, and another in the tests.

    Attributes:
        graphs: Whether there is :meth:`capture`.
    """

    graphs: bool

    def all_here(self) -> None:
        """Wait until all ranks are here and their device work is done. Collective over all ranks."""

    def together(self) -> None:
        """Make the next work begin at the same time on all ranks' devices. Collective over all ranks."""

    def seconds(self, run: Call) -> Times:
        """Call ``run`` once and wait until it is done."""

    def capture(self, call: Call, count: int) -> Call:
        """Capture ``count`` calls, and return a function that replays them. Collective if the call is."""


class HostClock:
    """A :class:`Clock` for the CPU."""

    graphs = False

    def all_here(self) -> None:
        """See :class:`Clock`."""
        dist.barrier()

    together = all_here

    def seconds(self, run: Call) -> Times:
        """See :class:`Clock`."""
        begin = perf_counter()
        run()
        took = perf_counter() - begin
        return Times(took, took)

    def capture(self, call: Call, count: int) -> Call:
        """The CPU has no graphs."""
        raise NotImplementedError


class CudaClock:
    """A :class:`Clock` for the current GPU and stream. The default process group needs NCCL."""

    graphs = True

    def __init__(self) -> None:
        self._one = torch.zeros(1, device="cuda")

    def all_here(self) -> None:
        """See :class:`Clock`."""
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()

    def together(self) -> None:
        """See :class:`Clock`. Ranks leave an all-reduce on the stream within one or two microseconds."""
        self.all_here()
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        dist.all_reduce(self._one)

    def seconds(self, run: Call) -> Times:
        """See :class:`Clock`."""
        begin, end = _event(), _event()
        begin.record()
        start = perf_counter()
        run()
        host = perf_counter() - start
        end.record()
        end.synchronize()
        return Times(float(begin.elapsed_time(end)) / 1e3, host)

    def capture(self, call: Call, count: int) -> Call:
        """See :class:`Clock`."""
        self.all_here()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread queries events meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            repeated(call, count)()
        return graph.replay


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_of(device_type: str) -> Clock:
    """The clock for "cpu" or "cuda"."""
    return CudaClock() if device_type == "cuda" else HostClock()


@contextmanager
def pinned(rank: int, world: int) -> Iterator[None]:
    """Keep this thread on one CPU, which is the same one for this rank of other pools: CPUs differ by a factor of 2.

    The CPUs of the ranks are as far apart as possible, because neighbours may share a core.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[rank * len(before) // world]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def repeated(call: Call, count: int) -> Call:
    """Return a function that makes ``count`` calls."""

    def run() -> None:
        for _ in range(count):
            call()

    return run


def enough(call: Call, clock: Clock) -> int:
    """The number of calls of a run, the same on all ranks. Warms up. Collective over all ranks."""
    seconds = torch.tensor(mean(clock, call, 3).device, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return max(3, min(200, int(_RUN / float(seconds))))


def mean(clock: Clock, call: Call, count: int) -> Times:
    """The mean time of one of ``count`` calls. Collective over all ranks.

    Ranks begin up to a millisecond apart. Some untimed calls come first, because no rank finishes them before all ranks
    have begun.
    """
    clock.all_here()
    repeated(call, _LEAD)()
    took = clock.seconds(repeated(call, count))
    return Times(took.device / count, took.host / count)


def in_turns(calls: Sequence[Callable[[], T]], rounds: int) -> list[list[T]]:
    """Results of every call, by round. All calls are first equally often, so that drift affects them equally."""
    returned: list[list[T]] = [[] for _ in calls]
    turns = list(zip(returned, calls, strict=True))
    for _ in range(rounds):
        for taken, call in turns:
            taken.append(call())
        turns.append(turns.pop(0))
    return returned


def alternate(ours: Call, peer: Call, rounds: int) -> tuple[float, float]:
    """Median seconds of two calls on the CPU, timed in turns."""
    clock = HostClock()
    samples = in_turns([lambda: clock.seconds(ours).host, lambda: clock.seconds(peer).host], rounds)
    return statistics.median(samples[0]), statistics.median(samples[1])


def slowest(results: Sequence[Sequence[float]]) -> list[float]:
    """The largest value of every figure over all ranks."""
    return [max(column) for column in zip(*results, strict=True)]
