"""Operator calls that C repeats, on GPUs: results, streams, and the calls that remain in Python."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import OPTIONS
from torch.utils._python_dispatch import TorchDispatchMode

import symmem
from symmem.ops import eager
from symmem.tools.commands.doctor import examine
from symmem.tools.ranks import RankPool

FOUND = examine("native")
WORLD = max(torch.cuda.device_count(), 2)

pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.why_not)


@pytest.fixture(scope="module")
def pool() -> Any:
    with RankPool(WORLD, **OPTIONS) as pool:
        yield pool


class Counted:
    """Counts the calls made in C, and the others."""

    def __init__(self) -> None:
        self.done, self.left = 0, 0
        self._run: Any = None

    def __call__(self, *args: Any) -> Any:
        result = self._run(*args)
        if result is None:
            self.left += 1
        else:
            self.done += 1
        return result

    def __enter__(self) -> Counted:
        symmem.ops.all_reduce(torch.ones(1, device="cuda"))  # the first call loads the module
        self._run, eager.run = eager.run, self
        return self

    def __exit__(self, *_: object) -> None:
        eager.run = self._run


def numbers(shape: tuple[int, ...], dtype: torch.dtype, turn: int, rank: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(count, device="cuda") * 7 + rank * 5 + turn) % 13).to(dtype).view(shape)


def all_right() -> None:
    """All operators and forms, with alternating shapes and new tensors at every call."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shapes, dtypes = ((3,), (5, 8), (64, 1024)), (torch.float32, torch.bfloat16)
    with Counted() as counted:
        for turn, shape, dtype in itertools.product(range(4), shapes, dtypes):
            given = [numbers(shape, dtype, turn, each) for each in range(world)]
            rows = [numbers((world, *shape), dtype, turn, each) for each in range(world)]
            total = sum(each.double() for each in given).to(dtype)  # type: ignore[union-attr]
            column = [each[rank] for each in rows]
            kept = []  # so that results have a new address every time
            for out in (None, torch.empty_like(given[0]), x := given[rank].clone()):
                kept.append(symmem.ops.all_reduce(x if out is x else given[rank], out=out))
                assert torch.equal(kept[-1], total), (turn, shape, dtype)
            for out in (None, torch.empty(world, *shape, dtype=dtype, device="cuda")):
                kept.append(symmem.ops.all_gather(given[rank], out=out))
                assert torch.equal(kept[-1], torch.stack(given))
                kept.append(symmem.ops.all_to_all(rows[rank], out=out))
                assert torch.equal(kept[-1], torch.stack(column))
            for out in (None, torch.empty_like(given[0])):
                kept.append(symmem.ops.reduce_scatter(rows[rank], reduction="max", out=out))
                assert torch.equal(kept[-1], torch.stack(column).amax(0))
                kept.append(symmem.ops.broadcast(given[rank], root=world - 1, out=out))
                assert torch.equal(kept[-1], given[world - 1])
    kinds = len(shapes) * len(dtypes) * 11
    assert (counted.left, counted.done) == (kinds, kinds * 3)


def through_the_dispatcher() -> tuple[int, int]:
    """The operators themselves, in their three forms. Counts calls that Python makes or repeats."""
    rank, world, name = dist.get_rank(), dist.get_world_size(), symmem.resolve_group().name
    operators, total = torch.ops.symmem, world * (world + 1) / 2
    with Counted() as counted:
        for _ in range(4):
            x = torch.full((77,), rank + 1.0, device="cuda")
            out = torch.empty_like(x)
            assert (operators.all_reduce(x, "sum", name) == total).all()
            operators.all_reduce_out(x, "sum", name, out=out)
            assert (out == total).all()
            operators.broadcast_(x, world - 1, name)
            assert (x == world).all()
    x.requires_grad_()
    operators.all_reduce(x, "sum", name).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, world))  # type: ignore[arg-type]
    with torch.inference_mode(), Counted() as inferred:
        for _ in range(3):
            x = torch.full((77,), rank + 1.0, device="cuda")
            assert (operators.all_reduce(x, "sum", name) == total).all()
            operators.all_reduce_(x, "sum", name)
            assert (x == total).all()
    assert (inferred.done, inferred.left) == (0, 0)
    return counted.done, counted.left


def seen_by_others() -> list[str]:
    """What a dispatch mode and a profiler see of operators that C++ repeats."""
    x, name, seen = torch.ones(77, device="cuda"), symmem.resolve_group().name, []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(f"mode {func.name()}")
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        torch.ops.symmem.all_reduce(x, "sum", name)
    with Mode():
        torch.ops.symmem.all_reduce(x, "sum", name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.symmem.all_reduce(x, "sum", name)
    return seen + [f"profiler {each.key}" for each in profile.key_averages() if "symmem" in each.key]


def on_streams_and_in_graphs() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    x, out = torch.full((1000,), rank + 1.0, device="cuda"), torch.empty(1000, device="cuda")
    total = world * (world + 1) / 2
    symmem.ops.all_reduce(x, out=out)
    torch.cuda.synchronize()
    side, later = torch.cuda.Stream(), torch.empty_like(out)
    with Counted() as counted:
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            x.add_(1)
            symmem.ops.all_reduce(x, out=out)  # on another stream it would read the old values
            later.copy_(out)
        torch.cuda.current_stream().wait_stream(side)
        assert (counted.done, counted.left) == (
            0,
            1,
        )  # the first call on another stream, which waits for the earlier one
        assert (later == total + world).all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            symmem.ops.all_reduce(x, out=out)
        assert (counted.done, counted.left) == (0, 2)
        for turn in range(5):
            x.fill_(turn + rank)
            graph.replay()
            assert (out == sum(range(world)) + turn * world).all()
            symmem.ops.all_reduce(x, out=x)
            assert torch.equal(x, out)


def on_streams_that_run_in_another_order() -> None:
    """The GPU of a rank would run the second call first, because the first call's stream is busy."""
    rank, world = dist.get_rank(), dist.get_world_size()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    x = [torch.full((1000 * (1 + call),), rank + 1.0 + 10 * call, device="cuda") for call in range(2)]
    out = [torch.empty_like(each) for each in x]
    torch.cuda.synchronize()

    def both() -> None:
        for call, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if call == rank % 2:
                    torch.cuda._sleep(20_000_000)
                symmem.ops.all_reduce(x[call], out=out[call])

    def check() -> None:
        torch.cuda.synchronize()
        for call in range(2):
            assert (out[call] == world * (world + 1) / 2 + 10 * call * world).all()
            out[call].zero_()

    for _ in range(3):
        both()
        check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        both()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        graph.replay()
        check()
    both()
    check()


def compiled_code() -> int:
    """Compiled code calls this too: counts its calls made in C."""

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = symmem.ops.all_reduce(torch.relu(x) + 1)
        return x

    made = torch.compile(chain, backend="symmem")
    x = torch.zeros(100, device="cuda")
    with torch.no_grad():
        made(x)
        with Counted() as counted:
            for _ in range(3):
                assert torch.equal(made(x), chain(x))
    assert counted.left <= 1  # from the eager chain, because its results are new tensors
    return counted.done


def beside_another_device() -> tuple[int, int]:
    """A group's first call while another GPU is current, if there is one. Counts later calls in C and in Python."""
    group, own = dist.new_group(), torch.cuda.current_device()
    x, world = torch.ones(9, device="cuda"), dist.get_world_size()
    with torch.cuda.device((own + 1) % torch.cuda.device_count()):
        assert (symmem.ops.all_reduce(x, group) == world).all()
    with Counted() as counted:
        for _ in range(3):
            assert (symmem.ops.all_reduce(x, group) == world).all()
    dist.destroy_process_group(group)
    return counted.done, counted.left


def conjugated() -> None:
    """Views that are conjugated when read have the memory of their tensors, but other values."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for _ in range(3):
        x = torch.full((5,), complex(rank, rank + 1), device="cuda")
        for given, wanted in ((x, x), (x.conj(), x.conj())):
            gathered = symmem.ops.all_gather(given)
            assert torch.equal(gathered[rank], wanted.resolve_conj())
            assert gathered.imag[:, 0].abs().tolist() == list(range(1, world + 1))


def other_groups() -> list[str]:
    """Two groups of the same ranks. One is destroyed and made again."""
    x, seen = torch.ones(10, device="cuda"), []
    for _ in range(2):
        group = dist.new_group()
        for each in (None, group, group.group_name) * 2:
            assert (symmem.ops.all_reduce(x, each) == dist.get_world_size()).all()
        dist.destroy_process_group(group)
        for gone in (group, group.group_name):
            try:
                symmem.ops.all_reduce(x, gone)
            except symmem.SymmemError as error:
                seen.append(type(error).__name__)
    return seen


def test_all_results_are_right(pool: RankPool) -> None:
    pool.run(all_right)


def test_operators(pool: RankPool) -> None:
    """C++ repeats all but the first call of a kind, if there is a compiler, as on all machines with tests."""
    for seen in pool.run(through_the_dispatcher):
        assert seen == (0, 3)


def test_operators_are_seen(pool: RankPool) -> None:
    for seen in pool.run(seen_by_others):
        assert seen == ["mode symmem::all_reduce", "profiler symmem::all_reduce"]


def test_streams_and_graphs(pool: RankPool) -> None:
    pool.run(on_streams_and_in_graphs)


def test_calls_on_two_streams_are_ordered(pool: RankPool) -> None:
    pool.run(on_streams_that_run_in_another_order)


def test_compiled_code(pool: RankPool) -> None:
    for done in pool.run(compiled_code):
        assert done >= 15


def test_a_first_call_beside_another_device(pool: RankPool) -> None:
    for seen in pool.run(beside_another_device):
        assert seen == (3, 0)


def test_conjugated_views(pool: RankPool) -> None:
    pool.run(conjugated)


def test_groups_that_go(pool: RankPool) -> None:
    for seen in pool.run(other_groups):
        assert seen == ["GroupError"] * 4
