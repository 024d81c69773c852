"""``symmem bench torch_backend``: torch's symmetric memory with symmem as its backend, beside torch's own for CUDA.

A process has one backend of torch, so the two sides are two pools of ranks on the same GPUs and CPUs. They measure in
turns.
Only fresh memory is measured with one pool at a time: while any process maps a peer's memory, the driver makes the next
mapping in a fraction of the time. Kernels are measured on several tensors, because where the driver places a tensor
changes their time by up to 5 %.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import symmem
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.gpu import check_gpus
from symmem.tools.bench.progress import SILENT, Progress
from symmem.tools.bench.timing import CudaClock, pinned, repeated, slowest
from symmem.tools.ranks import RankPool

__all__ = ["run"]

_FRESH = 64 << 20
_TENSORS, _SMALL = 200, 64 << 10  # in a warm arena: number and bytes
_GRAPH = 20  # calls in a CUDA graph
_PLACES = 5  # tensors on which a kernel is measured
_KERNELS = (
    *(("one_shot_all_reduce_out", 1 << bits) for bits in (14, 19)),
    *(("two_shot_all_reduce_", 1 << bits) for bits in (19, 23, 26)),
)


def _symmetric_memory(enable: bool) -> Any:
    import torch.distributed._symmetric_memory as symm_mem

    if enable:
        symmem.torch_backend.enable()
        symm_mem.set_backend("SYMMEM")  # type: ignore[arg-type]
    return symm_mem


def _fresh(symm_mem: Any, nbytes: int) -> tuple[torch.Tensor, Any]:
    """A tensor and its handle. Not `symm_mem.empty`, which may look for a pool."""
    device = torch.device("cuda", torch.cuda.current_device())
    tensor = symm_mem._SymmetricMemory.empty_strided_p2p((nbytes // 2,), (1,), torch.bfloat16, device)
    return tensor, symm_mem.rendezvous(tensor, dist.group.WORLD)


def _host(clock: CudaClock, call: Callable[[], object], count: int) -> float:
    """Seconds in Python of one of ``count`` calls."""
    clock.all_here()
    repeated(call, 10)()
    clock.all_here()
    return clock.seconds(repeated(call, count)).host / count


def _in_graph(clock: CudaClock, call: Callable[[], object]) -> float:
    """Median seconds on the GPU of a call in a CUDA graph."""
    call()
    replay = clock.capture(call, _GRAPH)
    samples = []
    for _ in range(11):
        clock.together()
        samples.append(clock.seconds(replay).device / _GRAPH)
    return statistics.median(samples[1:])


def _first_rendezvous(ours: bool) -> list[float]:
    """Median seconds of a new tensor and its first rendezvous."""
    symm_mem, clock = _symmetric_memory(ours), CudaClock()
    samples = []
    for _ in range(8):
        clock.all_here()
        begin = time.perf_counter()
        kept = _fresh(symm_mem, _FRESH)
        samples.append(time.perf_counter() - begin)
        clock.all_here()
        del kept
    return [statistics.median(samples[1:])]  # the first sets up libraries and connections


def _side(ours: bool) -> list[float]:
    """Seconds of every figure, in the order of :data:`_NAMES`; the last is symmem's alone."""
    with pinned(dist.get_rank(), dist.get_world_size()):
        return _figures(_symmetric_memory(ours), CudaClock(), ours)


def _figures(symm_mem: Any, clock: CudaClock, ours: bool) -> list[float]:
    places = [_fresh(symm_mem, max(nbytes for _, nbytes in _KERNELS)) for _ in range(_PLACES)]
    for memory, _ in places:
        memory.zero_()
    tensor, handle = places[0]
    peer = (handle.rank + 1) % handle.world_size
    group, name = dist.group.WORLD, dist.group.WORLD.group_name  # type: ignore[union-attr]
    values = [
        _host(clock, handle.barrier, 200),
        _host(clock, partial(symm_mem.rendezvous, tensor, group), 1000),
        _host(clock, partial(handle.get_buffer, peer, (1024,), torch.bfloat16), 1000),
        _in_graph(clock, handle.barrier),
    ]
    for operator, nbytes in _KERNELS:
        calls = []
        for memory, _ in places:
            part = memory[: nbytes // 2]
            out = [torch.empty_like(part)] if operator.endswith("_out") else []
            calls.append(partial(getattr(torch.ops.symm_mem, operator), part, "sum", name, *out))
        values.append(statistics.median(_in_graph(clock, call) for call in calls))
        values.append(_host(clock, calls[0], 100))
    warm = []
    if ours:
        tensors = [symmem.allocate(_SMALL, torch.uint8, "cuda", backend="native") for _ in range(_TENSORS)]
        for st in tensors:
            memory = st.tensor
            begin = time.perf_counter()
            kept_handle = symm_mem.rendezvous(memory, group)
            warm.append(time.perf_counter() - begin)
            del kept_handle
    clock.all_here()
    return [*values, statistics.median(warm) if warm else 0.0]


_NAMES = (
    *(("barrier_host", 0), ("rendezvous_again_host", 0), ("get_buffer_host", 0), ("barrier_graph", 0)),
    *((f"{operator}_{kind}", nbytes) for operator, nbytes in _KERNELS for kind in ("graph", "host")),
)


def run(ranks: int | None, rounds: int, progress: Progress = SILENT) -> Iterator[Figure]:
    """Yield all figures: the median of the rounds, and for times on the host the least, because a CPU may be slow for a
    while. ``ranks`` defaults to the number of GPUs.

    Raises:
        UnsupportedError: There are fewer than two GPUs or ranks.
    """
    world = ranks or torch.cuda.device_count()
    check_gpus("torch_backend", world)
    fresh = []
    for with_symmem in (True, False):
        progress.step(f"fresh memory, {world} ranks")
        with RankPool(world, timeout=240) as pool:
            fresh.append(slowest(pool.run(_first_rendezvous, with_symmem))[0] * 1e6)
    yield Figure("fresh_and_rendezvous", "native", world, _FRESH, fresh[0], "us", "torch_cuda", fresh[1])
    sides: tuple[list[list[float]], list[list[float]]] = [], []
    with RankPool(world, timeout=240) as ours, RankPool(world, timeout=240) as theirs:
        for turn in range(rounds):
            for pool, taken in ((ours, sides[0]), (theirs, sides[1])):
                progress.step(f"round {turn + 1} of {rounds}, {world} ranks")
                taken.append(slowest(pool.run(_side, pool is ours)))
    columns = [list(zip(*taken, strict=True)) for taken in sides]
    for (figure, nbytes), mine, other in zip(_NAMES, *columns, strict=False):
        typical = min if figure.endswith("_host") else statistics.median
        yield Figure(figure, "native", world, nbytes, typical(mine) * 1e6, "us", "torch_cuda", typical(other) * 1e6)
    yield Figure("rendezvous_in_warm_arena", "native", world, _SMALL, min(columns[0][-1]) * 1e6, "us")
