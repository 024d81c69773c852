"""``symmem bench p2p``: copies between all pairs of ranks, one pair alone and all ranks together.

There are four figures per pair, in GB/s. In ``p2p_pull_alone/A/B`` rank A copies rank B's memory to its own while the
other ranks are idle; ``p2p_push_alone/A/B`` is the other direction. In ``p2p_pull_together/A/B`` and
``p2p_push_together/A/B`` all ranks copy at the same time, at the same distance from rank to peer, so that every memory
is used by one copy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import symmem
from symmem.backends import get_backend
from symmem.errors import InvalidArgumentError
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.gpu import Torch, check_gpus
from symmem.tools.bench.progress import SILENT, Progress
from symmem.tools.bench.timing import Clock, clock_of, in_turns, repeated
from symmem.tools.ranks import RankPool

__all__ = ["Copies", "Memory", "copies", "measure", "run"]

SIZES = {"cpu": 16 << 20, "cuda": 64 << 20}
"""Bytes of a copy, by type of device."""

Memory = Callable[[int], torch.Tensor]
"""Returns a peer's memory, by its rank."""

Copies = dict[tuple[str, int], tuple[float, float]]
"""Median seconds of a copy, symmem's and the comparison's, by figure and rank of the peer."""

_RUN = {"cpu": 64 << 20, "cuda": 1 << 30}  # bytes copied in a turn


def copies(ours: Memory, theirs: Memory, own: torch.Tensor, clock: Clock, repeats: int, rounds: int = 5) -> Copies:
    """Time all copies of this rank, ``ours`` and ``theirs`` in turns. Collective over all ranks.

    Args:
        ours: Returns the memory of a rank, of the shape of ``own``.
        theirs: The same for the comparison.
        own: Plain memory of this rank.
        clock: Times the copies.
        repeats: Number of copies per timing.
        rounds: Number of timings of a copy, after a first one that does not count.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    medians: Copies = {}

    def measure(name: str, peer: int) -> None:
        for direction in ("pull", "push"):
            calls = []
            for memory in (ours(peer), theirs(peer)):
                to, source = (own, memory) if direction == "pull" else (memory, own)
                calls.append(partial(_timed, clock, partial(to.copy_, source), repeats, name == "together"))
            times = [statistics.median(taken[1:]) for taken in in_turns(calls, rounds + 1)]
            medians[f"p2p_{direction}_{name}", peer] = (times[0], times[1])

    for copying in range(world):
        _meet()
        if copying == rank:
            for shift in range(1, world):
                measure("alone", (rank + shift) % world)
    _meet()
    for shift in range(1, world):
        measure("together", (rank + shift) % world)
    clock.all_here()  # before any rank's memory is freed
    return medians


def _meet() -> None:
    """Wait for all ranks over gloo, because a wait in NCCL's barrier would keep the GPU busy."""
    dist.all_reduce(torch.zeros(1))


def _timed(clock: Clock, copy: Callable[[], object], repeats: int, together: bool) -> float:
    if together:
        clock.all_here()
    return clock.seconds(repeated(copy, repeats)).device / repeats


def _on_rank(backend: str, nbytes: int) -> Copies:
    device = get_backend(backend).device_type
    st = symmem.allocate(nbytes, torch.uint8, backend=backend, arena=False).rendezvous()
    st.tensor.fill_(1)
    own = torch.ones(nbytes, dtype=torch.uint8, device=device)
    clock = clock_of(device)
    if device == "cuda":
        transport = Torch("CUDA")
        memory = transport.allocate(nbytes)
        handle: Any = transport.rendezvous(memory)
        theirs: Memory = partial(_buffer, handle, nbytes)
    else:  # a copy inside the process
        local = torch.ones(nbytes, dtype=torch.uint8)
        theirs = partial(_same, local)
    return copies(st.remote_tensor, theirs, own, clock, max(1, _RUN[device] // nbytes))


def _buffer(handle: Any, nbytes: int, peer: int) -> torch.Tensor:
    memory: torch.Tensor = handle.get_buffer(peer, (nbytes,), torch.uint8)
    return memory


def _same(memory: torch.Tensor, peer: int) -> torch.Tensor:
    return memory


def measure(backend: str, world: int, nbytes: int) -> Iterator[Figure]:
    """Yield the figures of all pairs of ranks."""
    peer_name = "torch_cuda" if get_backend(backend).device_type == "cuda" else "local"
    with RankPool(world, timeout=240) as pool:
        results = pool.run(_on_rank, backend, nbytes)
    for name in dict.fromkeys(name for name, _ in results[0]):
        for rank, medians in enumerate(results):
            for peer in sorted(peer for figure, peer in medians if figure == name):
                ours, theirs = (nbytes / seconds / 1e9 for seconds in medians[name, peer])
                yield Figure(f"{name}/{rank}/{peer}", backend, world, nbytes, ours, "GB/s", peer_name, theirs)


def run(backend: str, ranks: Sequence[int] | None, nbytes: int | None, progress: Progress = SILENT) -> Iterator[Figure]:
    """Yield all figures. ``ranks`` defaults to the number of GPUs, and on the CPU to 2 and 4.

    Raises:
        InvalidArgumentError: There is only one rank.
        UnsupportedError: See :func:`.gpu.check_gpus`.
    """
    device = get_backend(backend).device_type
    nbytes = nbytes or SIZES[device]
    worlds = ranks or ((torch.cuda.device_count(),) if device == "cuda" else (2, 4))
    for world in worlds:
        if device == "cuda":
            check_gpus("p2p", world)
        if world < 2:
            raise InvalidArgumentError("`bench p2p` needs two ranks at least, not 1")
        progress.step(f"all pairs of {world} ranks, {nbytes} bytes")
        yield from measure(backend, world, nbytes)
