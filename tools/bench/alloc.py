"""``symmem bench alloc``: allocation in a warm arena, reclaiming, and leaks of a long run, on any backend.

With GPUs, the peer is an allocation and a rendezvous of PyTorch's transports, in separate processes.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

import symmem
from symmem.backends import get_backend
from symmem.errors import UnsupportedError
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.gpu import PEERS, check_gpus, fresh
from symmem.tools.bench.progress import SILENT, Progress
from symmem.tools.bench.timing import slowest
from symmem.tools.commands.doctor import examine
from symmem.tools.ranks import RankPool

__all__ = ["measure", "run"]

_SIZES = (4 << 10, 2 << 20)
_ALLOCATIONS = 2000
_BLOCKS, _BLOCK = 10_000, 256  # number of blocks, and bytes of one
_LONG_RUN = 16 << 10  # bytes of an allocation


def _warm(backend: str, nbytes: int) -> float:
    """Median seconds from a request to a tensor with reachable peers, in a warm arena."""
    allocate = partial(symmem.allocate, (nbytes,), torch.uint8, backend=backend)
    kept = [allocate() for _ in range(8)]  # grows the arena
    samples = []
    for _ in range(_ALLOCATIONS):
        begin = time.perf_counter()
        memory = allocate().rendezvous().tensor
        samples.append(time.perf_counter() - begin)
        del memory
    del kept
    symmem.collect()
    return statistics.median(samples)


def _reclaim(backend: str, rounds: int = 5) -> tuple[float, float, int]:
    """Median seconds to reclaim contiguous blocks, and every second block; and the number of rounds."""
    group = symmem.resolve_group()
    medians, exchanges = [], 0
    for step in (1, 2):
        samples = []
        for _ in range(rounds + 1):
            tensors = [symmem.allocate((_BLOCK,), torch.uint8, backend=backend) for _ in range(_BLOCKS * step)]
            symmem.collect()
            kept = tensors[1::2] if step == 2 else []
            del tensors
            gc.collect()
            with group.collective("begin together"):
                pass
            before, begin = group.status()["rounds"], time.perf_counter()
            symmem.collect()
            samples.append(time.perf_counter() - begin)
            exchanges = group.status()["rounds"] - before
            del kept
            symmem.collect()
        medians.append(statistics.median(samples[1:]))
    return medians[0], medians[1], exchanges


def _usage() -> tuple[int, int, int]:
    """Resident bytes, descriptors, and bytes of address space of this process."""
    gc.collect()
    pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
    return pages[1] * 4096, len(list(Path("/proc/self/fd").iterdir())), pages[0] * 4096


def _long_run(backend: str, pairs: int) -> tuple[int, int, int]:
    """Growth of resident bytes, descriptors and address space after ``pairs`` allocations that are dropped at once."""
    allocate = partial(symmem.allocate, (_LONG_RUN,), torch.uint8, backend=backend)
    for _ in range(pairs // 10):
        allocate()
    before = _usage()
    for _ in range(pairs):
        allocate()
    after = _usage()
    return after[0] - before[0], after[1] - before[1], after[2] - before[2]


def _theirs(transport: str, nbytes: int, rounds: int = 5) -> float:
    """Median seconds of PyTorch's allocation and rendezvous of fresh memory."""
    return sum(fresh(transport, "", nbytes, rounds))


def measure(
    backend: str, peers: Sequence[str], world: int, pairs: int, progress: Progress = SILENT
) -> Iterator[Figure]:
    """Yield all figures of a backend at one world size; the slowest rank counts."""
    others = {}
    for peer in peers:
        progress.step(f"alloc_warm, {world} ranks, torch_{peer}")
        with RankPool(world, timeout=240) as pool:
            others[peer] = {nbytes: max(pool.run(_theirs, PEERS[peer], nbytes, timeout=300)) * 1e6 for nbytes in _SIZES}
    with RankPool(world, timeout=300) as pool:
        for nbytes in _SIZES:
            progress.step(f"alloc_warm, {world} ranks, {nbytes} bytes")
            ours = max(pool.run(_warm, backend, nbytes, timeout=300)) * 1e6
            yield Figure("alloc_warm", backend, world, nbytes, ours, "us")
            for peer, times in others.items():
                yield Figure("alloc_warm", backend, world, nbytes, ours, "us", f"torch_{peer}", times[nbytes])
        progress.step(f"reclaim, {world} ranks, {_BLOCKS} blocks")
        contiguous, alternating, exchanges = slowest(pool.run(_reclaim, backend, timeout=300))
        yield Figure("reclaim", backend, world, _BLOCKS * _BLOCK, contiguous * 1e6, "us")
        yield Figure("reclaim_alternating", backend, world, _BLOCKS * _BLOCK, alternating * 1e6, "us")
        yield Figure("reclaim_rounds", backend, world, _BLOCKS * _BLOCK, exchanges, "count")
        progress.step(f"long_run, {world} ranks, {pairs} allocations")
        resident, descriptors, space = slowest(pool.run(_long_run, backend, pairs, timeout=300))
        yield Figure("long_run_resident", backend, world, pairs * _LONG_RUN, resident, "bytes")
        yield Figure("long_run_descriptors", backend, world, pairs * _LONG_RUN, descriptors, "count")
        yield Figure("long_run_address_space", backend, world, pairs * _LONG_RUN, space, "bytes")


def run(
    backend: str, peers: Sequence[str] | None, ranks: Sequence[int], pairs: int, progress: Progress = SILENT
) -> Iterator[Figure]:
    """Yield all figures. Without ``peers``, they are beside all of torch's transports that work here.

    Raises:
        UnsupportedError: There are peers, but the backend is for the CPU; or see :func:`.gpu.check_gpus`.
    """
    cuda = get_backend(backend).device_type == "cuda"
    if peers and not cuda:
        raise UnsupportedError(
            f"`bench alloc`: PyTorch's transports are for CUDA, and {backend!r} is for the CPU",
            hint="leave out --peers, or name a --backend for CUDA",
        )
    if peers is None:
        peers = [peer for peer in PEERS if cuda and examine(f"pytorch_{peer}").available]
    for world in ranks:
        if cuda:
            check_gpus("alloc", world)
        yield from measure(backend, peers, world, pairs, progress)
