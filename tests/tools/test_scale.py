"""What groups ask of a job's store (mission G1): linear in the group's size, whatever the number of groups."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from symmem.group.transports import StoreWire
from symmem.tools import cli
from symmem.tools.bench.counting import Ledger, RankStore
from symmem.tools.bench.scale import SITUATIONS, Cost, curve, job, line, simulate

SIZES = (2, 4, 8, 16)


def linear(costs: Sequence[Cost], what: str) -> bool:
    """Whether all costs are on one line."""
    slope, constant = line(costs, what)
    return [getattr(cost, what) for cost in costs] == [slope * cost.ranks + constant for cost in costs]


def each(cost: Cost, what: str) -> float:
    value: int = getattr(cost, what)
    return value / cost.ranks


@pytest.mark.parametrize("situation", SITUATIONS)
def test_requests_and_keys_grow_linearly_with_the_group(situation: str) -> None:
    counted = curve(SIZES, situation)
    for costs in (counted.first, counted.again):
        for what in ("requests", "messages", "keys", "left", "leader"):
            assert linear(costs, what), (what, costs)
            # What there is of a constant part is soon shared by many.
            assert each(costs[-1], what) <= each(costs[1], what), (what, costs)
    most = {"one_host": 11, "many_hosts": 20}[situation]
    slope, _constant = line(counted.first, "requests")
    assert slope <= most, counted.first
    assert not any(request.missed for request in counted.requests), "keys are deleted that were never made"


def test_what_is_read_grows_with_the_square() -> None:
    """Each rank reads what each gave; if that is no longer so, docs/scaling.md is wrong."""
    first = curve(SIZES, "many_hosts").first
    assert 3 < first[-1].received / first[-2].received < 5
    assert 1.8 < first[-1].sent / first[-2].sent < 2.2


@pytest.mark.parametrize("situation", SITUATIONS)
def test_keys_that_stay_do_not_depend_on_the_number_of_meetings(situation: str) -> None:
    ledger = Ledger()
    meetings = [Cost.of(4, requests) for requests in simulate(ledger, "often", 4, situation, meetings=5)]
    assert [cost.left for cost in meetings[1:]] == [0] * 4
    assert ledger.keys == meetings[0].left == {"one_host": 4, "many_hosts": 4 + 4 + 3}[situation]
    assert ledger.keys == ledger.store.num_keys()
    on_sockets = {"one_host": {0}, "many_hosts": {meetings[1].requests}}[situation]
    assert {cost.requests for cost in meetings[1:]} == on_sockets


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_group_of_a_job_asks_as_much_as_one_that_is_alone(situation: str) -> None:
    ranks, size = 33, 4
    alone = curve((size,), situation).first[0]
    whole = job(ranks, size, situation)
    assert [cost.ranks for cost in whole.groups] == [4] * 8 + [1]
    for cost in whole.groups[:-1]:
        assert (cost.requests, cost.keys, cost.left) == (alone.requests, alone.keys, alone.left)
    assert whole.groups[-1].requests == 0, "a rank that is alone asks nobody"
    assert whole.left == 8 * alone.left
    assert whole.most <= 7 * alone.left + alone.keys


def read_all_of_all(wire: StoreWire, sequence: int, deadline: float, original: Any = StoreWire._verdict) -> Any:
    """A wire whose ranks also look for each rank's message on their own."""
    verdict = original(wire, sequence, deadline)
    for rank in range(wire._size):
        wire._store.check([wire._key(sequence, rank)])
    return verdict


def keep_all(wire: StoreWire, sequence: int) -> None:
    """A wire that deletes nothing."""


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_planted_quadratic_protocol_is_noticed(situation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoreWire, "_verdict", read_all_of_all)
    first = curve(SIZES, situation).first
    assert not linear(first, "requests")
    assert each(first[-1], "requests") > each(first[1], "requests")
    assert linear(first, "keys")


def test_planted_keys_that_stay_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoreWire, "_forget", keep_all)
    ledger = Ledger()
    meetings = [Cost.of(4, requests) for requests in simulate(ledger, "often", 4, "many_hosts", meetings=3)]
    assert [cost.left > 0 for cost in meetings] == [True] * 3
    assert ledger.keys == ledger.store.num_keys() > 50


def test_the_store_counts_what_passes() -> None:
    ledger = Ledger()
    store = RankStore(ledger, 3)
    store.set("job/1/a", b"12345")
    store.set("job/1/a", b"1234567")
    assert store.add("job/met/3", 1) == 1
    assert store.check(["job/1/a", "job/1/b"]) is False
    assert store.get("job/1/a") == b"1234567"
    assert store.multi_get(["job/1/a"]) == [b"1234567"]
    store.wait(["job/1/a"])
    assert store.delete_key("job/1/a")
    assert not store.delete_key("job/1/a")
    taken = ledger.take()
    cost = Cost.of(4, taken)
    assert (cost.requests, cost.leader, cost.messages, cost.keys, cost.left) == (9, 0, 11, 2, 1)
    assert (cost.sent, cost.received) == (8 * 7 + 7 + 9 + 5 + 7 + 8, 7 + 7 + 8)
    assert [request.step for request in taken] == [1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert [request.missed for request in taken] == [0] * 8 + [1]
    assert ledger.take() == []
    assert (ledger.keys, ledger.most) == (1, 2)


def test_the_command_prints_figures_and_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYMMEM_HOST_ID", "mine")
    report = tmp_path / "scaling.md"
    assert cli.main(["bench", "scale", "--ranks", "20", "--group-size", "8", "--report", str(report), "--json"]) == 0
    assert os.environ["SYMMEM_HOST_ID"] == "mine"
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ratios = {(f["figure"], f["world"]): f["ratio"] for f in figures}
    assert ratios["store_requests_many_hosts", 8] == ratios["store_requests_in_job", 8] == 1
    assert ratios["store_bytes_out_many_hosts", 8] > 1.2
    assert {f["unit"] for f in figures} == {"count", "bytes"}
    text = report.read_text()
    assert "not at all sizes" not in text
    assert "**not**" not in text
    assert "A job of 20 ranks in 3 groups of up to 8" in text
