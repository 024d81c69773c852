"""The Python in the documentation runs: every page is one program, on two processes of this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from doc_pages import ROOT, blocks, pages, program
from patience import SETTINGS, TASK

from symmem.tools.examples import run_example
from symmem.tools.outcomes import RanksFailedError

# No GPU, or the same programs would take it; inductor makes no processes of its own.
ENV = {
    "CUDA_VISIBLE_DEVICES": "",
    "SYMMEM_ENABLE": SETTINGS,
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
PROGRAMS = {str(page.relative_to(ROOT)): program(page.read_text()) for page in pages()}
# Further down it shows what has names of the reader's own.
PROGRAMS["README.md"] = program((ROOT / "README.md").read_text().partition("\n## ")[0])


def run(text: str, name: str, folder: Path) -> str:
    path = folder / f"{name.replace('/', '_')}.py"  # a file, since Triton and torch read functions' sources
    path.write_text(text)
    return run_example(path, 2, ENV, timeout=TASK)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [name for name, text in PROGRAMS.items() if text])
def test_a_page_runs(name: str, tmp_path: Path) -> None:
    needed = {module for block in blocks((ROOT / name).read_text()) for module in block.needs}
    if missing := [module for module in sorted(needed) if importlib.util.find_spec(module) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    run(PROGRAMS[name], name, tmp_path)


@pytest.mark.ranks
def test_a_page_that_is_wrong_fails(tmp_path: Path) -> None:
    text = PROGRAMS["docs/quickstart.md"]
    wrong = text.replace("world * (world - 1) / 2", "world * world")
    assert wrong != text
    with pytest.raises(RanksFailedError, match=r"AssertionError"):
        run(wrong, "wrong", tmp_path)
