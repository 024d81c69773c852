"""Kernels are compiled once and kept on disk; missing packages and failures are named."""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from symmem.backends.cuda_compile import CompiledKernels
from symmem.backends.gpu import install_hint
from symmem.errors import UnsupportedError


class StubDriver:
    def attribute(self, ordinal: int, name: str) -> int:
        return {"COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0}[name]

    def on(self, ordinal: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def function(self, kernel: int) -> str:
        return f"function {kernel}"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the stub compiler was given, in the shape of cuda.core 1.2."""
    calls: list[Any] = []

    class Program:
        def __init__(self, source: str, language: str, options: Any) -> None:
            assert language == "c++"
            self.code = (source, options.arch, *options.define_macro)

        def compile(self, target: str) -> Any:
            assert target == "cubin"
            if "mistake" in self.code[0]:
                raise OSError("error: expected ';'")
            calls.append(self.code)
            return types.SimpleNamespace(code=b"cubin of " + self.code[0].encode())

    class ObjectCode:
        @staticmethod
        def from_cubin(code: bytes) -> Any:
            assert code.startswith(b"cubin of ")
            return types.SimpleNamespace(get_kernel=lambda name: types.SimpleNamespace(handle=len(name)))

    core: Any = types.ModuleType("cuda.core")
    core.Program, core.ObjectCode, core.ProgramOptions = Program, ObjectCode, types.SimpleNamespace
    bindings: Any = types.ModuleType("cuda.bindings")
    bindings.nvrtc = types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))
    for name, module in (("cuda", types.ModuleType("cuda")), ("cuda.core", core), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


def kernels(source: str = "source", names: tuple[str, ...] = ("put", "barrier"), **macros: str) -> CompiledKernels:
    driver: Any = StubDriver()
    return CompiledKernels(driver, 0, source, names, macros, purpose="signals", needs="7.0")


def test_a_program_is_compiled_once(compiled: list[Any]) -> None:
    for _ in range(2):
        assert kernels(WORLD="2").functions == {"put": "function 3", "barrier": "function 7"}
    assert compiled == [("source", "sm_90", ("WORLD", "2"))]
    kernels(WORLD="3")
    kernels("other source", WORLD="3")
    assert len(compiled) == 3


def test_source_that_does_not_compile_is_named(compiled: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="kernels of signals cannot be compiled for sm_90: OSError: error: exp"):
        kernels("mistake")
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize(
    ("cuda", "command"),
    [
        (None, "pip install 'cuda-python>=13' cuda-core"),
        ("13.0", "pip install 'cuda-python>=13' cuda-core"),
        ("12.8", "pip install 'cuda-python>=12.9,<13' cuda-core"),
    ],
)
def test_the_hint_fits_the_cuda_of_torch(cuda: str | None, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(UnsupportedError, match=r"signals on CUDA need cuda.core to compile their kernels") as caught:
        kernels()
    assert caught.value.hint == command
    assert install_hint("nvshmem4py") == f"pip install nvshmem4py-cu{12 if cuda == '12.8' else 13}"
