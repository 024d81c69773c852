"""`symmem check reproducible`: it finds the same bits here, and planted differences where they are."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from symmem.ops import functions as ops
from symmem.tools import cli, reproducible
from symmem.tools.commands.check import report

Output = pytest.CaptureFixture[str]


@pytest.mark.ranks
def test_the_bits_are_the_same_here(capsys: Output) -> None:
    assert cli.main(["check", "reproducible", "--device", "cpu", "--ranks", "4", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["ranks"], out["device"], out["same"]) == (4, "cpu", True)
    kinds = {(case["contract"], case["operation"], case["dtype"]) for case in out["cases"]}
    assert len(kinds) == len(out["cases"]) == 5 * 2 * 4
    assert not any(case["differs"] for case in out["cases"])


def different_rows(device: str) -> Any:
    """`row_bits` with another fault of all_reduce for every dtype."""
    original = ops.all_reduce

    def wrong(x: torch.Tensor, group: Any, reduction: str) -> torch.Tensor:
        out = original(x, group, reduction)
        differs = {
            torch.float32: len(x) == 15,  # depends on the batch
            torch.float16: len(x) > 1000,  # on the algorithm
            torch.bfloat16: dist.get_rank() == 1,
            torch.float64: os.getpid(),  # on the run
        }[x.dtype]
        return out + differs * (reduction == "avg")

    ops.all_reduce = wrong  # type: ignore[assignment]
    try:
        return reproducible.row_bits(device)
    finally:
        ops.all_reduce = original


def different_trees(device: str) -> Any:
    """`tree_bits` with sums in rank order instead of a tree."""
    original = ops.all_reduce

    def wrong(x: torch.Tensor, group: Any, reduction: str, order: str) -> torch.Tensor:
        return original(x.sum(0), group, reduction)

    ops.all_reduce = wrong  # type: ignore[assignment]
    try:
        return reproducible.tree_bits(device)
    finally:
        ops.all_reduce = original


@pytest.mark.ranks
def test_differences_are_found_where_they_are(capsys: Output) -> None:
    cases = reproducible.examine(2, "cpu", different_rows, different_trees)
    found = {(case.contract, case.dtype): case.differs for case in cases if case.differs}
    assert not any(case.differs for case in cases if case.operation != "all_reduce")
    assert found.pop(("batch", "float32")) == ("row 13 of 15 on rank 0", "row 13 of 15 on rank 1")
    assert found.pop(("algorithms", "float16"))[0] == "two shots on rank 0"
    assert found.pop(("ranks", "bfloat16")) == ("rank 1",)
    assert found.pop(("runs", "float64")) == ("rank 0", "rank 1")
    assert found.pop(("ranks", "float64")) == ("rank 1",)
    assert found.pop(("tree", "float32")) == ("2 ranks",)
    assert {contract for contract, _dtype in found} == {"tree"}  # of the other dtypes
    assert report(cases, 2, "cpu", as_json=False) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(cases)
    assert "DIFFERENT  batch       all_reduce      float32   row 13 of 15 on rank 0, row 13 of 15 on rank 1" in out
    assert "symmem: bits differ in " in err
    assert "batch all_reduce float32; " in err
    assert report(cases, 2, "cpu", as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["same"] is False


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cli.main(["check", "reproducible", "--device", "cuda", "--ranks", "2"]) == 1
    assert "needs a GPU for each rank, not 2 ranks on 1 GPUs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["check"])
