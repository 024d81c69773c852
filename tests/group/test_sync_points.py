"""Synchronisation points: all ranks pass, or all raise the same error, whatever the order in which they come."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import pytest
from patience import LONG

from symmem.errors import DivergenceError, PeerTimeoutError, SymmemError
from symmem.group.ledger import Ledger
from symmem.group.sync_points import SyncPoints


class OneRank:
    """A group, as far as synchronisation points need it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.gone: tuple[int, ...] = ()

    def lost(self) -> tuple[int, ...]:
        return self.gone


class Function:
    """Counts its calls as a compiled function does."""

    def __init__(self) -> None:
        self.calls = self.forgotten = 0

    def has_passed(self, call: int, waits: bool) -> bool:
        return self.calls >= call

    def forget(self) -> None:
        self.calls, self.forgotten = 0, self.forgotten + 1


class Rank:
    def __init__(self, ledger: Ledger, rank: int, size: int) -> None:
        self.group = OneRank(rank, size)
        self.points = SyncPoints(ledger, cast("Any", self.group))
        self.function = Function()

    def call(self, step: str | None, why: str = "its address changed", timeout: float = LONG) -> None:
        """Call the function; with ``step``, come to that point."""
        if self.points.mark[0]:
            self.points.look()
        if step is not None:
            self.points.meet(self.function, self.function.calls + 1, step, why, timeout)
        self.function.calls += 1


def ranks_of(size: int) -> list[Rank]:
    ledgers = [Ledger(rank, size, "g") for rank in range(size)]
    descriptors = [each.file for each in ledgers]
    for each in ledgers:
        each.attach(descriptors)
    for each in ledgers:
        each.file.close()
    return [Rank(ledger, rank, size) for rank, ledger in enumerate(ledgers)]


def errors_of(actions: Sequence[Callable[[], None]]) -> list[SymmemError | None]:
    """Run one action per rank at the same time; returns their errors."""

    def run(action: Callable[[], None]) -> SymmemError | None:
        try:
            action()
        except SymmemError as error:
            return error
        return None

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, actions))


def goes_on(rank: Rank) -> None:
    rank.call(None)
    while not rank.points.mark[0]:
        os.sched_yield()
    rank.call(None)


def all_call(ranks: list[Rank], step: str | None = "the comparison of x") -> list[SymmemError | None]:
    return errors_of([partial(each.call, step) for each in ranks])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_pass_in_any_order(size: int) -> None:
    ranks = ranks_of(size)
    chance = random.Random(size)
    steps = [chance.choice(("x", "y", None)) for _ in range(200)]

    def run(rank: Rank) -> None:
        for step in steps:
            rank.call(step)

    assert errors_of([partial(run, each) for each in ranks]) == [None] * size


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_rank_that_comes_alone(size: int) -> None:
    """All ranks raise an error that names the rank, the step and the reason; then all works."""
    ranks = ranks_of(size)
    assert all_call(ranks) == [None] * size
    for _ in range(3):
        actions = [*(partial(goes_on, each) for each in ranks[1:]), partial(ranks[0].call, "the comparison of x")]
        for error in errors_of(actions):
            assert isinstance(error, DivergenceError)
            assert "rank 0 waits for all ranks in the comparison of x at " in error.what
            assert "because its address changed; rank " in error.what
            assert error.peers == (0,)
        assert [each.function.calls for each in ranks] == [0] * size
        assert all_call(ranks) == [None] * size
        assert all_call(ranks, None) == [None] * size


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_at_different_points(size: int) -> None:
    ranks = ranks_of(size)
    actions = [partial(each.call, "xy"[min(at, 1)]) for at, each in enumerate(ranks)]
    for _ in range(2):
        errors = errors_of(actions)
        assert {type(error) for error in errors} == {DivergenceError}
        assert "the ranks are at different steps: x at " in str(errors[0])
        for each in ranks:
            each.function.forget()
    assert all_call(ranks) == [None] * size


def test_a_rank_that_does_not_come() -> None:
    """It is told when it comes, and then all works."""
    here, late = ranks_of(2)
    with pytest.raises(PeerTimeoutError, match=r"ranks \[1\] did not come in time") as caught:
        here.call("x", timeout=0.01)
    assert caught.value.peers == (1,)
    with pytest.raises(DivergenceError, match=r"rank 0 gave up x at .*ranks \[1\] did not come in time"):
        late.call("x")
    assert all_call([here, late]) == [None] * 2


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_skips_a_call(size: int) -> None:
    """All ranks make their next call at the same time, whatever came of the last one, and come to work together."""
    ranks = ranks_of(size)
    assert all_call(ranks) == [None] * size
    for skipping in ranks:
        waiting = [partial(each.call, "x", timeout=0.05) for each in ranks if each is not skipping]
        assert all(isinstance(error, SymmemError) for error in errors_of(waiting))
        for each in ranks:  # in the next call, the rank that skipped one is told of that one, and does not wait
            if each is skipping:
                with pytest.raises(DivergenceError, match="did not come in time"):
                    each.call("x")
        assert all(isinstance(error, SymmemError) for error in errors_of(waiting))
        errors = all_call(ranks)
        assert [type(error) for error in errors if error is not None and "may have skipped a call" in error.what] == [
            PeerTimeoutError
        ] * (size - 1)
        assert None not in errors
        assert all_call(ranks) == [None] * size


def test_a_rank_that_raised_for_another_reason_is_not_told_again() -> None:
    first, second = ranks_of(2)
    assert all_call([first, second]) == [None] * 2
    second.call(None)
    with pytest.raises(PeerTimeoutError):
        first.call("x", timeout=0.01)
    second.points.absorb()
    assert second.function.forgotten == 1
    assert all_call([first, second]) == [None] * 2


def test_ranks_behind_come_later() -> None:
    """A rank with a mark goes on if it has not come to the point yet."""
    first, second = ranks_of(2)
    assert all_call([first, second], "x") == [None] * 2
    first.call(None)
    waiting = threading.Thread(target=first.call, args=("x",))
    waiting.start()
    while not second.points.mark[0]:
        os.sched_yield()
    second.call(None)
    second.call("x")
    waiting.join()
    assert first.function.calls == second.function.calls == 3


@pytest.mark.parametrize("size", [2, 3, 4])
def test_acts_between_points(size: int) -> None:
    """Acts that differ are an error on all ranks, with the next act or look. Numbers need not match after a failure."""
    ranks = ranks_of(size)
    for turn in range(3):
        assert all_call(ranks) == [None] * size
        for value in range(ranks[0].points.acts_left):
            for each in ranks:
                each.points.act(each.function, value, "x")
        assert not any(each.points.acts_left for each in ranks)
        assert all_call(ranks) == [None] * size
        told = 0
        for each in [*ranks, *ranks]:
            if each.points.acts_left:  # otherwise this rank comes to a point next
                value = 7 if each is ranks[turn % size] else 8
                (error,) = errors_of([partial(each.points.act, each.function, value, "x")])
                told += error is not None and "uses x differently than rank" in error.what
        assert told == size
        assert [each.points.acts_left for each in ranks] == [0] * size


@pytest.mark.parametrize("leaver", [0, 1])
def test_no_rank_waits_after_one_has_left(leaver: int) -> None:
    ranks = ranks_of(2)
    waiting = threading.Thread(target=ranks[0].call, args=("x",))
    waiting.start()
    ranks[leaver].points.leave()
    waiting.join(LONG)
    assert not waiting.is_alive()


def test_lost_ranks_and_forked_processes_do_not_wait() -> None:
    first, _second = ranks_of(2)
    first.group.gone = (1,)
    first.call("x")
    child = os.fork()
    if not child:
        first.group.gone = ()
        first.call("x")  # the round that follows raises
        first.points.look()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
