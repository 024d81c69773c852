"""`symmem tune` without a GPU: from measured times to a table, and the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symmem.config.kernel_tables import KERNELS, Row, parse_algorithms, read_algorithms
from symmem.errors import ConfigError
from symmem.ops.engines.cuda_tuning import BLOCKS, Choice, built_in, table_for
from symmem.tools import tuning
from symmem.tools.cli import main
from symmem.tools.tuning import candidates, changes, rows_from, search, write

KI = 1 << 10
SIZES = tuple(KI << power for power in range(1, 14))


class Machine:
    """A machine where a kernel takes a fixed time and a time by bytes; 128 threads and 64 blocks are best."""

    COSTS: ClassVar = {
        "one_shot": (2.0, 8.0),
        "two_shot": (4.0, 2.0),
        "reduce_scatter": (1.0, 1.0),
        "exchange": (1.0, 3.0),
        "pull": (5.0, 1.0),
        "put": (9.0, 0.8),
    }

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, list[Row]]] = []

    def measure(self, operation: str, nbytes: int, rows: Sequence[Row]) -> list[float]:
        self.asked.append((operation, nbytes, list(rows)))
        return [self.seconds(row, nbytes) for row in rows]

    def seconds(self, row: Row, nbytes: int) -> float:
        fixed, rate = self.COSTS[row.kernel]
        slower = 1 + (row.threads != 128) * 0.1 + (row.blocks != 64) * 0.2
        return (fixed + rate * nbytes / (64 * KI)) * slower * 1e-6


@pytest.mark.parametrize("operation", KERNELS)
@pytest.mark.parametrize("world", [2, 8, 64])
def test_candidates_are_good_rows_of_every_kernel(operation: str, world: int) -> None:
    rows = candidates(operation, world)
    assert {row.kernel for row in rows} == set(KERNELS[operation])
    assert len(set(rows)) == len(rows)
    assert all(row.blocks <= BLOCKS for row in rows)


def test_the_quickest_of_each_size_is_found(tmp_path: Path) -> None:
    machine, known = Machine(), built_in(8)
    times = search("move", 8, known.move, SIZES, machine.measure)
    rows = rows_from(times)
    write(tmp_path / "t.yaml", {"move": rows}, 8, ["of a test"])
    table = table_for(8, str(tmp_path / "t.yaml"))
    tried = candidates("move", 8)
    for nbytes in SIZES:
        for symmetric in (False, True):
            best = min(
                (row for row in tried if symmetric or not row.symmetric), key=lambda row: machine.seconds(row, nbytes)
            )
            chosen = table.choose_move(nbytes, symmetric)
            taken = machine.seconds(Row(8, None, chosen.kernel, chosen.threads, chosen.blocks), nbytes)
            assert taken <= machine.seconds(best, nbytes) / tuning._WORTH
    assert table.choose_move(2 * KI) == Choice("exchange", 128, 64)
    assert table.choose_move(1 << 33).kernel == "pull"
    assert table.choose_move(1 << 33, True).kernel == "put"
    assert table.all_reduce == known.all_reduce


def test_noise_makes_no_rows() -> None:
    first, second = candidates("reduce_scatter", 2)[:2]
    times = {KI: {first: 1.0, second: 1.1}, 2 * KI: {first: 1.0, second: 0.99}, 4 * KI: {first: 1.1, second: 1.0}}
    assert rows_from(times) == (first._replace(nbytes=2 * KI), second)


def test_what_is_hopeless_is_not_tried_for_more_bytes() -> None:
    machine = Machine()
    search("all_reduce", 8, built_in(8).all_reduce, SIZES, machine.measure)
    kernels = [{row.kernel for row in rows} for _, _, rows in machine.asked]
    assert kernels[0] == {"one_shot", "two_shot"}
    assert kernels[-1] == {"two_shot"}


def test_changes_are_against_what_was_known() -> None:
    machine, known = Machine(), built_in(8).all_reduce
    times = search("all_reduce", 8, known, SIZES, machine.measure)
    found = changes(times, 8, known, rows_from(times))
    assert [each.nbytes for each in found] == list(SIZES)
    for each in found:
        assert each.seconds_before == machine.seconds(each.before, each.nbytes)
        assert each.seconds_after == machine.seconds(each.after, each.nbytes)
        assert each.seconds_after <= each.seconds_before
    assert (found[0].before.blocks, found[0].after.blocks) == (128, 64)


@given(st.data())
def test_whatever_was_measured_makes_a_table(data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(sorted(KERNELS)))
    rows = candidates(operation, 4)
    times = {
        size: {row: data.draw(st.floats(1e-6, 1e-3)) for row in rows}
        for size in data.draw(st.lists(st.sampled_from(SIZES), min_size=1, unique=True))
    }
    lines = [f"  - {{{tuning._written(operation, row)}}}" for row in rows_from(times)]
    read = parse_algorithms("version: 1\nrows:\n" + "\n".join(lines), "t.yaml")
    assert read[operation, 4] == rows_from(times)


def test_other_rows_of_a_file_stay(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    pull, exchange = Row(2, None, "pull", 256, 64, nap=40), Row(2, None, "exchange", 256, 64)
    write(file, {"move": [pull]}, 2, ["first"])
    write(file, {"move": [exchange._replace(nbytes=3 * KI), pull]}, 4, ["second"])
    write(file, {"move": [exchange]}, 2, ["third"])
    assert read_algorithms(str(file)) == {
        ("move", 2): (exchange,),
        ("move", 4): (exchange._replace(world=4, nbytes=3 * KI), pull._replace(world=4)),
    }
    assert [line for line in file.read_text().splitlines() if line.startswith("#")] == [
        "# third",
        "# second",
        "# first",
    ]
    file.write_text("something else")
    with pytest.raises(ConfigError):
        write(file, {"move": [pull]}, 2, [])
    assert file.read_text() == "something else"
    with pytest.raises(ConfigError, match="there is no folder"):
        write(tmp_path / "none" / "t.yaml", {"move": [pull]}, 2, [])


def test_a_machine_without_gpus_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main(["tune", "--ranks", "2"]) == 1
    assert "UnsupportedError: `symmem tune` measures CUDA kernels" in capsys.readouterr().err
    for bad in (["--most", "3KiB"], ["--least", "8"], ["--operations", "gather"]):
        with pytest.raises(SystemExit):
            main(["tune", *bad])
    assert main(["tune", "--least", "4KiB", "--most", "2KiB"]) == 1
    assert "--least 4096 bytes is more than" in capsys.readouterr().err
