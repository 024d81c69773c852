"""Figures as JSON lines, and what became slower from one file to another."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from symmem.errors import InvalidArgumentError
from symmem.tools import cli
from symmem.tools.bench.compare import FigureChange, parse, read
from symmem.tools.bench.figures import UNITS, Figure, measurements, pair_of

FIGURE = Figure("all_reduce", "host", 2, 1024, 20.0, "us", "gloo", 200.0)


@given(st.text(max_size=20), st.integers(1, 2**40), st.floats(-1e12, 1e12), st.sampled_from([*UNITS]))
def test_a_figure_is_read_as_it_was_written(name: str, number: int, value: float, unit: str) -> None:
    for figure in (Figure(name, name, number, number, value, unit), replace(FIGURE, value=number, unit=unit)):
        assert parse(figure.json()) == figure


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
@example("[" * 100_000)
@example("9" * 5000)
def test_any_other_text_is_a_named_error(line: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse(line)


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(FIGURE.json()) | changes)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "not JSON"),
        ("[1]", "expected the keys figure, backend, world"),
        (changed(speed=1), "expected the keys figure, backend, world"),
        (changed(value=math.nan), "'value' has a wrong value: 'nan'"),
        (changed(world=True), "'world' has a wrong value: 'True'"),
        (changed(unit="ms"), "'unit' must be one of us, GB/s, count, bytes"),
        (FIGURE.json(), "the same figure as in an earlier line"),
    ],
)
def test_errors_name_file_and_line(line: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text(f"{FIGURE.json()}\n{line}\n")
    with pytest.raises(InvalidArgumentError) as caught:
        read(file)
    assert caught.value.what.startswith(f"{file}, line 2: ")
    assert text in caught.value.what


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for file in (tmp_path / "nosuch", tmp_path, binary):
        assert cli.main(["bench", "compare", str(file), str(file)]) == 1
        assert f"symmem: InvalidArgumentError: {file}: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("unit", "old", "new", "ratio", "slowdown"),
    [
        ("us", 10.0, 12.0, 1.2, 1.2),
        ("GB/s", 300.0, 100.0, 1 / 3, 3.0),
        ("GB/s", 300.0, 0.0, 0.0, math.inf),
        ("count", 0, 3, None, math.inf),  # it leaks now
        ("count", 0, 0, None, 1.0),
        ("bytes", -4096, 0, None, 1.0),
        ("bytes", 4096, -4096, -1.0, -1.0),
    ],
)
def test_worse_is_more_time_or_less_bandwidth(
    unit: str, old: float, new: float, ratio: float | None, slowdown: float
) -> None:
    change = FigureChange(replace(FIGURE, unit=unit, value=old), replace(FIGURE, unit=unit, value=new))
    assert change.ratio == pytest.approx(ratio)
    assert change.slowdown == pytest.approx(slowdown)


def test_compare_prints_a_table_and_fails_if_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    with_nccl = replace(FIGURE, peer="nccl", peer_value=40.0)
    barrier, copy = replace(FIGURE, figure="barrier"), Figure("p2p_pull", "native", 8, 64, 300.0, "GB/s")
    old.write_text("".join(f"{each.json()}\n" for each in (FIGURE, with_nccl, copy, barrier)))
    now = [replace(FIGURE, value=24.0), replace(with_nccl, value=24.0), replace(copy, value=310.0)]
    new.write_text("".join(f"{each.json()}\n" for each in [*now, replace(barrier, figure="tour")]))

    assert cli.main(["bench", "compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert rows[2] == "all_reduce host 2 1024 gloo 20.00 24.00 us 1.200 0.100 -> 0.120"
    assert rows[4] == "p2p_pull native 8 64 - 300.00 310.00 GB/s 1.033 - -> -"
    assert f"Only in {old}:\n  barrier, host, 2 ranks, 1024 bytes\n" in out
    assert f"Only in {new}:\n  tour, host, 2 ranks, 1024 bytes\n" in out
    worse = "Worse by more than 1.1 times:\n  1.20 times: all_reduce, host, 2 ranks, 1024 bytes\n"
    assert out.endswith(worse)  # once, though there are two peers

    assert cli.main(["bench", "compare", str(old), str(new), "--fail-over", "1.1"]) == 1
    assert capsys.readouterr().out.endswith(worse)
    assert cli.main(["bench", "compare", str(old), str(new), "--fail-over", "1.3"]) == 0
    assert capsys.readouterr().out.endswith("Worse by more than 1.3 times: nothing.\n")
    assert cli.main(["bench", "compare", str(new), str(old), "--fail-over", "1"]) == 1  # the copy


@pytest.mark.parametrize("limit", ["0.9", "nan", "inf", "much"])
def test_a_limit_is_a_number_from_1(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "compare", "a", "b", "--fail-over", limit])
    assert caught.value.code == 2
    assert f"expected a number from 1, such as 1.1, got '{limit}'" in capsys.readouterr().err


def test_the_best_peer_is_the_one_with_the_best_value() -> None:
    slow = replace(FIGURE, peer="mpi", peer_value=300.0)
    (found,) = measurements([slow, FIGURE])
    assert (found.best, found.first) == (FIGURE, slow)
    (found,) = measurements([replace(slow, unit="GB/s"), replace(FIGURE, unit="GB/s")])
    assert found.best is not None
    assert found.best.peer == "mpi"
    (found,) = measurements([Figure("reclaim", "host", 2, 0, 1.0, "us")])
    assert found.best is None
    assert len(measurements([FIGURE, replace(FIGURE, value=21.0)])) == 2


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("p2p_pull_alone/0/12", ("p2p_pull_alone", 0, 12)),
        *((name, None) for name in ("barrier", "a/1", "a/1/x", "a//1", "a/1/2/3")),
    ],
)
def test_pairs_are_in_the_name(name: str, pair: tuple[str, int, int] | None) -> None:
    assert pair_of(name) == pair
