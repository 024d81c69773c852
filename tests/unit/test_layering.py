"""Imports point one way, down the list of rooms, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "allocator": "symmem",
    "backends": "symmem.backends",
    "config": "symmem.config",
    "tools": "symmem.tools",
}

# The rooms, from the top down. A module belongs to the room with the longest name that its own name begins with. It
# may import from its own room and from the rooms below. `symmem` itself is the front door: `allocator/__init__.py`.
ROOMS = (
    "symmem.__main__",
    "symmem.testing",
    "symmem.tools",
    "symmem.compile",
    "symmem.distributed",
    "symmem.torch_backend",
    "symmem.torch_compat",
    "symmem.triton",
    "symmem.ops",
    "symmem",
    "symmem.redirect",
    "symmem.tensor",
    "symmem.service",
    "symmem.arena",
    "symmem.memory",
    "symmem.group",
    "symmem.native",
    "symmem.backends",
    "symmem.config",
    "symmem.errors",
    "symmem._lazy",
    "symmem.version",
)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str) -> str:
    return max((room for room in ROOMS if is_in(module, room)), key=len)


class Project:
    """The modules of a checkout, and what every one imports.

    Args:
        sources: Text by module name; packages under the name of the package.
        packages: The names of ``sources`` that are packages.
    """

    def __init__(self, sources: Mapping[str, str], packages: set[str]) -> None:
        self.trees = {module: ast.parse(source) for module, source in sources.items()}
        self.packages = packages

    @classmethod
    def of(cls, root: Path) -> Project:
        """All modules below the folders of a checkout."""
        sources, packages = {}, set()
        for folder, package in FOLDERS.items():
            for path in sorted((root / folder).rglob("*.py")):
                parts = path.relative_to(root / folder).with_suffix("").parts
                module = ".".join([package, *(part for part in parts if part != "__init__")])
                sources[module] = path.read_text()
                if path.name == "__init__.py":
                    packages.add(module)
        return cls(sources, packages)

    def imports(self, module: str) -> Iterator[ast.Import | ast.ImportFrom]:
        """All import statements, those in functions and under TYPE_CHECKING included."""
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node

    def home(self, package: str, name: str, seen: tuple[str, ...] = ()) -> str:
        """The module that defines ``package.name``, through the ``__init__`` of every package that re-exports it."""
        if f"{package}.{name}" in self.trees:
            return f"{package}.{name}"
        if package in self.packages and package not in seen:
            for node in self.imports(package):
                if isinstance(node, ast.ImportFrom) and node.module in self.trees and node.module != package:
                    for alias in node.names:
                        if (alias.asname or alias.name) == name:
                            return self.home(node.module, alias.name, (*seen, package))
        return package

    def targets(self, node: ast.Import | ast.ImportFrom) -> list[str]:
        """The modules that an import statement needs."""
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        return [self.home(str(node.module), alias.name) for alias in node.names]

    def violations(self, module: str) -> Iterator[str]:
        """Imports of a module that point up, are relative, or name a folder of the checkout."""
        for node in self.imports(module):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{module}:{node.lineno}: relative import, write symmem...."
                continue
            for target in self.targets(node):
                top = target.split(".")[0]
                if top in FOLDERS:
                    yield f"{module}:{node.lineno}: {top} is a folder, write {FOLDERS[top]}"
                elif is_in(target, "symmem") and ROOMS.index(room_of(target)) < ROOMS.index(room_of(module)):
                    yield f"{module}:{node.lineno}: {target} is in a room above {room_of(module)}"

    def circles(self) -> list[list[str]]:
        """Modules that import one another, directly or through others; the ``__init__`` of packages left out."""
        edges = {
            module: {
                target
                for node in self.imports(module)
                if not (isinstance(node, ast.ImportFrom) and node.level)
                for target in self.targets(node)
                if target in self.trees and target != module and target not in self.packages
            }
            for module in self.trees
            if module not in self.packages
        }
        reach = {module: _reachable(module, edges) for module in edges}
        found = {frozenset(other for other in reach[m] if m in reach[other]) for m in edges if m in reach[m]}
        return sorted(sorted(circle) for circle in found)

    def problems(self) -> list[str]:
        """Everything that is wrong."""
        found = [line for module in self.trees for line in self.violations(module)]
        return found + [f"circle: {', '.join(circle)}" for circle in self.circles()]


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = list(edges[start])
    while ahead:
        module = ahead.pop()
        if module not in found:
            found.add(module)
            ahead += edges[module]
    return found


def test_imports_point_down_and_in_no_circle() -> None:
    project = Project.of(ROOT)
    assert len(project.trees) > 100
    assert project.problems() == []


def test_every_folder_of_the_package_is_a_room_or_in_one() -> None:
    folders = {path.name for path in (ROOT / "allocator").iterdir() if (path / "__init__.py").exists()}
    assert {room_of(f"symmem.{folder}") for folder in folders} == {f"symmem.{folder}" for folder in folders}


SOUND = {
    "symmem": "if TYPE_CHECKING:\n    from symmem.tensor import SymmetricTensor",
    "symmem.tensor": "if TYPE_CHECKING:\n    from symmem.tensor.tensor import SymmetricTensor",
    "symmem.tensor.tensor": "import torch\nfrom symmem.group import Group",
    "symmem.tensor.request": "",
    "symmem.group": "if TYPE_CHECKING:\n    from symmem.group.group import Group",
    "symmem.group.group": "from symmem.backends import base",
    "symmem.ops": "",
    "symmem.ops.registry": "from symmem.ops.registry.registry import lookup",
    "symmem.ops.registry.registry": "from symmem import find",
    "symmem.compile": "",
    "symmem.compile.hook": "",
    "symmem.backends": "",
    "symmem.backends.base": "import os, torch, symmem.config.options",
    "symmem.backends.host": "import symmem.backends.base",
    "symmem.config": "",
    "symmem.config.options": "from symmem.errors import ConfigError",
    "symmem.errors": "",
    "symmem.tools": "",
    "symmem.tools.cli": "import symmem, symmem.ops.registry.registry, configparser",
}
PACKAGES = {"symmem", *(f"symmem.{name}" for name in ("tensor", "group", "ops", "ops.registry", "compile"))} | {
    f"symmem.{name}" for name in ("backends", "config", "tools")
}


def test_sound_imports_pass() -> None:
    assert Project(SOUND, PACKAGES).problems() == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("symmem.config.options", "import symmem.backends"),
        ("symmem.config.options", "from symmem import __version__"),
        ("symmem.config.options", "from symmem import backends"),
        ("symmem.backends.host", "from symmem.tensor import SymmetricTensor"),
        ("symmem.backends.host", "from symmem import tensor"),
        ("symmem.backends.host", "def f():\n    import symmem.tensor.tensor"),
        ("symmem.backends.host", "if TYPE_CHECKING:\n    from symmem.group import Group"),
        ("symmem.group.group", "from symmem.tensor.request import request"),
        ("symmem.tensor.tensor", "from symmem import allocate"),
        ("symmem.tensor.tensor", "from symmem.ops.registry import lookup"),
        ("symmem.ops.registry.registry", "import symmem.compile.hook"),
        ("symmem.compile.hook", "import torch, symmem.tools.cli"),
        ("symmem.errors", "import symmem.config"),
        ("symmem.errors", "import symmem"),
        ("symmem.tensor.tensor", "from .request import request"),
        ("symmem.tensor.tensor", "from . import request"),
        ("symmem.tensor.tensor", "import backends.host"),
        ("symmem.tools.cli", "from allocator import errors"),
    ],
)
def test_an_import_that_is_wrong_is_found(module: str, source: str) -> None:
    (line,) = Project(SOUND | {module: source}, PACKAGES).problems()
    assert line.startswith(f"{module}:{len(source.splitlines())}: ")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"tensor.request": "from symmem.tensor.tensor import SymmetricTensor"}, id="directly"),
        pytest.param({"tensor.request": "def f():\n    import symmem.tensor.tensor"}, id="deferred"),
        pytest.param({"tensor.request": "if TYPE_CHECKING:\n    import symmem.tensor.tensor"}, id="type checking"),
        pytest.param({"tensor.request": "from symmem.tensor import SymmetricTensor"}, id="through a re-export"),
        pytest.param(
            {
                "tensor.request": "from symmem.tensor.again import Name",
                "tensor.again": "from symmem.tensor import SymmetricTensor as Name",
            },
            id="through two",
        ),
    ],
)
def test_a_circle_is_found(changes: dict[str, str]) -> None:
    planted = {"symmem.tensor.tensor": "from symmem.tensor import request"}
    planted |= {f"symmem.{module}": source for module, source in changes.items()}
    (line,) = Project(SOUND | planted, PACKAGES | {"symmem.tensor.again"} & planted.keys()).problems()
    assert line == "circle: symmem.tensor.request, symmem.tensor.tensor"


def test_a_planted_file_is_found(tmp_path: Path) -> None:
    for file, source in {
        "allocator/ops/__init__.py": "",
        "allocator/tensor/__init__.py": "from symmem import ops",
        "tools/bench/host.py": "import symmem.ops",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert Project.of(tmp_path).problems() == ["symmem.tensor:1: symmem.ops is in a room above symmem.tensor"]
