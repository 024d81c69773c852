"""Every example on processes of this machine, except hello.py, which test_examples.py runs under torchrun."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from patience import SETTINGS, TASK

from symmem.tools.commands import validate
from symmem.tools.examples import EXAMPLES, run_example, why_not
from symmem.tools.outcomes import RanksFailedError

FOLDER = Path(__file__).parents[2] / "examples"
# Without GPUs, because the programs would use them; Inductor starts no worker processes.
ENV = {
    "CUDA_VISIBLE_DEVICES": "",
    "SYMMEM_ENABLE": SETTINGS,
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def test_the_list_is_the_folder() -> None:
    assert set(EXAMPLES) == {path.name for path in FOLDER.glob("*.py")}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_it_can_be_read_alone(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert len(text.splitlines()) < 120
    tree = ast.parse(text)
    assert f"examples/{name}" in (ast.get_docstring(tree) or "")  # how to launch it
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    for module in imported:
        assert not re.match(r"symmem\.", module), "examples show the public API alone"
        assert module.split(".")[0] in {*sys.stdlib_module_names, "torch", "triton", "cuda", "symmem"}


@pytest.mark.ranks
@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"hello.py"}))
def test_it_is_right(name: str) -> None:
    if why := why_not(name, cuda=False):
        pytest.skip(why)
    world = 2 if EXAMPLES[name].compiles else 3
    printed = run_example(FOLDER / name, world, ENV, timeout=TASK)
    assert "right" in printed


@pytest.mark.ranks
def test_it_would_say_that_it_is_wrong(tmp_path: Path) -> None:
    name = "expert_dispatch.py"
    text = (FOLDER / name).read_text()
    broken = text.replace("begins[expert] : begins[expert] + number]", "begins[rank] : begins[rank] + number]")
    assert broken != text
    (tmp_path / name).write_text(broken)
    with pytest.raises(RanksFailedError, match=r"the outputs are wrong in step|must match"):
        run_example(tmp_path / name, 2, ENV)


@pytest.mark.ranks
def test_yaml_alone_moves_it() -> None:
    moved = run_example(FOLDER / "anywhere.py", 2, ENV | {"SYMMEM_CONFIG": str(FOLDER / "clusters/laptop.yaml")})
    assert re.search(r"arena of 16 MiB: .*laptop\.yaml:\d+:\d+ \(defaults\)", moved)
    assert re.search(r"backend 'host': .*laptop\.yaml", moved)


@pytest.mark.ranks
def test_validate_runs_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("hello.py", "gather_matmul.py"):
        (tmp_path / name).write_text("import sys\nsys.exit(int('gather' in __file__))\n")
    (tmp_path / "halo_exchange.py").write_text("")
    monkeypatch.setattr(validate, "why_not", lambda name, cuda: "no such thing" if name == "halo_exchange.py" else "")
    results = {result.case: result for result in validate.examples(tmp_path, 1)}
    assert list(results) == list(EXAMPLES)
    assert {result.backend for result in results.values()} == {"examples"}
    outcomes = {name: result.outcome for name, result in results.items()}
    assert (outcomes["hello.py"], outcomes["gather_matmul.py"]) == ("passed", "failed")
    assert results["halo_exchange.py"].why == "no such thing"
    assert "does not exist" in results["custom_op.py"].why


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "cuda" else object())
    assert why_not("halo_exchange.py", cuda=False) == ""
    assert why_not("halo_exchange.py", cuda=True) == "cuda.core is not installed"
