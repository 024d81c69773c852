"""Operators with symmetric arguments: registrations, and the checks of eager calls."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import LONG
from programs import run_program, run_python
from torch._C._distributed_c10d import _SymmetricMemory
from torch._library.simple_registry import singleton
from torch._subclasses.fake_tensor import FakeTensorMode

import symmem
from symmem import ops
from symmem.errors import ConfigError, GroupError, InvalidArgumentError, NotSymmetricError
from symmem.group.resolve import group_named
from symmem.ops.collectives import KINDS
from symmem.ops.registry import built_in, upstream
from symmem.ops.registry.eager_checks import is_torchs
from symmem.tools import cli
from symmem.tools.ranks import RankPool

HAS_UPSTREAM = hasattr(torch.library.Library, "register_symm_mem_args")
needs_upstream = pytest.mark.skipif(not HAS_UPSTREAM, reason="torch 2.13 and later")
Define = Callable[..., str]

_numbers = itertools.count()


@pytest.fixture
def lib() -> Iterator[ops.Library]:
    """A library with a new namespace. It ends with the test."""
    made = ops.Library(f"symmem_test{next(_numbers)}", "FRAGMENT")
    yield made
    names = [each.op for each in ops.registered() if each.op.startswith(f"{made.ns}::")]
    for name in names:
        ops.unregister(name)
    made._destroy()


@pytest.fixture
def define(lib: ops.Library) -> Define:
    def make(schema: str, kernel: Callable[..., Any] | None = None) -> str:
        lib.define(schema)
        name = schema.partition("(")[0]
        if kernel is not None:
            lib.impl(name, kernel, "CPU")
        return f"{lib.ns}::{name}"

    return make


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The default process group, of one rank; its name."""
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_size(1MiB)")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name  # type: ignore[union-attr]
    dist.destroy_process_group()


def refused(*args: Any, **kwargs: Any) -> str:
    """Returns the text of the error. The registry must be unchanged."""
    before = ops.fingerprint(), ops.version()
    with pytest.raises(InvalidArgumentError) as caught:
        symmem.register_symm_mem_args(*args, **kwargs)
    assert (ops.fingerprint(), ops.version()) == before
    return str(caught.value)


# Registering.


def test_a_function_registers(define: Define) -> None:
    name = define("op(Tensor x, Tensor y, str tp_group) -> Tensor")
    assert ops.registration(name) is None
    made = symmem.register_symm_mem_args(name, ["x"], exit_barrier=True)
    assert (made.op, made.args, made.group_arg, made.exit_barrier, made.one_sided) == (
        name,
        ("x",),
        "tp_group",
        True,
        False,
    )
    assert made.source.startswith(f"{__name__}:")
    packet = getattr(getattr(torch.ops, name.split("::")[0]), "op")  # noqa: B009
    for op in (name, f"{name}.default", packet, packet.default):
        assert ops.registration(op) == made
    assert ops.lookup(packet.default) is made
    assert made in ops.registered()
    assert ops.unregister(name) is made
    assert ops.registration(name) is None


def test_a_decorator_registers_and_returns_what_it_is_put_on(lib: ops.Library) -> None:
    @symmem.register_symm_mem_args(["x"], group_arg="pg_name")
    @torch.library.custom_op(f"{lib.ns}::custom", mutates_args=())
    def custom(x: torch.Tensor, pg_name: str) -> torch.Tensor:
        return x + 1

    assert isinstance(custom, torch.library.CustomOpDef)  # type: ignore[attr-defined]
    made = ops.registration(custom)
    assert made is not None
    assert (made.op, made.args, made.group_arg) == (f"{lib.ns}::custom", ("x",), "pg_name")
    lib.define("other(Tensor x) -> Tensor")
    packet = getattr(torch.ops, lib.ns).other
    assert symmem.register_symm_mem_args(("x",))(packet) is packet
    assert ops.registration(f"{lib.ns}::other") is not None
    ops.unregister(custom)


def test_a_library_registers_until_it_ends() -> None:
    lib = ops.Library("symmem_test_ending", "FRAGMENT")
    lib.define("op(Tensor x, str comm) -> ()")
    lib.define("op.two(Tensor x) -> ()")
    lib.register_symm_mem_args("op", ["x"], group_arg="comm")
    lib.register_symm_mem_args(torch.ops.symmem_test_ending.op.two, ["x"])
    made = ops.registration("symmem_test_ending::op")
    assert made is not None
    assert made.group_arg == "comm"
    with pytest.raises(InvalidArgumentError, match=r"symmem_test_ending::op\.two is registered already"):
        lib.register_symm_mem_args("op.two", ["x"])
    before = ops.version()
    lib._destroy()
    assert ops.version() > before
    assert not [each for each in ops.registered() if each.op.startswith("symmem_test_ending")]
    assert "symmem_test_ending::op" not in upstream.all_args()


def test_what_is_gone_or_defined_anew_is_not_registered() -> None:
    def define(schema: str) -> torch.library.Library:
        lib = torch.library.Library("symmem_test_anew", "FRAGMENT")
        lib.define(schema)
        return lib

    lib = define("op(Tensor x) -> ()")
    symmem.register_symm_mem_args("symmem_test_anew::op", ["x"])
    lib._destroy()
    assert ops.registration("symmem_test_anew::op") is None
    with_op = ops.fingerprint()
    lib = define("op(Tensor y, int n) -> ()")
    assert ops.registration("symmem_test_anew::op") is None
    assert ops.fingerprint() == with_op
    symmem.register_symm_mem_args("symmem_test_anew::op", ["y"])  # no duplicate
    ops.unregister("symmem_test_anew::op")
    lib._destroy()


def test_overloads_are_registered_one_by_one(define: Define) -> None:
    name = define("op.one(Tensor x) -> Tensor")
    define("op.two(Tensor x, Tensor y) -> Tensor")
    plain = name.removesuffix(".one")
    text = refused(plain, ["x"])
    assert text.startswith(f"{plain} has no default overload")
    assert f"name one of: {plain}.one, {plain}.two" in text
    assert f"{plain} has no overload 'three'" in refused(f"{plain}.three", ["x"])
    symmem.register_symm_mem_args(f"{plain}.two", ["y"])
    assert ops.registration(f"{plain}.one") is None
    assert ops.registration(f"{plain}.two") is not None
    assert ops.registration(plain) is None
    define("op(Tensor z) -> Tensor")
    symmem.register_symm_mem_args(plain, ["z"])
    assert ops.registration(plain) == ops.registration(f"{plain}.default")


def test_the_only_overload_needs_no_name(define: Define) -> None:
    name = define("op.one(Tensor x) -> Tensor")
    assert symmem.register_symm_mem_args(name.removesuffix(".one"), ["x"]).op == name


@pytest.mark.parametrize(
    ("name", "args", "written"),
    [
        ("aten::mm", ["self", "mat2"], ["Tensor", "Tensor"]),
        ("aten::add.out", ["out"], ["Tensor"]),
        ("aten::cat", ["tensors"], ["Tensor[]"]),
        ("aten::index.Tensor", ["indices"], ["Tensor?[]"]),
        ("aten::native_layer_norm", ["weight"], ["Tensor?"]),
    ],
)
def test_ops_written_in_cpp_are_registered_by_name(name: str, args: list[str], written: list[str]) -> None:
    made = symmem.register_symm_mem_args(name, args)
    try:
        assert (made.op, made.group_arg, list(made.args)) == (name, None, args)
        assert [made.parameters[arg].type for arg in args] == written
        assert ops.registration(name) == made
    finally:
        ops.unregister(name)


def test_nested_arguments_are_registered_and_found_in_calls(define: Define) -> None:
    types = ("Tensor[]", "Tensor?", "Tensor?[]", "Tensor[]?", "Tensor(a!)[]", "Tensor[2]")
    schema = ", ".join(f"{kind} a{index}" for index, kind in enumerate(types))
    name = define(f"op({schema}, *, Tensor? last=None) -> ()")
    made = symmem.register_symm_mem_args(name, ["last", "a1", "a0", "a2", "a3", "a4"])
    assert made.mutated == ("a4",)
    x, y = torch.ones(1), torch.ones(1)
    found = list(made.tensors_of(([x, y], None, [None, x], None, [y]), {"last": y}))
    assert [place for place, _ in found] == ["last", "a0[0]", "a0[1]", "a2[1]", "a4[0]"]
    assert all(tensor is (y if place in ("last", "a0[1]", "a4[0]") else x) for place, tensor in found)


# Invalid registrations.


def test_an_unknown_op_is_refused(define: Define) -> None:
    name = define("one_shot(Tensor x) -> Tensor")
    text = refused(f"{name}s", ["x"])
    assert text.startswith(f"there is no operator {name}s")
    assert f"did you mean '{name}'?" in text
    assert "there is no operator nosuchlib::op\n  What to do: import the module or load the library" in refused(
        "nosuchlib::op", ["x"]
    )
    for odd in ("op", "", "a::b::c", "a::b.", "a.b", "a::b.c.d", "a:: b"):
        assert "is not the name of an operator\n  What to do: write" in refused(odd, ["x"])
    assert "is not the name of an operator" not in refused("load_library::x", ["x"])


def test_what_is_no_op_is_refused() -> None:
    assert refused(3, ["x"]).startswith("a int is not an operator")
    assert refused(torch.ops.higher_order.cond, ["x"]).startswith("a CondOp is not an operator")
    text = refused(lambda x: x, ["x"])
    assert "a function is not an operator" in text
    assert "above @torch.library.custom_op" in text
    with pytest.raises(InvalidArgumentError, match="a function is not an operator"):
        symmem.register_symm_mem_args(["x"])(lambda x: x)


def test_missing_or_odd_names_are_refused(define: Define) -> None:
    name = define("op(Tensor x, Tensor y, int n, int[] m, str group) -> Tensor")
    assert f"register_symm_mem_args({name!r}) names no arguments\n  What to do: pass the op and the names" in refused(
        name
    )
    assert f"{name}: the arguments must be a list of names\n  What to do: pass ['x']" in refused(name, "x")
    assert f"{name}: no arguments are named\n  What to do: arguments that hold tensors: x, y" in refused(name, [])
    assert f"{name}: the argument 'x' is named twice" in refused(name, ["x", "y", "x"])
    assert refused(name, ["x", "input"]).startswith(f"{name} has no argument 'input': {name}(Tensor x, Tensor y")
    assert f"{name}: the argument 'n' is of type int, not a tensor\n  What to do: arg" in refused(name, ["x", "n"])
    assert "the argument 'm' is of type int[], not a tensor" in refused(name, ["m"])
    assert "the argument 'group' is of type str, not a tensor" in refused(name, ["group"])
    bare = define("bare(int n) -> ()")
    assert "arguments that hold tensors: none" in refused(bare, ["n"])


def test_a_second_registration_is_refused_unless_it_replaces(define: Define) -> None:
    name = define("op(Tensor x, Tensor y) -> Tensor")
    first = symmem.register_symm_mem_args(name, ["x"])
    text = refused(name, ["x"])
    assert text == (
        f"{name} is registered already, with x, by {first.source}\n  What to do: register it once, or pass replace=True"
    )
    refused(name, ["y"])
    assert ops.registration(name) == first
    second = symmem.register_symm_mem_args(name, ["y"], replace=True)
    assert ops.registration(name) is second
    assert upstream.args_of(name) == (("y",) if HAS_UPSTREAM else None)
    assert "symm_mem::one_shot_all_reduce is registered already, with input, by symmem" in refused(
        "symm_mem::one_shot_all_reduce", ["input"]
    )


def test_unregistering_what_is_not_is_refused(define: Define) -> None:
    name = define("op(Tensor x) -> Tensor")
    with pytest.raises(InvalidArgumentError, match=f"{name} is not registered\n  What to do: `symmem ops list`"):
        ops.unregister(name)


# The group.


@pytest.mark.parametrize(
    ("arguments", "group_arg"),
    [
        ("str group_name", "group_name"),
        ("str tp_group", "tp_group"),
        ("str reduce_op, str pg_name", "pg_name"),
        ("str reduce_op='sum', *, str? ProcessGroup=None", "ProcessGroup"),
        ("__torch__.torch.classes.c10d.ProcessGroup comm, str reduce_op", "comm"),
        ("int n, int? group=None", None),
        ("int n", None),
    ],
)
def test_the_group_is_found_in_the_schema(define: Define, arguments: str, group_arg: str | None) -> None:
    made = symmem.register_symm_mem_args(define(f"op(Tensor x, {arguments}) -> ()"), ["x"])
    assert (made.group_arg, made.unclear_group) == (group_arg, ())


@pytest.mark.parametrize(
    ("arguments", "unclear"),
    [
        ("str comm", "comm"),
        ("str reduce_op, str? comm", "reduce_op, comm"),
        ("str group_a, str group_b, str op", "group_a, group_b"),
        ("__torch__.torch.classes.c10d.ProcessGroup comm, str group_name", "comm, group_name"),
    ],
)
def test_an_unclear_group_must_be_named(define: Define, arguments: str, unclear: str) -> None:
    name = define(f"op(Tensor x, {arguments}) -> ()")
    text = refused(name, ["x"])
    assert f"{name}: the schema does not tell which argument carries the group, of {unclear}" in text
    assert f"pass group_arg={unclear.split(', ')[0]!r}, or group_arg=None" in text
    last = unclear.split(", ")[-1]
    assert symmem.register_symm_mem_args(name, ["x"], group_arg=last).group_arg == last
    assert symmem.register_symm_mem_args(name, ["x"], group_arg=None, replace=True).group_arg is None


def test_what_cannot_carry_a_group_is_refused(define: Define) -> None:
    name = define("op(Tensor x, int group, str comm) -> ()")
    text = refused(name, ["x"], group_arg="group")
    assert f"{name}: the argument 'group' is of type int and cannot carry the group" in text
    assert "arguments that can: comm" in text
    assert f"{name} has no argument 'pg' to carry the group: {name}(" in refused(name, ["x"], group_arg="pg")


def test_the_group_of_a_call(define: Define, group: str) -> None:
    name = define("op(Tensor x, str? comm=None, *, __torch__.torch.classes.c10d.ProcessGroup? pg=None) -> ()")
    x = torch.ones(1)
    world = symmem.resolve_group()
    by_name = symmem.register_symm_mem_args(name, ["x"], group_arg="comm")
    assert by_name.group_of((x, group)) is world
    assert by_name.group_of((x,), {"comm": group}) is world
    assert by_name.group_of((x, None)) is world
    assert by_name.group_of((x,)) is world
    with pytest.raises(GroupError) as caught:
        by_name.group_of((x, "nosuch"))
    assert f"{name}: no group by argument 'comm': there is no process group 'nosuch' here" in str(caught.value)
    by_object = symmem.register_symm_mem_args(name, ["x"], group_arg="pg", replace=True)
    assert by_object.group_of((x, "nosuch"), {"pg": dist.group.WORLD}) is world
    assert by_object.group_of((x,), {"pg": dist.group.WORLD.boxed()}) is world  # type: ignore[union-attr]
    with pytest.raises(GroupError, match="no group by argument 'pg': int is not a group"):
        by_object.group_of((x,), {"pg": 3})
    fallen_back = symmem.register_symm_mem_args(define("other(Tensor x, *, str comm_group='preset') -> ()"), ["x"])
    with pytest.raises(GroupError, match="there is no process group 'preset' here"):
        fallen_back.group_of((x,))
    default = symmem.register_symm_mem_args(name, ["x"], group_arg=None, replace=True)
    assert default.group_of((x, "nosuch")) is world


def test_without_process_groups_the_group_of_a_call_is_an_error(define: Define) -> None:
    made = symmem.register_symm_mem_args(define("op(Tensor x) -> ()"), ["x"])
    with pytest.raises(GroupError, match=r"no group by the default process group: torch\.distributed is not init"):
        made.group_of((torch.ones(1),))


# Upstream.


@needs_upstream
def test_ours_are_visible_upstream(define: Define, caplog: pytest.LogCaptureFixture) -> None:
    name = define("op(Tensor x, Tensor y, str tp) -> Tensor")

    def seen() -> list[str] | None:
        entry = singleton.get(name)
        args = None if entry is None else entry.symm_mem_args.get()
        return None if args is None else list(args)

    symmem.register_symm_mem_args(name, ["x"], group_arg="tp")
    assert seen() == ["x"]
    symmem.register_symm_mem_args(name, ["y"], group_arg="tp", replace=True)
    assert seen() == ["y"]
    ops.unregister(name)
    assert seen() is None
    assert not caplog.records
    # Upstream lowers its own ops itself.
    assert ops.registration("symm_mem::one_shot_all_reduce") is not None
    assert upstream.args_of("symm_mem::one_shot_all_reduce") is None


@needs_upstream
def test_upstream_is_told_where_it_can_place(define: Define) -> None:
    """Without our hook, its placement would raise for an operator on the CPU."""
    from torch._inductor.virtualized import V  # here, because it takes seconds and every worker collects this file

    name = define("op(Tensor x, str group_name) -> Tensor")
    symmem.register_symm_mem_args(name, ["x"])
    held = singleton.get(name).symm_mem_args  # type: ignore[union-attr]
    node = torch.fx.Graph().placeholder("x")
    assert held.is_registered()
    for device, shown in (("cpu", False), ("meta", True)):
        reader = node.graph.call_function(getattr(torch.ops, name.split("::")[0]).op.default, (node, "any"))
        node.meta["val"] = torch.empty(2, device=device)
        with V.set_graph_handler(types.SimpleNamespace(current_node=reader)):  # type: ignore[arg-type]
            assert held.is_registered() is shown
            assert upstream.all_args()[name] == ("x",)
    ops.unregister(name)
    assert not held.is_registered()


def compile_without_the_hook() -> list[float]:
    lib = ops.Library("symmem_test_rank", "FRAGMENT")
    lib.define("op(symm Tensor x, str group_name) -> Tensor")
    lib.impl("op", lambda x, group: x * 2, "CPU")
    torch.library.register_fake("symmem_test_rank::op", lambda x, group: torch.empty_like(x), lib=lib)
    op = torch.ops.symmem_test_rank.op
    return torch.compile(lambda x: op(x + 1, "any"))(torch.ones(3)).tolist()


@pytest.mark.slow
def test_operators_on_the_cpu_compile_without_the_hook(new_pool: Callable[[int], RankPool]) -> None:
    """In a rank, because ranks share what Inductor loads."""
    assert new_pool(1).run(compile_without_the_hook) == [[4] * 3]


@needs_upstream
def test_upstreams_are_honoured(define: Define) -> None:
    name = define("op(Tensor x, Tensor[] ys, str group_name, str other_group) -> Tensor")
    before, number = ops.fingerprint(), ops.version()
    theirs: Any = torch.library.Library(name.split("::")[0], "FRAGMENT")
    theirs.register_symm_mem_args("op", ["x", "ys"])
    made = ops.registration(name)
    assert made is not None
    assert (made.args, made.group_arg, made.source) == (("x", "ys"), "group_name", "torch.library")
    assert made in ops.registered()
    assert ops.version() > number
    assert ops.fingerprint() != before
    assert f"{name} is registered already, with x, ys, by torch.library" in refused(name, ["x"], group_arg=None)
    theirs._destroy()
    assert ops.registration(name) is None
    assert ops.fingerprint() == before


@needs_upstream
def test_upstreams_with_no_clear_group_say_so_when_it_is_asked_for(define: Define, group: str) -> None:
    name = define("op(Tensor x, str comm) -> Tensor")
    theirs: Any = torch.library.Library(name.split("::")[0], "FRAGMENT")
    theirs.register_symm_mem_args("op", ["x"])
    made = ops.registration(name)
    assert made is not None
    with pytest.raises(
        GroupError, match=f"{name}: the registration does not tell which argument carries the group; .* 'comm'"
    ) as e:
        made.group_of((torch.ones(1), group))
    assert f"register_symm_mem_args({name!r}, ['x'], group_arg='comm', replace=True)" in str(e.value)
    made = symmem.register_symm_mem_args(name, ["x"], group_arg="comm", replace=True)
    assert made.group_of((torch.ones(1), group)).name == group
    theirs._destroy()


@needs_upstream
def test_the_later_of_both_counts(define: Define, caplog: pytest.LogCaptureFixture) -> None:
    name = define("op(Tensor x, Tensor y, str comm) -> Tensor")
    symmem.register_symm_mem_args(name, ["x"], group_arg="comm", exit_barrier=True)
    theirs: Any = torch.library.Library(name.split("::")[0], "FRAGMENT")
    theirs.register_symm_mem_args("op", ["y"])
    made = ops.registration(name)
    assert made is not None
    assert (made.args, made.group_arg, made.exit_barrier, made.source) == (("y",), "comm", True, "torch.library")
    assert symmem.register_symm_mem_args(name, ["x"], group_arg="comm", replace=True) is ops.registration(name)
    theirs._destroy()


@needs_upstream
def test_upstreams_that_do_not_fit_are_told(define: Define, caplog: pytest.LogCaptureFixture) -> None:
    name = define("op(Tensor x, int n) -> Tensor")
    theirs: Any = torch.library.Library(name.split("::")[0], "FRAGMENT")
    theirs.register_symm_mem_args("op", ["n"])
    theirs.register_symm_mem_args("later", ["x"])  # this op does not exist
    with pytest.raises(InvalidArgumentError, match=r"Library.*does not match the op: .*'n' is of type int"):
        ops.registration(name)
    assert ops.registration(f"{theirs.ns}::later") is None
    assert name not in {each.op for each in ops.registered()}
    assert any("does not match" in record.message for record in caplog.records)
    symmem.register_symm_mem_args(name, ["x"], replace=True)
    assert ops.registration(name) is not None
    theirs._destroy()


@needs_upstream
def test_ops_of_torch_are_known_better_here(caplog: pytest.LogCaptureFixture) -> None:
    theirs: Any = torch.library.Library("symm_mem", "FRAGMENT")
    theirs.register_symm_mem_args("multimem_all_gather_out", ["input"])
    made = ops.registration("symm_mem::multimem_all_gather_out")
    assert made is not None
    assert made.args == ("out",)
    theirs._destroy()


def test_without_upstream_everything_works(define: Define, monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_UPSTREAM:
        monkeypatch.delattr(torch.library.Library, "register_symm_mem_args")
        monkeypatch.setattr(singleton, "find", None)
        monkeypatch.setattr(singleton, "get", None)
    name = define("op(Tensor x, str group) -> Tensor")
    other = define("other(Tensor x) -> Tensor")
    made = symmem.register_symm_mem_args(name, ["x"])
    lib = ops.Library(name.split("::")[0], "FRAGMENT")
    lib.register_symm_mem_args("other", ["x"])
    assert ops.registration(name) is made
    assert made in ops.registered()
    assert upstream.all_args() == {}
    refused(name, ["x"])
    ops.unregister(name)
    lib._destroy()
    assert ops.registration(name) is None
    assert ops.registration(other) is None


# torch.ops.symm_mem.


def symm_mem_schemas() -> dict[str, Any]:
    assert ops.registered()  # defines the ops that are written in Python
    schemas = torch._C._jit_get_all_schemas()
    return {each.name.removeprefix("symm_mem::"): each for each in schemas if each.name.startswith("symm_mem::")}


def test_each_op_of_torch_is_registered_or_needs_nothing() -> None:
    known = symm_mem_schemas()
    assert len(known) > 20
    assert set(known) - set(built_in.NEED) - set(built_in.NEED_NONE) == set(), "new ops: read their kernels"
    assert not set(built_in.NEED) & set(built_in.NEED_NONE)
    found = {each.op: each for each in ops.registered() if each.source == "symmem"}
    assert {name for name in found if name.startswith("symm_mem::")} == {
        f"symm_mem::{name}" for name in set(known) & set(built_in.NEED)
    }
    for name, need in built_in.NEED.items():
        if name in known:
            made = found[f"symm_mem::{name}"]
            names = [argument.name for argument in known[name].arguments]
            assert made.args == need.args
            assert made.group_arg == ("group_name" if "group_name" in names else None)


def test_symmems_own_ops_are_registered_or_take_any_memory() -> None:
    ops.registered()  # defines them
    # Ops with a leading underscore belong to symmem.compile, for generated code only.
    schemas = {each.name for each in torch._C._jit_get_all_schemas() if re.match("symmem::[^_]", each.name)}
    forms = {
        f"symmem::{name}{form}"
        for name, kind in KINDS.items()
        for form in ("", "_", "_out")
        if not (kind.is_tree and form == "_")
    }
    assert schemas == forms | {f"symmem::{name}" for name in built_in.OWN}
    for name, need in built_in.OWN.items():
        made = ops.registration(f"symmem::{name}")
        assert made is not None
        assert (made.args, made.group_arg, made.source) == (("x",), "group_name", "symmem")
        assert (made.one_sided, made.exit_barrier) == (name != "barrier", name == "barrier")
        assert need.args == made.args
        assert upstream.args_of(made.op) is None
    assert ops.registration("symmem::all_reduce") is None


@pytest.mark.parametrize("mode", ["error", "copy"])
def test_symmems_own_ops_are_checked_like_others(mode: str) -> None:
    x = torch.ones(3)
    calls: list[Callable[[], object]] = [
        lambda: torch.ops.symmem.put(x, torch.ones(3), 0, "any"),
        lambda: torch.ops.symmem.get_out(x, 0, "any", out=torch.ones(3)),
        lambda: torch.ops.symmem.wait_signal(x, 0, 0, "any"),
    ]
    for call in calls:
        with ops.checked(mode), pytest.raises(NotSymmetricError, match=r"symmem::\w+: the argument 'x' must be"):
            call()


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("multimem_all_gather_out", "out"),
        ("_low_contention_all_gather_ce_multicast_out", "out"),
        ("memcpy_to_multicast_", "symm_mem_out"),
    ],
)
def test_gathering_needs_only_its_output(name: str, arg: str) -> None:
    made = ops.registration(f"symm_mem::{name}")
    if made is None:
        assert name not in symm_mem_schemas()
        pytest.skip(f"torch {torch.__version__} has no symm_mem::{name}")
    assert (made.args, made.mutated, made.group_arg) == ((arg,), (arg,), "group_name")


@pytest.mark.slow
def test_ops_that_a_torch_lacks_are_left_out() -> None:
    code = (
        "from symmem.ops import registered; from symmem.ops.registry import built_in; "
        "built_in.NEED['nosuch'] = built_in.Need(('x',)); "
        "assert len(registered()) > 20"
    )
    run_program(code).check_returncode()


@pytest.mark.slow
def test_ops_that_a_torch_has_otherwise_are_left_out() -> None:
    code = (
        "from symmem.ops import registered, registration; from symmem.ops.registry import built_in; "
        "from symmem.ops.registry.schema import known_op; "
        "built_in.NEED['tile_reduce'] = built_in.Need(('x',)); "
        "assert len(registered()) > 20 and registration('symm_mem::tile_reduce') is None; "
        "assert known_op('symm_mem::tile_reduce')"
    )
    run = run_program(code)
    run.check_returncode()
    assert "symm_mem::tile_reduce has no argument 'x'" in run.stderr


@pytest.mark.slow
def test_importing_and_registering_elsewhere_do_not_touch_torchs_ops() -> None:
    code = """
import sys, symmem
assert 'torch' not in sys.modules and 'symmem.ops' not in sys.modules
import torch
symmem.register_symm_mem_args('aten::mm', ['self'])
from symmem.ops.registry import registry
assert set(registry._entries) == {'aten::mm'}
assert symmem.ops.registration('symm_mem::one_shot_all_reduce').source == 'symmem'
assert symmem.ops.registration('symm_mem::get_remote_tensors').args == ('x',)
"""
    run_python(code).check_returncode()


# The fingerprint and the version.


def test_the_fingerprint_is_of_what_is_registered(define: Define) -> None:
    one, two = define("one(Tensor x, Tensor y, str a, str b) -> ()"), define("two(Tensor x) -> ()")
    empty = ops.fingerprint()
    assert len(empty) == 64
    seen = {empty}
    for kwargs in (
        {"arg_names": ["x"], "group_arg": "a"},
        {"arg_names": ["y"], "group_arg": "a"},
        {"arg_names": ["x", "y"], "group_arg": "a"},
        {"arg_names": ["x"], "group_arg": "b"},
        {"arg_names": ["x"], "group_arg": None},
        {"arg_names": ["x"], "group_arg": "a", "exit_barrier": True},
        {"arg_names": ["x"], "group_arg": "a", "one_sided": True},
    ):
        number = ops.version()
        symmem.register_symm_mem_args(one, **kwargs, replace=True)
        assert ops.version() > number
        assert ops.fingerprint() not in seen
        seen.add(ops.fingerprint())
    symmem.register_symm_mem_args(one, ["x", "y"], group_arg="a", replace=True)
    symmem.register_symm_mem_args(two, ["x"])
    both, number = ops.fingerprint(), ops.version()
    assert (ops.fingerprint(), ops.version()) == (both, number)
    for name in (one, two):
        ops.unregister(name)
    assert ops.fingerprint() == empty
    symmem.register_symm_mem_args(two, ["x"])
    symmem.register_symm_mem_args(one, ["y", "x"], group_arg="a")
    assert ops.fingerprint() == both


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = "from symmem.ops import fingerprint; print(fingerprint())"
    # In this process other tests may have registered something. Hashes of texts differ in an interpreter with a seed.
    done = run_program(code), run_python(code, env={**os.environ, "PYTHONHASHSEED": "1"})
    (fingerprint,) = {each.stdout.strip() for each in done}
    assert len(fingerprint) == 64, done


def test_threads_register_and_look_at_once(define: Define) -> None:
    names = [define(f"op{index}(Tensor x) -> ()") for index in range(40)]
    errors: list[BaseException] = []
    outcomes: list[str] = []

    def work(offset: int) -> None:
        try:
            for name in names[offset:] + names[:offset]:
                try:
                    symmem.register_symm_mem_args(name, ["x"])
                    outcomes.append(name)
                except InvalidArgumentError:
                    assert ops.registration(name) is not None
                ops.version()
                ops.registered()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(0, 40, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not errors
    assert sorted(outcomes) == sorted(names)  # one thread per name


# Any schema.

TENSORS = ("Tensor", "Tensor?", "Tensor[]", "Tensor?[]", "Tensor[]?", "Tensor(a!)", "Tensor(a!)[]", "Tensor(a!)?")
OTHERS = (
    "int",
    "int[]",
    "float?",
    "bool",
    "Scalar",
    "SymInt[]?",
    "ScalarType?",
    "Device?",
    "(Tensor, Tensor)",
    "str?[]",
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(TENSORS + OTHERS), min_size=1, max_size=7), st.integers(0, 7), st.data())
def test_of_any_schema_the_tensors_and_nothing_else(kinds: list[str], keyword: int, data: st.DataObject) -> None:
    lib = ops.Library(f"symmem_test_any{next(_numbers)}", "FRAGMENT")
    # An alias set belongs to one argument.
    written = [kind.replace("(a!", f"({chr(98 + index)}!") + f" a{index}" for index, kind in enumerate(kinds)]
    if keyword < len(written):
        written.insert(keyword, "*")
    lib.define(f"op({', '.join(written)}) -> ()")
    name = f"{lib.ns}::op"
    tensors = [f"a{index}" for index, kind in enumerate(kinds) if kind in TENSORS]
    names = data.draw(st.lists(st.sampled_from([f"a{index}" for index in range(len(kinds) + 1)]), unique=True))
    try:
        if names and set(names) <= set(tensors):
            made = symmem.register_symm_mem_args(name, names)
            assert ops.registration(name) == made
            assert made.args == tuple(names)
            assert set(made.mutated) == {each for each in names if "!" in kinds[int(each[1:])]}
            assert {each.name for each in made.parameters.values() if each.tensor} == set(tensors)
            ops.unregister(name)
        else:
            refused(name, names)
            assert ops.registration(name) is None
    finally:
        lib._destroy()


# Eager calls.


def add(x: torch.Tensor, group: str) -> torch.Tensor:
    """Fails without symmetric memory, like a kernel that needs it."""
    assert symmem.find(x) is not None
    return x + 1


def add_(x: torch.Tensor, outs: list[torch.Tensor], group: str) -> torch.Tensor:
    assert all(symmem.find(each) for each in (x, *outs))
    for each in outs:
        each.copy_(x)
    return x.add_(1)


def test_plain_memory_is_an_error_that_says_what_to_do(define: Define, group: str) -> None:
    name = define("op(Tensor x, Tensor[] ys, str group) -> Tensor", lambda x, ys, group: x + 1)
    packet = getattr(torch.ops, name.split("::")[0]).op
    x, good = torch.ones(2, 3), symmem.allocate((2, 3)).tensor
    symmem.register_symm_mem_args(name, ["x", "ys"])
    assert packet(x, [x], group).sum() == 12  # outside of checked() nothing is checked
    for call in (lambda: ops.check(name, (good, [good, x], group)), lambda: packet(good, [good, x], group)):
        with ops.checked(), pytest.raises(NotSymmetricError) as caught:
            call()
        text = str(caught.value)
        assert f"{name}: the argument 'ys[1]' must be symmetric memory, but is a plain tensor of shape (2, 3)" in text
        assert "torch.float32, on cpu" in text
        assert "What to do: allocate it with symmem.allocate((2, 3), torch.float32, 'cpu').tensor" in text
        assert "symmem.ops.checked('copy')" in text
    with ops.checked():
        packet(good, [good, good[1:]], group)
        packet(good, [], group)
        assert (x + x).sum() == 12  # other ops are not checked
    ops.check(name, (good, []), {"group": group})
    ops.check("aten::mm", (x, x))


def test_the_setting_decides_where_nothing_is_said(define: Define, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = define("op(Tensor x, str group) -> Tensor", lambda x, group: x + int(symmem.find(x) is not None))
    packet = getattr(torch.ops, name.split("::")[0]).op
    symmem.register_symm_mem_args(name, ["x"])
    with ops.checked():
        for mode, value in (("off", 0.0), ("copy", 1.0)):
            monkeypatch.setenv("SYMMEM_ENABLE", f"symmetric_arguments({mode})")
            assert packet(torch.zeros(1), group) == value
        monkeypatch.delenv("SYMMEM_ENABLE")
        with pytest.raises(NotSymmetricError):
            packet(torch.zeros(1), group)
        with pytest.raises(NotSymmetricError), ops.checked("error"):
            packet(torch.zeros(1), "nosuch")  # not the error about the group
    with ops.checked("off"):
        assert packet(torch.zeros(1), group) == 0
    assert packet(torch.zeros(1), group) == 0
    with pytest.raises(ConfigError, match="symmetric_arguments: unknown value 'cpy'"), ops.checked("cpy"):
        pass


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_copies_are_written_back_and_returned_as_the_callers(
    define: Define, group: str, context: Callable[[], Any]
) -> None:
    name = define("op(Tensor(a!) x, Tensor(b!)[] outs, str group) -> Tensor(a!)", add_)
    packet = getattr(torch.ops, name.split("::")[0]).op
    symmem.register_symm_mem_args(name, ["x", "outs"])
    with context():
        x = torch.arange(6.0).view(2, 3)
        first, second = torch.zeros(3, 2).t(), symmem.allocate((2, 3)).tensor.zero_()
        gaps = torch.zeros(2, 6)[:, ::2]
        with ops.checked("copy"):
            result = packet(x, [first, second, gaps, gaps], group)
    assert result.data_ptr() == x.data_ptr()
    assert symmem.find(x) is None
    assert torch.equal(x, torch.arange(6.0).view(2, 3) + 1)
    for each in (first, second, gaps):
        assert torch.equal(each, torch.arange(6.0).view(2, 3))


def test_one_tensor_passed_twice_is_one_copy(define: Define, group: str) -> None:
    def kernel(x: torch.Tensor, y: torch.Tensor) -> None:
        assert x.data_ptr() == y.data_ptr()
        x.add_(1)

    name = define("op(Tensor(a!) x, Tensor(b!)? y=None) -> ()", kernel)
    symmem.register_symm_mem_args(name, ["x", "y"])
    x = torch.zeros(3)
    with ops.checked("copy"):
        getattr(torch.ops, name.split("::")[0]).op(x, y=x.view(3))
    assert torch.equal(x, torch.ones(3))


def test_arguments_by_name_and_expanded_ones_are_copied(define: Define, group: str) -> None:
    def kernel(x: torch.Tensor, *, out: torch.Tensor) -> None:
        assert symmem.find(x) is not None
        assert symmem.find(out) is not None
        out.copy_(x + 1)

    name = define("op(Tensor x, *, Tensor(a!) out) -> ()", kernel)
    symmem.register_symm_mem_args(name, ["x", "out"])
    out = torch.zeros(2, 3)
    with ops.checked("copy"):
        getattr(torch.ops, name.split("::")[0]).op(torch.tensor([1.0, 2.0, 3.0]).expand(2, 3), out=out)
    assert out.tolist() == [[2.0, 3.0, 4.0]] * 2


def test_a_one_sided_op_is_never_given_a_copy(define: Define, group: str) -> None:
    name = define("put(Tensor x, str group) -> Tensor", add)
    symmem.register_symm_mem_args(name, ["x"], one_sided=True)
    with ops.checked("copy"), pytest.raises(NotSymmetricError) as caught:
        getattr(torch.ops, name.split("::")[0]).put(torch.zeros(1), group)
    assert "checked('copy')" not in str(caught.value)


def test_gradients_are_what_they_are_unchecked(lib: ops.Library, group: str) -> None:
    @torch.library.custom_op(f"{lib.ns}::scale", mutates_args=())
    def scale(x: torch.Tensor, group: str) -> torch.Tensor:
        assert symmem.find(x) is not None
        return x * 3

    scale.register_autograd(lambda ctx, grad: (grad * 3, None))
    symmem.register_symm_mem_args(scale, ["x"])
    for x in (torch.ones(4, requires_grad=True), torch.nn.Parameter(torch.ones(4))):
        with ops.checked("copy"):
            (scale(x * 2, group) + scale(x, group)).sum().backward()
        assert torch.equal(x.grad, torch.full((4,), 9.0))  # type: ignore[arg-type]
        with ops.checked("error"), pytest.raises(NotSymmetricError):
            scale(x, group)
    ops.unregister(scale)


def test_autograd_learns_of_what_is_written(define: Define, group: str) -> None:
    name = define("op_(Tensor(a!) x) -> Tensor(a!)", lambda x: x.add_(1))
    symmem.register_symm_mem_args(name, ["x"])
    packet = getattr(torch.ops, name.split("::")[0]).op_
    for x in (torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True) * 1):
        version = x._version
        with ops.checked("copy"):
            assert packet(x) is x
        assert torch.equal(x, torch.full((2,), 2.0))
        assert x._version > version


def test_tensors_with_no_memory_are_left_alone(define: Define, lib: ops.Library, group: str) -> None:
    name = define("op(Tensor x) -> Tensor", lambda x: x + 1)
    lib.impl("op", lambda x: torch.empty_like(x), "Meta")
    symmem.register_symm_mem_args(name, ["x"])
    packet = getattr(torch.ops, name.split("::")[0]).op
    fakes = FakeTensorMode()
    with fakes:
        fake = torch.ones(2)
    empty, meta = torch.empty(0), torch.empty(2, device="meta")
    for mode in ("error", "copy"):
        with ops.checked(mode):
            assert packet(meta).shape == (2,)
            assert packet(empty).shape == (0,)
            assert type(packet(fake)) is type(fake)
            with fakes:
                assert type(packet(torch.ones(2))) is type(fake)
        with fakes, ops.checked(mode):
            assert type(packet(torch.ones(2))) is type(fake)
    ops.check(name, (fake,))
    ops.check(name, (meta,))
    with ops.checked("copy"), pytest.raises(NotSymmetricError):
        ops.check(name, (torch.eye(2).to_sparse(),))


def test_closed_memory_is_not_symmetric(define: Define, group: str) -> None:
    name = define("op(Tensor x) -> Tensor", lambda x: x + 1)
    symmem.register_symm_mem_args(name, ["x"])
    handle = symmem.allocate(4)
    tensor = handle.tensor
    ops.check(name, (tensor[1:].view(3, 1),))
    handle.close()
    with pytest.raises(NotSymmetricError):
        ops.check(name, (tensor,))


def test_memory_that_torch_allocated_is_symmetric(define: Define, monkeypatch: pytest.MonkeyPatch) -> None:
    name = define("op(Tensor x) -> Tensor")
    symmem.register_symm_mem_args(name, ["x"])
    x = torch.ones(2)
    # torch 2.11 has no such method, so memory of its own allocator is not recognised.
    monkeypatch.setattr(_SymmetricMemory, "is_symm_mem_tensor", staticmethod(lambda each: each is x), raising=False)
    ops.check(name, (x,))
    with pytest.raises(NotSymmetricError):
        ops.check(name, (torch.ones(2),))


@pytest.mark.parametrize("transport", ["CUDA", "NVSHMEM"])
def test_memory_that_an_older_torch_allocated_is_symmetric(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 can tell only by a rendezvous, and its transports differ for other memory."""
    asked = []

    class Older:
        @staticmethod
        def rendezvous(tensor: Any, group: str) -> Any:
            asked.append(group)
            if tensor is theirs:
                return SimpleNamespace(offset=0)
            if tensor is pooled:
                return SimpleNamespace(offset=512)
            if tensor is broken:
                raise RuntimeError("CUDA error")
            if transport == "CUDA":
                return None
            raise RuntimeError("Pointer not within any SymmetricMemory allocation, is the tensor allocated from it?")

    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", Older)
    theirs, pooled, plain, broken = (cast("torch.Tensor", SimpleNamespace(is_cuda=True)) for _ in range(4))
    assert is_torchs(theirs, lambda: "tp")
    assert not is_torchs(pooled, lambda: "tp")  # operators would read the memory 512 bytes before it
    assert not is_torchs(plain, lambda: "tp")
    with pytest.raises(RuntimeError, match="CUDA error"):
        is_torchs(broken, lambda: "tp")
    assert not is_torchs(torch.ones(1), lambda: "tp")  # no transport is for the CPU
    assert asked == ["tp"] * 4


def test_a_process_group_that_was_destroyed(group: str) -> None:
    made = dist.new_group([0])
    assert symmem.resolve_group(made).size == 1
    dist.destroy_process_group(made)
    with pytest.raises(GroupError, match="torch does not know the process group: it was destroyed"):
        symmem.resolve_group(made)
    with pytest.raises(GroupError, match="there is no process group"):  # not the group that the cache still has
        group_named(made.group_name)


def test_torchs_operators_take_what_begins_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a storage for its allocation, so in an arena they would read other tensors."""
    group = symmem.Group.from_store(0, 1, dist.HashStore(), "torchs operators")
    from_arena = symmem.allocate(64, group=group).rendezvous(group).tensor
    own = symmem.allocate(64, group=group, arena=False).rendezvous(group).tensor
    monkeypatch.setattr(_SymmetricMemory, "is_symm_mem_tensor", staticmethod(lambda each: True), raising=False)
    for name in ("symm_mem::one_shot_all_reduce", "symm_mem::two_shot_all_reduce_"):
        for tensor in (own, own[3:]):
            ops.check(name, (tensor, "sum", "tp"))
            assert is_torchs(tensor, lambda: "tp")
        for tensor in (from_arena, from_arena[3:]):
            assert not is_torchs(tensor, lambda: "tp")
            with pytest.raises(
                NotSymmetricError, match=r"(?s)is not at the beginning.*backend='pytorch_cuda', arena=False"
            ):
                ops.check(name, (tensor, "sum", "tp"))


def test_a_failed_op_leaves_the_callers_tensors(define: Define, group: str) -> None:
    def kernel(x: torch.Tensor) -> None:
        x.add_(1)
        raise ValueError("no")

    name = define("op(Tensor(a!) x) -> ()", kernel)
    symmem.register_symm_mem_args(name, ["x"])
    x = torch.zeros(2)
    with ops.checked("copy"), pytest.raises(ValueError, match="no"):
        getattr(torch.ops, name.split("::")[0]).op(x)
    assert torch.equal(x, torch.zeros(2))


def test_it_decorates_and_nests_and_ends(define: Define, group: str) -> None:
    name = define("op(Tensor x, str group) -> Tensor", add)
    symmem.register_symm_mem_args(name, ["x"])
    packet = getattr(torch.ops, name.split("::")[0]).op

    @ops.checked("copy")
    def step() -> torch.Tensor:
        result: torch.Tensor = packet(torch.zeros(1), group)
        return result

    assert step() == step() == 1
    with ops.checked("error"), ops.checked("copy"):
        assert packet(torch.zeros(1), group) == 1
    with symmem.use_symmetric_memory(), ops.checked("error"):
        assert packet(torch.zeros(1), group) == 1
    assert torch._C._len_torch_dispatch_stack() == 0


def test_a_composition_is_warned_of(lib: ops.Library, caplog: pytest.LogCaptureFixture) -> None:
    lib.define("op(Tensor x) -> Tensor")
    lib.impl("op", lambda x: x + 1)
    with caplog.at_level(logging.WARNING, logger="symmem.ops"):
        symmem.register_symm_mem_args(f"{lib.ns}::op", ["x"])
    assert f"{lib.ns}::op is a composition of other ops" in caplog.text


def gather_on_ranks(mode: str) -> tuple[list[float], list[float]]:
    """A simple communicating op. It stores to all ranks' outputs, and has no exit barrier."""
    lib = ops.Library("symmem_test_ranks", "FRAGMENT")
    lib.define("gather(Tensor x, Tensor(a!) out, str comm) -> ()")

    def kernel(x: torch.Tensor, out: torch.Tensor, comm: str) -> None:
        handle = symmem.SymmetricTensor.wrap(out).rendezvous(comm)
        handle.barrier()
        time.sleep(0.2 * dist.get_rank())
        for peer in range(dist.get_world_size()):
            handle.remote_tensor(peer)[dist.get_rank()] = x

    lib.impl("gather", kernel, "CPU")
    lib.register_symm_mem_args("gather", ["out"], group_arg="comm")
    x, out = torch.tensor(float(dist.get_rank() + 1)), torch.zeros(2)
    results = []
    try:
        with ops.checked(mode):
            for _ in range(2):
                torch.ops.symmem_test_ranks.gather(x, out, dist.group.WORLD.group_name)  # type: ignore[union-attr]
                results.append(out.tolist())
                x *= 10
    finally:
        lib._destroy()
    return results[0], results[1]


def test_copies_reach_peers(new_pool: Callable[[int], RankPool]) -> None:
    assert new_pool(2).run(gather_on_ranks, "copy") == [([1.0, 2.0], [10.0, 20.0])] * 2


# The command.


def test_the_command_lists_what_is_registered(define: Define, capsys: pytest.CaptureFixture[str]) -> None:
    name = define("op(Tensor(a!) x, Tensor?[] ys, str tp) -> ()")
    made = symmem.register_symm_mem_args(name, ["x", "ys"], group_arg="tp", exit_barrier=True)
    assert cli.main(["ops", "list", "--json"]) == 0
    shown = {each["op"]: each for each in json.loads(capsys.readouterr().out)}
    assert shown[name] == {
        "op": name,
        "args": ["x", "ys"],
        "types": {"x": "Tensor", "ys": "Tensor?[]"},
        "mutated": ["x"],
        "group_arg": "tp",
        "unclear_group": [],
        "exit_barrier": True,
        "one_sided": False,
        "source": made.source,
    }
    assert shown["symm_mem::nvshmem_put"]["one_sided"] is True
    assert set(shown) == {each.op for each in ops.registered()}
    assert cli.main(["ops", "list"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines}
    assert rows["op"] == ["symmetric arguments", "group by", "registered by"]
    assert rows[name] == ["x, ys: Tensor?[]", "tp", made.source]
    assert rows["symm_mem::nvshmem_put"] == ["tensor", "default group", "symmem"]


@pytest.mark.slow
def test_the_command_imports_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_ops.py").write_text(
        "import symmem, torch\n"
        "lib = symmem.ops.Library('my_ops', 'DEF')\n"
        "lib.define('op(Tensor x) -> ()')\n"
        "lib.register_symm_mem_args('op', ['x'])\n"
    )
    code = "import runpy; runpy.run_module('symmem', run_name='__main__')"
    done = run_program(code, "ops", "list", "--import", "my_ops", folder=tmp_path)
    assert done.returncode == 0
    row = next(line for line in done.stdout.splitlines() if line.startswith("my_ops::op "))
    assert row.split()[1:] == ["x", "default", "group", "my_ops:4"]
    with pytest.raises(SystemExit):
        cli.main(["ops"])
    assert "COMMAND" in capsys.readouterr().err
    assert cli.main(["ops", "list", "--import", "nosuchmodule"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "symmem: InvalidArgumentError: cannot import 'nosuchmodule'" in err


@pytest.mark.parametrize(("inputs", "args"), [(0, ("x",)), (2, ("ys",)), ("ys", ("ys",)), ([2, "x"], ("ys", "x"))])
def test_inputs_by_position_or_name(define: Define, inputs: Any, args: tuple[str, ...]) -> None:
    name = define("op(Tensor x, str group_name, Tensor[] ys) -> ()")
    assert symmem.requires_symmetric_memory(name, inputs).args == args


@pytest.mark.parametrize("wrong", [1, 3, -1, True, [0, "x"]])
def test_wrong_inputs_are_refused(define: Define, wrong: Any) -> None:
    name = define("op(Tensor x, str group_name, Tensor[] ys) -> ()")
    with pytest.raises(InvalidArgumentError, match=name):
        symmem.requires_symmetric_memory(name, input=wrong)


@pytest.mark.parametrize(
    ("arguments", "group"), [("Any group_name", "group_name"), ("Any pg, Any x", "pg"), ("Any x", None)]
)
def test_an_argument_of_type_any_may_carry_the_group(define: Define, arguments: str, group: str | None) -> None:
    name = define(f"op(Tensor t, {arguments}) -> ()")
    assert symmem.requires_symmetric_memory(name).group_arg == group


def test_schema_hint() -> None:
    """``symm`` before an argument's type registers it. Torch sees the schema without it."""
    lib = ops.Library("symm_hint", "DEF")
    lib.define("op(symm Tensor x, Tensor y, symm Tensor(a!)[] outs, str group_name) -> ()")
    known = ops.registration("symm_hint::op")
    assert known is not None
    assert (known.args, known.group_arg) == (("x", "outs"), "group_name")
    assert "symm " not in str(torch.ops.symm_hint.op.default._schema)
    lib.define("torchs(SymmMemTensor x, SymmMemTensor(a!)[] outs, str group_name) -> ()")
    lib.define("by_name(Tensor x, Tensor y, str group_name) -> ()", symm_mem_hint="y")
    lib.define("by_position(symm Tensor x, Tensor y, str group_name) -> ()", symm_mem_hint=[1])
    wanted = {"torchs": ("x", "outs"), "by_name": ("y",), "by_position": ("x", "y")}
    assert {name: ops.registration(f"symm_hint::{name}").args for name in wanted} == wanted  # type: ignore[union-attr]
    lib.define("plain(Tensor symm, str group_name) -> ()")
    assert ops.registration("symm_hint::plain") is None


@pytest.mark.parametrize(
    ("schema", "hint", "why"),
    [
        ("(symm int x) -> ()", (), "the argument 'x' is of type int, not a tensor"),
        ("(SymmMemTensor x, str group_name) -> ()", "y", "has no argument 'y'"),
        ("(Tensor x, str group_name) -> ()", 2, "has no argument 2"),
        ("(SymmMemTensor x, str group_name) -> ()", "x", "the argument 'x' is named twice"),
        ("(SymmMemTensor x, str a, str b) -> ()", (), "does not tell which argument carries the group"),
    ],
)
def test_a_hint_that_does_not_fit_defines_nothing(lib: ops.Library, schema: str, hint: Any, why: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{lib.ns}::bad.*{why}"):
        lib.define(f"bad{schema}", symm_mem_hint=hint)
    assert not hasattr(getattr(torch.ops, lib.ns), "bad")
    lib.define("bad(SymmMemTensor x, str group_name) -> ()")
    assert ops.registration(f"{lib.ns}::bad").args == ("x",)  # type: ignore[union-attr]


@pytest.mark.parametrize("carries", ["name", "process group"])
def test_functional_collectives_carry_their_group(carries: str, group: str) -> None:
    """Since torch 2.13 the type of this argument is ``Any``."""
    name = "_c10d_functional::all_reduce"
    made = symmem.requires_symmetric_memory(name)
    try:
        assert (made.args, made.group_arg) == (("input",), "group_name")
        value = group if carries == "name" else dist.group.WORLD
        assert made.group_of((torch.ones(1), "sum", value)).name == group
    finally:
        ops.unregister(name)
