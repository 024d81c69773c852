"""The C and C++ code under the sanitizers of the compiler: addresses and undefined behaviour, and threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
CC, CXX = (shutil.which(name) or name for name in ("gcc", "g++"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str, **variables: str) -> str:
    """Run a command; returns what it prints."""
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def require(compiler: str, kinds: str, folder: Path) -> None:
    """Skip the test if a program cannot be compiled with these sanitizers and run."""
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    try:
        run(compiler, f"-fsanitize={kinds}", str(folder / "empty.c"), "-o", str(folder / "empty"))
        run(str(folder / "empty"))
    except (AssertionError, OSError) as error:
        pytest.skip(f"{compiler} has no -fsanitize={kinds} that works here: {error}")


@pytest.mark.parametrize("kinds", ["address,undefined", "thread"])
def test_threads_that_use_the_backend_of_torch(kinds: str, tmp_path: Path) -> None:
    require(CXX, kinds, tmp_path)
    program = str(tmp_path / "exercise")
    run(
        *(CXX, "-std=c++20", "-O0", "-g1", f"-fsanitize={kinds}", "-fno-sanitize-recover=all"),
        "-fno-sanitize=vptr",  # torch's libraries do not export all typeinfo
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{ROOT / 'allocator' / 'native'}", f"-I{TORCH / 'include'}"),
        *(str(Path(__file__).with_name("exercise.cpp")), "-o", program),
        *(f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"),
    )
    assert run(program) == "ok\n"


def test_the_module_in_c(tmp_path: Path) -> None:
    """The tests of eager launches, of the ledger and of barriers pass over a module with sanitizers."""
    kinds = "address,undefined"
    require(CC, kinds, tmp_path)
    libraries = [run(CC, f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    # The libraries are for Python alone: they make compilers slow.
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            (tmp_path / name).write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {found} "$@"\n')
            (tmp_path / name).chmod(0o755)
    files = [
        str(ROOT / "tests" / file) for file in ("ops/test_eager.py", "group/test_ledger.py", "backends/test_signals.py")
    ]
    told = run(
        *(sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "temp")),
        CC=f"env -u LD_PRELOAD {CC} -fsanitize={kinds} -fno-sanitize-recover=all -g",
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        ASAN_OPTIONS="detect_leaks=0",  # Python keeps memory to the end
        LD_PRELOAD=" ".join(libraries),
    )
    assert "passed" in told
    assert "skipped" not in told
