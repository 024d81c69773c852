"""Registrations by a C++ operator library, which the test compiles. Every case is a program that loads it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from emulated_gpu import COMPILER
from patience import TASK
from programs import run_program

import symmem

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch_folder, made = Path(torch.__file__).parent, tmp_path_factory.mktemp("cpp") / "registering.so"
    command = [str(COMPILER), "-std=c++20", "-O0", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{symmem.include_path()}"]
    command += ["-isystem", str(torch_folder / "include")]
    command.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    command += ["-o", str(made), str(Path(__file__).with_name("registering.cpp"))]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, timeout=TASK)
    return made


def run(library: Path, program: str, imports: str = "import symmem, torch") -> str:
    """Run a program that has loaded the library, and return its output."""
    code = f"{imports}\nload = lambda: torch.ops.load_library({str(library)!r})\n{program}"
    done = run_program(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


EVERYTHING = """
of = symmem.ops.registration
twice, picked, named = of("cpp_registry::twice"), of("cpp_registry::picked"), of("cpp_registry::picked.named")
alone = of(torch.ops.cpp_registry.alone)
assert (twice.args, twice.group_arg, twice.exit_barrier, twice.one_sided) == (("x",), "group_name", False, False)
assert (picked.args, picked.group_arg, picked.exit_barrier) == (("x", "others"), "tp", True)
assert (named.op, named.args) == ("cpp_registry::picked.named", ("x",))
assert (alone.args, alone.group_arg, alone.one_sided, alone.mutated) == (("x",), None, True, ("x",))
name, line = twice.source.rsplit(":", 1)
assert name.endswith("registering.cpp") and 'cpp_registry::twice"' in open(name).read().splitlines()[int(line) - 1]
assert of("cpp_registry::undefined") is None and of("cpp_registry::late") is None
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import symmem, torch",
        "import torch",  # the library is loaded before symmem
    ],
)
def test_a_library_registers_whenever_it_is_loaded(library: Path, imports: str) -> None:
    run(library, "load()\nimport symmem" + EVERYTHING, imports)


def test_a_library_that_is_loaded_late_changes_what_was_known(library: Path) -> None:
    program = """
before, names = symmem.ops.fingerprint(), {each.op for each in symmem.ops.registered()}
version, told = symmem.ops.version(), []
from symmem.ops.registry import registry
registry.listeners.append(told.append)
load()
assert symmem.ops.version() > version
now = {each.op for each in symmem.ops.registered()} - names
assert now == {f"cpp_registry::{name}" for name in ("twice", "picked", "picked.named", "alone")}, now
assert now <= set(told)
assert symmem.ops.fingerprint() != before
"""
    run(library, program)


def test_eager_calls_are_checked(library: Path) -> None:
    program = """
load()
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group, x = symmem.resolve_group().name, torch.ones(3)
st = symmem.allocate(3, backend="host").rendezvous()
with symmem.ops.checked("error"):
    torch.ops.cpp_registry.twice(st.tensor, group)
    try:
        torch.ops.cpp_registry.twice(x, group)
    except symmem.errors.NotSymmetricError as error:
        print(error)
with symmem.ops.checked("copy"):
    assert torch.ops.cpp_registry.twice(x, group).tolist() == [2.0] * 3
dist.destroy_process_group()
"""
    text = run(library, program)
    assert "cpp_registry::twice" in text
    assert "'x'" in text


def test_what_does_not_fit_is_an_error_where_it_is_looked_up_and_nowhere_else(
    library: Path,
) -> None:
    program = """
load()
for turn in range(2):
    for name in ("wrong", "doubly"):
        try:
            symmem.ops.registration(f"cpp_registry::{name}")
        except symmem.errors.InvalidArgumentError as error:
            print(error)
    assert symmem.ops.registration("cpp_registry::twice").args == ("x",)
for name in ("wrong", "doubly", "late"):
    symmem.register_symm_mem_args(f"cpp_registry::{name}", ["x"], replace=True)
    assert symmem.ops.registration(f"cpp_registry::{name}").source.startswith("__main__")
try:
    symmem.register_symm_mem_args("cpp_registry::twice", ["x"])
except symmem.errors.InvalidArgumentError as error:
    print(error)
assert symmem.ops.unregister("cpp_registry::picked").args == ("x", "others")
assert symmem.ops.registration("cpp_registry::picked") is None
"""
    lines = run(library, program).splitlines()
    source = Path(__file__).with_name("registering.cpp")
    numbers = {
        name: number for number, line in enumerate(source.read_text().splitlines(), 1) for name in [line.strip()]
    }
    wrong = numbers['symmem::register_symm_mem_args("cpp_registry::wrong", {"y"});']
    doubly = numbers['symmem::register_symm_mem_args("cpp_registry::doubly", {0});']
    shown = [line for line in lines if "What to do" not in line]
    what = f"registering.cpp:{wrong} is wrong: cpp_registry::wrong: the argument 'y' is of type int, not a tensor"
    assert sum(what in line for line in shown) == 2
    what = f"registering.cpp:{doubly} is wrong: cpp_registry::doubly is registered already, with x"
    assert sum(what in line for line in shown) == 2
    assert "cpp_registry::twice is registered already, with x, by " in shown[-1]
    assert "registering.cpp:" in shown[-1]


def test_an_operator_that_is_defined_later_is_registered(library: Path) -> None:
    program = """
load()
assert symmem.ops.registration("cpp_registry::undefined") is None
lib = torch.library.Library("cpp_registry", "FRAGMENT")
lib.define("undefined(Tensor x, str group_name) -> Tensor")
assert symmem.ops.registration("cpp_registry::undefined").args == ("x",)
"""
    run(library, program)
