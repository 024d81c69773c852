"""The ledger: acts that differ are found by the second rank at once, and nothing else is."""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from thread_ranks import descriptors

from symmem import native
from symmem.errors import DivergenceError
from symmem.group import ledger as module
from symmem.group.ledger import RING, ActSequence, Ledger, PythonRing


@pytest.fixture(params=["c", "python"], autouse=True)
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = native.load_module().Ring if request.param == "c" else PythonRing
    monkeypatch.setattr(module, "_ring_type", lambda: kind)


def sequences(size: int, index: int = 0) -> list[ActSequence]:
    """One sequence, as every rank of a group sees it."""
    ledgers = [Ledger(rank, size, "g") for rank in range(size)]
    descriptors = [each.file for each in ledgers]
    for each in ledgers:
        each.attach(descriptors)
    for each in ledgers:
        each.file.close()
    found = [each.claim(index, "the arena") for each in ledgers]
    return [each for each in found if each is not None]


def enter(sequence: ActSequence, number: int, digest: int | None = None, text: str = "") -> None:
    text_id = sequence.add_text(text) if text else 0
    if sequence.enter(number, hash(number) * 31 if digest is None else digest, text_id):
        sequence.look(number)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_equal_acts_raise_nothing_whatever_the_order(size: int) -> None:
    ranks, chance = sequences(size), random.Random(size)
    counts = [0] * size
    while min(counts) < 3 * RING:
        rank = chance.randrange(size)
        for _ in range(chance.randrange(1, 2 * RING)):
            counts[rank] += 1
            enter(ranks[rank], counts[rank])


def key_of(name: str | None, fingerprint: int, frame: FrameType) -> tuple[Any, ...]:
    outer = frame.f_back or frame
    return name, fingerprint, id(frame.f_code), frame.f_lasti, id(outer.f_code), outer.f_lasti


def within(line: int, use: Callable[[FrameType], object], is_outer: bool = True) -> object:
    """Use the frame of a call, which calls ``use`` on one of two lines, and always has the same caller."""
    if is_outer:
        return within(line, use, False)
    if line:
        return use(sys._getframe(0))
    return use(sys._getframe(0))


def test_call_sites_are_found_again() -> None:
    """By the frame and its caller, the layout and the name; more of them than the table of the module in C has."""
    sequence, names = sequences(2)[0], [None, "n", "long"]
    sites = [(name, fingerprint, line) for fingerprint in range(-200, 200) for name in names for line in (0, 1)]

    def find(name: str | None, fingerprint: int, line: int) -> object:
        same = name and "".join(list(name))  # an equal text, but another object
        return within(line, lambda frame: sequence.find(same, fingerprint, frame))

    def remember(number: int, name: str | None, fingerprint: int, line: int) -> None:
        def enter(frame: FrameType) -> None:
            sequence.known[key_of(name, fingerprint, frame)] = number

        within(line, enter)

    def look_up() -> list[object]:
        return [found for site in sites for found in (find(*site), find(*site))]

    assert set(look_up()) == {None}
    for number, site in enumerate(sites):
        remember(number, *site)
    found = look_up()
    assert found == [number for number in range(len(sites)) for _ in range(2)]
    assert look_up() == found
    sequence.forget()
    assert not sequence.known
    assert set(look_up()) == {None}


def test_a_frame_without_a_caller() -> None:
    sequence, frame = sequences(2)[0], sys._getframe(0)
    while frame.f_back is not None:
        frame = frame.f_back
    assert sequence.find(None, 1, frame) is None
    sequence.known[key_of(None, 1, frame)] = "alone"
    assert [sequence.find(None, 1, frame) for _ in range(2)] == ["alone", "alone"]


def test_the_second_one_is_told_at_once_and_the_first_one_at_its_next_act() -> None:
    first, second = sequences(2)
    enter(first, 1, 10, "A at a.py:1")
    with pytest.raises(DivergenceError, match=r"allocation 1: A at a\.py:1 on rank 0, B at b\.py:2 on rank 1") as told:
        enter(second, 1, 20, "B at b.py:2")
    assert told.value.peers == (1,)
    with pytest.raises(DivergenceError, match=r"A at a\.py:1 on rank 0, B at b\.py:2 on rank 1"):
        enter(first, 2, 11)


def test_every_rank_is_told() -> None:
    ranks = sequences(5)
    for rank in (0, 1, 2, 4):
        enter(ranks[rank], 1, 10, "A")
    with pytest.raises(DivergenceError, match="A on ranks 0-2, 4, B on rank 3"):
        enter(ranks[3], 1, 20, "B")
    for rank in (0, 1, 2, 4):
        with pytest.raises(DivergenceError, match="B on rank 3"):
            enter(ranks[rank], 2)


@pytest.mark.parametrize("lead", [RING - 1, RING, RING + 1, 3 * RING + 7, 100 * RING])
def test_a_rank_far_ahead_misses_nothing(lead: int) -> None:
    ahead, behind = sequences(2)
    for number in range(1, lead + 2):
        enter(ahead, number)

    def act() -> None:
        enter(behind, 1, 99, "other")  # it can see the difference itself if the ring still has the act
        ahead.look(lead + 1)  # else the rank ahead sees it with its next call

    with pytest.raises(DivergenceError, match="allocation 1:"):
        act()


def test_a_difference_of_long_ago_is_found_by_its_rolling_hash() -> None:
    ahead, behind = sequences(2)
    for number in range(1, 5 * RING):
        enter(ahead, number)

    def follow() -> None:
        for number in range(1, 5 * RING):
            enter(behind, number, hash(number) * 31 + (number >= 2 * RING))

    with pytest.raises(DivergenceError):
        follow()


def test_sequences_are_apart() -> None:
    ledgers = [Ledger(rank, 2, "g") for rank in range(2)]
    for each in ledgers:
        each.attach([other.file for other in ledgers])
    one, other = ([each.claim(index, f"arena {index}") for each in ledgers] for index in range(2))
    for index, sequence in enumerate(one):
        assert sequence is not None
        if index == 0:
            enter(sequence, 1, 1)
        else:
            with pytest.raises(DivergenceError):
                enter(sequence, 1, 2)
    for sequence in other:
        assert sequence is not None
        enter(sequence, 1, 5)
    for each in ledgers:
        each.file.close()
    assert ledgers[0].claim(module._SEQUENCES, "one too many") is None


def test_texts_fill_their_memory_and_are_then_forgotten() -> None:
    first, second = sequences(2)
    old = first.add_text("old")
    first.known["a key"] = old
    while first.known:
        first.add_text("filling" * 20)
    first.add_text("new")
    assert not first.enter(1, 1, old)
    with pytest.raises(DivergenceError, match="an act without a record on rank 0, B on rank 1"):
        enter(second, 1, 2, "B")


def test_of_two_that_act_at_the_same_moment_one_at_least_is_told() -> None:
    """Both store before they load. Without the full fence, both could miss the other's word."""
    context = multiprocessing.get_context("fork")
    rounds = module._SEQUENCES
    ledgers = [Ledger(rank, 2, "g") for rank in range(2)]
    missed = 0
    for _ in range(20):
        barrier, found = context.Barrier(2), context.Array("i", [0] * rounds)
        children = [context.Process(target=_rank, args=(rank, ledgers, barrier, found)) for rank in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            assert child.exitcode == 0
        missed += list(found[:]).count(0)
        for each in ledgers:
            each.file.close()
        ledgers = [Ledger(rank, 2, "g") for rank in range(2)]
    for each in ledgers:
        each.file.close()
    assert missed == 0


def _rank(rank: int, ledgers: list[Ledger], barrier: Any, found: Any) -> None:
    ledger = ledgers[rank]
    ledger.attach([each.file for each in ledgers])
    for index in range(module._SEQUENCES):
        sequence = ledger.claim(index, "the arena")
        assert sequence is not None
        barrier.wait(30)
        try:
            enter(sequence, 1, rank)
        except DivergenceError:
            with found.get_lock():
                found[index] += 1


@pytest.mark.parametrize("ahead", [0, 1, 700])
def test_a_neighbour_that_has_made_the_act_is_not_waited_for(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        pytest.fail("it waits")

    first, second = sequences(2)
    enter(first, 1)
    for number in range(1, 2 + ahead):
        enter(second, number)
    monkeypatch.setattr(time, "sleep", sleep)
    first.await_ranks(1, [1], 60)


def test_a_neighbour_that_is_behind_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it acts, or a rank has found a difference; only once if it does nothing."""
    first, second = sequences(2)
    calls: list[float] = []

    def sleep(seconds: float) -> None:
        calls.append(seconds)
        if len(calls) == 3:
            enter(second, 1)

    monkeypatch.setattr(time, "sleep", sleep)
    enter(first, 1)
    first.await_ranks(1, [1], 60)
    assert len(calls) == 3
    enter(first, 2)
    first.await_ranks(2, [1], 0)
    count = len(calls)
    first.await_ranks(2, [1], 60)
    assert len(calls) == count
    enter(second, 2)
    enter(first, 3)
    with pytest.raises(DivergenceError):
        enter(second, 3, 6)
    first.await_ranks(4, [1], 60)
    assert len(calls) == count


@pytest.mark.parametrize("size", [2, 4, 5])
def test_a_rank_that_is_relied_on_compares_with_the_one_that_relies(size: int) -> None:
    """Also if they are not neighbours, and their neighbours have not come."""
    for digest in (5, 6):
        ranks = sequences(size)
        first, second = ranks[size // 2], ranks[0]
        rank = first._ledger.rank
        enter(first, 1, 5)
        first.rely_on(1, [0], 1)
        if digest == 6:
            with pytest.raises(DivergenceError):
                enter(second, 1, digest)
            assert second.is_relied_on
            with pytest.raises(DivergenceError):
                first.look(1)
            continue
        enter(second, 1, digest)
        assert second.mark[0] == 0  # it does not look again
        assert not second.is_relied_on
        assert second.uncompared(1, [rank]) == []
        assert first.uncompared(1, [0]) == [0]
        first.rely_on(1, [0], 1)
        assert first.uncompared(1, [0]) == []


def test_a_rank_compares_before_it_relies_on_one_that_has_come() -> None:
    ranks = sequences(4)
    enter(ranks[0], 1, 5)
    enter(ranks[2], 1, 6)
    with pytest.raises(DivergenceError):
        ranks[2].rely_on(1, [0], 1)
    assert ranks[0].is_found


def test_the_history_reaches_back_to_the_rank_that_is_farthest_behind() -> None:
    """Wherever that is in the circle."""
    ranks = sequences(4)
    for number in range(1, 4 * RING):
        enter(ranks[1], number, 5 * number)
        enter(ranks[2], number, 5 * number)
        enter(ranks[3], number, 5 * number)
    enter(ranks[0], 1, 5)
    enter(ranks[0], 2, 11)  # it differs
    ranks[2].look(4 * RING - 1)
    with pytest.raises(DivergenceError, match="allocation 2"):
        ranks[2].rely_on(2, [0], 4 * RING - 1)


def test_nothing_is_left_open() -> None:
    before = descriptors()
    for _ in range(5):
        sequences(4)
    assert descriptors() == before
