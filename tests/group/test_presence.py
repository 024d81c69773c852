"""A rank that cannot come to the first meeting of a group is noticed at once; that rank is a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from programs import Program
from thread_ranks import make_groups, meet, run_ranks

import symmem.group.group
import symmem.group.presence
from symmem.errors import ConfigError, GroupError, PeerLostError, PeerTimeoutError
from symmem.group.group import Group
from symmem.group.presence import Presence, RankProcess
from symmem.group.transports import NotComingError

SOON = 20.0
"""Seconds, far less than the timeout of the ranks that wait."""

PATIENT = 60.0
"""Seconds that a rank waits for the store to take a note. By default it drops the note early on a busy machine."""

Start = Callable[[str], Program]


@pytest.fixture(autouse=True)
def patient_and_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Notes are not dropped, and no socket stays open."""
    monkeypatch.setattr(symmem.group.presence, "_BRIEF", PATIENT)
    yield
    for group in list(symmem.group.group._groups):
        group._disconnect()


@pytest.fixture
def store(tmp_path: Path) -> dist.FileStore:
    return dist.FileStore(str(tmp_path / "store"), -1)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process, which waits after ``code`` until it is killed."""
    begin = (
        "import os, time, torch.distributed as dist, symmem\n"
        "from symmem.group import presence\n"
        f"presence._BRIEF = {PATIENT}\n"
        f"store = dist.FileStore({str(tmp_path / 'store')!r}, -1)\n"
    )
    processes: list[Program] = []

    def run(code: str) -> Program:
        processes.append(Program(f"{begin}{code}\nstore.set(f'{{os.getpid()}} waits', '')\ntime.sleep(600)"))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


def waits(group: Group) -> tuple[Any, float]:
    """The result of a join with a long timeout, and the seconds that it took."""
    begin = time.monotonic()
    (result,) = run_ranks(1, lambda _: meet(group, timeout=120), timeout=150)
    return result, time.monotonic() - begin


def test_a_process_that_dies_before_it_joins_is_named(store: dist.FileStore, start: Start) -> None:
    """It has made the group, so the others know its process."""
    process = start("group = symmem.Group.from_store(1, 2, store, 'a')")
    store.wait([f"{process.pid} waits"])
    group = Group.from_store(0, 2, store, "a")
    threading.Timer(0.7, process.kill).start()
    error, seconds = waits(group)
    assert isinstance(error, PeerLostError)
    assert (error.peers, error.rank, error.step) == ((1,), 0, "meet: join")
    assert seconds < SOON


def test_a_process_that_dies_while_it_waits_in_the_join_is_named(store: dist.FileStore, start: Start) -> None:
    """Its message has come, so that only its process can tell."""
    process = start(
        "import threading, os\n"
        "threading.Timer(1.0, os._exit, (0,)).start()\n"
        "symmem.collect(symmem.Group.from_store(1, 3, store, 'a'))"
    )
    process.wait()
    groups = [Group.from_store(rank, 3, store, "a") for rank in (0, 2)]
    results = run_ranks(2, lambda i: meet(groups[i], "collect", timeout=120), timeout=150)
    assert [(type(error), error.peers) for error in results] == [(PeerLostError, (1,))] * 2


def test_a_process_that_ends_by_an_exception_says_so(store: dist.FileStore, start: Start) -> None:
    """The note at the store reaches other hosts too."""
    start("group = symmem.Group.from_store(1, 2, store, 'a')\nraise ValueError('a mistake')").wait()
    error, seconds = waits(Group.from_store(0, 2, store, "a"))
    assert isinstance(error, PeerLostError)
    assert error.peers == (1,)
    assert seconds < SOON


def test_a_death_that_another_group_knows_counts(
    store: dist.FileStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process never made the second group. A new process that has come in its place is not taken for it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    process = start("group = symmem.Group.from_store(1, 2, store, 'a')\nwith group.collective('meet'): pass")
    first = Group.from_store(0, 2, store, "a")
    run_ranks(1, lambda _: meet(first, timeout=120), timeout=150)
    process.kill()
    process.wait()
    error, seconds = waits(Group.from_store(0, 2, store, "b"))
    assert isinstance(error, PeerLostError)
    assert error.peers == (1,)
    assert seconds < SOON
    new = start("group = symmem.Group.from_store(1, 2, store, 'd')")
    store.wait([f"{new.pid} waits"])
    result = run_ranks(1, lambda _: meet(Group.from_store(0, 2, store, "d"), timeout=2.0), timeout=60)[0]
    assert isinstance(result, PeerTimeoutError)
    # A group of which this process has another rank may have other members.
    monkeypatch.setenv("RANK", "1")
    result = run_ranks(1, lambda _: meet(Group.from_store(0, 2, store, "e"), timeout=1.0), timeout=60)[0]
    assert isinstance(result, PeerTimeoutError)


LAUNCHED = """
import os, sys, time
if os.environ["RANK"] == "1":
    time.sleep(600)  # it never comes to symmem
import torch.distributed as dist, symmem
from symmem.errors import PeerLostError
group = symmem.Group.from_store(0, 2, dist.HashStore(), "launched")
print("ready", flush=True)
try:
    with group.collective("meet", 120):
        pass
except PeerLostError as error:
    print(error.peers, error, flush=True)
"""


@pytest.mark.parametrize("port", ["1234", None], ids=["of one job", "of unknown jobs"])
def test_a_launched_process_that_dies_before_it_uses_symmem_is_named(port: str | None) -> None:
    """Without the variable MASTER_PORT, a process does not know which of its siblings are of the same job."""
    variables = {**os.environ, "WORLD_SIZE": "2", **({"MASTER_PORT": port} if port else {})}
    if port is None:
        variables.pop("MASTER_PORT", None)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCHED], env={**variables, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        output = ranks[0].stdout
        assert output is not None
        assert output.readline() == "ready\n"
        ranks[1].kill()
        if port is None:
            with pytest.raises(subprocess.TimeoutExpired):
                ranks[0].wait(2)
        else:
            begin = time.monotonic()
            assert "(1,)" in (told := output.readline())
            assert "the process of rank 1 ended" in told
            assert time.monotonic() - begin < SOON
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_a_sibling_with_another_kind_of_rank_is_no_peer() -> None:
    """Its variable RANK is not a number, so it is not a rank of the job."""
    variables = {"PATH": os.environ["PATH"], "WORLD_SIZE": "2", "MASTER_PORT": "1234"}
    code = (
        "import torch.distributed as dist, symmem\n"
        "from symmem.group import launcher_peers\n"
        "symmem.Group.from_store(0, 2, dist.HashStore(), 'a')\n"
        "print(sorted(launcher_peers._found), launcher_peers.lost(2, 0))"
    )
    sibling = subprocess.Popen([sys.executable, "-c", "input()"], env={**variables, "RANK": "first"}, stdin=-1)
    try:
        told = subprocess.run([sys.executable, "-c", code], env={**variables, "RANK": "0"}, stdout=-1, text=True)
        assert told.stdout == "['0'] set()\n"
    finally:
        sibling.kill()
        sibling.communicate()


def test_a_subgroup_may_name_its_ranks_of_the_job(
    store: dist.FileStore, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its missing rank 1 is rank 2 of the job, which has ended as the group of all ranks knows."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    meets = "group = symmem.Group.from_store({}, 3, store, 'a')\nwith group.collective('meet'): pass"
    _alive, process = (start(meets.format(rank)) for rank in (1, 2))
    everyone = Group.from_store(0, 3, store, "a")
    run_ranks(1, lambda _: meet(everyone, timeout=120), timeout=150)
    process.kill()
    process.wait()
    error, seconds = waits(Group.from_store(0, 2, store, "b", job_ranks=[0, 2]))
    assert isinstance(error, PeerLostError)
    assert error.peers == (1,)
    assert seconds < SOON
    other = Group.from_store(0, 2, store, "c", job_ranks=[0, 1])
    result = run_ranks(1, lambda _: meet(other, timeout=2.0), timeout=60)[0]
    assert isinstance(result, PeerTimeoutError)  # its missing rank lives


@pytest.mark.parametrize("ranks", [[0], [1, 2], [0, 1, 2]])
def test_ranks_of_the_job_must_fit(ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(GroupError, match="job_ranks names the variable RANK of all 2 ranks of the group, 0 for this"):
        Group.from_store(0, 2, dist.HashStore(), "a", job_ranks=ranks)


@pytest.mark.parametrize("ranks", [3, [None, 1], ["0", "1"]])
def test_ranks_of_the_job_are_integers(ranks: Any) -> None:
    with pytest.raises(GroupError, match="job_ranks is a list of integers, not"):
        Group.from_store(0, 2, dist.HashStore(), "a", job_ranks=ranks)


@pytest.mark.parametrize("kind", ["hash", "file", "tcp", "prefix"])
def test_looking_at_the_store_changes_nothing_and_does_not_wait(kind: str, tmp_path: Path) -> None:
    tcp = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = {
        "hash": dist.HashStore(),
        "file": dist.FileStore(str(tmp_path / "store"), -1),
        "tcp": tcp,
        "prefix": dist.PrefixStore("a", tcp),
    }[kind]
    presence = Presence(store, "group", 0, 2, tuple)
    assert presence._peek("key") is None
    assert not store.check(["key"])
    store.set("key", json.dumps({"rank": 3}))
    assert presence._peek("key") == {"rank": 3}
    store.delete_key("key")
    assert presence._peek("key") is None


def test_an_id_that_another_process_reuses_is_no_sign_of_life(start: Start) -> None:
    """The start of a process is compared as well as its id."""
    process = start("")
    here = RankProcess.here()
    started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    descriptor = RankProcess(here.boot, here.namespace, process.pid, started).watch()
    assert descriptor is not None
    descriptor.close()
    with pytest.raises(ProcessLookupError):
        RankProcess(here.boot, here.namespace, process.pid, started - 1).watch()
    assert RankProcess("elsewhere", here.namespace, process.pid, started).watch() is None


def test_an_error_of_the_configuration_is_raised_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank with the error makes no group, so the others would wait for it."""
    store = dist.HashStore()
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_sizes(1MiB)")
    with pytest.raises(ConfigError):
        Group.from_store(1, 3, store, "a")
    monkeypatch.delenv("SYMMEM_ENABLE")
    groups = [Group.from_store(rank, 3, store, "a") for rank in (0, 2)]
    results = run_ranks(2, lambda i: meet(groups[i], timeout=120), timeout=150)
    assert {type(error) for error in results} == {ConfigError}
    assert all("arena_sizes" in str(error) for error in results)


def test_a_rank_takes_its_note_back() -> None:
    """Its configuration is right at the next try."""
    store = dist.HashStore()
    others = Presence(store, "p", 0, 2, tuple)
    others.announce()
    with_error = Presence(store, "p", 1, 2, tuple)
    with_error.announce(ConfigError("wrong"))
    with pytest.raises(NotComingError, match="wrong"):
        others.check()
    Presence(store, "p", 1, 2, tuple).announce()
    others.check()


def test_a_process_that_ends_names_its_reason() -> None:
    store = dist.HashStore()
    ends, waits = (Presence(store, "p", rank, 2, tuple) for rank in (1, 0))
    waits.announce()
    ends.announce()
    ends.end(" with ValueError: a mistake")
    with pytest.raises(NotComingError, match="rank 1's process ended with ValueError: a mistake"):
        waits.check()


def test_threads_that_wait_at_one_client_do_not_blame_the_store() -> None:
    """A client of a TCPStore handles one request at a time."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    groups = [Group.from_store(1, 2, server, f"of thread {number}") for number in range(4)]
    results = run_ranks(4, lambda number: meet(groups[number], timeout=2.5), timeout=60)
    assert {type(error) for error in results} == {PeerTimeoutError}
    assert all(error.peers == (0,) and "did not come" in str(error) for error in results)


def test_ranks_that_are_threads_are_not_watched() -> None:
    """They share a process."""
    groups = make_groups(2)
    results = run_ranks(2, lambda rank: meet(groups[rank], timeout=20))
    assert results == [None, None]
