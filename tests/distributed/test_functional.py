"""Functional collectives in compiled graphs: symmem's operators run them, with the results of eager code."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from patience import SETTINGS, TASK
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils import _pytree as pytree

import symmem
from symmem.tools.ranks import RankPool

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SERVED, LEFT = "run by symmem", "run by the process group"


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    cache = tmp_path_factory.mktemp("inductor")
    return {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "SYMMEM_ENABLE": SETTINGS,
    }


@pytest.fixture(scope="module")
def pool(env: dict[str, str | None]) -> Iterator[RankPool]:
    with RankPool(2, env=env, process_group="symmem", timeout=TASK) as made:
        yield made


def world() -> dist.ProcessGroup:
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", UserWarning)
    return cast("dist.ProcessGroup", dist.group.WORLD)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(17 * seed + dist.get_rank()))


@contextlib.contextmanager
def reporting() -> Iterator[Any]:
    from symmem.compile.explanation import reporting as collect

    with collect() as report:
        yield report


def found(report: Any) -> list[tuple[str, str]]:
    """What ran the functional collectives: name and outcome."""
    decisions = [each for graph in report.graphs for each in graph.decisions]
    return [(each.op.removeprefix("_c10d_functional::"), each.outcome) for each in decisions]


def same(program: Callable[..., Any], *arguments: torch.Tensor, **options: Any) -> list[tuple[str, str]]:
    """Compare a program's compiled and eager results bit by bit, twice; return what ran its collectives."""
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="symmem", fullgraph=True, **options)
    with reporting() as report:
        for _ in range(2):
            copies = [x.clone() for x in arguments]
            wanted, results = program(*copies), compiled(*(given := [x.clone() for x in arguments]))
            for one, other in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(results), strict=True):
                assert torch.equal(one, other)
            for one, other in zip(copies, given, strict=True):
                assert torch.equal(one, other)
    return found(report)


# Every form.


def out_of_place() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor) -> Any:
        total = functional.all_reduce(x * 2, "sum", group)
        gathered = functional.all_gather_tensor(x + 1, 0, group)
        part = functional.reduce_scatter_tensor(gathered * 2, "avg", 0, group)
        exchanged = functional.all_to_all_single(x, None, None, group)
        sent = functional.broadcast(x * 3, 1, group)
        return total + 1, gathered * 1, part + 0, exchanged + 1, sent - x, x.t().contiguous()

    names = ["all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast"]
    assert same(program, values(2 * size, 3)) == [(name, SERVED) for name in names]


def coalesced() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor, y: torch.Tensor) -> Any:
        most = functional.all_reduce_coalesced([x, y * 2], "max", group)
        gathered = functional.all_gather_into_tensor_coalesced([x, y], group)
        parts = functional.reduce_scatter_tensor_coalesced([x * 2, y], "sum", [0, 0], group)
        return [each + 1 for each in (*most, *gathered, *parts)]

    ran = same(program, values(2 * size, 3), values(size))
    assert sorted(ran) == [
        *[("all_gather_into_tensor", SERVED)] * 2,
        *[("all_reduce", SERVED)] * 2,
        *[("reduce_scatter_tensor", SERVED)] * 2,
    ]


def in_place() -> None:
    size = dist.get_world_size()
    world()

    def program(x: torch.Tensor, gathered: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        dist.all_gather_into_tensor(gathered, x)
        dist.reduce_scatter_tensor(part, gathered * 2)
        return x + 1

    ran = same(program, values(3), torch.empty(3 * size), torch.empty(3))
    assert [outcome for _name, outcome in ran] == [SERVED] * 3


def forms_from_passes() -> None:
    """Forms that only torch's passes put into graphs."""
    group, ops = world(), torch.ops._c10d_functional
    size = dist.get_world_size()

    def rewrite(graph: torch.fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is ops.broadcast.default:
                node.target = ops.broadcast_.default
            for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
                if node.target is getattr(ops, name).default:
                    value = node.meta["val"]
                    with graph.inserting_before(node):
                        options = {"dtype": value.dtype, "device": value.device}
                        out = graph.call_function(torch.ops.aten.empty.memory_format, (list(value.shape),), options)
                    out.meta["val"] = value
                    node.target, node.kwargs = getattr(ops, f"{name}_out").default, {"out": out}

    def program(x: torch.Tensor) -> Any:
        sent = functional.broadcast(x * 3, 1, group)
        gathered = functional.all_gather_tensor(x + 1, 0, group)
        part = functional.reduce_scatter_tensor(gathered * 2, "sum", 0, group)
        least = functional.all_reduce_coalesced([x * 5, x * 7], "min", group)
        return sent + 1, gathered * 1, part + 1, [each + 1 for each in least]

    ran = same(program, values(2 * size, 3), options={"post_grad_custom_post_pass": rewrite})
    assert [outcome for _name, outcome in ran] == [SERVED] * 5


def other_shapes_and_dtypes() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor, scalar: torch.Tensor, half: torch.Tensor, numbers: torch.Tensor) -> Any:
        total = functional.all_reduce(x.t(), "sum", group)
        whole = functional.all_reduce(scalar * 2, "sum", group)
        gathered = functional.all_gather_tensor(half.t() * 2, 0, group)
        nothing = functional.all_gather_tensor(x[:0] * 2, 0, group)
        most = functional.all_reduce(numbers + 1, "max", group)
        part = functional.reduce_scatter_tensor(half.t(), "sum", 0, group)
        return total + 1, whole * 1, gathered * 1, nothing * 1, most + 1, part + 1

    numbers = torch.arange(4) * dist.get_rank()
    assert {
        outcome for _name, outcome in same(program, values(3, 2), values(), values(3, 2 * size).half(), numbers)
    } == {SERVED}


def dynamic_shapes() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor) -> Any:
        total = functional.all_reduce(x * 2, "sum", group)
        gathered = functional.all_gather_tensor(total + 1, 0, group)
        return functional.all_to_all_single(gathered, None, None, group) + 1, total * 1

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="symmem", fullgraph=True, dynamic=True)
    with reporting() as report:
        for rows in (4, 6, 10):
            x = values(rows * size, 3)
            for one, other in zip(program(x), compiled(x), strict=True):
                assert torch.equal(one, other)
    assert len(report.graphs) == 1
    assert [outcome for _name, outcome in found(report)] == [SERVED] * 3


def gradients() -> None:
    group, size = world(), dist.get_world_size()

    def program(x: torch.Tensor) -> torch.Tensor:
        gathered = functional.all_gather_tensor_autograd(x * 2, 0, group)
        part = functional.reduce_scatter_tensor_autograd(gathered.square(), "sum", 0, group)
        return functional.all_to_all_single_autograd(part, [2] * size, [2] * size, group).sin()

    torch._dynamo.reset()
    results = []
    with reporting() as report:
        for run in (program, torch.compile(program, backend="symmem", fullgraph=True)):
            x = values(2 * size, 3).requires_grad_()
            run(x).sum().backward()
            assert x.grad is not None
            results.append(x.grad)
    torch.testing.assert_close(*results)
    assert len(report.graphs) == 2
    assert [outcome for _name, outcome in found(report)] == [SERVED] * 6


def torchs_passes_for_overlap() -> None:
    """The passes see the collectives and their waits as ever: one merges the collectives, one moves the waits."""
    group = world()

    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = functional.all_reduce(x * 2, "sum", group)
        gathered = [functional.all_gather_tensor(x + number, 0, group) for number in range(3)]
        return total.sum() + torch.cat(gathered).sum() + y @ y @ y

    from torch._inductor.utils import run_and_get_code

    x, y = values(4, 3), values(8, 8, seed=1)
    for options, calls in (
        ({"reorder_for_compute_comm_overlap": True}, 4),
        ({"reorder_for_compute_comm_overlap": True, "bucket_all_gathers_fx": "all"}, 2),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(program, backend="symmem", fullgraph=True, options=cast("Any", options))
        with reporting() as report:
            result, (code, *_rest) = run_and_get_code(compiled, x, y)
        torch.testing.assert_close(result, program(x, y))
        assert [outcome for _name, outcome in found(report)] == [SERVED] * calls
        assert code.count("torch.ops._c10d_functional.wait_tensor.default(") == calls
        assert "torch.ops._c10d_functional.all" not in code


@pytest.mark.parametrize(
    "program",
    [
        out_of_place,
        coalesced,
        in_place,
        forms_from_passes,
        other_shapes_and_dtypes,
        dynamic_shapes,
        gradients,
        torchs_passes_for_overlap,
    ],
)
def test_every_form_has_the_results_of_eager_code(pool: RankPool, program: Callable[[], None]) -> None:
    pool.run(program)


# What symmem does not run.


def other_calls() -> None:
    """They stay functional collectives, and run in the process group."""
    group, rank = world(), dist.get_rank()

    def program(x: torch.Tensor, truth: torch.Tensor) -> Any:
        product = functional.all_reduce(x, "product", group)
        total = functional.all_reduce(truth, "sum", group)
        return product + 1, total, functional.all_reduce(x, "sum", group) + 1

    truth = torch.tensor([rank == 0, True])
    ran = same(program, values(3), truth)
    assert ran == [("all_reduce", LEFT), ("all_reduce", LEFT), ("all_reduce", SERVED)]


def parts_of_different_sizes() -> None:
    """Rank 0 has equal parts and rank 1 has not, so the ranks must compare."""
    group, rank = world(), dist.get_rank()
    sizes = [[1, 1], [1, 3]][rank]

    def program(x: torch.Tensor) -> torch.Tensor:
        return functional.all_to_all_single(x, sizes, sizes, group) + 1

    before = served("all_to_all")
    same(program, values(sum(sizes), 2))
    assert served("all_to_all") == before


def served(operation: str) -> int:
    calls = [each for each in symmem.distributed.report() if each.operation == operation and each.by == "symmem"]
    return sum(each.calls for each in calls)


def shared_memory_is_missing() -> None:
    """Every form runs in the inner group, if the ranks turn out to share no memory."""
    process_group: Any = world()
    total = served("all_reduce")
    with mock.patch.object(process_group, "_hosts", SimpleNamespace(obstacle=lambda *call: "a test")):
        for program in (out_of_place, coalesced, in_place, forms_from_passes):
            program()
    assert served("all_reduce") == total


def other_settings_than_the_compiler_had() -> None:
    group = world()
    symmem_group = symmem.resolve_group(group)

    @torch.compile(backend="symmem", fullgraph=True)
    def program(x: torch.Tensor) -> torch.Tensor:
        return functional.all_reduce(x * 2, "sum", group) + 1

    x = values(3)
    first, before = program(x), served("all_reduce")
    assert torch.equal(program(x), first)
    assert served("all_reduce") == before + 1
    off = dataclasses.replace(symmem_group.settings, compiled_collectives="off")
    with mock.patch.object(symmem_group, "settings", off):
        torch.testing.assert_close(program(x), first)  # code from a cache may come from such a program
        with reporting() as report:
            torch.testing.assert_close(torch.compile(lambda x: program(x) * 1, backend="symmem")(x), first)
        assert not report.graphs


def a_wrong_shape_fails_on_all_ranks() -> None:
    group, rank = world(), dist.get_rank()

    @torch.compile(backend="symmem", fullgraph=True, dynamic=True)
    def program(x: torch.Tensor) -> torch.Tensor:
        return functional.all_reduce(x * 2, "sum", group) + 1

    program(values(3))
    with pytest.raises(symmem.errors.MismatchError, match="all_reduce"):
        program(values(4 + rank))
    assert torch.equal(program(values(5)), functional.all_reduce(values(5) * 2, "sum", group) + 1)


@pytest.mark.parametrize(
    "program",
    [
        other_calls,
        parts_of_different_sizes,
        shared_memory_is_missing,
        other_settings_than_the_compiler_had,
        a_wrong_shape_fails_on_all_ranks,
    ],
)
def test_all_other_calls(pool: RankPool, program: Callable[[], None]) -> None:
    pool.run(program)


# Groups of other backends, and several groups.


def over_gloo(setting: str) -> list[tuple[str, str]]:
    group = world()

    def program(x: torch.Tensor) -> Any:
        gathered = functional.all_gather_tensor(x + 1, 0, group)
        return functional.all_reduce(x * 2, "sum", group) + 1, gathered * 1

    assert symmem.resolve_group(group).settings.compiled_collectives == setting
    return same(program, values(4, 3))


@pytest.mark.parametrize("setting", ["auto", "on"])
def test_groups_of_other_backends_need_the_setting(env: dict[str, str | None], setting: str) -> None:
    option = f"compiled_collectives({setting}),{SETTINGS}"
    with RankPool(2, env={**env, "SYMMEM_ENABLE": option}, process_group="gloo", timeout=TASK) as pool:
        expected = {"auto": [], "on": [("all_gather_into_tensor", SERVED), ("all_reduce", SERVED)]}[setting]
        assert pool.run(over_gloo, setting) == [expected] * 2


def overlapping_groups() -> None:
    everyone, rank = world(), dist.get_rank()
    pairs = [dist.new_group(ranks, backend="symmem") for ranks in ([0, 1], [1, 2])]
    mine = [pair for pair, ranks in zip(pairs, ([0, 1], [1, 2]), strict=True) if rank in ranks]

    def program(x: torch.Tensor) -> torch.Tensor:
        for pair in mine:
            x = functional.all_reduce(x * 2, "sum", pair) + rank
        return functional.all_gather_tensor(x, 0, everyone) * 1

    ran = same(program, values(4, 3))
    assert ran == [*[("all_reduce", SERVED)] * len(mine), ("all_gather_into_tensor", SERVED)]


def test_several_groups_in_one_graph(env: dict[str, str | None]) -> None:
    with RankPool(3, env=env, process_group="symmem", timeout=TASK) as pool:
        pool.run(overlapping_groups)


# Models without a change of code.


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def trained(model: Callable[[torch.Tensor], torch.Tensor], parameters: nn.Module) -> list[torch.Tensor]:
    result = model(values(4, 8, seed=1))
    result.square().sum().backward()
    gradients = [cast("Any", each.grad).full_tensor() for each in parameters.parameters()]
    return [result.detach(), *gradients]


def compare(models: list[nn.Module]) -> list[tuple[str, str]]:
    """Train two equal models, one eager and one compiled by ``enable()``; return what ran the latter's collectives."""
    eager, other = models
    expected = trained(eager, eager)
    torch._dynamo.reset()
    symmem.compile.enable()
    try:
        with reporting() as report:
            results = trained(torch.compile(other), other)
    finally:
        symmem.compile.disable()
    for one, another in zip(expected, results, strict=True):
        torch.testing.assert_close(one, another)
    return found(report)


def tensor_parallel() -> None:
    world()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"0": ColwiseParallel(input_layouts=Shard(0)), "2": RowwiseParallel(output_layouts=Shard(0))}
    ran = compare([parallelize_module(layers(), mesh, plan) for _ in range(2)])
    assert [name for name, _outcome in ran][:2] == ["all_gather_into_tensor", "reduce_scatter_tensor"]
    assert len(ran) > 2  # the backward graph has others
    assert {outcome for _name, outcome in ran} == {SERVED}


def dtensors() -> None:
    world()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def program(local: torch.Tensor) -> torch.Tensor:
        shard: Any = DTensor.from_local(local, mesh, [Shard(0)])
        everywhere = (shard * 2).redistribute(mesh, [Replicate()])
        return everywhere.sum(0).to_local() + shard.sum(0).full_tensor()

    ran = same(program, values(4, 6))
    assert {outcome for _name, outcome in ran} == {SERVED}
    assert {"all_gather_into_tensor", "all_reduce"} <= {name for name, _outcome in ran}


def fully_sharded() -> None:
    """FSDP2's own collectives are outside of the graphs, and symmem's process group runs them."""
    mesh = DeviceMesh.from_group(world(), "cpu")
    models: list[Any] = [layers() for _ in range(2)]
    for model in models:
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    before = served("all_gather"), served("reduce_scatter")
    compare(models)
    assert served("all_gather") > before[0]
    assert served("reduce_scatter") > before[1]


@pytest.mark.parametrize("program", [tensor_parallel, dtensors, fully_sharded])
def test_models_need_no_change(pool: RankPool, program: Callable[[], None]) -> None:
    pool.run(program)
