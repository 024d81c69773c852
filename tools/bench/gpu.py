"""``symmem bench gpu``: a backend beside torch's transports, on all GPUs of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import symmem
from symmem.errors import UnsupportedError
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.progress import SILENT, Progress
from symmem.tools.bench.timing import CudaClock, in_turns, repeated, slowest
from symmem.tools.ranks import RankPool

__all__ = ["PEERS", "Torch", "check_gpus", "fresh", "measure", "run"]

PEERS = {"cuda": "CUDA", "nvshmem": "NVSHMEM", "nccl": "NCCL"}
"""Names of torch's transports: the name in figures, and torch's name."""

_FRESH = (4 << 10, 2 << 20, 64 << 20, 1 << 30)
_COPIES = (64 << 20, 1 << 30)


class Torch:
    """torch's symmetric memory over one transport."""

    def __init__(self, transport: str) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        self._module: Any = symm_mem
        self._device = torch.device("cuda", torch.cuda.current_device())
        # torch 2.11 refuses to set "CUDA", which is the default.
        if symm_mem.get_backend(self._device) != transport:
            symm_mem.set_backend(transport)  # type: ignore[arg-type]
        if transport == "NCCL":  # it needs a communicator, and does not make it
            dist.all_reduce(torch.zeros(1, device=self._device))

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate fresh memory of ``nbytes``."""
        from torch._C._distributed_c10d import _SymmetricMemory

        # Not `symm_mem.empty`: it reuses memory of a pool, which has been through a rendezvous already.
        memory: torch.Tensor = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, self._device)
        return memory

    def rendezvous(self, memory: torch.Tensor) -> Any:
        """Return the handle of memory that all ranks have allocated. Collective over all ranks."""
        return self._module.rendezvous(memory, dist.group.WORLD)


def _timed(call: Callable[[], object]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def fresh(transport: str | None, backend: str, nbytes: int, rounds: int) -> list[float]:
    """Median seconds of allocate and of rendezvous: torch's with a transport, symmem's with None."""
    allocate: Callable[[], Any] = partial(symmem.allocate, nbytes, torch.uint8, backend=backend, arena=False)
    rendezvous: Callable[[Any], Any] = symmem.SymmetricTensor.rendezvous
    if transport:
        theirs = Torch(transport)
        allocate, rendezvous = partial(theirs.allocate, nbytes), theirs.rendezvous
    clock, samples = CudaClock(), []
    for turn in range(rounds + 1):
        clock.all_here()
        alloc, memory = _timed(allocate)
        clock.all_here()
        meet, handle = _timed(partial(rendezvous, memory))
        if turn:  # the first sets up libraries and connections
            samples.append((alloc, meet))
        clock.all_here()
        del memory, handle
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def _copies(transport: str, backend: str, rounds: int = 5) -> list[float]:
    """Median seconds of a pull and a push by size, symmem's and torch's. All ranks copy at once, with a neighbour."""
    theirs = Torch(transport)
    peer = (dist.get_rank() + 1) % dist.get_world_size()
    largest = max(_COPIES)
    # One allocation for all sizes: torch's transports may take new memory at an old address for the old one.
    st = symmem.allocate(largest, torch.uint8, backend=backend, arena=False).rendezvous()
    memory = theirs.allocate(largest)
    handle = theirs.rendezvous(memory)
    remotes = st.remote_tensor(peer), handle.get_buffer(peer, (largest,), torch.uint8)
    scratch = torch.empty(largest, dtype=torch.uint8, device="cuda")
    clock, medians = CudaClock(), []
    for nbytes in _COPIES:
        calls = [partial(scratch[:nbytes].copy_, remote[:nbytes]) for remote in remotes]
        calls += [partial(remote[:nbytes].copy_, scratch[:nbytes]) for remote in remotes]
        repeats = max(1, (2 << 30) // nbytes)
        samples = in_turns([partial(_streamed, clock, call, repeats) for call in calls], rounds + 1)
        pull, peer_pull, push, peer_push = (statistics.median(taken[1:]) for taken in samples)
        medians += [pull, push, peer_pull, peer_push]
    clock.all_here()
    return medians


def _streamed(clock: CudaClock, call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call by the clock of the stream. All ranks begin together."""
    clock.all_here()
    return clock.seconds(repeated(call, repeats)).device / repeats


def _barrier(transport: str, backend: str, count: int = 100, rounds: int = 15) -> list[float]:
    """Median seconds of a barrier in a CUDA graph, and of an eager call: symmem's, then torch's."""
    theirs = Torch(transport)
    st = symmem.allocate(1024, torch.uint8, backend=backend, arena=False).rendezvous()
    handle = theirs.rendezvous(theirs.allocate(1024))
    clock, result = CudaClock(), []
    for call in (st.barrier, handle.barrier):
        call()
        replay = clock.capture(call, count)
        graphs, eager = [], []
        for turn in range(rounds + 1):
            replayed = _streamed(clock, replay, 1) / count
            clock.all_here()
            seconds, _ = _timed(repeated(call, count))
            if turn:
                graphs.append(replayed)
                eager.append(seconds / count)
        result.append((statistics.median(graphs), statistics.median(eager)))
        clock.all_here()
        del replay
    return [*result[0], *result[1]]


def measure(backend: str, peer: str, world: int, progress: Progress = SILENT) -> Iterator[Figure]:
    """Yield all figures of a backend beside one of torch's transports; the slowest rank counts."""

    def figure(name: str, nbytes: int, ours: float, theirs: float, unit: str = "us") -> Figure:
        def convert(seconds: float) -> float:
            return seconds * 1e6 if unit == "us" else nbytes / seconds / 1e9

        return Figure(name, backend, world, nbytes, convert(ours), unit, f"torch_{peer}", convert(theirs))

    with RankPool(world, timeout=240) as pool:
        progress.step(f"p2p_pull and p2p_push, {world} ranks, beside torch_{peer}")
        copies = slowest(pool.run(_copies, PEERS[peer], backend, timeout=240))
        for nbytes in _COPIES:
            pull, push, peer_pull, peer_push = (copies.pop(0) for _ in range(4))
            yield figure("p2p_pull", nbytes, pull, peer_pull, "GB/s")
            yield figure("p2p_push", nbytes, push, peer_push, "GB/s")
        progress.step(f"barrier, {world} ranks, beside torch_{peer}")
        if peer == "cuda":  # the only transport of torch 2.11 with a barrier
            graph, eager, peer_graph, peer_eager = slowest(pool.run(_barrier, PEERS[peer], backend, timeout=240))
            yield figure("barrier_graph", 0, graph, peer_graph)
            yield figure("barrier_eager", 0, eager, peer_eager)
    # The two sides run in separate processes. While a process has any mapping of a peer's memory, the driver makes the
    # next one in a fraction of the time, so a mapping of one side would speed up the other.
    sides: list[list[list[float]]] = []
    for transport in (None, PEERS[peer]):
        sides.append([])
        with RankPool(world, timeout=240) as pool:
            for nbytes in _FRESH:
                progress.step(f"rendezvous, {world} ranks, {nbytes} bytes, beside torch_{peer}")
                rounds = 7 if nbytes < 1 << 30 else 3
                sides[-1].append(slowest(pool.run(fresh, transport, backend, nbytes, rounds, timeout=240)))
    for nbytes, (alloc, meet), (peer_alloc, peer_meet) in zip(_FRESH, *sides, strict=True):
        yield figure("alloc_fresh", nbytes, alloc, peer_alloc)
        yield figure("rendezvous", nbytes, meet, peer_meet)
        yield figure("alloc_and_rendezvous", nbytes, alloc + meet, peer_alloc + peer_meet)


def check_gpus(suite: str, world: int) -> None:
    """Check the number of GPUs and ranks.

    Raises:
        UnsupportedError: There are fewer than two GPUs or ranks.
    """
    gpus = torch.cuda.device_count()
    if min(gpus, world) < 2:
        raise UnsupportedError(f"`bench {suite}` needs two GPUs and two ranks at least, not {gpus} and {world}")


def run(backend: str, peers: Sequence[str], ranks: int | None, progress: Progress = SILENT) -> Iterator[Figure]:
    """Yield all figures of a backend beside these peers. ``ranks`` defaults to the number of GPUs.

    Raises:
        UnsupportedError: See :func:`check_gpus`.
    """
    world = ranks or torch.cuda.device_count()
    check_gpus("gpu", world)
    for peer in peers:
        yield from measure(backend, peer, world, progress)
