"""Imports point one way, down the list of layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "allocator": "symmem",
    "backends": "symmem.backends",
    "config": "symmem.config",
    "tools": "symmem.tools",
}

# From the top down. A module belongs to the layer with the longest name that its own begins with, and imports
# from that layer and those below.
LAYERS = (
    "symmem.__main__",
    "symmem.tools",
    "symmem.compile",
    "symmem.ops",
    "symmem",
    "symmem.backends",
    "symmem.config",
    "symmem.errors",
    "symmem.version",
    "symmem._lazy",
    "symmem._torch_ops",
)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer_of(module: str) -> str:
    return max((layer for layer in LAYERS if is_in(module, layer)), key=len)


def imported(node: ast.Import | ast.ImportFrom, modules: set[str]) -> list[str]:
    """The modules that a statement imports; ``from a import b`` is ``a.b`` if there is such a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in modules or name in LAYERS else str(node.module) for name in names]


def violations(module: str, source: str, modules: set[str]) -> list[str]:
    """What is wrong with the imports of ``module``, those in functions and under TYPE_CHECKING included.

    Args:
        module: Name of the module.
        source: Its text.
        modules: Names of all modules of the project.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"{module}:{node.lineno}: relative import, write symmem....")
            continue
        for target in imported(node, modules):
            top = target.split(".")[0]
            if top in FOLDERS:
                found.append(f"{module}:{node.lineno}: {top} is a folder, write {FOLDERS[top]}")
            elif is_in(target, "symmem") and LAYERS.index(layer_of(target)) < LAYERS.index(layer_of(module)):
                found.append(f"{module}:{node.lineno}: {target} is in a layer above {layer_of(module)}")
    return found


def sources(root: Path) -> dict[str, Path]:
    """Name and file of every module below the folders of ``root``."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def violations_below(root: Path) -> list[str]:
    files = sources(root)
    modules = set(files)
    return [line for module, path in files.items() for line in violations(module, path.read_text(), modules)]


def test_imports_point_down() -> None:
    assert sources(ROOT)
    assert violations_below(ROOT) == []


MODULES = {"symmem", "symmem.tensor", "symmem.ops.registry", "symmem.backends.base"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("symmem.config.options", "import symmem.backends"),
        ("symmem.config.options", "from symmem import __version__"),
        ("symmem.config.options", "from symmem import backends"),
        ("symmem.backends.host", "from symmem.tensor.tensor import SymmetricTensor"),
        ("symmem.backends.host", "from symmem import tensor"),
        ("symmem.backends.host", "def f():\n    import symmem.tensor"),
        ("symmem.backends.host", "if TYPE_CHECKING:\n    from symmem.tensor import SymmetricTensor"),
        ("symmem", "if TYPE_CHECKING:\n    from symmem import ops"),
        ("symmem.tensor", "from symmem.ops.registry import x"),
        ("symmem.ops.registry", "import symmem.compile.hook"),
        ("symmem.compile.hook", "import torch, symmem.tools.cli"),
        ("symmem.errors", "import symmem.config"),
        ("symmem.errors", "import symmem"),
        ("symmem.tensor", "from .group import Group"),
        ("symmem.tensor", "from . import group"),
        ("symmem.tensor", "import backends.host"),
        ("symmem.tools.cli", "from allocator import errors"),
    ],
)
def test_a_violation_is_found(module: str, source: str) -> None:
    (line,) = violations(module, source, MODULES)
    assert line.startswith(f"{module}:{len(source.splitlines())}: ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("symmem.config.options", "from symmem.errors import ConfigError"),
        ("symmem.config.options", "from symmem import errors"),
        ("symmem.backends.host", "import os, torch, symmem.backends.base, symmem.config.options"),
        ("symmem", "if TYPE_CHECKING:\n    from symmem.tensor import SymmetricTensor"),
        ("symmem.ops.registry", "from symmem import find, tensor"),
        ("symmem.tools.cli", "import symmem, symmem.compile, configparser"),
    ],
)
def test_a_sound_import_passes(module: str, source: str) -> None:
    assert violations(module, source, MODULES) == []


def test_a_planted_file_is_found(tmp_path: Path) -> None:
    for file, source in {
        "allocator/ops/__init__.py": "",
        "allocator/tensor.py": "from symmem import ops",
        "tools/bench/host.py": "import symmem.ops",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert violations_below(tmp_path) == ["symmem.tensor:1: symmem.ops is in a layer above symmem"]
