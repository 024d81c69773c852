"""The pool of ranks of the demo, the benchmarks and the tests."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist
from patience import LONG
from programs import run_program

from symmem.tools.ranks import RankPool, RanksFailedError, rank_store

Make = Callable[..., RankPool]


def who(*more: Any) -> tuple[Any, ...]:
    return (dist.get_rank(), dist.get_world_size(), os.getpid(), *more)


def environment(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} does not like it")
    return dist.get_rank()


def fail_with_what_cannot_be_sent() -> NoReturn:
    raise ValueError(threading.Lock())


class Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


def answer_what_cannot_be_read() -> Unreadable:
    return Unreadable()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def hang_on(rank: int) -> int:
    if dist.get_rank() == rank:
        threading.Event().wait()
    return dist.get_rank()


def pass_a_note() -> bytes:
    rank, world = dist.get_rank(), dist.get_world_size()
    rank_store().set(f"note{rank}", f"from {rank}")
    return rank_store().get(f"note{(rank + 1) % world}")


class Watch:
    """Watches processes that are not children of this one."""

    def __init__(self, pids: list[int]) -> None:
        self._descriptors = [os.pidfd_open(pid) for pid in pids]

    def ended(self, seconds: float = LONG) -> bool:
        """Whether all processes end within the timeout."""
        return all(select.select([descriptor], [], [], seconds)[0] for descriptor in self._descriptors)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


@pytest.fixture
def watch() -> Iterator[Callable[[RankPool], Watch]]:
    made: list[Watch] = []

    def make(pool: RankPool) -> Watch:
        made.append(Watch(pool.pids))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_results_come_in_rank_order(pools: Any) -> None:
    pool = pools.get(2)
    assert pool.run(who, "a", 1) == [(rank, 2, pid, "a", 1) for rank, pid in enumerate(pool.pids)]
    assert len({os.getpid(), *pool.pids}) == 3
    assert pool.run(pass_a_note) == [b"from 1", b"from 0"]


def test_what_a_rank_raises_comes_back_with_its_traceback(pools: Any) -> None:
    pool = pools.get(2)
    with pytest.raises(RanksFailedError) as caught:
        pool.run(fail_on, 1)
    good, bad = caught.value.outcomes
    assert (good.value, good.error, good.trace) == (0, None, "")
    assert type(bad.error) is ValueError
    assert bad.error.__traceback__ is None
    assert "in fail_on" in bad.trace
    assert str(caught.value).startswith("1 of 2 ranks failed\n--- rank 1\nTraceback")
    assert "rank 1 does not like it" in str(caught.value)
    assert pool.run(fail_on, 7) == [0, 1]  # the pool works again


def test_what_cannot_travel_is_told_as_text(pools: Any) -> None:
    pool = pools.get(2)
    for outcome in pool.outcomes(fail_with_what_cannot_be_sent):
        assert type(outcome.error) is RuntimeError
        assert "ValueError: <unlocked" in str(outcome.error)
        assert "in fail_with_what_cannot_be_sent" in outcome.trace
    for rank, outcome in enumerate(pool.outcomes(answer_what_cannot_be_read)):
        assert str(outcome.error).startswith(f"rank {rank}'s answer cannot be read: ValueError")
    assert pool.run(fail_on, 7) == [0, 1]


def test_the_environment_is_set_and_removed(new_pool: Make) -> None:
    here = dict(os.environ)
    assert {"PATH", "HOME"} <= here.keys()  # what every process inherits
    env = {"PATH": None, "HOME": "/by/the/pool", "SYMMEM_TEST_NEW": ""}
    pool = new_pool(2, env=env, process_group=None)
    expected = [None, "/by/the/pool", "", "2"]
    assert pool.run(environment, *env, "WORLD_SIZE") == [expected, expected]
    assert pool.run(environment, "RANK", "LOCAL_RANK") == [["0", "0"], ["1", "1"]]
    assert dict(os.environ) == here


def test_the_environment_is_that_of_the_parent_now(new_pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the environment of the server process, which is older."""
    new_pool(1, process_group=None).run(environment)  # the server runs
    monkeypatch.setenv("SYMMEM_TEST_NEW", "now")
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("RANK", "9")
    pool = new_pool(1, env={}, process_group=None)
    assert pool.run(environment, "SYMMEM_TEST_NEW", "HOME", "RANK") == [["now", None, "0"]]


def test_a_killed_rank_is_told_and_the_others_answer(new_pool: Make, watch: Callable[[RankPool], Watch]) -> None:
    pool = new_pool(2)
    ended = watch(pool)
    first, second = pool.outcomes(die_on, 1)
    assert first.error is None
    assert str(second.error) == "rank 1 died with exit code -9"
    assert not pool.alive
    first, second = pool.outcomes(fail_on, 7)  # a task after the death
    assert first.value == 0
    assert "rank 1 died" in str(second.error)
    pool.close()
    assert ended.ended()


def test_a_hang_ends_all_ranks_and_says_so(new_pool: Make, watch: Callable[[RankPool], Watch]) -> None:
    pool = new_pool(2)
    ended = watch(pool)
    pool.run(fail_on, 7)  # all are up
    with pytest.raises(RanksFailedError, match=r"rank 1\n.*did not answer in 0\.5 s and was killed") as caught:
        pool.run(hang_on, 1, timeout=0.5)
    assert caught.value.outcomes[0].value == 0
    assert ended.ended()


@pytest.mark.ranks
def test_closing_leaves_no_process(watch: Callable[[RankPool], Watch]) -> None:
    with RankPool(2) as pool:
        assert pool.alive
        ended = watch(pool)
        assert not ended.ended(0)
    assert ended.ended()
    assert not pool.alive
    assert pool.pids == []
    pool.close()  # again


def _hang_in_a_pool_of_its_own() -> None:
    """Run by the test below, in a process whose stderr the ranks inherit."""
    with RankPool(2, process_group=None) as pool:
        pool.run(environment)
        pool.outcomes(_wait_for_ever, timeout=0.5)


def _wait_for_ever() -> None:
    threading.Event().wait()


@pytest.mark.ranks
def test_hung_ranks_show_where_they_are() -> None:
    path = [str(Path(__file__).parent), *sys.path]
    done = run_program(
        f"import sys; sys.path[:] = {path!r}; import {Path(__file__).stem} as test; test._hang_in_a_pool_of_its_own()"
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        shown = done.stderr.partition(f"--- rank {rank} hangs at:\n")[2].partition("---")[0]
        assert "in _wait_for_ever" in shown, done.stderr
