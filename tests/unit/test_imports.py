"""The modules that an import or a simple program loads, and `torch.ops.symmem` for every order of imports."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from programs import Run, run_program, run_python

pytestmark = pytest.mark.slow

ALLOCATE_RENDEZVOUS_BARRIER = """
import symmem
import torch.distributed as dist

group = symmem.Group.from_store(0, 1, dist.HashStore())
st = symmem.allocate((4, 4), group=group, backend="host")
st.rendezvous(group)
st.barrier()
"""

# The subsystems that such a program on one rank and on the CPU does not use.
OPTIONAL = (
    "symmem.arena.collect",
    "symmem.arena.statistics",
    "symmem.backends.cuda_signals",
    "symmem.backends.driver",
    "symmem.backends.driver_errors",
    "symmem.backends.gpu",
    "symmem.backends.kernel_words",
    "symmem.backends.native",
    "symmem.backends.nvshmem",
    "symmem.backends.pytorch",
    "symmem.backends.signal_kernels",
    "symmem.compile",
    "symmem.config.cluster",
    "symmem.config.kernel_tables",
    "symmem.config.yaml_nodes",
    "symmem.distributed",
    "symmem.ops",
    "symmem.redirect",
    "symmem.service.status",
    "symmem.tensor.device_view",
    "symmem.tensor.rendezvous",
    "symmem.tensor.torch_handle",
    "symmem.tensor.torch_memory",
    "symmem.tools",
    "symmem.torch_backend",
    "symmem.torch_compat",
    "symmem.triton",
    "torch._dynamo",
    "yaml",
)


# The modules that `import symmem` may load; they are small and import no torch.
QUICK = {
    "symmem._lazy",
    "symmem._torch_backend_setting",
    "symmem._torch_ops",
    "symmem._torch_process_group",
    "symmem.errors",
    "symmem.group",
    "symmem.group.observers",
    "symmem.service",
    "symmem.version",
}


def printed(done: CompletedProcess[str]) -> Any:
    """What a program printed as JSON."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PRINT_MODULES = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"


def test_importing_symmem_loads_no_torch() -> None:
    loaded = printed(run_python("import symmem" + PRINT_MODULES))
    assert "torch" not in loaded
    assert {name for name in loaded if name.startswith("symmem.")} <= QUICK


def test_a_simple_program_loads_no_optional_subsystem() -> None:
    loaded = printed(run_program(ALLOCATE_RENDEZVOUS_BARRIER + PRINT_MODULES))
    assert "symmem.tensor.tensor" in loaded
    assert sorted(set(OPTIONAL).intersection(loaded)) == []


OPERATORS = """
import json, sys
before = type(torch.ops.symmem)
names = [torch.ops.symmem.all_reduce.default.name(), torch.ops.symmem.put.default.name()]
print(json.dumps({
    "names": names,
    "modules": [torch.ops.symmem.all_reduce.__module__, torch.ops.aten.add.__module__],
    "plain": type(torch.ops.symmem) is type(torch.ops.aten) is not before,
    "missing": hasattr(torch.ops.symmem, "no_such_operator"),
    "finders": [type(finder).__name__ for finder in sys.meta_path],
    "loaders": [type(torch.__loader__).__name__, type(torch.__spec__.loader).__name__],
}))
"""


@pytest.mark.parametrize(
    ("run", "imports"),
    [
        (run_python, "import symmem, importlib.util; assert importlib.util.find_spec('torch'); import torch"),
        (run_program, "import torch; torch.ops.symmem; import symmem; assert 'symmem.ops' not in sys.modules"),
        (run_program, "import torch, symmem, importlib; importlib.reload(symmem)"),
    ],
)
def test_operators_exist_in_every_order_of_imports(run: Run, imports: str) -> None:
    found = printed(run(f"import sys; {imports}{OPERATORS}"))
    assert found["names"] == ["symmem::all_reduce", "symmem::put"]
    assert found["modules"] == ["torch._ops.symmem", "torch._ops.aten"]
    assert found["plain"]
    assert not found["missing"]
    assert "_WaitingFinder" not in found["finders"]
    assert found["loaders"] == ["SourceFileLoader"] * 2


def test_an_import_of_torch_may_fail(tmp_path: Path) -> None:
    """The finder waits for the next attempt; nothing else changes for a program without a working torch."""
    (tmp_path / "torch.py").write_text("import missing_library")
    program = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import symmem

def attempt():
    try:
        import torch
    except ImportError as error:
        return error.name

errors = [attempt(), attempt()]
sys.modules["torch"] = None
errors.append(attempt())
del sys.modules["torch"]

def count_waiting():
    return [getattr(finder, "_name", "") for finder in sys.meta_path].count("torch")

waiting = [count_waiting()]
with open(sys.path[0] + "/torch.py", "w") as file:
    file.write("import types; ops = types.SimpleNamespace(symmem=types.ModuleType('symmem'))")
importlib.invalidate_caches()
errors.append(attempt())
waiting += [count_waiting()]
print(json.dumps([errors, waiting, type(sys.modules["torch"].ops.symmem).__name__]))
"""
    missing = "missing_library"
    assert printed(run_python(program, str(tmp_path))) == [[missing, missing, "torch", None], [1, 0], "LazyNamespace"]


def test_the_first_op_in_symmetric_memory_imports_no_compiler() -> None:
    program = (
        "import sys, torch, symmem, torch.distributed as dist\n"
        "group = symmem.Group.from_store(0, 1, dist.HashStore())\n"
        "with symmem.use_symmetric_memory(group): y = torch.ones(3) + 1\n"
        "assert symmem.find(y) and y.tolist() == [2, 2, 2]\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    done = run_program(program)
    assert done.returncode == 0, done.stderr
