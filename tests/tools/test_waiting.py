"""Waits, cycles and awaited processes that follow from processes' answers."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from symmem.tools.live.dump import data, report
from symmem.tools.live.processes import Process
from symmem.tools.live.top import printable, table
from symmem.tools.live.waiting import Absent, analyse


def group(rank: int, size: int, rounds: int = 0, name: str = "g", **status: Any) -> dict[str, Any]:
    told = {"name": name, "identity": name, "rank": rank, "size": size, "closed": False, "wire": "sockets", "lost": []}
    return {**told, "rounds": rounds, "operation": None, "round": None, "signals": [], "arenas": [], **status}


def in_round(number: int, waits_for: list[int] | None) -> dict[str, Any]:
    waiting = {"step": "collect: compare", "number": number, "seconds": 12.0, "seconds_left": 30.0}
    operation = {"name": "collect", "seconds": 12.5, "thread": 1}
    return {"rounds": number, "round": {**waiting, "waits_for": waits_for}, "operation": operation}


def signal(*waits_for: int) -> dict[str, Any]:
    waiting = {"step": "barrier on channel 0", "seconds": 3.0, "seconds_left": 9.0, "thread": 1}
    return {"signals": [{**waiting, "waits_for": list(waits_for)}]}


def on_gpu(*waits_for: int) -> dict[str, Any]:
    waiting = {"step": "all_reduce", "seconds": 3.0, "seconds_left": 9.0, "thread": 0, "device": "cuda:5"}
    return {"signals": [{**waiting, "waits_for": list(waits_for)}]}


def process(rank: int, *groups: dict[str, Any], job: str = "job") -> Process:
    stack = {"name": "MainThread", "thread": 1, "frames": ["train.py:7 in step: barrier()"]}
    answer = {"job": job, "pid": 100 + rank, "rank": rank, "groups": groups, "stacks": [stack], "tensors": []}
    return Process(job, 100 + rank, answer)


def waited_for(*processes: Process) -> list[tuple[int, tuple[int, ...]]]:
    return sorted((wait.process.rank or 0, wait.ranks) for wait in analyse(processes).waits)


def test_a_round_that_one_rank_has_not_come_to() -> None:
    """The followers know only that they wait for rank 0."""
    found = [
        process(0, group(0, 3, **in_round(7, [2]))),
        process(1, group(1, 3, **in_round(7, [0]))),
        process(2, group(2, 3, rounds=6)),
    ]
    assert waited_for(*found) == [(0, (2,)), (1, (2,))]
    assert analyse(found).awaited == [(found[2], 2)]
    assert analyse(found).cycles == []
    text = report("job", analyse(found))
    assert "rank 1 (process 101) waits for rank 2 (process 102): in 'collect: compare', round 7, of group 'g'" in text
    assert "All waiting processes wait for rank 2 (process 102)" in text
    assert "train.py:7 in step: barrier()" in text


def test_a_round_that_rank_0_has_not_come_to() -> None:
    found = [process(0, group(0, 2, rounds=6)), process(1, group(1, 2, **in_round(7, [0])))]
    assert waited_for(*found) == [(1, (0,))]


def test_a_round_that_all_have_come_to() -> None:
    found = [process(0, group(0, 2, **in_round(7, []))), process(1, group(1, 2, **in_round(7, [0])))]
    assert waited_for(*found) == [(0, ()), (1, ())]
    assert analyse(found).awaited == []


def test_a_rank_that_is_not_to_be_seen() -> None:
    """Rank 0 knows it; over the store no rank does."""
    found = [process(0, group(0, 4, **in_round(7, [3]))), process(1, group(1, 4, **in_round(7, [0])))]
    assert waited_for(*found) == [(0, (3,)), (1, (3,))]
    assert analyse(found).awaited == [(Absent("g", 3), 2)]
    found = [process(0, group(0, 4, **in_round(7, None))), process(1, group(1, 4, **in_round(7, [0])))]
    assert waited_for(*found) == [(0, (2, 3)), (1, (2, 3))]
    assert "rank 3 of group 'g' (not visible here)" in report("job", analyse(found))


def test_a_cycle_by_way_of_two_groups() -> None:
    found = [
        process(0, group(0, 2, name="a", **signal(1)), group(0, 2, name="b")),
        process(1, group(1, 2, name="b", **in_round(3, [0])), group(1, 2, name="a")),
        process(2, group(0, 3, name="c", **signal(1)), group(1, 2, name="d")),
    ]
    found[1].answer["groups"] += (group(1, 3, name="c"),)  # type: ignore[index]
    seen = analyse(found)
    assert [sorted(str(each) for each in cycle) for cycle in seen.cycles] == [[str(found[0]), str(found[1])]]
    assert seen.awaited == []
    assert "A CYCLE: rank " in report("job", seen)
    assert len(data(found)["waits"]) == 3


def test_what_a_gpu_waits_for() -> None:
    """While a GPU waits, its host may wait for another rank; here the two waits form a cycle."""
    found = [process(0, group(0, 2, **on_gpu(1))), process(1, group(1, 2, **in_round(3, [0])))]
    seen = analyse(found)
    assert [(wait.process, wait.peers, wait.device) for wait in seen.waits] == [
        (found[1], (found[0],), None),
        (found[0], (found[1],), "cuda:5"),
    ]
    assert len(seen.cycles) == 1
    line = (
        "rank 0 (process 100) waits for rank 1 (process 101): in 'all_reduce' of group 'g', as rank 0 of it, on the GPU"
    )
    assert f"{line} cuda:5, since 3 s; fails in 9 s" in report("job", seen)
    assert "waits for rank 1 in 'all_reduce', on the GPU cuda:5, 3 s" in table(found)
    assert [wait["device"] for wait in data(found)["waits"]] == [None, "cuda:5"]


def test_groups_of_one_name_are_told_apart() -> None:
    """By job; and, within a job, by the identity that the ranks agreed on."""
    one = process(0, group(0, 2, **in_round(7, [1]))), process(1, group(1, 2, rounds=6))
    other = process(0, group(0, 2, rounds=9), job="other"), process(1, group(1, 2, rounds=9), job="other")
    again = process(2, group(1, 2, rounds=9, identity="another"))
    assert waited_for(*one, *other, again) == [(0, (1,))]
    assert analyse([*one, *other, again]).awaited == [(one[1], 1)]


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda pair: pair[0] != pair[1]), max_size=20))
def test_cycles_and_ends_of_any_waits(pairs: list[tuple[int, int]]) -> None:
    """Every cycle is a cycle; there is none only if no process reaches itself; awaited processes do not wait."""
    edges = {a: sorted({d for c, d in pairs if c == a}) for a, _ in pairs}
    found = [process(rank, group(rank, 8, **(signal(*edges[rank]) if rank in edges else {}))) for rank in range(8)]
    seen = analyse(found)
    for cycle in seen.cycles:
        ranks = [node.rank for node in cycle]
        assert all(b in edges[a] for a, b in zip(ranks, [*ranks[1:], ranks[0]], strict=True))  # type: ignore[index]
    left = set(range(8))
    while ends := {a for a in left if not left & set(edges.get(a, []))}:
        left -= ends
    assert bool(left) == bool(seen.cycles)
    targets = {b for peers in edges.values() for b in peers}
    assert {node.rank for node, _ in seen.awaited} == targets - edges.keys()


def test_the_table_has_each_rank_and_its_problem() -> None:
    mute = Process("job", 9, problem="does not answer")
    text = table([process(0, group(0, 2, **signal(1))), process(1, group(1, 2, rounds=4)), mute])
    lines = text.splitlines()
    assert "waits for rank 1 in 'barrier on channel 0', 3 s" in lines[2]
    assert "4 rounds done" in lines[3]
    assert "does not answer" in lines[4]
    assert "process 9 does not answer" in report("job", analyse([mute]))
    assert "inspection is off" in table([])


def test_nothing_reaches_the_terminal_that_it_would_act_on() -> None:
    text = table([process(0, group(0, 1, name="\x1b[2J\x07evil"))])
    assert "\x1b" in text
    assert printable(text).count("?") == 2
    assert all(char.isprintable() or char == "\n" for char in printable(text))
