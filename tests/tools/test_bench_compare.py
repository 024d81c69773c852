"""Figures as JSON lines, and what became slower from one file to another (mission F4)."""

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
from symmem.tools.bench.compare import Change, compare, parse, read
from symmem.tools.bench.figures import UNITS, Figure, measurements, pair_of

FIGURE = Figure("all_reduce", "host", 2, 1024, 20.0, "us", "gloo", 200.0)

names = st.text(min_size=1, max_size=20)
numbers = st.floats(-1e12, 1e12) | st.integers(-(10**12), 10**12)
peers = st.tuples(st.just(""), st.none()) | st.tuples(names, st.just(0.0) | st.floats(1e-9, 1e12))


@st.composite
def figures(draw: st.DrawFn) -> Figure:
    peer, peer_value = draw(peers)
    sizes = draw(st.integers(1, 10**5)), draw(st.integers(0, 2**60))
    return Figure(draw(names), draw(names), *sizes, draw(numbers), draw(st.sampled_from([*UNITS])), peer, peer_value)


@given(figures())
def test_a_figure_is_read_as_it_was_written(figure: Figure) -> None:
    assert parse(figure.json()) == figure


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@given(figures(), st.sampled_from([*json.loads(FIGURE.json()), "more"]), json_values)
@example(FIGURE, "world", True)
@example(FIGURE, "value", 10**400)
@example(FIGURE, "ratio", math.nan)
def test_what_is_accepted_is_the_figure_that_was_written(figure: Figure, key: str, value: Any) -> None:
    line = json.dumps(json.loads(figure.json()) | {key: value})
    try:
        found = parse(line)
    except InvalidArgumentError:
        return
    written = json.loads(line)
    for name, was in written.items():
        if name == "ratio":
            assert was == pytest.approx(found.ratio)
        else:
            assert getattr(found, name) == was
            assert type(was) is type(getattr(found, name))
    assert (found.world >= 1, found.bytes >= 0, found.unit in UNITS) == (True, True, True)


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
@example("[" * 100_000)
@example("9" * 5000)
def test_any_text_is_a_figure_or_a_named_error(line: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse(line)


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(FIGURE.json()) | changes)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("", "not JSON"),
        ("[1]", "expected a JSON object, got '[1]'"),
        ("{}", "keys are missing: ['backend'"),
        (changed(speed=1), "unknown ones: ['speed']"),
        (FIGURE.json()[:-1] + ', "unit": "us"}', "a key is there twice"),
        (changed(value=math.nan), "NaN is no number"),
        (changed(value="1"), "'value' must be a number"),
        (changed(value=True), "'value' must be a number"),
        (changed(world=0), "'world' must be a whole number from 1"),
        (changed(bytes=1.5), "'bytes' must be a whole number from 0"),
        (changed(unit="ms"), "'unit' must be one of us, GB/s, count, bytes"),
        (changed(figure=""), "'figure' must be a name"),
        (changed(peer=""), "'peer_value' must be one, if and only if a peer"),
        (changed(peer_value=None), "'peer_value' must be one, if and only if a peer"),
        (changed(ratio=0.2), "'ratio' must be value over peer_value, 0.1"),
        (changed(ratio=None), "'ratio' must be value over peer_value, 0.1"),
        (FIGURE.json(), "this figure was there before"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(line: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    file.write_text(f"{FIGURE.json()}\n{line}\n")
    with pytest.raises(InvalidArgumentError) as caught:
        read(file)
    assert caught.value.what.startswith(f"{file}, line 2: ")
    assert what in caught.value.what
    assert "symmem bench SUITE --json" in str(caught.value)


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
        ("us", 10.0, 5.0, 0.5, 0.5),
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
    change = Change(replace(FIGURE, unit=unit, value=old), replace(FIGURE, unit=unit, value=new))
    assert change.ratio == pytest.approx(ratio)
    assert change.slowdown == pytest.approx(slowdown)


def test_figures_are_found_by_what_they_are_of() -> None:
    kinds = [{"figure": "x"}, {"backend": "x"}, {"world": 4}, {"bytes": 2}, {"peer": "nccl"}, {"unit": "count"}]
    others = [replace(FIGURE, **kind) for kind in kinds]
    found = compare([FIGURE, *others[:3]], [*others[3:], replace(FIGURE, value=25.0)])
    assert [(change.old.value, change.new.value) for change in found.both] == [(20.0, 25.0)]
    assert found.gone == others[:3]
    assert found.added == others[3:]


def test_compare_tells_and_fails_if_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    with_nccl = replace(FIGURE, peer="nccl", peer_value=40.0)
    barrier, copy = replace(FIGURE, figure="barrier"), Figure("p2p_pull", "native", 8, 64, 300.0, "GB/s")
    old.write_text("".join(f"{each.json()}\n" for each in (FIGURE, with_nccl, copy, barrier)))
    now = [replace(FIGURE, value=24.0), replace(with_nccl, value=24.0), replace(copy, value=310.0)]
    new.write_text("".join(f"{each.json()}\n" for each in [*now, replace(barrier, figure="tour")]))

    assert cli.main(["bench", "compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[2] == [
        "all_reduce",
        "host",
        "2",
        "1024",
        "gloo",
        "20.00",
        "24.00",
        "us",
        "1.200",
        "0.100",
        "->",
        "0.120",
    ]
    assert rows[4] == ["p2p_pull", "native", "8", "64", "-", "300.00", "310.00", "GB/s", "1.033", "-", "->", "-"]
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
        ("barrier", None),
        ("a/1", None),
        ("a/1/x", None),
        ("a//1", None),
        ("a/1/2/3", None),
    ],
)
def test_pairs_are_told_by_the_name(name: str, pair: tuple[str, int, int] | None) -> None:
    assert pair_of(name) == pair
