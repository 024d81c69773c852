"""The collective operators on the CPU, over 2 to 4 processes: correct, equal on all ranks, without hangs."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import os
import random
import re
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import LONG, SOON
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import symmem
from symmem.errors import PeerLostError, SymmemError
from symmem.ops import functions as ops
from symmem.ops.engines import host
from symmem.ops.engines.base import Engines
from symmem.tools.bench import collectives
from symmem.tools.ranks import RankPool, rank_store

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
MOVED = (*FLOATS, torch.int8, torch.int64, torch.bool, torch.uint16, torch.complex64)
REDUCED = (*FLOATS, torch.int8, torch.uint8, torch.int32, torch.int64, torch.complex64)
# The relative error of rounding a result once. Sums of narrow dtypes are computed in float32.
ROUNDING = {
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float64: 1e-14,
    torch.float8_e4m3fn: 0.07,
    torch.float8_e5m2: 0.13,
    torch.complex64: 1e-6,
}
# Sizes around the limits of one step and of one shot. None is a multiple of 16 bytes.
PIECE = host.REGION // 4
SIZES = (0, 1, 3, 17, 1021, 32771, PIECE - 1, PIECE + 3, 2 * PIECE + 5)


def world() -> tuple[int, int]:
    group = symmem.resolve_group()
    return group.rank, group.size


def digest(tensor: torch.Tensor) -> str:
    """A digest of the bits."""
    dense = tensor.contiguous()
    return hashlib.sha256(ctypes.string_at(dense.data_ptr(), dense.nbytes)).hexdigest()


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float32, generator=generator).to(dtype)
    return torch.randint(0, 120, shape, generator=generator).to(dtype)


def laid_out(tensor: torch.Tensor, how: int) -> torch.Tensor:
    """The same values, at an odd offset of a larger tensor, transposed, or with gaps."""
    if how == 0 or tensor.dim() == 0:
        return tensor.clone()
    if how == 1:
        room = torch.empty(tensor.numel() + 7, dtype=tensor.dtype)
        placed = room[3 : 3 + tensor.numel()].view(tensor.shape)
    elif how == 2:
        placed = torch.empty(tensor.shape[::-1], dtype=tensor.dtype).permute(*range(tensor.dim() - 1, -1, -1))
    else:
        placed = torch.empty((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype)[..., ::2]
    return placed.copy_(tensor)


def exact(tensors: list[torch.Tensor], reduction: str) -> torch.Tensor:
    """The reference result, in float64 or the widest type of this kind."""
    first = tensors[0]
    wide = torch.complex128 if first.dtype.is_complex else torch.float64 if first.is_floating_point() else torch.int64
    stacked = torch.stack([each.to(wide) for each in tensors])
    if reduction in ("min", "max"):
        return stacked.amin(0) if reduction == "min" else stacked.amax(0)
    return stacked.sum(0) / (len(tensors) if reduction == "avg" else 1)


def check_reduced(result: torch.Tensor, tensors: list[torch.Tensor], reduction: str, note: str) -> None:
    reference = exact(tensors, reduction)
    if result.dtype not in ROUNDING:
        assert torch.equal(result, reference.to(result.dtype)), note
        return
    magnitude = sum(each.to(torch.complex128).abs() for each in tensors)
    difference = (result.to(torch.complex128) - reference).abs()
    allowed = ROUNDING[result.dtype] * (magnitude + (0.02 if result.dtype.itemsize == 1 else 1e-7))
    assert bool((difference <= allowed).all()), f"{note}: {(difference - allowed).max()}"


def call(name: str, form: int, x: torch.Tensor, shape: tuple[int, ...], how: int, *options: Any) -> torch.Tensor:
    """Call an operator in one of its forms. Returns the result. In form 3 the smaller tensor is a row of the larger."""
    group = symmem.resolve_group()
    if form == 0:
        return getattr(torch.ops.symmem, name)(x, *options, group.name)
    if form == 1:
        out = laid_out(torch.zeros(shape, dtype=x.dtype), how)
        getattr(torch.ops.symmem, f"{name}_out")(x, *options, group.name, out=out)
        return out
    if name == "all_gather":
        rows = laid_out(torch.stack([x] * group.size), how)
        rows[: group.rank].zero_()
        rows[group.rank + 1 :].zero_()
        if form == 3:
            return ops.all_gather(rows[group.rank], out=rows)
        torch.ops.symmem.all_gather_(rows, group.name)
        return rows
    before = x.clone()
    if form == 3 and name == "reduce_scatter":
        ops.reduce_scatter(x, None, options[0], x[group.rank])
    else:
        getattr(torch.ops.symmem, f"{name}_")(x, *options, group.name)
    if name != "reduce_scatter":
        return x
    others = [rank for rank in range(group.size) if rank != group.rank]
    assert torch.equal(x.view(torch.uint8)[others], before.view(torch.uint8)[others])
    return x[group.rank]


def fuzz_one(seed: int) -> tuple[str, str]:
    rank, size = world()
    rng = random.Random(seed)
    name = rng.choice(("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"))
    reduces = name in ("all_reduce", "reduce_scatter")
    dtype = rng.choice(REDUCED if reduces else MOVED)
    count = rng.choice(SIZES) if rng.random() < 0.4 else rng.randrange(2000)
    shape: tuple[int, ...] = rng.choice(((count,), (count, 1), (3, count // 3), (count // 4, 2, 2), (1, count // 7, 7)))
    if name in ("reduce_scatter", "all_to_all"):
        shape = (size, *(count // size if each == count else each for each in shape))
    elif count == 1:
        shape = ()
    tensors = [values(shape, dtype, seed * 10 + each) for each in range(size)]
    x, form, how = laid_out(tensors[rank], rng.randrange(4)), rng.randrange(4), rng.randrange(4)
    if form >= 2 and name == "reduce_scatter":
        x = tensors[rank].clone()
    note = f"seed {seed}: {name} form {form} {dtype} {shape} strides {x.stride()}"
    if reduces:
        fits = [r for r in ("sum", "avg", "min", "max") if dtype in ROUNDING or r != "avg"]
        reduction = rng.choice([r for r in fits if not dtype.is_complex or r in ("sum", "avg")])
        if dtype in (torch.int8, torch.uint8):
            tensors = [each // size for each in tensors]  # no overflow
            x.copy_(tensors[rank])
        shape = shape if name == "all_reduce" else shape[1:]
        result = call(name, form, x, shape, how, reduction)
        parts = tensors if name == "all_reduce" else [each[rank] for each in tensors]
        check_reduced(result, parts, reduction, f"{note} {reduction}")
        return (digest(result) if name == "all_reduce" else "", digest(result))
    if name == "broadcast":
        root = rng.randrange(size)
        wanted, result = tensors[root], call(name, form, x, shape, how, root)
    elif name == "all_gather":
        wanted, result = torch.stack(tensors), call(name, form, x, (size, *shape), how)
    else:
        wanted, result = torch.stack([each[rank] for each in tensors]), call(name, form, x, shape, how)
    assert result.shape == wanted.shape, note
    assert digest(result) == digest(wanted), note
    return "", digest(result)


def fuzz(seeds: range) -> list[tuple[str, str]]:
    return [fuzz_one(seed) for seed in seeds]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_are_right_and_the_same_everywhere_and_each_time(pools: Any, size: int) -> None:
    pool = pools.get(size)
    seeds = range(1000 * size, 1000 * size + 70)
    runs = [pool.run(fuzz, seeds) for _ in range(2)]
    assert runs[0] == runs[1]
    for each in zip(*runs[0], strict=True):
        assert len({common for common, _own in each}) == 1


def in_order(reduction: str, dtype: torch.dtype, count: int) -> None:
    """Bitwise equal to a sum in float32, in rank order."""
    rank, size = world()
    # Magnitudes so different that every order rounds differently.
    tensors = [values((count,), dtype, each) * (1, 4000, 0.01, 5)[each] for each in range(size)]
    sums = tensors[0].float()
    for each in tensors[1:]:
        sums = sums + each.float()
    wanted = (sums / size if reduction == "avg" else sums).to(dtype)
    assert digest(ops.all_reduce(tensors[rank], reduction=reduction)) == digest(wanted)
    rows = torch.stack([tensors[rank]] * size)
    assert digest(ops.reduce_scatter(rows, reduction=reduction)) == digest(wanted)


@pytest.mark.parametrize("size", [2, 4])
def test_sums_are_made_in_float32_in_the_order_of_ranks(pools: Any, size: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for count in (1001, 100_003, PIECE + 3):  # one shot, two shots, several pieces
            for reduction in ("sum", "avg"):
                pools.get(size).run(in_order, reduction, dtype, count)


def groups_at_once() -> None:
    """Alternating operations of three groups with different ranks."""
    rank, size = world()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, odd = pairs[rank // 2], dist.new_group([0, 2, 3])
    store = symmem.Group.from_store(rank, size, rank_store(), "of a store")
    x = torch.arange(5.0) + rank
    for _ in range(3):
        assert ops.all_gather(x, mine)[:, 0].tolist() == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert ops.all_reduce(x, store)[0] == 6
        if rank in (0, 2, 3):
            assert ops.broadcast(x, odd, root=1)[0] == 2
        assert torch.ops.symmem.all_reduce(x, "max", store.name)[0] == 3
    if rank == 1:
        with pytest.raises(symmem.SymmemError, match="not a member"):
            ops.all_reduce(x, odd)


def test_several_groups_and_subgroups(pools: Any) -> None:
    pools.get(4).run(groups_at_once)


def gone() -> None:
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), "short-lived")
    ops.all_reduce(torch.ones(3), group)
    (engine,) = group.extension(Engines).values()
    ends = [weakref.ref(group), weakref.ref(engine)]
    del group, engine
    gc.collect()
    assert [each() for each in ends] == [None, None]  # type: ignore[operator]
    with pytest.raises(symmem.SymmemError, match="no process group 'short-lived'"):
        torch.ops.symmem.all_reduce(torch.ones(3), "sum", "short-lived")


def test_an_engine_goes_with_its_group(pools: Any) -> None:
    pools.get(2).run(gone)


def closed_by_another_rank() -> str:
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), "closed by another rank")
    group.settings = dataclasses.replace(group.settings, signal_timeout=4 * LONG)
    ops.all_reduce(torch.ones(3), group)
    if rank == 0:
        rank_store().wait([f"rank {peer} is about to wait" for peer in range(1, size)])
        group.close()
        rank_store().wait([f"rank {peer} is told" for peer in range(1, size)])
        return ""
    rank_store().set(f"rank {rank} is about to wait", "")
    with pytest.raises(PeerLostError) as caught:
        ops.all_reduce(torch.ones(3), group)
    rank_store().set(f"rank {rank} is told", "")
    group.close()
    return str(caught.value)


def test_a_rank_that_closes_the_group_is_not_waited_for(pools: Any) -> None:
    for text in pools.get(3).run(closed_by_another_rank)[1:]:
        assert "ranks [0] closed the group" in text


def gradients() -> None:
    """The gradient of the sum of all ranks' losses. A rank weighs the result by its rank + 1."""
    rank, size = world()
    weight, total = rank + 1.0, size * (size + 1) / 2

    def gradient(operation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        (weight * operation(x)).sum().backward()
        assert x.grad is not None
        return x.grad

    assert gradient(ops.all_reduce, torch.ones(3)).tolist() == [total] * 3
    assert gradient(lambda x: ops.all_reduce(x, reduction="avg"), torch.ones(3)).tolist() == [total / size] * 3
    assert gradient(ops.all_gather, torch.ones(3)).tolist() == [total] * 3
    rows = torch.arange(1.0, size + 1)
    assert gradient(ops.reduce_scatter, torch.ones(size)).tolist() == rows.tolist()
    assert torch.equal(gradient(lambda x: ops.reduce_scatter(x, reduction="avg"), torch.ones(size)), rows / size)
    assert gradient(ops.all_to_all, torch.ones(size)).tolist() == rows.tolist()
    wanted = total if rank == 1 else 0.0
    assert gradient(lambda x: ops.broadcast(x, root=1), torch.ones(3)).tolist() == [wanted] * 3


def test_gradients_are_those_of_all_losses_together(pools: Any) -> None:
    pools.get(3).run(gradients)


def one_sided() -> None:
    rank, size = world()
    name = symmem.resolve_group().name
    after, before = (rank + 1) % size, (rank - 1) % size
    st = symmem.allocate(8, backend="host").rendezvous()
    st.tensor.fill_(rank)
    ops.barrier(st.tensor)
    assert ops.get(st.tensor, after).tolist() == [after] * 8
    ops.barrier(st.tensor)
    ops.put(st.tensor[2:4], torch.full((2,), 10.0 + rank), after)
    ops.put_signal(st.tensor, after, 3)
    ops.wait_signal(st.tensor, before, 3)
    assert st.tensor.tolist() == [rank] * 2 + [10 + before] * 2 + [rank] * 4
    out = torch.empty(2)
    torch.ops.symmem.barrier(st.tensor, 1, name)
    torch.ops.symmem.get_out(st.tensor[2:4], after, name, out=out)
    assert out.tolist() == [10 + rank] * 2
    ops.barrier()
    with pytest.raises(symmem.SymmemError, match="symmetric"):
        ops.get(out, after)


def test_one_sided_copies_and_signals(pools: Any) -> None:
    pools.get(3).run(one_sided)


def compiled() -> None:
    rank, _size = world()

    def program(x: torch.Tensor) -> torch.Tensor:
        y = ops.all_gather(x * 2)
        with torch.no_grad():
            torch.ops.symmem.all_reduce_(y.detach(), "sum", name)
        return ops.reduce_scatter(y * rank)

    name = symmem.resolve_group().name
    results = []
    for function in (program, torch.compile(program, fullgraph=True, backend="aot_eager")):
        x = (torch.arange(5.0) + rank).requires_grad_()
        result = function(x)
        result.square().sum().backward()
        assert x.grad is not None
        results.append((digest(result), digest(x.grad)))
    assert results[0] == results[1]


def test_compiled_programs_of_several_ranks(pools: Any) -> None:
    pools.get(2).run(compiled)


@pytest.mark.ranks
def test_the_benchmark_measures_all_operators() -> None:
    figures = list(collectives.measure("host", 2, (1024,)))
    assert [each.figure for each in figures] == list(collectives.OPERATORS)
    assert all(each.value > 0 and each.peer == "gloo" and each.peer_value for each in figures)


# Faults. Every rank returns its error. The pool still works afterwards.

Outcome = tuple[str, tuple[int, ...], str]


def error_of(operation: Callable[[], object]) -> Outcome:
    try:
        operation()
    except SymmemError as error:
        return type(error).__name__, error.peers, str(error)
    return "", (), ""


def compared(first: bool, odd: int) -> list[Outcome]:
    """Rank ``odd`` makes another call. Afterwards all ranks make the same calls again."""
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), f"compared {first}")
    if not first:
        ops.all_reduce(torch.ones(2), group)
    differs = rank == odd
    x, symmetric = torch.ones(size, 4), torch.ones(size, 4)
    found = [
        error_of(lambda: ops.all_reduce(torch.ones(5 if differs else 4), group)),
        error_of(lambda: ops.all_reduce(torch.ones(4 << 20 if differs else 4), group)),
        error_of(lambda: ops.all_reduce(x.half() if differs else x, group)),
        error_of(lambda: ops.all_reduce(x, group, reduction="max" if differs else "sum")),
        error_of(lambda: ops.broadcast(x, group, root=1 if differs else 0)),
        error_of(lambda: ops.all_to_all(x, group) if differs else ops.all_gather(x, group)),
        error_of(lambda: ops.all_reduce(x.t() if differs else x, group)),
        error_of(lambda: ops.all_gather(torch.ones(0, 5 if differs else 3), group)),
        error_of(lambda: ops.all_gather(torch.ones([1] * 40) if differs else torch.ones([1] * 41), group)),
        error_of(lambda: ops.barrier(group=group) if differs else ops.all_reduce(torch.ones(1), group)),
        error_of(lambda: ops.barrier(group=group, channel=int(differs))),
    ]
    assert ops.all_reduce(symmetric, group)[0, 0] == size
    return found


@pytest.mark.parametrize("first", [True, False])
def test_ranks_that_do_not_call_alike_are_told_and_go_on(pools: Any, first: bool) -> None:
    results = pools.get(3).run(compared, first, 1)
    for column in zip(*results, strict=True):
        assert {kind for kind, _peers, _text in column} == {"MismatchError"}
        assert {peers for _kind, peers, _text in column} == {(1,)}
    texts = [text for _kind, _peers, text in results[0]]
    assert "all_reduce(sum) of 4 torch.float32 on ranks 0, 2, all_reduce(sum) of 5 torch.float32 on rank 1" in texts[0]
    assert "all_reduce(sum) of 3x4 torch.float16 on rank 1" in texts[2]
    assert "broadcast(root 1) of 3x4 torch.float32 on rank 1" in texts[4]
    assert "all_reduce(sum) of 3x4 torch.float32 on ranks 0, 2, all_reduce(sum) of 4x3 torch.float32" in texts[6]
    assert "all_gather of 0x3 torch.float32 on ranks 0, 2, all_gather of 0x5 torch.float32 on rank 1" in texts[7]
    assert "barrier of no tensor on channel 0 on rank 1" in texts[9]
    assert "barrier of no tensor on channel 0 on ranks 0, 2, barrier of no tensor on channel 1 on rank 1" in texts[10]
    for text in texts:
        assert re.search(rf"; called at {re.escape(__file__)}:\d+ in <lambda> on ranks 0-2\n", text), text


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(4)


def refused(first: bool) -> list[Outcome]:
    """Rank 1's arguments are bad."""
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), f"refused {first}")
    x, differs = torch.ones(4), rank == 1
    if not first:
        ops.all_reduce(x, group)
    found = [
        error_of(lambda: ops.all_reduce(x, group, reduction="product" if differs else "sum")),
        error_of(lambda: ops.all_reduce(x, group, out=torch.ones(5) if differs else None)),
        error_of(lambda: ops.all_reduce(x, group, out=torch.ones(1).expand(4) if differs else None)),
        error_of(lambda: ops.reduce_scatter(torch.ones(size + differs), group)),
        error_of(lambda: ops.all_reduce(x.numpy() if differs else x, group)),  # type: ignore[arg-type]
        error_of(lambda: ops.all_reduce([1.0] * 4 if differs else x, group)),  # type: ignore[arg-type]
        error_of(lambda: ops.all_reduce(None if differs else x, group)),  # type: ignore[arg-type]
        error_of(lambda: ops.all_reduce(x, group, out=3 if differs else None)),  # type: ignore[arg-type]
        error_of(lambda: ops.all_reduce(x, group, out=torch.ones(4, device="meta") if differs else None)),
        error_of(lambda: ops.all_reduce(torch.ones(4, device="meta") if differs else x, group, out=torch.ones(4))),
        error_of(lambda: ops.all_reduce(x, group, out=inference_tensor() if differs else None)),
        error_of(lambda: ops.barrier(group=group, channel=64 if differs else 0)),
    ]
    bad = [error_of(lambda: ops.broadcast(x, group, root=size)) for _ in range(3)]  # on all ranks
    assert {kind for kind, _peers, _text in bad} == {"RankError"}
    assert ops.all_reduce(x, group)[0] == size
    return found


@pytest.mark.parametrize("first", [True, False])
def test_arguments_that_one_rank_refuses_are_an_error_on_all(pools: Any, first: bool) -> None:
    begin = time.monotonic()
    own, *others = (lambda results: (results[1], results[0], results[2]))(pools.get(3).run(refused, first))
    assert {kind for kind, _peers, _text in own} == {"InvalidArgumentError"}
    assert "torch.from_numpy(array)" in own[4][2]
    for column in others:
        assert [text for _kind, _peers, text in column] == [text for _kind, _peers, text in own]
        assert {kind for kind, _peers, _text in column} == {"InvalidArgumentError"}
        assert all("rank 1" in text for _kind, _peers, text in column)
    assert time.monotonic() - begin < SOON


class Refusing(TorchFunctionMode):
    """A mode of a program, with an error of its own for operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "symmem" in str(func):
            raise ValueError("refused by the mode")
        return func(*args, **kwargs or {})


class RefusingTensor(torch.Tensor):
    """A tensor class of a program, with an error of its own for operators."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "symmem" in str(func):
            raise ValueError("refused by the class")
        return super().__torch_function__(func, types, args, kwargs or {})


def refused_by_the_program() -> list[str]:
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), "refused by the program")
    x, found = torch.ones(4), []
    for mode, tensor in ((Refusing(), x), (contextlib.nullcontext(), x.as_subclass(RefusingTensor))):
        with mode if rank == 1 else contextlib.nullcontext(), pytest.raises(Exception, match="refused by") as caught:
            ops.all_reduce(tensor if rank == 1 else x, group)
        found.append(type(caught.value).__name__)
        assert ops.all_reduce(x, group)[0] == size
    return found


def test_what_the_program_around_a_call_raises_is_raised_on_all(pools: Any) -> None:
    assert pools.get(3).run(refused_by_the_program) == [
        ["RendezvousError"] * 2,
        ["ValueError"] * 2,
        ["RendezvousError"] * 2,
    ]


def barrier_of_fake_tensors() -> int:
    """Rank 1 traces a program that the others do not run."""
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), "barrier of fake tensors")
    ops.barrier(group=group)
    if rank == 1:
        with FakeTensorMode():
            ops.barrier(group=group)
            ops.all_reduce(torch.ones(4), group)
    return int(ops.all_reduce(torch.ones(4), group)[0])


def test_a_barrier_under_a_fake_mode_is_local(pools: Any) -> None:
    assert pools.get(3).run(barrier_of_fake_tensors) == [3, 3, 3]


def refused_by_autograd(check: bool) -> list[Outcome]:
    """Rank 1's tensors require gradients, or have tangents."""
    rank, size = world()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMMEM_ENABLE", "collective_check(each)" if check else "")
        group = symmem.Group.from_store(rank, size, rank_store(), f"autograd {check}")
    x, differs = torch.ones(4), rank == 1
    assert ops.all_reduce(x, group)[0] == size
    leaf = torch.ones(4, requires_grad=differs)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(4), torch.ones(4)) if differs else torch.ones(4)
        found = [
            error_of(lambda: ops.all_reduce(dual, group)),
            error_of(lambda: ops.all_reduce(torch.ones(4), group, out=dual)),
        ]
    found += [
        error_of(lambda: ops.all_reduce(leaf, group, out=leaf)),
        error_of(lambda: ops.all_reduce(leaf, group, out=torch.ones(4))),
        error_of(lambda: ops.all_reduce(torch.ones(4), group, out=leaf)),
        error_of(lambda: torch.ops.symmem.all_reduce_(leaf, "sum", symmem.ops.functions._name(group))),
    ]
    if differs:  # local calls
        with pytest.raises(NotImplementedError):
            ops.all_reduce(torch.ones(4, device="meta", requires_grad=True), group, out=torch.ones(4, device="meta"))
        with FakeTensorMode(), pytest.raises(NotImplementedError):
            ops.all_reduce(torch.ones(4, requires_grad=True), group, out=torch.ones(4))
    assert ops.all_reduce(x, group)[0] == size
    return found


@pytest.mark.parametrize("check", [False, True])
def test_what_autograd_refuses_on_one_rank_is_an_error_on_all(pools: Any, check: bool) -> None:
    """The next call pairs with the right one. Calls with meta or fake tensors are local."""
    for found in pools.get(3).run(refused_by_autograd, check):
        assert {kind for kind, _peers, _text in found} == {"UnsupportedError"}


def without_memory() -> list[Outcome]:
    """Rank 1 cannot allocate the result, or stops before it communicates; then its error is a long text."""
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), "without memory")
    x = torch.ones(4)
    ops.all_reduce(x, group)
    (engine,) = group.extension(Engines).values()
    found = []

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt("é" * 3000)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch, "empty_like", lambda *args: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                ops.all_reduce(x, group)
        else:
            found.append(error_of(lambda: ops.all_reduce(x, group)))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(engine, "_parts", fail)
            with pytest.raises(KeyboardInterrupt):
                ops.all_reduce(x, group)
        else:
            found.append(error_of(lambda: ops.all_reduce(x, group)))
    assert ops.all_reduce(x, group)[0] == size
    return found


def test_a_rank_that_stops_before_it_communicates_tells_the_others(pools: Any) -> None:
    first, _own, last = pools.get(3).run(without_memory)
    for found in first, last:
        assert [kind for kind, _peers, _text in found] == ["RendezvousError"] * 2
        assert "rank 1" in found[0][2]
        assert "ZeroDivisionError" in found[0][2]
        assert "KeyboardInterrupt" in found[1][2]


def checked() -> list[Outcome]:
    """Rank 1 makes another call, or refuses, in the checked mode."""
    rank, size = world()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMMEM_ENABLE", "collective_check(each)")
        group = symmem.Group.from_store(rank, size, rank_store(), "checked")
    x, differs = torch.ones(4), rank == 1
    assert ops.all_reduce(x, group)[0] == size
    found = [
        error_of(lambda: ops.all_reduce(torch.ones((2, 2) if differs else 4), group)),  # the same number of elements
        error_of(lambda: ops.all_reduce(x, group, out=torch.ones(5) if differs else None)),
    ]
    assert ops.all_reduce(x, group)[0] == size
    return found


def test_in_the_checked_mode_shapes_count_and_refusals_arrive_as_they_are(pools: Any) -> None:
    for shapes, refusal in pools.get(3).run(checked):
        assert shapes[:2] == ("MismatchError", (1,))
        assert "ranks disagree on 'shape of x': [4] on ranks 0, 2, [2, 2] on rank 1" in shapes[2]
        assert refusal[0] == "InvalidArgumentError"
        assert "rank 1" in refusal[2]


def interrupted() -> list[Outcome]:
    """Rank 1 is interrupted between two pieces, and starts again."""
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), "interrupted")
    x = torch.ones(4 * PIECE)
    ops.all_reduce(x, group)
    (engine,) = group.extension(Engines).values()
    if rank == 1:
        engine._reduce = lambda *args: 1 // 0  # type: ignore[attr-defined]
        with pytest.raises(ZeroDivisionError):
            ops.all_reduce(x, group)
        del engine._reduce  # type: ignore[attr-defined]
        found = []
    else:
        found = [error_of(lambda: ops.all_reduce(x, group))]
    assert ops.all_reduce(x, group)[-1] == size
    return found


def test_a_rank_that_is_interrupted_between_pieces_tells_the_others(pools: Any) -> None:
    (found,), nothing = pools.get(2).run(interrupted)
    assert found[0] == "RendezvousError"
    assert "[rank 1, group interrupted, step all_reduce] ZeroDivisionError" in found[2]
    assert nothing == []


def without_the_number() -> None:
    """An interrupt came between a barrier and the note of its number."""
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), "without the number")
    ops.all_reduce(torch.ones(4), group)
    (engine,) = group.extension(Engines).values()
    if rank == 0:
        engine._number -= 1  # type: ignore[attr-defined]
    for value in (2.0, 3.0):
        assert ops.all_reduce(torch.full((4,), value), group).eq(value * size).all()


def test_an_interrupt_after_the_barrier_does_not_move_a_rank_to_another_region(pools: Any) -> None:
    pools.get(2).run(without_the_number)


def nested() -> list[Outcome]:
    """During an operation of rank 0, a callback begins another."""
    rank, size = world()
    group = symmem.Group.from_store(rank, size, rank_store(), "nested")
    x, found = torch.ones(4), []
    ops.all_reduce(x, group)
    (engine,) = group.extension(Engines).values()
    reduce = engine._reduce  # type: ignore[attr-defined]

    def again(*args: Any) -> None:
        found.append(error_of(lambda: ops.all_reduce(x, group)))
        reduce(*args)

    if rank == 0:
        engine._reduce = again  # type: ignore[attr-defined]
    assert ops.all_reduce(x, group)[0] == size
    vars(engine).pop("_reduce", None)
    assert ops.all_reduce(x, group)[0] == size
    return found


def test_an_operation_amid_another_is_refused(pools: Any) -> None:
    (found,), nothing = pools.get(2).run(nested)
    assert (found[0], nothing) == ("GroupError", [])
    assert "inside another" in found[2]


def with_group(name: str, timeout: str) -> symmem.Group:
    os.environ["SYMMEM_ENABLE"] = f"rendezvous_timeout({LONG}s),signal_timeout({timeout})"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return symmem.Group.from_store(rank, size, rank_store(), name)


def killed(nbytes: int) -> list[Outcome]:
    """Rank 1 dies during a series of operations."""
    group = with_group("killed", f"{LONG}s")
    x = torch.ones(nbytes // 4)
    for count in range(200):
        if group.rank == 1 and count == 50:
            signal.setitimer(signal.ITIMER_REAL, 0.002)  # SIGALRM kills the process at some point of the loop
        found = error_of(lambda: ops.all_reduce(x, group))
        if found[0]:
            return [found, error_of(lambda: ops.all_reduce(x, group))]
        assert count < 199, "rank 1 lives"
    return []


@pytest.mark.parametrize("nbytes", [1 << 10, 4 << 20])
def test_a_rank_that_dies_amid_an_operation_is_named(new_pool: Callable[..., RankPool], nbytes: int) -> None:
    begin = time.monotonic()
    outcomes = new_pool(3, process_group=None).outcomes(killed, nbytes)
    assert outcomes.pop(1).error is not None
    for outcome in outcomes:
        assert outcome.error is None, outcome.trace
        assert [kind for kind, _peers, _text in outcome.value] == ["PeerLostError"] * 2
        assert [peers for _kind, peers, _text in outcome.value] == [(1,)] * 2
    assert time.monotonic() - begin < SOON


def late() -> list[Outcome]:
    """Rank 2 does not come."""
    group = with_group("late", "2s")
    x = torch.ones(1000)
    ops.all_reduce(x, group)
    if group.rank == 2:
        rank_store().wait(["rank 0 gave up", "rank 1 gave up"])
        errors = []
    else:
        errors = [error_of(lambda: ops.all_reduce(x, group))]
        rank_store().set(f"rank {group.rank} gave up", "")
    (engine,) = group.extension(Engines).values()
    engine._timeout = LONG  # type: ignore[attr-defined]
    errors.append(error_of(lambda: ops.all_reduce(x, group)))
    for nbytes in (4, 1000, 5 << 20):
        x = torch.full((nbytes // 4,), group.rank + 1.0)
        assert ops.all_reduce(x, group).eq(6).all()
    return errors


def test_a_rank_that_skips_an_operation_is_named_on_all_and_all_go_on_together(
    new_pool: Callable[..., RankPool],
) -> None:
    first, second, late_one = new_pool(3, process_group=None).run(late)
    assert [kind for kind, _peers, _text in first + second + late_one] == ["PeerTimeoutError"] * 5
    assert [peers for _kind, peers, _text in first + second + late_one] == [(2,)] * 5
    assert "step all_reduce] rank 2 did not come in time" in first[0][2] + second[0][2]
    assert "rank 2 did not come to the last collective operation in time. It has come now" in first[1][2]
    assert "gave up a collective operation when this rank did not come in time" in late_one[0][2]


def forked() -> str:
    ops.all_reduce(torch.ones(2))
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.write(there, error_of(lambda: ops.all_reduce(torch.ones(2)))[0].encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(there)
    ops.all_reduce(torch.ones(2))
    return os.read(here, 100).decode()


def test_a_forked_child_is_no_rank(pools: Any) -> None:
    assert pools.get(2).run(forked) == ["ForkedError"] * 2
