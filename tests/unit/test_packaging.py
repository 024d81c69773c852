"""What is installed is what the folders hold: setuptools is silent about a package that is not listed."""

from __future__ import annotations

import configparser
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "allocator": "symmem",
    "backends": "symmem.backends",
    "config": "symmem.config",
    "tools": "symmem.tools",
}
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def package_of(folder: Path) -> str:
    """The package that a folder, relative to the root, is installed as."""
    top, *below = folder.parts
    return ".".join([FOLDERS[top], *below])


def python_files() -> list[Path]:
    return [path.relative_to(ROOT) for top in FOLDERS for path in sorted((ROOT / top).rglob("*.py"))]


def test_packages_are_the_folders_that_hold_python() -> None:
    packages = SETUPTOOLS["packages"]
    assert len(packages) == len(set(packages))
    assert set(packages) == {package_of(path.parent) for path in python_files()}


def test_each_package_is_mapped_to_its_folder() -> None:
    mapping = SETUPTOOLS["package-dir"]
    assert set(mapping) == set(SETUPTOOLS["packages"])
    for package, folder in mapping.items():
        assert package == package_of(Path(folder))


def test_each_package_has_an_init() -> None:
    for folder in SETUPTOOLS["package-dir"].values():
        assert (ROOT / folder / "__init__.py").is_file(), folder


def test_typed() -> None:
    assert "py.typed" in SETUPTOOLS["package-data"]["symmem"]
    assert (ROOT / "allocator" / "py.typed").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources: in place, setuptools would take along what an older build left."""
    for module in ("pip", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*pip_wheel, out, source], capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {"/".join([*package_of(path.parent).split("."), path.name]) for path in python_files()}
    assert {name for name in files if name.endswith(".py")} == modules
    assert "symmem/py.typed" in files
    assert {name.split("/")[0] for name in files} == {"symmem"}


def test_wheel_has_the_source_in_c(wheel: zipfile.ZipFile) -> None:
    for file in (ROOT / "allocator/native").iterdir():
        assert file.is_dir() or wheel.read(f"symmem/native/{file.name}") == file.read_bytes()


def test_wheel_has_the_headers(wheel: zipfile.ZipFile) -> None:
    headers = sorted((ROOT / "allocator/include").iterdir())
    assert [header.name for header in headers] == ["symmem.cuh", "symmem_registry.h"]
    for header in headers:
        assert wheel.read(f"symmem/include/{header.name}") == header.read_bytes()


def test_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert dict(entry_points["console_scripts"]) == {"symmem": "symmem.tools.cli:main"}


def test_wheel_has_the_license(wheel: zipfile.ZipFile) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())
