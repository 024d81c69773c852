"""Tables of algorithms: the YAML file, the rows that it replaces, and the comparison of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from thread_ranks import make_groups, run_ranks

from symmem.config import load_settings
from symmem.config.kernel_tables import parse_algorithms, read_algorithms
from symmem.config.kinds import BUILT_IN
from symmem.errors import ConfigError, MismatchError
from symmem.group.compare import compare_in_group
from symmem.ops.engines.cuda_tuning import Choice, built_in, table_for

HEAD = "version: 1\nrows:\n"
GOOD = """version: 1
rows:
  - {operation: all_reduce, world: 4, nbytes: 64KiB, kernel: one_shot, threads: 64, blocks: 7, nap: 20}
  - {operation: all_reduce, world: 4, kernel: two_shot, threads: 512, blocks: 256}
  - {operation: move, world: 2, kernel: pull, threads: 96, blocks: 3}
  - {operation: move, world: 8, nbytes: 64KiB, kernel: exchange, threads: 64, blocks: 4}
  - {operation: move, world: 8, kernel: put, threads: 128, blocks: 8}
  - {operation: move, world: 8, kernel: pull, threads: 64, blocks: 4}
"""


@pytest.fixture
def good(tmp_path: Path) -> str:
    file = tmp_path / "table.yaml"
    file.write_text(GOOD)
    return str(file)


def test_rows_take_the_place_of_those_for_the_same_ranks(good: str) -> None:
    table, known = table_for(4, good), built_in(4)
    assert table.choose(64 << 10) == Choice("one_shot", 64, 7, 20)
    assert table.choose((64 << 10) + 1) == Choice("two_shot", 512, 256)
    assert table_for(8, good).choose_move(1 << 30, symmetric=True) == Choice("put", 128, 8)
    assert table_for(8, good).choose_move(1 << 30) == Choice("pull", 64, 4)
    assert table_for(8, good).symmetric_beyond() == 64 << 10
    assert (table.move, table.reduce_scatter) == (known.move, known.reduce_scatter)
    assert table_for(2, good).choose_move(1) == Choice("pull", 96, 3)
    assert table_for(2, good).all_reduce == built_in(2).all_reduce
    assert table_for(3, good) == built_in(3)
    assert table_for(4) == table_for(4, BUILT_IN) == known


def test_fingerprints_tell_what_is_chosen(good: str) -> None:
    assert table_for(4, good).fingerprint() != table_for(4).fingerprint()
    assert table_for(3, good).fingerprint() == table_for(3).fingerprint()
    assert table_for(4).fingerprint() == table_for(3).fingerprint()  # the same rows, written for up to 4 ranks


ROW = "{operation: all_reduce, world: 2, nbytes: 4KiB, kernel: one_shot, threads: 128, blocks: 8}"
LAST = "{operation: all_reduce, world: 2, kernel: two_shot, threads: 128, blocks: 8}"
MOVE = "{operation: move, world: 2, kernel: pull, threads: 128, blocks: 8}"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "1:1: rows: the table has no rows"),
        ([ROW.replace("one_shot", "one_shoot"), LAST], "rows[0].kernel: unknown kernel 'one_shoot'"),
        ([LAST.replace("two_shot", "pull")], "rows[0].kernel: unknown kernel 'pull'"),
        ([LAST.replace("all_reduce", "gather")], "3:17: rows[0].operation: unknown operation 'gather'"),
        ([LAST.replace("threads: 128, ", "")], "3:5: rows[0]: the key 'threads' is missing"),
        ([LAST.replace("threads", "thread")], "rows[0]: unknown key 'thread'"),
        ([LAST.replace("128", "100")], "3:66: rows[0].threads: expected a multiple of 32 from 64 to 512; got '100'"),
        ([LAST.replace("128", "1024")], "rows[0].threads: expected a multiple of 32 from 64 to 512; got '1024'"),
        ([LAST.replace("8}", "257}")], "rows[0].blocks: expected a whole number from 1 to 256; got '257'"),
        ([LAST.replace("8}", "-1}")], "rows[0].blocks: expected a whole number from 1 to 256; got '-1'"),
        ([LAST.replace("8}", "٣}")], "rows[0].blocks: expected a whole number from 1 to 256; got '٣'"),
        ([LAST.replace("world: 2", "world: 1")], "rows[0].world: expected a whole number from 2 to 64; got '1'"),
        ([ROW.replace("4KiB", "4KB"), LAST], "rows[0].nbytes: unknown unit 'KB' in '4KB'"),
        ([LAST.replace("8}", "8, nap: 1e9}")], "rows[0].nap: expected a whole number from 0 to 1000000; got '1e9'"),
        ([ROW, MOVE], "3:5: rows[0]: a gap after this row: no row is for any all_reduce of 2 ranks of more than 4KiB"),
        ([MOVE.replace("pull", "put")], "rows[0]: a gap after this row: no row is for any move of 2 ranks"),
        ([MOVE, MOVE.replace("pull", "put")], "4:5: rows[1]: this row is never used"),
        ([ROW, ROW, LAST], "4:5: rows[1]: this row is never used"),
        ([LAST, ROW], "4:5: rows[1]: this row is never used"),
        ([LAST, MOVE, LAST], "5:5: rows[2]: this row is never used"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_key(rows: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    text = HEAD + "".join(f"  - {row}\n" for row in rows) if rows else "version: 1\nrows: []\n"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_algorithms(str(file))
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={"SYMMEM_ENABLE": f"algorithms({file})"})
    assert str(caught.value).startswith(f"SYMMEM_ENABLE, character 12: algorithms: {file}:")
    assert message in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for text, message in (
        ("rows: []", "version: the key is missing"),
        ("version: 1", "has no rows"),
        ("[", "YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_algorithms(text, "t.yaml")
    with pytest.raises(ConfigError, match="argument algorithms: cannot read the table of algorithms"):
        load_settings({"algorithms": tmp_path / "none.yaml"}, environ={})


def test_a_path_does_not_depend_on_later_folders(good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(good).parent)
    assert load_settings({"algorithms": "table.yaml"}, environ={}).algorithms == good


@given(
    st.lists(st.tuples(st.integers(1, 1 << 40), st.booleans()), max_size=5),
    st.integers(0, 1 << 41),
    st.booleans(),
)
def test_a_table_that_is_taken_answers_for_every_size(
    limits: list[tuple[int, bool]], nbytes: int, symmetric: bool
) -> None:
    """A file with any rows is either refused, or the first row that fits is used."""
    common = "operation: move, world: 5, threads: 64"
    rows = [
        f"{{{common}, blocks: {n + 1}, nbytes: {most}, kernel: {'put' if only else 'pull'}}}"
        for n, (most, only) in enumerate(limits)
    ]
    text = HEAD + "".join(f"  - {row}\n" for row in [*rows, f"{{{common}, blocks: 99, kernel: pull}}"])
    orders = [most * 2 + (not only) for most, only in limits]
    if any(after <= before for before, after in itertools.pairwise(orders)):
        with pytest.raises(ConfigError, match="this row is never used"):
            parse_algorithms(text, "t.yaml")
        return
    table = built_in(5)._replace(move=parse_algorithms(text, "t.yaml")["move", 5])
    fits = (n + 1 for n, (most, only) in enumerate(limits) if nbytes <= most and (symmetric or not only))
    assert table.choose_move(nbytes, symmetric).blocks == next(fits, 99)


# Ranks compare.


def test_ranks_with_other_tables_are_named() -> None:
    groups = make_groups(3, name="tables")
    tables = [built_in(3), built_in(3), built_in(8)]

    def meet(rank: int) -> None:
        compare_in_group(groups[rank], "all_reduce", {"table of algorithms": tables[rank].fingerprint()}, "use one")

    for error in run_ranks(3, meet):
        assert isinstance(error, MismatchError)
        assert error.peers == (2,)
        assert "ranks disagree on 'table of algorithms'" in str(error)
        assert error.step == "all_reduce"
    tables[2] = tables[0]
    assert run_ranks(3, meet) == [None] * 3


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = make_groups(2, dist.HashStore(), "late")
    settings: Any = SimpleNamespace(**{**vars(groups[0].settings), "signal_timeout": 0.3})
    groups[0].settings = settings
    (error,) = run_ranks(1, lambda rank: compare_in_group(groups[0], "broadcast", {}, ""))
    assert type(error).__name__ == "PeerTimeoutError"
    assert error.peers == (1,)
