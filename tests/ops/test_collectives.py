"""The collective operators in torch: schemas, fake kernels, gradients, compilation, and invalid calls.
Uses a group of one rank, or fake tensors in a larger group.
"""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from programs import run_program
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import symmem
from symmem.errors import (
    GroupError,
    InvalidArgumentError,
    NotRendezvousedError,
    NotSymmetricError,
    RankError,
    UnsupportedError,
)
from symmem.group import resolve
from symmem.ops import functions as ops
from symmem.ops import gradients
from symmem.ops.engines.base import Engines

# Torch and its imports emit warnings, some of them in 2.11 or 2.15 only.
_WARNINGS = (
    "ignore::DeprecationWarning:torch",
    "ignore:.*Profiler clears events:UserWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.torch.jit.trace. is deprecated:FutureWarning",
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning",
)
pytestmark = [pytest.mark.filterwarnings(each) for each in _WARNINGS]

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
OPTIONS: dict[str, tuple[Any, ...]] = {"all_reduce": ("sum",), "reduce_scatter": ("avg",), "broadcast": (0,)}
ONE_SIDED = ("put", "get", "get_out", "put_signal", "wait_signal", "barrier")
numbers = itertools.count()


def one() -> symmem.Group:
    """A group of one rank."""
    return symmem.Group.from_store(0, 1, dist.HashStore(), f"one {next(numbers)}")


@pytest.fixture
def group() -> symmem.Group:
    return one()


@pytest.fixture
def many() -> symmem.Group:
    """A group of three ranks. Two of them never come."""
    return symmem.Group.from_store(1, 3, dist.HashStore(), f"many {next(numbers)}")


@pytest.fixture
def symmetric(group: symmem.Group) -> Iterator[torch.Tensor]:
    st = symmem.allocate(6, backend="host", arena=False).rendezvous(group)
    yield st.tensor
    st.close()


def op(name: str) -> Any:
    return getattr(torch.ops.symmem, name).default


def rows(name: str, in_place: bool = False) -> torch.Tensor:
    """A valid x for a group of one rank."""
    needs = name in ("reduce_scatter", "all_to_all") or (in_place and name == "all_gather")
    return torch.randn(1, 5, 3) if needs else torch.randn(5, 3)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_opcheck(name: str, group: symmem.Group) -> None:
    rest = (*OPTIONS.get(name, ()), group.name)
    for x in (rows(name), rows(name).requires_grad_(), rows(name).mT, rows(name)[..., 1]):
        torch.library.opcheck(op(name), (x, *rest))
    out = torch.empty_like(op(name)(rows(name), *rest))
    torch.library.opcheck(op(f"{name}_out"), (rows(name), *rest), {"out": out})
    torch.library.opcheck(op(f"{name}_"), (rows(name, in_place=True), *rest))


def test_one_sided_operators_have_fake_kernels() -> None:
    with FakeTensorMode():  # opcheck would pass copies, in other memory
        x = torch.empty(3, 4)
        assert torch.ops.symmem.get(x.mT, 1, "any").shape == (4, 3)
        torch.ops.symmem.get_out(x, 1, "any", out=torch.empty(3, 4))
        torch.ops.symmem.put(x, x, 1, "any")
        torch.ops.symmem.barrier(x, 1, "any")


@pytest.mark.parametrize("name", [*COLLECTIVES, *ONE_SIDED])
def test_mutating_forms_return_nothing_and_refuse_gradients(name: str, group: symmem.Group) -> None:
    packets = [name] if name in ONE_SIDED else [name, f"{name}_", f"{name}_out"]
    for each in packets:
        schema = op(each)._schema
        assert schema.is_mutable == (len(schema.returns) == 0)
    if name in COLLECTIVES:
        x = rows(name, in_place=True).requires_grad_()
        rest = (*OPTIONS.get(name, ()), group.name)
        with pytest.raises(UnsupportedError, match="has no gradient"):
            op(f"{name}_")(x, *rest)
        with torch.no_grad():
            op(f"{name}_")(x, *rest)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_gradcheck(name: str, group: symmem.Group) -> None:
    rest = (*OPTIONS.get(name, ()), group.name)
    x = rows(name).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op(name)(x, *rest), (x,))
    assert torch.autograd.gradgradcheck(lambda x: op(name)(x, *rest), (x,))


@pytest.mark.parametrize("reduction", ["sum", "avg"])
@pytest.mark.parametrize(("name", "shape"), [("all_reduce_tree", (4, 5)), ("reduce_scatter_tree", (4, 1, 5))])
def test_trees_are_operators_with_gradients(
    name: str, shape: tuple[int, ...], reduction: str, group: symmem.Group
) -> None:
    x, rest = torch.randn(shape, dtype=torch.float64, requires_grad=True), (reduction, group.name)
    torch.library.opcheck(op(name), (x, *rest))
    torch.library.opcheck(op(f"{name}_out"), (x.detach(), *rest), {"out": torch.empty(5, dtype=torch.float64)})
    assert torch.autograd.gradcheck(lambda x: op(name)(x, *rest), (x,))
    assert torch.autograd.gradgradcheck(lambda x: op(name)(x, *rest), (x,))
    given = torch.func.grad(lambda x: op(name)(x, *rest).pow(2).sum())(x.detach())
    leaves = x.detach().view(4, 5).sum(0) * 2
    torch.testing.assert_close(given, (leaves / 16 if reduction == "avg" else leaves).expand(4, 5).reshape(shape))


@pytest.mark.parametrize("name", COLLECTIVES)
def test_transforms_give_gradients(name: str, group: symmem.Group) -> None:
    """With one rank an operation is a view, so transforms of the view give the expected gradients."""
    rest, x = (*OPTIONS.get(name, ()), group.name), rows(name)
    shape = op(name)(x, *rest).shape

    def first(loss: Any) -> Any:
        return torch.func.grad(lambda x: loss(x).pow(3).sum())

    def of(loss: Any) -> list[Any]:
        leaf = x.clone().requires_grad_()
        first(loss)(leaf).sum().backward()
        second = torch.func.grad(lambda x: first(loss)(x).sum())(x)
        return [first(loss)(x), second, leaf.grad, torch.func.vjp(loss, x)[1](torch.ones(shape))[0]]

    torch.testing.assert_close(of(lambda x: op(name)(x, *rest)), of(lambda x: x.view(shape)))
    with pytest.raises(UnsupportedError, match="forward mode"):
        torch.func.jvp(first(lambda x: op(name)(x, *rest)), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter"])
def test_extremes_have_no_gradient(name: str, group: symmem.Group) -> None:
    result = op(name)(rows(name).requires_grad_(), "max", group.name)
    with pytest.raises(UnsupportedError, match=f"{name} has no gradient for 'max'"):
        result.sum().backward()


@pytest.mark.parametrize("form", ["", "_", "_out"])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_derivatives_in_forward_mode_are_refused(name: str, form: str, group: symmem.Group) -> None:
    """Otherwise they would be zeros."""
    rest, x = (*OPTIONS.get(name, ()), group.name), rows(name, in_place=form == "_")
    out = {"out": torch.empty_like(op(name)(x, *rest))} if form == "_out" else {}
    with torch.autograd.forward_ad.dual_level():
        op(name + form)(x, *rest, **out)  # plain tensors have no tangents
        with pytest.raises(UnsupportedError, match=f"{name}{form} has no derivative in forward mode"):
            op(name + form)(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), *rest, **out)
    if form == "":
        with pytest.raises(UnsupportedError, match="forward mode"):
            torch.func.jvp(lambda x: getattr(ops, name)(x, group), (x,), (torch.ones_like(x),))


def test_what_is_written_is_known_to_autograd(group: symmem.Group) -> None:
    x = torch.ones(3)
    y = (x.requires_grad_() * 2).exp()  # its backward needs y
    with torch.no_grad():
        ops.all_reduce(y, group, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fake_kernels_know_shapes_and_refuse_what_is_bad(many: symmem.Group) -> None:
    name = many.name
    with FakeTensorMode():
        x = torch.empty(3, 4, dtype=torch.bfloat16)
        assert torch.ops.symmem.all_reduce(x.mT, "sum", name).shape == (4, 3)
        assert torch.ops.symmem.all_gather(x, name).shape == (3, 3, 4)
        assert torch.ops.symmem.reduce_scatter(x, "sum", name).shape == (4,)
        assert torch.ops.symmem.all_to_all(x, name).shape == (3, 4)
        assert torch.ops.symmem.broadcast(x, 2, name).dtype == torch.bfloat16
        with pytest.raises(InvalidArgumentError, match="a first dimension of 3"):
            torch.ops.symmem.all_to_all(torch.empty(4, 3), name)
        with pytest.raises(InvalidArgumentError, match=r"out must have shape \[4\]"):
            torch.ops.symmem.reduce_scatter_out(x, "sum", name, out=torch.empty(3))
    assert many.extension(Engines) == {}  # no engine was made


def program(x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    """Functional forms with gradients, and mutating forms on local tensors."""
    y = torch.ops.symmem.all_reduce(x @ weight, "avg", name)
    z = torch.ops.symmem.all_gather(y.relu(), name)
    z = torch.ops.symmem.reduce_scatter(z, "sum", name)
    with torch.no_grad():
        scale = z.detach() + 1
        torch.ops.symmem.all_reduce_(scale, "sum", name)
        room = torch.empty_like(scale)
        torch.ops.symmem.broadcast_out(scale, 0, name, out=room)
        room.mul_(2)
        torch.ops.symmem.all_reduce_(room, "max", name)
    return ops.all_reduce(z * room, name) + x.sum()


# What Inductor compiles runs in a rank, because ranks share what Inductor loads.


def compiled_programs_are_right(backend: str) -> None:
    group = one()
    torch._dynamo.reset()
    dynamic = True if backend == "inductor" else None  # one set of C++ kernels, for all shapes
    compiled = torch.compile(program, fullgraph=True, backend=backend, dynamic=dynamic)
    # In float64, because a compiler may add in another order.
    x, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    results = []
    for function in (program, compiled):
        leaves = [each.clone().requires_grad_() for each in (x, weight)]
        result = function(*leaves, group.name)  # type: ignore[arg-type, call-arg]
        result.square().mean().backward()
        results.append([result, *(each.grad for each in leaves)])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    compiled(torch.randn(5, 8, dtype=torch.float64), weight, group.name)  # another shape: dynamic from here on


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_programs_are_right(backend: str, pools: Any) -> None:
    pools.get(1).run(compiled_programs_are_right, backend)


@pytest.mark.slow
def test_the_compiler_takes_the_name_of_the_default_group_for_a_constant() -> None:
    """Importing the functions does not import the compiler either."""
    code = """
import sys
import torch, torch.distributed as dist
from symmem.ops import all_reduce
assert "torch._dynamo" not in sys.modules
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
compiled = torch.compile(lambda x: all_reduce(x), fullgraph=True, backend="eager")
assert compiled(torch.ones(3)).tolist() == [1] * 3
dist.destroy_process_group()
"""
    run_program(code).check_returncode()


def test_compiled_code_changes_its_arguments_in_place(group: symmem.Group) -> None:
    def double(x: torch.Tensor) -> None:
        x.add_(x)
        torch.ops.symmem.all_reduce_(x, "sum", group.name)

    torch._dynamo.reset()
    x = torch.ones(7)
    torch.compile(double, fullgraph=True, backend="aot_eager")(x)
    assert x.tolist() == [2] * 7


def no_copy_is_made_for_forms_that_return_nothing() -> None:
    from torch._inductor.utils import run_and_get_code

    group = one()

    def chain(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.ops.symmem.all_reduce_(y, "sum", group.name)
        torch.ops.symmem.all_reduce_out(y, "sum", group.name, out=out)
        return y

    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True)
    x, out = torch.randn(40), torch.empty(40)
    result, code = run_and_get_code(compiled, x, out)
    assert torch.equal(result, x * 2)
    assert torch.equal(out, result)
    assert "".join(code).count("cpp_fused_") - "".join(code).count("def cpp_fused_") < 5, code
    assert "copy_" not in "".join(code).split("def call")[1].split("def benchmark")[0]


@pytest.mark.slow
def test_no_copy_is_made_for_forms_that_return_nothing(pools: Any) -> None:
    """Inductor passes the tensors themselves to the operators."""
    pools.get(1).run(no_copy_is_made_for_forms_that_return_nothing)


def one_sided_operators_compile_with_inductor() -> None:
    group = one()
    name, symmetric = group.name, symmem.allocate(6, backend="host", arena=False).rendezvous(group)

    def exchange(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        torch.ops.symmem.put(x, source * 2, 0, name)
        torch.ops.symmem.put_signal(x, 0, 1, name)
        torch.ops.symmem.wait_signal(x, 0, 1, name)
        torch.ops.symmem.barrier(x, 0, name)
        return x + torch.ops.symmem.get(x, 0, name)

    torch._dynamo.reset()
    result = torch.compile(exchange, fullgraph=True)(symmetric.tensor, torch.arange(6.0))
    assert result.tolist() == [0, 4, 8, 12, 16, 20]
    symmetric.close()


@pytest.mark.slow
def test_one_sided_operators_compile_with_inductor(pools: Any) -> None:
    pools.get(1).run(one_sided_operators_compile_with_inductor)


# Invalid calls.


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x, g: ops.all_reduce(x, g, "product"), InvalidArgumentError, "reduction must be one of sum, avg"),
        (lambda x, g: ops.all_reduce(x.bool(), g), InvalidArgumentError, "no 'sum' of torch.bool"),
        (lambda x, g: ops.all_reduce(x.int(), g, "avg"), InvalidArgumentError, "no 'avg' of torch.int32"),
        (lambda x, g: ops.all_reduce(x.cfloat(), g, "min"), InvalidArgumentError, "no 'min' of torch.complex64"),
        (lambda x, g: ops.all_reduce(x.to_sparse(), g), InvalidArgumentError, "dense"),
        (lambda x, g: ops.all_reduce(x, g, out=x.double()), InvalidArgumentError, "not shape .* torch.float64"),
        (lambda x, g: ops.all_reduce(x, g, out=torch.ones(3)), InvalidArgumentError, "out must have shape"),
        (lambda x, g: ops.all_reduce(x, g, out=torch.empty(2, 4, device="meta")), InvalidArgumentError, "device meta"),
        (lambda x, g: ops.all_reduce(x[0], g, out=x.view(-1)[1:5]), InvalidArgumentError, "not the same"),
        (lambda x, g: ops.all_gather(x[0, :3], g, out=x.view(-1)[1:4][None]), InvalidArgumentError, "row of out"),
        (lambda x, g: ops.reduce_scatter(x[:1], g, out=x.view(-1)[1:5]), InvalidArgumentError, "row of x"),
        (lambda x, g: ops.all_to_all(x[:1], g, out=x[:1].view(1, 4)), InvalidArgumentError, "share memory"),
        (lambda x, g: ops.reduce_scatter(x, g), InvalidArgumentError, "a first dimension of 1"),
        (lambda x, g: ops.all_to_all(x[0, 0], g), InvalidArgumentError, "a first dimension of 1"),
        (lambda x, g: ops.broadcast(x, g, root=-1), RankError, "root -1"),
        (lambda x, g: torch.ops.symmem.all_reduce_(x[:1].expand(3, 4), "sum", g.name), InvalidArgumentError, "share"),
        *(  # type: ignore[var-annotated]
            (lambda x, g, value=value: ops.all_reduce(x, g, value), InvalidArgumentError, "reduction must be one of")
            for value in (None, 3, [])
        ),
        (lambda x, g: ops.all_reduce(x.requires_grad_(), g, None), InvalidArgumentError, "reduction must be one of"),  # type: ignore[arg-type]
        *(
            (lambda x, g, value=value: ops.broadcast(x, g, value), InvalidArgumentError, "root must be an integer")
            for value in (None, "0", 0.0, False)
        ),
        (lambda x, g: ops.broadcast(x.requires_grad_(), root=None), InvalidArgumentError, "root must be an integer"),  # type: ignore[arg-type]
        (lambda x, g: ops.all_reduce(x, "nowhere"), GroupError, "not initialised"),
        (lambda x, g: ops.get(x, 0, g), NotSymmetricError, "symmetric"),
        (lambda x, g: ops.put(x, x, 0, g), NotSymmetricError, "symmetric"),
    ],
)
def test_bad_input_is_refused_by_name(
    call: Callable[..., object], error: type[Exception], match: str, group: symmem.Group
) -> None:
    x = torch.randn(2, 4)
    before = x.clone()
    with pytest.raises(error, match=match):
        call(x, group)
    assert torch.equal(x, before)
    assert torch.equal(ops.all_reduce(x, group), x)  # the failure has no effect on later calls


def _one_rank() -> symmem.Group:
    return symmem.Group.from_store(0, 1, dist.HashStore())


NOT_DENSE: dict[str, tuple[Callable[[], Any], str]] = {
    "handle": (lambda: symmem.allocate(3, backend="host", group=_one_rank()), r"\.tensor"),
    "array": (lambda: numpy.zeros(3), "from_numpy"),
    "None": (lambda: None, "NoneType"),
    "int": (lambda: 5, r"torch\.tensor"),
    "list": (list, r"torch\.tensor"),
    "group": (_one_rank, "group="),
    "quantized": (lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8), "int_repr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(3)]), "values"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.zeros(3)], layout=torch.jagged), "values"),
    "sparse": (lambda: torch.zeros(3).to_sparse(), "to_dense"),
}
"""Makers of values that are no dense tensors, and the hints for them."""


def not_dense(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NOT_DENSE[kind][0]()


@pytest.mark.parametrize("kind", NOT_DENSE)
def test_values_that_are_no_dense_tensors_are_refused_with_a_hint(kind: str, group: symmem.Group) -> None:
    value, hint = not_dense(kind), NOT_DENSE[kind][1]
    x = torch.ones(3)
    calls: list[Callable[[], object]] = [
        *(lambda name=name: getattr(ops, name)(value, group) for name in COLLECTIVES),
        *(lambda name=name: getattr(ops, name)(x, group, out=value) for name in COLLECTIVES if value is not None),
        lambda: ops.get(value, 0, group),
        lambda: ops.put(value, x, 0, group),
        lambda: ops.put(x, value, 0, group),
        lambda: ops.put_signal(value, 0, 0, group),
        lambda: ops.wait_signal(value, 0, 0, group),
        *([] if value is None else [lambda: ops.barrier(value), lambda: ops.get(x, 0, group, out=value)]),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match=hint):
            call()


@pytest.mark.parametrize("kind", ["quantized", "nested", "sparse"])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_operators_themselves_refuse_tensors_that_are_not_dense(kind: str, name: str, group: symmem.Group) -> None:
    x = not_dense(kind)
    rest = (*OPTIONS.get(name, ()), group.name)
    group_named = ops._name(group)
    assert group_named == group.name
    for call in (
        lambda: op(name)(x, *rest),
        lambda: op(f"{name}_")(x, *rest),
        lambda: op(f"{name}_out")(x, *rest, out=x),
        lambda: op(f"{name}_out")(torch.ones(3), *rest, out=x),
    ):
        with pytest.raises(InvalidArgumentError):
            call()


def test_a_dtensor_is_refused_with_a_hint(group: symmem.Group) -> None:
    class Sharded(torch.Tensor):
        def to_local(self) -> None: ...

    with pytest.raises(InvalidArgumentError, match=r"not a Sharded\n.*to_local\(\)"):
        ops.all_reduce(torch.ones(3).as_subclass(Sharded), group)


def freed(like: torch.Tensor) -> torch.Tensor:
    """FSDP frees parameters like this."""
    tensor = like.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", COLLECTIVES)
def test_operators_refuse_tensors_with_a_freed_storage(name: str, group: symmem.Group) -> None:
    x, rest = torch.ones(1, 3), (*OPTIONS.get(name, ()), group.name)
    for call in (
        lambda: getattr(ops, name)(freed(x), group),
        lambda: getattr(ops, name)(x, group, out=freed(getattr(ops, name)(x, group))),
        lambda: op(f"{name}_")(freed(x), *rest),
    ):
        with pytest.raises(InvalidArgumentError, match="no memory"):
            call()


def test_copies_refuse_tensors_with_a_freed_storage(symmetric: torch.Tensor, group: symmem.Group) -> None:
    with pytest.raises(InvalidArgumentError, match="the source has no memory"):
        ops.put(symmetric, freed(symmetric), 0, group)
    with pytest.raises(InvalidArgumentError, match="the target has no memory"):
        ops.get(symmetric, 0, group, out=freed(symmetric))


@pytest.mark.parametrize("value", [None, "0", 0.5, True])
def test_peers_and_channels_are_integers(value: Any, symmetric: torch.Tensor, group: symmem.Group) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ops.get(symmetric, value, group),
        lambda: ops.put(symmetric, symmetric, value, group),
        lambda: ops.put_signal(symmetric, 0, value, group),
        lambda: ops.wait_signal(symmetric, value, 0, group),
        lambda: ops.barrier(symmetric, group, value),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match=r"(peer|channel) must be an integer"):
            call()


def test_other_groups_and_ranks_are_refused(symmetric: torch.Tensor, group: symmem.Group, many: symmem.Group) -> None:
    with pytest.raises(NotRendezvousedError):
        ops.get(symmetric, 0, many)
    with pytest.raises(RankError):
        ops.get(symmetric, 1, group)
    with pytest.raises(InvalidArgumentError, match="shape"):
        ops.put(symmetric, torch.ones(5), 0, group)


def test_shared_elements_that_are_not_in_the_way_are_fine(group: symmem.Group) -> None:
    x = torch.arange(8.0)
    assert ops.all_reduce(x, group, out=x) is x
    assert ops.all_reduce(x.view(2, 4), group, out=x.view(2, 4)).tolist() == x.view(2, 4).tolist()
    ops.all_reduce(x[::2], group, out=x[1::2])
    assert x.tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert ops.all_reduce(x[:1].expand(3), group).tolist() == [0, 0, 0]
    lazy = torch.tensor([1 + 2j]).conj()
    assert ops.all_reduce(lazy, group).tolist() == [1 - 2j]
    torch.ops.symmem.all_reduce_(lazy, "sum", group.name)
    assert lazy.tolist() == [1 - 2j]
    with torch.inference_mode():
        y = torch.ones(3)
        assert ops.all_reduce(y, group, out=y).tolist() == [1, 1, 1]


# Names.


def test_groups_of_one_name_are_told_apart_or_refused() -> None:
    first, second = (symmem.Group.from_store(0, 1, dist.HashStore(), "twin") for _ in range(2))
    with pytest.raises(GroupError, match="2 groups made from stores are named 'twin'"):
        torch.ops.symmem.all_reduce(torch.ones(1), "sum", "twin")
    assert ops.all_reduce(torch.ones(1), second).tolist() == [1]
    assert resolve.name_of(second) == "twin"
    assert resolve.group_named("twin") is second
    second.close()
    assert resolve.group_named("twin") is first


def test_a_name_follows_its_process_group() -> None:
    seen = []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            assert ops.all_reduce(torch.ones(2)).tolist() == [1, 1]
            seen.append(resolve.group_named(symmem.resolve_group().name))
            assert seen[-1] is symmem.resolve_group()
            double = symmem.Group.from_store(0, 1, dist.HashStore(), seen[-1].name)
            with pytest.raises(GroupError, match="a process group is named"):
                ops.all_reduce(torch.ones(2, requires_grad=True), double)  # the backward pass finds the group by name
            assert ops.all_reduce(torch.ones(2), dist.group.WORLD).tolist() == [1, 1]
        finally:
            dist.destroy_process_group()
    assert seen[0] is not seen[1]


def test_a_closed_group_is_refused(group: symmem.Group) -> None:
    group.close()
    with pytest.raises(GroupError, match="is closed"):
        ops.all_reduce(torch.ones(2), group)


def test_groups_that_are_gone_are_forgotten() -> None:
    for turn in range(3):
        resolve.name_of(symmem.Group.from_store(0, 1, dist.HashStore(), f"gone {turn}"))
    gc.collect()
    resolve.name_of(symmem.Group.from_store(0, 1, dist.HashStore(), "here"))
    assert not [name for name in resolve._of_names if name.startswith("gone")]


# The shortcut of ordinary eager calls, and calls that must go through the dispatcher.


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionRecorder(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


seen: list[str] = []


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that bypassed the dispatcher."""
    found: list[str] = []

    def counting(work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda kind, *args: (found.append(kind.name), work(kind, *args))[1]

    for name in ("functional", "in_place", "into"):
        monkeypatch.setattr(ops, name, counting(getattr(ops, name)))
    return found


def test_the_usual_call_is_short(direct: list[str], group: symmem.Group) -> None:
    x = torch.ones(3)
    ops.all_reduce(x, group)
    ops.all_reduce(x, group, out=x)
    ops.broadcast(x, group, out=torch.empty(3))
    with torch.no_grad():
        ops.all_gather(torch.nn.Parameter(torch.ones(3)), group)
    with torch.inference_mode():
        ops.all_reduce(torch.ones(3), group)
    assert direct == ["all_reduce", "all_reduce", "broadcast", "all_gather", "all_reduce"]


@pytest.mark.parametrize(
    "around",
    [Recorder, FunctionRecorder, lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])],
)
def test_what_looks_at_operators_sees_them(around: Any, direct: list[str], group: symmem.Group) -> None:
    seen.clear()
    x = torch.ones(3)
    with around() as active:
        ops.all_reduce(x, group)
        ops.all_reduce(x, group, out=x)
        ops.all_gather(x, group, out=torch.empty(1, 3))
    if hasattr(active, "key_averages"):
        seen.extend(each.key.replace("::", ".") for each in active.key_averages())
    for form in ("all_reduce", "all_reduce_", "all_gather_out"):
        assert any(each.removesuffix(".default") == f"symmem.{form}" for each in seen), seen
    assert direct == []


@pytest.mark.parametrize(
    "given",
    [
        lambda: torch.ones(3, requires_grad=True),
        lambda: torch.ones(3).as_subclass(Wrapped),
        lambda: torch.ones(3, device="meta"),
        lambda: torch._efficientzerotensor(3),
        lambda: torch.ones(3, dtype=torch.cfloat).conj(),
        lambda: torch._to_functional_tensor(torch.ones(3)),
    ],
)
def test_unusual_tensors_go_through_the_dispatcher(
    given: Callable[[], torch.Tensor], direct: list[str], group: symmem.Group
) -> None:
    assert ops.all_reduce(given(), group).shape == (3,)
    with torch.no_grad():
        ops.all_gather(torch.ones(3), group, out=torch.empty(1, 3, requires_grad=True))
    assert direct == ["all_gather"]
    with pytest.raises(UnsupportedError, match="has no gradient"):
        ops.all_gather(torch.ones(3), group, out=torch.empty(1, 3, requires_grad=True))


def test_tracers_and_transforms_see_the_operator(direct: list[str], group: symmem.Group) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: ops.all_reduce(x, group))(torch.ones(3))
    assert "symmem.all_reduce.default" in str(graph.code)
    traced = torch.jit.trace(lambda x: ops.all_reduce(x, group) + 1, (torch.ones(3),), check_trace=False)
    assert "symmem::all_reduce" in str(traced.graph)
    assert torch.func.vmap(lambda x: ops.all_reduce(x, group))(torch.ones(2, 3)).shape == (2, 3)  # one by one
    assert direct == []


def test_operators_themselves_are_one_kernel_in_python(group: symmem.Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls without gradients, and two calls that something may intercept."""
    again: list[str] = []
    beneath = gradients._beneath
    monkeypatch.setattr(
        gradients, "_beneath", lambda op, *args, **options: (again.append(str(op)), beneath(op, *args, **options))[1]
    )
    x, name = torch.ones(3), group.name
    torch.ops.symmem.all_reduce(x, "sum", name)
    torch.ops.symmem.all_reduce_(x, "sum", name)
    torch.ops.symmem.all_reduce_out(x, "sum", name, out=torch.empty(3))
    assert again == []
    with Recorder():
        torch.ops.symmem.all_reduce(x, "sum", name)
    torch.ops.symmem.all_reduce(x.requires_grad_(), "sum", name)
    assert len(again) == 2
