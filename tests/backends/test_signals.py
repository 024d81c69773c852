"""Barriers that ranks give up, with ranks as threads over the pads of one process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import LONG

from symmem import native
from symmem.backends import libc, signals
from symmem.backends.signals import SharedSignals
from symmem.errors import PeerLostError, PeerTimeoutError, RendezvousError

SIZE = 3


@pytest.fixture(autouse=True, params=["Python", "C"], scope="module")
def language(request: pytest.FixtureRequest) -> None:
    """The language of a barrier on channel 5, as long as nothing goes wrong."""
    if request.param == "C" and native.module() is None:
        pytest.skip("there is no module in C")
    here.is_quick = request.param == "C"


here = SimpleNamespace(is_quick=False)


def make() -> tuple[list[SharedSignals], list[int]]:
    """The signals of all ranks, and the list of lost ranks."""
    lost: list[int] = []
    words = [(ctypes.c_uint32 * (SharedSignals.nbytes(SIZE) // 4))() for _ in range(SIZE)]
    pads = [ctypes.addressof(pad) for pad in words]
    groups: list[Any] = [SimpleNamespace(rank=r, size=SIZE, name="threads", lost=lambda: lost) for r in range(SIZE)]
    made = [SharedSignals(group, pads, words) for group in groups]
    for one in made if here.is_quick else ():
        one.quicken(5, native.module())
    return made, lost


def raise_(kind: type[BaseException], *arguments: object) -> None:
    raise kind


def interrupt(one: SharedSignals, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    """Interrupt a barrier of this rank in its sleep."""

    with monkeypatch.context() as patch:
        patch.setattr(signals, "futex_wait", functools.partial(raise_, kind))
        with pytest.raises(kind):
            one.barrier(5, 10.0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_interrupted_barrier_fails_on_all_ranks_and_the_next_one_works(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, second, third), _lost = make()
    interrupt(first, monkeypatch, kind)
    for one in (third, second):
        with pytest.raises(
            RendezvousError, match="rank 0 gave up a barrier on this channel when it was interr"
        ) as caught:
            one.barrier(5, 10.0)
        assert type(caught.value) is RendezvousError
        assert caught.value.peers == (0,)
    with ThreadPoolExecutor(SIZE) as threads:
        assert list(threads.map(lambda one: one.barrier(5, 20.0), (first, second, third))) == [None] * SIZE


def test_a_rank_that_died_is_named_in_every_barrier() -> None:
    (first, _, third), lost = make()
    lost.append(1)
    with pytest.raises(PeerLostError, match="rank 1's process ended"):
        first.barrier(5, 10.0)
    for one in (third, first, third):
        with pytest.raises(PeerLostError, match="rank 1's process ended"):
            one.barrier(5, 10.0)


@pytest.mark.parametrize("dead", [1, 2])
def test_a_rank_that_died_ends_the_wait_for_another_one(dead: int) -> None:
    (first, *_), lost = make()
    lost.append(dead)
    with pytest.raises(PeerLostError, match=f"rank {dead}'s process ended"):  # the other one lives, and has not come
        first.barrier(5, LONG)


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3), st.booleans()), max_size=4))
@settings(max_examples=40)
def test_ranks_go_on_together_after_a_rank_skipped_calls(episodes: list[tuple[int, int, bool]]) -> None:
    """Programs that call a barrier in every step. In an episode, one rank skips some calls; then a step fails on all.

    In some episodes, a rank is interrupted later, before the others come.
    """
    everyone, _lost = make()
    with ThreadPoolExecutor(SIZE) as threads:

        def step(*skipped: int) -> set[str]:
            for one in everyone:
                one.stopped = lambda: bool(skipped)  # waits for a rank that does not come end at once
            callers = [one for rank, one in enumerate(everyone) if rank not in skipped]
            return set(threads.map(error_of, callers))

        def error_of(one: SharedSignals) -> str:
            try:
                one.barrier(5, LONG)
            except RendezvousError as error:
                return type(error).__name__
            return "passed"

        assert step() == {"passed"}
        for skips, times, interrupts in episodes:
            for _ in range(times):
                assert step(skips) == {"PeerTimeoutError"}
            assert step() == {"PeerTimeoutError"}
            if interrupts:
                with pytest.MonkeyPatch.context() as patch:
                    interrupt(everyone[skips], patch, KeyboardInterrupt)
                assert step(skips) == {"RendezvousError"}
            assert step() == step() == {"passed"}


def test_all_that_wait_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *others), _lost = make()
    raised: list[type[BaseException]] = []

    def wait(one: SharedSignals) -> None:
        try:
            one.barrier(5, 20.0)
        except RendezvousError as error:
            raised.append(type(error))

    threads = [threading.Thread(target=wait, args=(one,), daemon=True) for one in others]
    interrupt(first, monkeypatch, KeyboardInterrupt)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert raised == [RendezvousError, RendezvousError]


def test_a_rank_that_comes_while_another_gives_up_lets_all_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier is given up by all ranks or by none."""
    (first, second, third), _lost = make()
    third._arrive(5)

    def arrive_late() -> None:  # between the first rank's doubt and its second look
        second._arrive(5)
        libc.full_fence()

    monkeypatch.setattr(signals, "full_fence", arrive_late)
    first.barrier(5, 0.0)
    for one in (second, third):
        one.prepare(5, LONG)
        assert one._given_up(5) is None


def test_what_is_refused_is_raised_by_the_others() -> None:
    (first, second, third), _lost = make()
    for one in (second, third):
        one._refusal = lambda rank, number: RendezvousError(f"rank {rank} refused {number}")
    first.refuse(5, LONG)
    for one in (second, third):
        with pytest.raises(RendezvousError, match="rank 0 refused 1"):
            one.barrier(5, LONG)
    with ThreadPoolExecutor(SIZE) as threads:
        assert list(threads.map(lambda one: one.barrier(5, LONG), (first, second, third))) == [None] * SIZE


def test_a_late_rank_that_refuses_its_call_has_raised_enough() -> None:
    (first, second, third), _lost = make()
    for one in (first, third):
        with pytest.raises(PeerTimeoutError):
            one.barrier(5, 0.05)
    second.refuse(5, LONG)
    for one in (first, third):
        with pytest.raises(PeerTimeoutError, match="rank 1 did not come to the last barrier on this channel in time"):
            one.barrier(5, LONG)
    with ThreadPoolExecutor(SIZE) as threads:
        assert list(threads.map(lambda one: one.barrier(5, LONG), (first, second, third))) == [None] * SIZE


def test_a_rank_that_is_stopped_as_it_decides_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second, third), _lost = make()
    monkeypatch.setattr(signals, "_LONGEST_DOUBT", 0.05)
    first._arrive(5)
    first._set_mark(5, 1, signals._DOUBT)

    def barrier(one: SharedSignals) -> None:
        with pytest.raises(PeerTimeoutError, match="rank 0 gave up") as caught:
            one.barrier(5, LONG)
        assert caught.value.peers == (0,)

    with ThreadPoolExecutor(SIZE) as threads:
        list(threads.map(barrier, (second, third)))


def test_a_timeout_is_an_error_on_all_ranks_once() -> None:
    (first, second, third), _lost = make()
    with pytest.raises(PeerTimeoutError, match="rank 1 did not come in time"):
        first.barrier(5, 0.05)
    with pytest.raises(PeerTimeoutError, match="did not come in time"):
        third.barrier(5, 0.05)
    with pytest.raises(PeerTimeoutError, match="gave up a barrier on this channel when this rank did not come"):
        second.barrier(5, LONG)
    for one in (first, third):
        with pytest.raises(PeerTimeoutError, match="rank 1 did not come to the last barrier on this channel in time"):
            one.barrier(5, LONG)
    with ThreadPoolExecutor(SIZE) as threads:
        assert list(threads.map(lambda one: one.barrier(5, LONG), (first, second, third))) == [None] * SIZE


def call(one: SharedSignals, seconds: float = LONG) -> str:
    try:
        one.barrier(5, seconds)
    except RendezvousError as error:
        return type(error).__name__
    return "passed"


def test_ranks_that_failed_in_different_numbers_of_calls_go_on_in_the_same_one() -> None:
    """Rank 2 comes with rank 0, and waits in its first call while rank 0 gives up three. Then rank 1 comes."""
    (first, second, third), _lost = make()
    third._arrive(5)
    assert [call(first, 0.0) for _ in range(3)] == ["PeerTimeoutError"] * 3
    assert call(third, 0.0) == "PeerTimeoutError"
    with ThreadPoolExecutor(SIZE) as threads:
        calls = threads.map(lambda one, count: [call(one) for _ in range(count)], (first, second, third), (2, 2, 4))
    failed = ["PeerTimeoutError"]
    assert list(calls) == [
        [*failed, "passed"],
        [*failed, "passed"],
        [*failed * 3, "passed"],
    ]  # rank 0's and rank 2's fourth call fails last


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.booleans()), max_size=12))
@settings(max_examples=200)
def test_after_any_faults_all_ranks_pass_the_same_barrier(acts: list[tuple[int, bool]]) -> None:
    """Ranks call in any order and give up at once, or are interrupted. Then all call until they pass."""
    everyone, _lost = make()
    for rank, interrupts in acts:
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RendezvousError, KeyboardInterrupt):
            patch.setattr(signals, "futex_wait", functools.partial(raise_, KeyboardInterrupt))
            everyone[rank].barrier(5, LONG if interrupts else 0.0)

    def passes(one: SharedSignals) -> list[int]:
        calls = next(count for count in range(len(acts) + 3) if call(one) == "passed")
        return [calls, one.number(5), [call(one) for _ in range(2)].count("passed")]

    with ThreadPoolExecutor(SIZE) as threads:
        seen = list(threads.map(passes, everyone))
    assert len({number for _, number, _ in seen}) == 1
    assert [passed for *_, passed in seen] == [2] * SIZE


@pytest.mark.parametrize(("yields", "sleeps"), [(90, 0), (110, 1)])
def test_it_stays_awake_for_as_long_as_a_sleep_costs(yields: int, sleeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a yield puts forward by a microsecond: a rank that sleeps too early is late for the next one."""
    (one, second, third), _lost = make()
    one._quick.clear()
    clock = SimpleNamespace(now=0.0)
    slept = []

    def come(*_: object) -> None:
        clock.now += 1e-6
        if clock.now > yields * 1e-6:
            for other in (second, third):
                if not other.number(5):
                    other._arrive(5)

    def sleep(*arguments: object) -> None:
        slept.append(arguments)
        clock.now += 20e-6

    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(signals, "os", SimpleNamespace(sched_yield=come))
    monkeypatch.setattr(signals, "futex_wait", lambda *arguments: (sleep(*arguments), come()))
    one.barrier(5, 10.0)
    assert len(slept) == sleeps


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_barrier_in_c(size: int) -> None:
    """Ranks as threads: all pass every barrier, and the words are those that Python would have left."""
    words = [(ctypes.c_uint32 * (SharedSignals.nbytes(size) // 4))() for _ in range(size)]
    pads = tuple(ctypes.addressof(pad) for pad in words)
    groups: list[Any] = [SimpleNamespace(rank=r, size=size, name="threads", lost=list) for r in range(size)]
    ranks = [SharedSignals(group, pads, words) for group in groups]
    counts = [0] * size
    if native.module() is None:
        pytest.skip("there is no module in C")

    def run(rank: int) -> None:
        one = ranks[rank]
        one.quicken(9, native.module())
        for turn in range(300):
            assert min(counts) >= turn - 1
            counts[rank] += 1
            one.barrier(9, LONG)
            assert min(counts) > turn

    with ThreadPoolExecutor(size) as threads:
        list(threads.map(run, range(size)))
    for one in ranks:
        assert one.number(9) == 300
        assert not one.is_unfinished(9)
        assert not one.is_given_up(9)


def test_a_barrier_in_c_of_a_rank_without_a_pad() -> None:
    (one, *_), _lost = make()
    if native.module() is None:
        pytest.skip("there is no module in C")
    with pytest.raises(ValueError, match="rank 3 of 3 pads"):
        native.module().Barrier(pads=one._pads, rank=3, arrived=0, marks=(1, 2), unfinished={}, channel=5, awake=1e-4)


@pytest.mark.parametrize("kind", [PeerLostError, RendezvousError])
def test_a_rank_that_comes_while_this_one_is_told(kind: type[RendezvousError], monkeypatch: pytest.MonkeyPatch) -> None:
    """It came before it left the group, so the wait is over. After any other error, its signal is for a later call."""
    ones, _ = make()

    def told(wait: object) -> RendezvousError:
        ones[1].put_signal(0, 0, LONG)
        return kind("told")

    monkeypatch.setattr("symmem.backends.pending_waits.told", told)
    with contextlib.nullcontext() if kind is PeerLostError else pytest.raises(kind, match="told"):
        ones[0].wait_signal(1, 0, LONG)
