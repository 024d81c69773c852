"""``symmem bench host``: barrier, remote copies, allocation and rendezvous of host shared memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from time import perf_counter

import torch
import torch.distributed as dist

import symmem
from symmem.group.resolve import resolve_group
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.progress import SILENT, Progress
from symmem.tools.bench.timing import alternate
from symmem.tools.ranks import RankPool

__all__ = ["measure", "run"]

_COPY = 16 << 20
_FRESH = 64 << 20


def _barrier() -> tuple[float, float]:
    """Median seconds of a barrier, symmem's and gloo's; every sample is the mean of many."""
    st = symmem.allocate(1, backend="host", arena=False).rendezvous()
    count = 200

    def ours() -> None:
        for _ in range(count):
            st.barrier()

    def gloo() -> None:
        for _ in range(count):
            dist.barrier()

    ours()
    gloo()
    mine, peers = alternate(ours, gloo, rounds=9)
    return mine / count, peers / count


def _copies() -> list[tuple[float, float]]:
    """On rank 0: median seconds of a pull and of a push of a peer's 16 MiB, both beside a local copy.

    The physical pages of a tensor change its speed by some percent, so several tensors are measured.
    """
    samples = [_copies_of_one() for _ in range(7)]
    return [
        (statistics.median(ours for ours, _ in kind), statistics.median(local for _, local in kind))
        for kind in zip(*samples, strict=True)
    ]


def _copies_of_one() -> list[tuple[float, float]]:
    st = symmem.allocate(_COPY, torch.uint8, backend="host", arena=False).rendezvous()
    st.tensor.fill_(1)
    local, other = torch.ones(_COPY, dtype=torch.uint8), torch.ones(_COPY, dtype=torch.uint8)
    st.barrier()
    timings = []
    if dist.get_rank() == 0:
        remote = st.remote_tensor(1)
        # Both sides read from, or write to, the same tensor, so that caches help them equally.
        for target, source, beside in (
            (local, remote, partial(local.copy_, other)),
            (remote, local, partial(other.copy_, local)),
        ):
            target.copy_(source)
            timings.append(alternate(partial(target.copy_, source), beside, rounds=40))
    st.barrier()
    return timings


def _fresh() -> tuple[float, float, float]:
    """Median seconds to allocate 64 MiB, to rendezvous it, and to exchange bytes and descriptors alone."""
    group = resolve_group()
    samples = []
    for _ in range(15):
        dist.barrier()
        begin = perf_counter()
        st = symmem.allocate(_FRESH, torch.uint8, backend="host", arena=False)
        allocated = perf_counter()
        st.rendezvous()
        met = perf_counter()
        # The rounds of a rendezvous (compare, map, agree) with nothing to map.
        with group.collective("measure") as collective:
            collective.exchange("compare", b"x" * 300)
            collective.exchange("map", b"", [0, 0]).close()
        samples.append((allocated - begin, met - allocated, perf_counter() - met))
    columns = list(zip(*samples, strict=True))
    return statistics.median(columns[0]), statistics.median(columns[1]), statistics.median(columns[2])


def measure(world: int, progress: Progress = SILENT) -> list[Figure]:
    """Return all figures at one world size; the slowest rank counts."""
    with RankPool(world) as pool:
        progress.step(f"barrier, {world} ranks")
        barrier = max(pool.run(_barrier))
        progress.step(f"alloc_fresh and rendezvous, {world} ranks, {_FRESH} bytes")
        fresh = max(pool.run(_fresh), key=sum)
        progress.step(f"p2p_pull and p2p_push, {world} ranks, {_COPY} bytes")
        copies = pool.run(_copies)[0] if world > 1 else []
    figures = [Figure("barrier", "host", world, 0, barrier[0] * 1e6, "us", "gloo", barrier[1] * 1e6)]
    for name, seconds in zip(("alloc_fresh", "rendezvous", "exchange"), fresh, strict=True):
        figures.append(Figure(name, "host", world, _FRESH, seconds * 1e6, "us"))
    for name, (ours, local) in zip(("p2p_pull", "p2p_push"), copies, strict=False):
        figures.append(Figure(name, "host", world, _COPY, _COPY / ours / 1e9, "GB/s", "local", _COPY / local / 1e9))
    return figures


def run(ranks: Sequence[int], progress: Progress = SILENT) -> Iterator[Figure]:
    """Yield all figures at these world sizes."""
    for world in ranks:
        yield from measure(world, progress)
