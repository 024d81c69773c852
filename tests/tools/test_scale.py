"""Requests of a rendezvous to the job's store grow linearly with the group, and groups do not add to each other's."""

from __future__ import annotations

import json
import os

import pytest

from symmem.distributed.process_group import meet
from symmem.tools import cli
from symmem.tools.bench.scale import SITUATIONS, Counter, StoreRequests, simulate

SIZES = (2, 4, 8, 16)


@pytest.fixture(autouse=True)
def no_rank_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that waits for long looks for the others in the store. On a busy machine, that would be counted too."""
    monkeypatch.setattr("symmem.group.transports._PROMPT", 60.0)
    monkeypatch.setattr("symmem.group.presence._BRIEF", 60.0)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_requests_and_keys_grow_linearly_with_the_group(situation: str) -> None:
    counted = {size: simulate(size, situation, Counter(), rounds=3) for size in SIZES}
    for number in range(2):
        for name in ("requests", "keys", "keys_left"):
            two, four, *more = (getattr(counted[size][number], name) for size in SIZES)
            assert more == [four + (four - two) // 2 * (size - 4) for size in SIZES[2:]], (name, number)
    first, again, last = counted[16]
    assert first.requests <= {"one_host": 16, "many_hosts": 26}[situation] * 16
    assert (again.keys_left, again.requests) == (0, last.requests)
    assert (again.requests == 0) == (situation == "one_host")
    # On many hosts, every rank reads what every rank gave; if this changes, docs/scaling.md is wrong.
    least, most = {"one_host": (1.8, 2.3), "many_hosts": (3, 5)}[situation]
    assert least < first.bytes_out / counted[8][0].bytes_out < most


def test_the_bytes_of_a_process_groups_first_meeting_grow_linearly() -> None:
    """A job has one process group of all ranks."""
    small, large = (simulate(size, "many_hosts", Counter(), act=meet)[0] for size in (16, 128))
    for name in ("requests", "keys", "bytes_in", "bytes_out"):
        assert getattr(large, name) < 10 * getattr(small, name), name
    assert large.bytes_in + large.bytes_out < 6000 * 128


def test_the_store_is_counted() -> None:
    counter = Counter()
    simulate(1, "one_host", counter)
    assert counter.take() == StoreRequests()  # a rank that is alone asks nothing
    for name, sent, new in (("a", 5, True), ("a", 7, True), ("b", 0, False)):
        counter.note([name], sent, received=2, new=new)
    counter.note_deleted("b")
    assert counter.take() == StoreRequests(requests=4, keys=1, keys_left=1, bytes_in=16, bytes_out=6)
    counter.note_deleted("a")
    assert (counter.take(), counter.keys) == (StoreRequests(1, 0, -1, 1, 0), set())


def test_the_command_prints_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMMEM_HOST_ID", "mine")
    assert cli.main(["bench", "scale", "--ranks", "20", "--group-size", "8", "--json"]) == 0
    assert os.environ["SYMMEM_HOST_ID"] == "mine"
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ratios = {(f["figure"], f["world"]): f["ratio"] for f in figures}
    assert ratios["store_requests_many_hosts", 8] == ratios["store_requests_in_job", 8] == 1
    assert ratios["store_bytes_out_many_hosts", 8] > 1.2
    assert ratios["store_requests_of_job", 20] is None
    assert {f["unit"] for f in figures} == {"count", "bytes"}
