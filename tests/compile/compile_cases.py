"""Cases of torch.compile with registered arguments, for test_compile.py and test_compile_gpu.py."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import logging
import re
import tempfile
import types
import uuid
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compile_operators import POINTERS, handle_of
from compile_support import (
    Deferred,
    case,
    check,
    compiled,
    ct,
    current_graph,
    device,
    explanation,
    group,
    outcomes,
    summed,
    values,
)

import symmem
from symmem.backends import kernel_status, kernel_words
from symmem.compile.records import ArgumentRecord, BufferRecord
from symmem.compile.report import AT_RUN_TIME, COPIED, IN_PLACE, PLACED, Decision, report_of
from symmem.errors import GroupError, InvalidArgumentError, NotSymmetricError, PeerTimeoutError, UnsupportedError
from symmem.group.resolve import name_of
from symmem.ops.engines.base import Engines

hook, wrappers, control = (Deferred(f"symmem.compile.{name}") for name in ("hook", "wrappers", "control"))
cache_keys, symmetric_layout = Deferred("symmem.compile.cache_keys"), Deferred("symmem.compile.plan.symmetric_layout")
mutable_ops = Deferred("symmem.compile.plan.mutable_ops")
runtime, runtime_inputs = Deferred("symmem.compile.run.graph"), Deferred("symmem.compile.run.inputs")


# Producers.


@case()
def case_chain() -> None:
    """Eight layers need one symmetric buffer, one plain buffer and no copy."""
    name, weights = group(), [values(8, 8, seed=9 + layer) / 3 for layer in range(8)]
    everyone = [summed(each) for each in weights]

    def f(x: torch.Tensor) -> torch.Tensor:
        for weight in everyone:
            x = ct.total(x @ weight, name)
        return x

    def expected(x: torch.Tensor) -> torch.Tensor:
        for weight in everyone:
            x = summed(x @ weight)
        return x

    report = check(f, lambda step: (values(8, 8, seed=step) / 8,), expected)
    (graph,) = report.graphs
    assert outcomes(report) == [PLACED] * 8
    assert (len(graph.buffers), graph.reuses, graph.copies) == (1, 7, 0)
    assert len(set(POINTERS)) == 1


@case()
def case_pointwise_and_reduction() -> None:
    name = group()
    report = check(
        lambda x: (ct.total(x.relu() + 1, name), ct.total(x.sum(1), name)),
        lambda step: (values(5, 7, seed=step),),
        lambda x: (summed(x.relu() + 1), summed(x.sum(1))),
    )
    assert outcomes(report) == [PLACED, PLACED]


@case()
def case_mm_relu() -> None:
    """Torch 2.11 would let relu write over the result of mm, which is not in the symmetric buffer."""
    name, weight = group(), torch.ones(6, 6, device=device())
    report = check(
        lambda x: ct.total((x @ weight).relu(), name),
        lambda step: (values(6, 6, seed=step),),
        lambda x: summed((x @ weight).relu()),
    )
    assert outcomes(report) == [PLACED]


@case()
def case_views_and_concatenation() -> None:
    name = group()

    def f(x: torch.Tensor) -> Any:
        y = x * 2
        joined = torch.cat([x + 1, x - 1])
        return ct.total(y[1:3], name), ct.total(y.t(), name), ct.total(joined, name), ct.total(joined[2:], name)

    def expected(x: torch.Tensor) -> Any:
        y, joined = x * 2, torch.cat([x + 1, x - 1])
        return summed(y[1:3].contiguous()), summed(y.t().contiguous()), summed(joined), summed(joined[2:].contiguous())

    report = check(f, lambda step: (values(4, 4, seed=step),), expected)
    assert outcomes(report) == [PLACED] * 4


@case()
def case_expanded_and_flipped() -> None:
    name = group()
    report = check(
        lambda x: (ct.total((x + 1).expand(3, 4), name), ct.total((x + 2).flip(0), name)),
        lambda step: (values(1, 4, seed=step),),
        lambda x: (summed((x + 1).expand(3, 4).contiguous()), summed((x + 2).flip(0))),
    )
    assert COPIED not in outcomes(report)


@case()
def case_op_to_op() -> None:
    name = group()
    report = check(
        lambda x: ct.total(ct.total(x + 1, name), name),
        lambda step: (values(4, 4, seed=step),),
        lambda x: summed(summed(x + 1)),
    )
    assert outcomes(report) == [PLACED, PLACED]


@case()
def case_fallback_producers() -> None:
    """A custom operator with an ``out`` variant writes to symmetric memory. Without it, the result is copied."""
    name = group()
    report = check(
        lambda x: (ct.total(ct.scaled(x, 3.0), name), ct.total(ct.opaque(x), name)),
        lambda step: (values(4, 4, seed=step),),
        lambda x: (summed(x * 3), summed(x * 2)),
    )
    assert outcomes(report) == [PLACED, COPIED]
    assert "out=" in report.graphs[0].decisions[1].advice


@case()
def case_producer_within() -> None:
    """A custom operator without ``out`` variant runs within use_symmetric_memory if that is faster than a copy."""
    name = group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("symmem.compile.plan.producers._pays", lambda made: True)
        with torch._inductor.config.patch(force_disable_caches=True):
            report = check(
                lambda x: ct.total(ct.opaque(x), name),
                lambda step: (values(4, 4, seed=step),),
                lambda x: summed(x * 2),
            )
    assert outcomes(report) == [AT_RUN_TIME]
    assert "runs within use_symmetric_memory" in report.graphs[0].decisions[0].why


# Inputs.


@case()
def case_inputs() -> None:
    name = group()
    report = check(lambda x: ct.total(x, name), lambda step: (values(4, 6, seed=step),), summed)
    assert outcomes(report) == [AT_RUN_TIME]
    assert len(set(POINTERS)) == 1  # one persistent buffer


@case()
def case_symmetric_input() -> None:
    name = group()
    mine = symmem.allocate((4, 6), dtype=torch.float32).tensor

    def make(step: int) -> tuple[torch.Tensor]:
        return (mine.copy_(values(4, 6, seed=step)),)

    report = check(lambda x: ct.total(x, name), make, summed)
    assert outcomes(report) == [AT_RUN_TIME]
    assert set(POINTERS) == {mine.data_ptr()}


@case()
def case_symmetric_inputs_that_change() -> None:
    """Symmetric inputs are used in place while the ranks agree. If the address keeps changing, they are copied."""
    name = group()
    torch._dynamo.reset()
    tensors = [
        symmem.allocate((4, 6), dtype=torch.float32).tensor for _ in range(runtime_inputs.MAX_ADDRESS_CHANGES + 3)
    ]
    run = compiled(lambda x: ct.total(x, name))
    POINTERS.clear()
    tensors.append(tensors[runtime_inputs.MAX_ADDRESS_CHANGES - 1])  # it was used in place before, and is copied now
    for step, tensor in enumerate(tensors):
        tensor.copy_(values(4, 6, seed=step))
        torch.testing.assert_close(run(tensor), summed(tensor))
    used = [pointer == tensor.data_ptr() for pointer, tensor in zip(POINTERS, tensors, strict=True)]
    assert used == [True] * runtime_inputs.MAX_ADDRESS_CHANGES + [False] * 4


@case()
def case_what_was_agreed_on_is_copied_from_then_on() -> None:
    """For operators that need torch's memory, other symmetric memory is copied from the first call on."""
    backend = symmem.allocate((2, 2), dtype=torch.float32).backend
    for each in (None, backend):
        record, shape = ArgumentRecord(0, group(), each, "agree", False, "op"), ((2, 2), (2, 1))
        graph = runtime.Graph()
        tensors = [
            symmem.allocate((2, 2), dtype=torch.float32).tensor.fill_(1)
            for _ in range(runtime_inputs.MAX_ADDRESS_CHANGES + 1)
        ]
        used = [graph.place(record, tensor, *shape) is tensor for tensor in (*tensors, *tensors[-2:])]
        assert used == [each is None] * runtime_inputs.MAX_ADDRESS_CHANGES + [False] * 3


@case()
def case_arguments_are_compared_again() -> None:
    """A plain tensor, or many addresses, in earlier calls do not end the use in place for good."""
    record, shape = ArgumentRecord(0, group(), None, "agree", False, "op"), ((2, 2), (2, 1))
    many = 2 * runtime_inputs.MAX_ADDRESS_CHANGES
    tensors = [symmem.allocate((2, 2), dtype=torch.float32).tensor.fill_(1) for _ in range(many)]
    plain = torch.ones(2, 2, device=device())

    def used(tensors: list[torch.Tensor]) -> list[bool]:
        graph, found = runtime.Graph(), []
        for tensor in tensors:
            graph.begin()
            placed = graph.place(record, tensor, *shape)
            assert placed.tolist() == [[1, 1], [1, 1]]
            found.append(placed is tensor)
        return found

    assert used([plain, *[tensors[0]] * 3]) == [False, True, True, True]
    assert used([*[plain] * 4, *[tensors[0]] * 5]) == [False] * 7 + [True] * 2
    only_here = [plain, plain] if dist.get_rank() else tensors[:2]
    assert used([*only_here, *[tensors[0]] * 2]) == [False] * 3 + [True]
    first = runtime_inputs.MAX_ADDRESS_CHANGES
    assert used([*tensors, tensors[-1]]) == [True] * first + [False] * (many - first - 1) + [True] * 2


@case()
def case_sizes_that_differ_by_rank() -> None:
    """The memory has room for the largest size of any rank, and what is allocated later is right."""
    name, rank, weight = group(), dist.get_rank(), values(8, 8, seed=7)
    torch._dynamo.reset()
    run = compiled(lambda x: (ct.heads(x @ weight, name), ct.heads(x, name)), dynamic=True)
    for step, rows in enumerate(((4, 300), (30, 8), (301, 302), (40, 450), (2, 2))):
        x = values(rows[rank], 8, seed=step)
        wanted = [torch.empty(4, 8, device=device()) for _ in range(2)]
        for out, part in zip(wanted, ((x @ weight)[:2], x[:2]), strict=True):
            dist.all_gather(list(out.chunk(2)), part.contiguous())
        torch.testing.assert_close(list(run(x)), wanted)
    record, graph = ArgumentRecord(0, name, None, "agree", False, "op"), runtime.Graph()
    for rows in ((0, 3), (3, 0), (0, 0)):  # a rank without rows
        graph.begin()
        x = torch.ones(rows[rank], 2, device=device())
        assert graph.place(record, x, x.shape, x.stride()).shape == x.shape
    handle = symmem.allocate(4, torch.float32, device=device())
    handle.tensor.fill_(rank)
    handle.barrier()
    assert handle.remote_tensor(1 - rank).tolist() == [1 - rank] * 4
    handle.barrier()


@case()
def case_one_rank_is_plain() -> None:
    """Only rank 0 passes symmetric memory. All ranks copy, so no rank reads a wrong address."""
    name = group()
    torch._dynamo.reset()
    mine = symmem.allocate((4, 6), dtype=torch.float32).tensor
    run = compiled(lambda x: ct.total(x, name))
    for step in range(3):
        x = values(4, 6, seed=step)
        wanted = summed(x)
        given = mine.copy_(x) if dist.get_rank() == 0 else x
        torch.testing.assert_close(run(given), wanted)


@case()
def case_other_tensor_on_one_rank() -> None:
    """The ranks pass different pieces of symmetric memory."""
    name = group()
    torch._dynamo.reset()
    first, second = (symmem.allocate((4, 6), dtype=torch.float32).tensor for _ in range(2))
    run = compiled(lambda x: ct.total(x, name))
    for step in range(3):
        x = values(4, 6, seed=step)
        wanted = summed(x)
        given = (first if dist.get_rank() == 0 else second).copy_(x)
        torch.testing.assert_close(run(given), wanted)


@case()
def case_same_input_twice() -> None:
    name = group()
    report = check(
        lambda x: (ct.total(x, name), ct.summed(x, name)),
        lambda step: (values(4, 6, seed=step),),
        lambda x: (summed(x), summed(x)),
    )
    assert outcomes(report) == [AT_RUN_TIME, AT_RUN_TIME]
    assert len({each.buffer for each in report.graphs[0].decisions}) == 1


@case()
def case_parameters_and_constants() -> None:
    name = group()
    module = torch.nn.Linear(4, 4, bias=False, device=device())
    constant = torch.arange(4.0, device=device())

    def f(x: torch.Tensor) -> torch.Tensor:
        return x @ ct.total(module.weight.detach(), name) + ct.total(constant, name)

    with torch.no_grad():
        check(
            f,
            lambda step: (values(4, 4, seed=step),),
            lambda x: x @ summed(module.weight.detach()) + summed(constant),
        )


@case()
def case_dynamic_shapes() -> None:
    """One graph serves all sizes, and the persistent buffer grows."""
    name = group()
    torch._dynamo.reset()
    with explanation.reporting() as report:
        run = compiled(lambda x: ct.total(x * 2, name) + ct.total(x, name), dynamic=True)
        for size in (3, 5, 4, 9, 9, 2):
            x = values(size, 4, seed=size)
            torch.testing.assert_close(run(x), summed(x * 2) + summed(x))
    assert len(report.graphs) == 1
    assert {each.nbytes for each in report.graphs[0].decisions} == {None}


@case()
def case_empty() -> None:
    name = group()
    check(lambda x: x + ct.total(x[:0], name).sum() * 0, lambda step: (values(4, seed=step),), lambda x: x)


@case()
def case_buffer_that_was_empty() -> None:
    """An empty tensor has a capacity of zero elements, whatever its strides are."""
    graph, record = runtime.Graph(), BufferRecord(0, torch.float32, str(device()), (group(),), None, False)
    for sizes in ((8, 0), (4, 1), (0, 9), (2, 2)):
        strides = (max(sizes[1], 1), 1)
        made = graph.buffer(record, sizes, strides).fill_(1)
        assert (made.shape, made.stride(), made.sum()) == (sizes, strides, sizes[0] * sizes[1])


# Operators that write to their arguments.


@case()
def case_in_place_on_intermediates() -> None:
    name = group()

    def f(x: torch.Tensor) -> Any:
        y, z = x + 1, x + 2
        ct.add_peer_(y, name)
        back = ct.add_peer_back_(z, name)
        return y * 2, z * 2, back + 1

    def expected(x: torch.Tensor) -> Any:
        y, z = summed(x + 1), summed(x + 2)
        return y * 2, z * 2, z + 1

    report = check(f, lambda step: (values(4, 4, seed=step),), expected)
    assert outcomes(report) == [PLACED, PLACED]


@case()
def case_in_place_on_inputs() -> None:
    """The result reaches the caller's tensor, in symmetric or plain memory."""
    name = group()
    torch._dynamo.reset()
    mine = symmem.allocate((4, 4), dtype=torch.float32).tensor

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ct.add_peer_(x, name)
        return ct.add_peer_back_(y, name) + 1

    run = compiled(f)
    for step in range(3):
        x, y = values(4, 4, seed=step), values(4, 4, seed=step + 50)
        wanted = summed(x), summed(y)
        given = mine.copy_(y) if step else y
        result = run(x, given)
        torch.testing.assert_close((x, given, result), (*wanted, wanted[1] + 1))


# Several tensors, several groups.


@case()
def case_lists() -> None:
    name = group()
    report = check(
        lambda x: tuple(ct.totals([x + 1, x], x * 3, name)) + tuple(ct.totals([x - 1], None, name)),
        lambda step: (values(4, 4, seed=step),),
        lambda x: (summed(x + 1), summed(x), summed(x * 3), summed(x - 1)),
    )
    assert outcomes(report) == [PLACED, AT_RUN_TIME, PLACED, PLACED]


@case()
def case_two_groups() -> None:
    """A buffer for a group and its subgroup is in memory that both reach."""
    name = group()
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()].group_name

    def f(x: torch.Tensor) -> Any:
        y = x + 1
        return ct.total(y, alone), ct.total(y, name)

    report = check(f, lambda step: (values(4, 4, seed=step),), lambda x: (x + 1, summed(x + 1)))
    assert outcomes(report) == [PLACED, PLACED]


# Results of the graph.


@case()
def case_escapes() -> None:
    """The next call does not change results or views of them. Large results are not copied."""
    name = group()
    torch._dynamo.reset()

    def f(x: torch.Tensor) -> Any:
        small, large = x[:4] + 1, x + 2
        return ct.total(small, name), small, small[1:], ct.total(large, name), large

    run = compiled(f)
    kept = []
    for step in range(3):
        x = values(1 << 9, 1 << 10, seed=step)
        kept.append((x, run(x)))
    for x, results in kept:
        wanted = summed(x[:4] + 1), x[:4] + 1, x[1:4] + 1, summed(x + 2), x + 2
        torch.testing.assert_close(results, wanted)
        assert symmem.find(results[1]) is None
        assert symmem.find(results[2]) is None
        assert symmem.find(results[4]) is not None  # 2 MiB


@case()
def case_training() -> None:
    """The backward graph has a registered operator too, and saved tensors do not change."""
    name = group()

    class Total(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return ct.total(x, name)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return ct.total(gradient * 1, name)

    weight = summed(values(4, 4, seed=99))

    def f(x: torch.Tensor) -> torch.Tensor:
        y = (x @ weight).tanh()
        return (Total.apply(y) * y).sum()

    torch._dynamo.reset()
    with explanation.reporting() as report:
        run = compiled(f)
        for step in range(3):
            x = values(4, 4, seed=step).requires_grad_()
            run(x).backward()
            other = x.detach().clone().requires_grad_()
            y = (other @ weight).tanh()
            everyone = summed(y.detach())
            gradient = everyone + summed(y.detach() * 1)
            y.backward(gradient)
            torch.testing.assert_close(x.grad, other.grad)
    assert len(report.graphs) == 2


@case(gpu=False)
def case_conditional() -> None:
    name = group()

    def f(x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        return torch.cond(flag.sum() > 0, lambda y: ct.total(y * 2, name), lambda y: ct.total(y * 3, name), (x,))

    torch._dynamo.reset()
    run = compiled(f)
    for step in range(4):
        x, flag = values(4, 4, seed=step), torch.tensor([1.0 if step % 2 else -1.0], device=device())
        torch.testing.assert_close(run(x, flag), summed(x * (2 if step % 2 else 3)))


# Compile options.


@case(gpu=False)
def case_cpp_wrapper() -> None:
    """The ranks name their plans alike and make no precompiled header, because the C++ takes long to compile."""
    name = group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uuid.uuid4", lambda: uuid.UUID(int=1))
        check(
            lambda x: ct.total(x + 1, name),
            lambda step: (values(4, 4, seed=step),),
            lambda x: summed(x + 1),
            options={"cpp_wrapper": True, "cpp_cache_precompile_headers": False},
        )


@case(gpu=False)
def case_memory_planning() -> None:
    name = group()
    report = check(
        lambda x: ct.total((x + 1).relu(), name) + ct.total(x * 2, name),
        lambda step: (values(4, 4, seed=step),),
        lambda x: summed((x + 1).relu()) + summed(x * 2),
        options={"memory_planning": True},
    )
    assert outcomes(report) == [COPIED, COPIED]


@case()
def case_inference_mode() -> None:
    name = group()
    torch._dynamo.reset()
    run = compiled(lambda x: ct.total(x, name) + ct.total(x + 1, name))
    for step in range(4):
        x = values(4, 4, seed=step)
        wanted = summed(x) + summed(x + 1)
        with torch.inference_mode(step % 2 == 0):
            torch.testing.assert_close(run(x), wanted)


@case()
def case_own_operators() -> None:
    """symmem's operators take any memory, and Inductor plans their results like other buffers."""
    name = group()

    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = symmem.ops.all_reduce(x * 0.5, name)
        return x

    def expected(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = summed(x * 0.5)
        return x

    check(f, lambda step: (values(4, 4, seed=step),), expected)


@case()
def case_own_operators_of_all_kinds() -> None:
    """Compiled code calls them past the dispatcher unless a profiler runs. Arguments may have any strides."""
    name = group()

    def f(x: torch.Tensor) -> Any:
        return (
            symmem.ops.all_reduce(x, name, "max"),
            symmem.ops.all_gather(x * 2, name),
            symmem.ops.reduce_scatter(x, name) + 1,
            symmem.ops.all_to_all(x, name),
            symmem.ops.broadcast(x + 1, name, 1),
            torch.ops.symmem.all_reduce(group_name=name, reduction="min", x=x + 2),
        )

    torch._dynamo.reset()
    run = compiled(f)
    for step in range(3):
        whole = values(4, 2, 5, seed=step)
        for x in (whole[:2].contiguous(), whole[::2], whole[:2].transpose(1, 2)):
            torch.testing.assert_close(run(x), f(x))
    x = values(4, 2, 5)[:2].contiguous()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        run(x)
    events: Any = profiled.events()
    assert "symmem::all_gather_out" in {each.name for each in events}
    engine, sources = type(symmem.resolve_group().extension(Engines)[device()]), []
    with pytest.MonkeyPatch.context() as patch:
        known = engine.all_gather
        patch.setattr(engine, "all_gather", lambda self, x, out: (sources.append(x), known(self, x, out)))
        compiled(lambda x: symmem.ops.all_gather(x, name))(values(2, 3).t())
        assert sources.pop().is_contiguous()  # the engine requires that
    conjugate = torch.view_as_complex(values(2, 2, 2)).conj()
    torch.testing.assert_close(
        compiled(lambda x: symmem.ops.all_gather(x, name))(conjugate), symmem.ops.all_gather(conjugate, name)
    )


@case()
def case_own_operators_of_a_group_that_changes() -> None:
    """Shapes depend on the number of ranks, so code for another number is not run and not loaded from a cache."""
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()

    def made(size: int) -> symmem.Group:
        prefix = "changing" if size == 2 else f"changing, {rank} alone"
        return symmem.Group.from_store(rank % size, size, dist.PrefixStore(prefix, store), "changing")

    torch._dynamo.reset()
    f = lambda x: symmem.ops.all_gather(x + 1, "changing")  # noqa: E731
    run, x = compiled(f), values(4, 4)
    both = made(2)
    assert torch.equal(run(x), symmem.ops.all_gather(x + 1, both))
    both.close()
    with pytest.raises(GroupError):
        run(x)
    alone = made(1)
    with pytest.raises(GroupError, match="compiled for the group 'changing' of 2 ranks, but the group has 1 ranks now"):
        run(x)
    torch._dynamo.reset()
    assert torch.equal(compiled(f)(x), x.add(1).unsqueeze(0))
    alone.close()


@case()
def case_code_for_other_groups_is_not_taken_from_a_cache() -> None:
    """The larger of two groups owns a shared buffer, so the cache key must show which group is larger."""
    both, alone = [[0, 1]], [[0], [1]]
    for members in ((both, alone), (alone, both)):
        made = []
        for name, parts in zip(("cached a", "cached b"), members, strict=True):
            group = [dist.new_group(ranks) for ranks in parts][dist.get_rank() if parts is alone else 0]
            group._set_group_name(name)
            dist.distributed_c10d._world.pg_names[group] = name  # type: ignore[assignment]
            torch._C._distributed_c10d._register_process_group(name, group)  # type: ignore[arg-type]
            made.append(group)
        larger = "cached a" if members[0] is both else "cached b"
        torch._dynamo.reset()
        x = values(3, 3)
        with explanation.reporting() as report:
            run = compiled(lambda x: sum(ct.total(y, "cached a") + ct.total(y, "cached b") for y in (x @ x,)))
            torch.testing.assert_close(run(x), x @ x + summed(x @ x))
        assert [each.group for each in report.graphs[0].buffers] == [larger]
        for group in made:
            dist.destroy_process_group(group)


@case()
def case_key_of_compiled_code() -> None:
    """The key contains operators that torch wraps, the originals of mutable-op wrappers, and torch's backend."""
    graph = torch.fx.Graph()
    hook.install()
    hook._prepare()
    x = graph.placeholder("x")
    wrapped = torch.ops.higher_order.auto_functionalized_v2
    back, add = torch.ops.ct.add_peer_back_.default, torch.ops.ct.add_peer_.default
    wrapper = next(wrapper for wrapper, op in mutable_ops._originals.items() if op is back)
    for op in (wrapper, add):
        graph.call_function(wrapped, (op,), {"tp": group(), "_x_base_index": 0, "_all_bases": [x]})
    graph.call_function(torch.ops.aten.relu.default, (x,))
    names = [op._name for op, _node in cache_keys.operators(torch.fx.GraphModule({}, graph))]
    assert names == ["ct::add_peer_back_", "ct::add_peer_", "aten::relu"]
    ours = torch.fx.Graph()
    ours.call_function(torch.ops.symm_mem.one_shot_all_reduce.default, (ours.placeholder("x"), "sum", group()))
    called, found = list(cache_keys.operators(torch.fx.GraphModule({}, ours))), []
    for backend in ("CUDA", "NCCL"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.distributed._symmetric_memory.get_backend", lambda device: backend)  # noqa: B023
            found.append(cache_keys.key_of(called))
    assert found[0] != found[1]


@case()
def case_nothing_registered() -> None:
    torch._dynamo.reset()
    with explanation.reporting() as report:
        assert torch.equal(compiled(lambda x: x + 1)(torch.ones(4, 4)), torch.full((4, 4), 2.0))
    assert report.graphs == []
    assert "no compiled graph" in str(report)


@case()
def case_views_by_an_operator() -> None:
    """A view of an input by an operator is compared too, because the ranks may pass different pieces."""
    name = group()
    torch._dynamo.reset()
    both = symmem.allocate((8, 6), dtype=torch.int32).tensor
    mine = both[:4] if dist.get_rank() == 0 else both[4:]
    run = compiled(lambda x: ct.total(x.view(torch.uint8), name))
    for step in range(2):
        x = torch.full((4, 6), 7 * (dist.get_rank() + 1) + step, dtype=torch.int32, device=device())
        assert torch.equal(run(mine.copy_(x)).view(torch.int32), summed(x))


@case()
def case_one_tensor_written_to_twice() -> None:
    """A tensor passed as two mutated arguments is copied once. Overlapping views are an error that names them."""
    name = group()

    def f(x: torch.Tensor) -> None:
        ct.plus_one_(x)
        ct.pair_plus_(x, x, name)

    torch._dynamo.reset()
    x = torch.ones(8, device=device())
    compiled(f)(x)
    assert x.eq(4).all()
    compiled(lambda x: ct.pair_plus_(x[:4], x[4:], name))(x)
    assert x.eq(5).all()
    with pytest.raises(Exception, match="ct::pair_plus_ writes to its arguments, and 'x' and 'y' share memory"):
        compiled(lambda x: ct.pair_plus_(x[:5], x[3:], name))(x)


@case()
def case_explained_often() -> None:
    """Dynamo compiles a code object only a few times. Calls of ``explain`` do not count."""
    name = group()

    def f(x: torch.Tensor) -> torch.Tensor:
        return ct.total(x @ x, name)

    torch._dynamo.reset()
    x = values(4, 4)
    for _ in range(10):
        assert len(symmem.compile.explain(f, x).graphs) == 1
    torch.testing.assert_close(compiled(f)(x), summed(x @ x))


@case()
def case_operators_redefined() -> None:
    """Operators are redefined, as in a notebook. Names that differ only in the end of the namespace do not collide."""
    name = group()
    for by in (1, 2):
        lib = symmem.ops.Library("again", "DEF")
        lib.define(f"plus_(symm Tensor(a!) x, str group_name, int by={by}) -> Tensor(a!)")
        lib.impl("plus_", lambda x, g, by=by: handle_of(x).tensor.add_(by), "CompositeExplicitAutograd")
        torch.library.register_fake("again::plus_", lambda x, g, by=1: x, lib=lib)
        torch._dynamo.reset()
        x = values(3)
        wanted = x + by
        compiled(lambda x: torch.ops.again.plus_(x, name))(x)
        torch.testing.assert_close(x, wanted)
        lib._destroy()
    libs = []
    for namespace, op in (("ra", "b__f_"), ("ra__b", "f_")):
        libs.append(symmem.ops.Library(namespace, "DEF"))
        libs[-1].define(f"{op}(symm Tensor(a!) x, str group_name) -> Tensor(a!)")
    for lib in libs:
        lib._destroy()


# Switching the hook, and registering.


@case()
def case_enable() -> None:
    """Code compiled with the hook off passes plain memory, which the operators refuse. Switching recompiles."""
    name = group()
    run = torch.compile(lambda x: ct.summed(x + 1, name))
    torch._dynamo.reset()
    x = values(4, 4)
    with pytest.raises(Exception, match="plain memory"):
        run(x)
    symmem.compile.enable()
    try:
        assert symmem.compile.enabled()
        torch.testing.assert_close(run(x), summed(x + 1))
    finally:
        symmem.compile.disable()
    with pytest.raises(Exception, match="plain memory"):
        run(x)


@case()
def case_registry_changes() -> None:
    """A registration after compiling places the argument from then on; in a block, until the block ends."""
    name = group()
    lib = torch.library.Library("ct", "FRAGMENT")
    schema = "late(Tensor x, str group_name) -> Tensor"
    lib.define(schema)

    def late(x: torch.Tensor, g: str) -> torch.Tensor:
        return torch.full_like(x, float(symmem.find(x) is not None))

    lib.impl("late", late, "CompositeExplicitAutograd")
    torch.library.register_fake("ct::late", lambda x, g: torch.empty_like(x), lib=lib)
    torch._dynamo.reset()
    run = compiled(lambda x: ct.late(x + 1, name) + 0)
    x = values(4, 4)
    assert run(x).eq(0).all()
    with symmem.compile.specify_symmetric_memory("ct::late", "x"):
        assert run(x).eq(1).all()
        with symmem.compile.specify_symmetric_memory("ct::late", "x", exit_barrier=True):
            assert run(x).eq(1).all()
        assert not symmem.ops.registration("ct::late").exit_barrier
        assert run(x).eq(1).all()
    assert run(x).eq(0).all()
    said = symmem.compile.specify_symmetric_memory("ct::late", "x")
    assert run(x).eq(1).all()
    with said:
        pass
    with said:
        assert run(x).eq(1).all()
        symmem.ops.unregister("ct::late")
    assert symmem.ops.registration("ct::late") is None
    built_in = symmem.ops.registration("symm_mem::one_shot_all_reduce")
    with symmem.compile.specify_symmetric_memory("symm_mem::one_shot_all_reduce", "input"):
        pass
    assert symmem.ops.registration("symm_mem::one_shot_all_reduce") is built_in


@case()
def case_explain() -> None:
    name = group()

    def f(x: torch.Tensor) -> torch.Tensor:
        sums = ct.total(x + 1, name) + ct.total(ct.opaque(x), name)
        return sums + ct.total(torch.kthvalue(x, 4, keepdim=True)[0], name)

    torch._dynamo.reset()
    report = symmem.compile.explain(f, values(4, 4))
    text = str(report)
    assert report.copies == 2
    assert "3 registered arguments, 2 copied at every call" in text
    assert re.search(r"copied: the operator that makes it \(.*aten.kthvalue.*\) allocates its own result", text)
    assert "to avoid the copy: call it in an operator of your own with one result" in text
    assert re.search(r"ct::total\(x: \[4, 4\] float32, 64 B\): placed: .* writes straight to it", text)
    assert "to avoid the copy: give that operator a variant with out=" in text
    assert "compile_cases.py" in text
    assert "a barrier follows" in text
    assert report.to_json()["graphs"][0]["decisions"][1]["outcome"] == COPIED
    again = symmem.compile.explain(f, values(4, 4))
    assert [each.outcome for graph in again.graphs for each in graph.decisions] == [PLACED, COPIED, COPIED]


@case()
def case_reports_tell_what_happened() -> None:
    """A report counts the calls that used an argument in place and those that copied it, and goes on counting."""
    name, nbytes = group(), 24 * 4
    mine, plain = symmem.allocate((4, 6), torch.float32).tensor.fill_(1), torch.ones(4, 6, device=device())
    report = symmem.compile.explain(lambda x: ct.total(x, name), plain)
    assert f"used in place in 0 calls until now, copied in 1 ({nbytes} B in all)" in str(report)
    assert "to avoid the copy: allocate it with symmem.allocate" in str(report)
    report = symmem.compile.explain(lambda x: ct.total(x, name), mine)
    assert "used in place in 1 call until now, copied in 0\n" in str(report)
    assert "to avoid the copy" not in str(report)
    torch._dynamo.reset()
    with explanation.reporting() as report:
        run = compiled(lambda x: (ct.total(x, name), ct.total(x, name), ct.total(x + 1, name)))
        for x in (plain, mine, mine, mine, plain, plain):  # call 4 compares again, as do calls 2 and 8
            run(x)
    (graph,) = report.graphs
    first, second, third = (each.number for each in graph.decisions)
    assert first == second
    assert third is None
    counted = {"in_place": 3, "copied": 3, "nbytes": 3 * nbytes}
    assert graph.to_json()["usage"] == {first: counted}
    run(plain)
    assert graph.usage[first].copied == 4


@case()
def case_reports_show_the_lines_of_this_program() -> None:
    """Torch's caches ignore source lines. Code that another program has left there is reported with our lines."""
    name, source = group(), "def f(x):\n    y = total(x * 3, name)\n    return total(y * y, name) + y\n"
    for program, blank in (("first", 0), ("second", 3), ("third", 5)):
        space: dict[str, Any] = {"total": ct.total, "name": name}
        exec(compile("\n" * blank + source, f"/{program}/program.py", "exec"), space)
        torch._dynamo.reset()
        with explanation.reporting() as report:
            compiled(space["f"])(values(2, 5))
        (graph,) = report.graphs
        shown = [each.where.partition(",") for each in graph.decisions]
        assert [file for file, *_ in shown] == [f'File "/{program}/program.py"'] * 2
        lines = [int(rest.split()[1].strip(",")) for *_, rest in shown]
        assert lines == [blank + 2, blank + 3]
    call = Decision("ct::total", "x", PLACED, "buf0", name, (), "float32", 4, "", where="theirs:1")
    others = f"# symmem decision: {call.line()}\n"
    assert report_of("g", others, lines=[]).decisions[0].where == ""
    assert report_of("g", others, lines=[("ct::total", "ours:1")] * 2).decisions[0].where == ""


@case()
def case_written_and_sliced_inputs() -> None:
    """A slice of a symmetric input is used in place. If an operator writes to it, the report tells the copied bytes."""
    name = group()
    mine = symmem.allocate((8, 4), torch.float32).tensor.zero_()

    def read(buffer: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        buffer[:3].copy_(x)
        return ct.total(buffer[:3], name)

    def write(buffer: torch.Tensor, x: torch.Tensor) -> None:
        buffer[:3].copy_(x)
        ct.add_peer_(buffer[:3], name)

    for function in (read, write):
        torch._dynamo.reset()
        POINTERS.clear()
        with explanation.reporting() as report:
            run = compiled(function)
            for step in range(2):
                x = values(3, 4, seed=step)
                made = run(mine, x)
                torch.testing.assert_close(mine[:3] if made is None else made, summed(x))
                assert mine[3:].eq(0).all()
        (decision,) = report.graphs[0].decisions
        assert decision.outcome == (AT_RUN_TIME if function is read else PLACED)
        assert decision.copied_back == (0 if function is read else mine.nbytes)
        assert (set(POINTERS) == {mine.data_ptr()}) == (function is read)
    assert "the graph writes to an input before the operator: 128 B are copied back to the input" in str(report)


@case()
def case_report_file() -> None:
    """SYMMEM_ENABLE=compile_report(path): every rank writes one line per compiled graph."""
    name = group()
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMMEM_ENABLE", f"compile_report({folder}/report)")
        compiled(lambda x: ct.total(x + 3, name))(values(2, 2))
        (file,) = Path(folder).iterdir()
        assert file.name == f"report.rank{dist.get_rank()}"
        (line,) = file.read_text().splitlines()
        assert json.loads(line)["decisions"][0]["outcome"] == PLACED
        run = compiled(lambda x: ct.total(x, name))
        run(values(2, 2))
        del run
        torch._dynamo.reset()
        gc.collect()
        *_, report, usage = map(json.loads, file.read_text().splitlines())
        number = str(report["decisions"][0]["number"])
        assert usage == {"name": report["name"], "usage": {number: {"in_place": 0, "copied": 1, "nbytes": 16}}}


# Bad input, and lifetimes.


@case()
def case_plain_for_one_sided() -> None:
    name = group()
    torch._dynamo.reset()
    run = compiled(lambda x: ct.mine(x, name))
    with pytest.raises(NotSymmetricError, match=r"ct::mine: the argument 'x' must be symmetric memory"):
        run(values(2, 2))
    mine = symmem.allocate((2, 2), dtype=torch.float32).tensor.fill_(5)
    assert run(mine).eq(5).all()
    report = symmem.compile.explain(lambda x: ct.mine(x, name), mine)
    assert outcomes(report) == [IN_PLACE]
    assert report.graphs[0].peak == 0


@case()
def case_no_such_group() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="ct::total: no group by argument 'group_name'") as caught:
        compiled(lambda x: ct.total(x + 1, "nobody"))(values(2, 2))
    assert "GroupError" in repr(caught.value) or isinstance(caught.value, GroupError)


@case()
def case_group_is_destroyed() -> None:
    made = dist.new_group(list(range(dist.get_world_size())))
    name = made.group_name
    torch._dynamo.reset()
    run = compiled(lambda x: ct.total(x + 1, name))
    x = values(4, 4)
    torch.testing.assert_close(run(x), summed(x + 1))
    dist.destroy_process_group(made)
    with pytest.raises(GroupError):
        run(x)


@case()
def case_group_is_made_again() -> None:
    """Memory of a destroyed group is not used for a new group with the same name."""
    name, run = "again", None
    mine = symmem.allocate((4, 4), dtype=torch.float32)
    for turn in range(2):
        made = dist.new_group(list(range(dist.get_world_size())))
        made._set_group_name(name)
        dist.distributed_c10d._world.pg_names[made] = name  # type: ignore[assignment]
        torch._C._distributed_c10d._register_process_group(name, made)  # type: ignore[arg-type]
        mine.rendezvous(made)
        if run is None:
            torch._dynamo.reset()
            run = compiled(
                lambda x, y: (
                    *(ct.total(each, name) for each in (x @ x, x, y)),
                    symmem.ops.all_gather(x + 1, name),
                )
            )
        for step in range(2):
            x, y = values(4, 4, seed=step), mine.tensor.copy_(values(4, 4, seed=step + 2 * turn))
            gathered = symmem.ops.all_gather(x + 1, group())
            torch.testing.assert_close(run(x, y), (summed(x @ x), summed(x), summed(y), gathered))
        dist.destroy_process_group(made)


@case()
def case_graph_knows_groups_made_again() -> None:
    """A graph drops its buffers if a group is replaced or closed, and keeps them otherwise."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store, count = dist.distributed_c10d._get_default_store(), itertools.count()

    def of_store() -> symmem.Group:
        prefix = f"known again {next(count)}"
        return symmem.Group.from_store(rank, size, dist.PrefixStore(prefix, store), "known again")

    def replaced(group: symmem.Group) -> None:
        others.append(of_store())
        assert name_of(others[-1]) == group.name

    def closed(group: symmem.Group) -> None:
        group.close()
        if group.process_group is None:
            others.append(of_store())

    others: list[symmem.Group] = []
    of_process_group = symmem.resolve_group(dist.new_group(list(range(size))))
    for first, goes in ((of_store(), replaced), (of_store(), closed), (of_process_group, closed)):
        graph = runtime.Graph()
        if first.process_group is None:
            name_of(first)
        record = BufferRecord(0, torch.float32, str(device()), (first.name,), None, False)
        made = graph.buffer(record, (2, 2), (2, 1))
        graph.begin()
        assert graph.buffer(record, (2, 2), (2, 1)) is made
        goes(first)
        graph.begin()
        assert graph.buffer(record, (2, 2), (2, 1)) is not made
        for each in (first, *others):
            each.close()


@case()
def case_kernel_that_stopped_is_named() -> None:
    """If a kernel stopped, the error says why, instead of torch's CUDA error."""
    error = RuntimeError("CUDA error: unspecified launch failure")

    def fail(inputs: Any) -> None:
        raise error

    with pytest.raises(RuntimeError) as plain:
        current_graph.bound(fail)([])
    assert plain.value is error
    memory = (ctypes.c_uint32 * (kernel_words.NBYTES // 4))()
    words = kernel_words.KernelWords(0, ctypes.addressof(memory), 0)
    try:
        number = words.enter(symmem.resolve_group())
        memory[:4] = [1, 7, 1, number]
        with pytest.raises(PeerTimeoutError, match="barrier on channel 7") as caught:
            current_graph.bound(fail)([])
        assert caught.value.__cause__ is error
    finally:
        kernel_status.devices.remove(words)


@case()
def case_memory_is_freed_with_the_function() -> None:
    name = group()
    torch._dynamo.reset()
    gc.collect()
    graphs: list[Any] = []
    known = runtime.Graph._make

    def make(self: Any, *args: Any) -> Any:
        graphs.append(weakref.ref(self))
        return known(self, *args)

    runtime.Graph._make = make
    run = compiled(lambda x: ct.total(x + 17, name))
    run(values(2, 2))
    runtime.Graph._make = known
    del run
    torch._dynamo.reset()
    gc.collect()
    assert [graph() for graph in graphs] == [None]


@case()
def case_functions_have_separate_graphs() -> None:
    """Functions of one module have separate graphs, also in nested calls. A graph is freed with its function."""

    def now(inputs: Any) -> Any:
        return current_graph.running.here.graph

    def seen() -> list[Any]:
        outside, inner = now([]), current_graph.bound(now)
        first, second, third = current_graph.bound(lambda inputs: (now(inputs), inner(inputs), now(inputs)))([])
        assert first is third is not second
        assert inner([]) is second
        assert now([]) is outside not in (first, second)
        return [weakref.ref(first), weakref.ref(second)]

    graphs = seen()
    gc.collect()
    assert [graph() for graph in graphs] == [None, None]


@case(gpu=False)
def case_options() -> None:
    with pytest.raises(InvalidArgumentError, match="a mode or options, not both"):
        control.backend(None, [], mode="default", options={})


# CUDA graphs, as far as they can be tested without a GPU.


@case(gpu=False)
def case_cuda_graphs_know_symmetric_inputs() -> None:
    """Symmetric inputs are static for a CUDA graph. Graphs without symmetric memory are not changed."""
    hook.install()
    calls: list[Any] = []

    def stock(model: Any, static_input_idxs: Any = (), **options: Any) -> Any:
        calls.append((tuple(static_input_idxs), options))
        return lambda inputs: [*inputs, "ran"]

    wrapped = wrappers._cudagraphify(stock)
    kept, runtime.Graph.keeps = runtime.Graph.keeps, lambda self, value: value == "symmetric"
    try:
        assert wrapped(None, (2,), device_index=0)([1]) == [1, "ran"]
        with wrappers._captured(True):
            run = wrapped(None, (2,), device_index=0)
        assert len(calls) == 1
        inputs = ["symmetric", "plain", "weight", "symmetric"]
        assert run(inputs) == run(inputs) == [*inputs, "ran"]
    finally:
        runtime.Graph.keeps = kept
    assert calls == [((2,), {"device_index": 0}), ((0, 2, 3), {"device_index": 0})]


@case(gpu=False)
def case_cuda_graphs_do_not_get_inputs_that_are_checked_outside() -> None:
    """Otherwise every replay would copy the inputs as well as the results of the checks."""
    from torch._inductor.dependencies import StarDep
    from torch._inductor.virtualized import V
    from torch.utils._ordered_set import OrderedSet

    hook.install()

    def node(reads: set[Any], last: set[str]) -> Any:
        deps = types.SimpleNamespace(reads={StarDep(name) for name in reads}, writes=set())
        return types.SimpleNamespace(read_writes=deps, last_usage=OrderedSet(last))

    def last_usage() -> list[set[str]]:
        taken, user = node({"buf1"}, {"buf1", "arg0_1", "arg1_1"}), node({"arg1_1", "buf2"}, {"arg0_1", "arg2_1"})
        seen: list[Any] = []
        scheduler = types.SimpleNamespace(mutation_real_name={"buf2": "arg2_1"})  # it was written before
        wrappers._partition_signature(lambda *args: seen.append(args))(scheduler, [[taken, user]], [False])
        assert seen == [(scheduler, [[taken, user]], [False])]
        return [set(each.last_usage) for each in (taken, user)]

    with V.set_graph_handler(types.SimpleNamespace()):  # type: ignore[arg-type]
        assert last_usage() == [{"buf1", "arg0_1", "arg1_1"}, {"arg0_1", "arg2_1"}]
        symmetric_layout.begin_plan("g").uncaptured_inputs.update(("arg0_1", "arg1_1", "arg2_1"))
        assert last_usage() == [{"buf1", "arg1_1"}, {"arg2_1"}]


@case(gpu=False)
def case_cuda_graphs_are_captured_without_checks_of_inputs() -> None:
    """The node that checks an input is not captured. Torch decides about the other nodes."""
    hook.install()
    judged = wrappers._should_partition(lambda self, node: "torch's")

    class Node:
        node: Any = None

    other, look = Node(), Node()
    look.node = type("Kernel", (), {"symmem_uncaptured": True})()
    assert judged(None, other) == "torch's"
    assert "outside of CUDA graphs" in judged(None, look)


@case(gpu=False)
def case_unknown_torch() -> None:
    """An unsupported torch is an error that names the function, and nothing is wrapped."""
    hook.uninstall()

    def changed(self: Any, target: Any, args: Any) -> None: ...

    lowering = wrappers.GraphLowering
    known, lowering.call_function = lowering.call_function, changed
    try:
        with pytest.raises(UnsupportedError, match=r"GraphLowering.call_function takes \('self', 'target', 'args'\)"):
            hook.install()
        assert not hook._originals
    finally:
        lowering.call_function = known


@case(gpu=False)
def case_without_the_hook() -> None:
    """A torch that the hook does not fit compiles as always, and registered arguments are copied."""
    hook.uninstall()
    name, weight = group(), values(4, 4, seed=9)
    owner: Any = wrappers.AllocateLine
    known = owner._codegen_comm_buffer
    owner._codegen_comm_buffer = lambda self, code, other=None: known(self, code)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("symmem.compile").addHandler(handler)
    control._warn_once.cache_clear()
    torch._dynamo.reset()
    try:
        torch.testing.assert_close(compiled(lambda x: x.sin() + 1)(weight), weight.sin() + 1)
        assert messages == []
        run = compiled(lambda x: ct.total(ct.total(x @ weight, name), name).relu())
        for step in range(2):
            x = values(4, 4, seed=step)
            torch.testing.assert_close(run(x), summed(summed(x @ weight)).relu())
        assert len(messages) == 1
        assert "registered arguments in plain memory are copied at every call" in messages[0]
        with pytest.raises(UnsupportedError, match="does not support torch"):
            control.enable()
    finally:
        owner._codegen_comm_buffer = known
        logging.getLogger("symmem.compile").removeHandler(handler)
        torch._dynamo.reset()
