"""Functions are called as soon as a watched process ends."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator

import pytest
from patience import LONG

from symmem.errors import PeerLostError
from symmem.group import loss_notices
from symmem.group.group import Group
from symmem.tools.ranks import RankPool, rank_store


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as started:
        yield started
        started.kill()


@pytest.fixture
def descriptor(process: subprocess.Popen[bytes]) -> Iterator[int]:
    opened = os.pidfd_open(process.pid)
    yield opened
    loss_notices.forget(opened)
    os.close(opened)


def test_all_functions_are_called_once(
    process: subprocess.Popen[bytes], descriptor: int, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[str] = []
    last, later = threading.Event(), threading.Event()
    loss_notices.notify(descriptor, lambda: called.append("first"))
    loss_notices.notify(descriptor, lambda: 1 // 0)
    loss_notices.notify(descriptor, last.set)
    assert not last.wait(0.05)
    process.kill()
    assert last.wait(LONG)
    assert "ZeroDivisionError" in caplog.text  # it stops neither the thread nor the other functions
    loss_notices.notify(descriptor, later.set)  # of a process that has ended
    assert later.wait(LONG)
    assert called == ["first"]


def test_what_is_forgotten_is_not_called(process: subprocess.Popen[bytes], descriptor: int) -> None:
    called: list[str] = []
    other, ended = os.pidfd_open(process.pid), threading.Event()
    loss_notices.notify(other, lambda: called.append("forgotten"))
    loss_notices.forget(other)
    loss_notices.forget(other)
    os.close(other)
    loss_notices.notify(descriptor, ended.set)
    process.kill()
    assert ended.wait(LONG)
    assert called == []


def test_a_forked_child_changes_nothing_of_its_parents(process: subprocess.Popen[bytes], descriptor: int) -> None:
    ended = threading.Event()
    loss_notices.notify(descriptor, ended.set)
    if (child := os.fork()) == 0:
        loss_notices.forget(descriptor)
        os._exit(len(loss_notices._functions))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    process.kill()
    assert ended.wait(LONG)


def survive() -> tuple[list[int], str]:
    rank, told, lost = int(os.environ["RANK"]), threading.Event(), list[int]()
    group = Group.from_store(rank, 3, rank_store())
    with group.collective("join"):
        pass
    group.check()

    def note(who: int) -> None:
        lost.append(who)
        told.set()

    group.when_lost(note)
    with group.collective("all listen"):
        pass
    if rank == 2:
        os._exit(3)
    assert told.wait(LONG)
    with pytest.raises(PeerLostError, match="the process of rank 2 ended") as caught:
        group.check()
    group.close()
    return lost, str(caught.value)


@pytest.mark.ranks
def test_a_group_tells_who_was_lost() -> None:
    with RankPool(3, process_group=None, timeout=LONG) as pool:
        outcomes = pool.outcomes(survive)
    for rank, outcome in enumerate(outcomes[:2]):
        assert outcome.error is None, outcome.trace
        lost, text = outcome.value
        assert lost == [2]
        assert f"rank {rank}" in text
