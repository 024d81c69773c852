"""Agree or fail, with ranks as threads: every failure, on every rank, in every round."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from patience import LONG, SOON
from thread_ranks import descriptors, make_groups, meet, run_ranks, succeed

from symmem.backends import descriptors as scm
from symmem.backends.libc import close_all
from symmem.errors import (
    GroupError,
    MismatchError,
    OutOfMemoryError,
    PeerLostError,
    PeerTimeoutError,
    RankError,
    RendezvousError,
    ResourceLimitError,
)
from symmem.group.agreement import Rounds
from symmem.group.compare import differing
from symmem.group.group import Group
from symmem.group.locations import Location, Places

HOST = Location("boot", 1, "node", 1)
OTHER_HOST = Location("another boot", 1, "node2", 1)
OTHER_CONTAINER = Location("boot", 2, "node", 1)


@pytest.fixture(params=["sockets", "store"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Three ranks on one host, or on several."""
    if request.param == "store":
        stand_at(monkeypatch, HOST, OTHER_HOST, HOST)
    return 3


def stand_at(monkeypatch: pytest.MonkeyPatch, *places: Location) -> None:
    """Give the rank of every thread a location."""
    here = classmethod(lambda cls: places[int(threading.current_thread().name)])
    monkeypatch.setattr(Location, "here", here)


@pytest.fixture(scope="module")
def first_store() -> None:
    """Make the first TCPStore of the process, because it leaves a pipe open."""
    dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


pytestmark = pytest.mark.usefixtures("first_store", "nothing_leaks")


def kinds(results: list[Any]) -> set[type]:
    return {type(result) for result in results}


def test_all_exchange_in_rank_order(size: int) -> None:
    """Every rank receives the contributions in rank order, in whatever order the ranks come."""
    groups = make_groups(size)
    for order in itertools.permutations(range(size)):

        def rank(rank: int, order: tuple[int, ...] = order) -> list[bytes]:
            time.sleep(0.01 * order[rank])
            with groups[rank].collective("talk", LONG) as collective:
                first = [c.payload for c in collective.exchange("a", b"%d" % rank * rank)]
                second = [c.payload for c in collective.exchange("b", b"x%d" % rank)]
            return first + second

        assert set(map(tuple, succeed(size, rank))) == {(b"", b"1", b"22", b"x0", b"x1", b"x2")}


@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("fresh", [True, False])
def test_an_error_of_any_rank_at_any_round_is_raised_on_all_at_once(
    size: int, culprit: int, after: int, fresh: bool
) -> None:
    """A failure on one rank raises the same error on all ranks at once; the next collective works."""
    groups = make_groups(size)
    if not fresh:
        succeed(size, lambda rank: meet(groups[rank]))

    def rank(rank: int) -> None:
        with groups[rank].collective("work", LONG) as collective:
            for step in range(after):
                collective.exchange(f"step {step}")
            if rank == culprit:
                raise OutOfMemoryError("no room left", hint="make room")
            collective.exchange("last")

    begin = time.monotonic()
    results = run_ranks(size, rank)
    assert time.monotonic() - begin < SOON
    assert kinds(results) == {OutOfMemoryError}
    assert {(e.what, e.hint, e.rank, e.group, e.step) for e in results} == {
        ("no room left", "make room", culprit, "threads", "work")
    }
    for _ in range(2):
        succeed(size, lambda rank: meet(groups[rank]))


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_of_another_library_is_told_by_name(size: int, culprit: int) -> None:
    """Peers raise a RendezvousError that names the foreign error; on the culprit it is the cause."""
    groups = make_groups(size)

    def rank(rank: int) -> None:
        with groups[rank].collective("work", LONG):
            if rank == culprit:
                raise KeyError("lost")

    results = run_ranks(size, rank)
    assert kinds(results) == {RendezvousError}
    assert all("KeyError: 'lost'" in str(error) and error.rank == culprit for error in results)
    assert isinstance(results[culprit].__cause__, KeyError)


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("when", ["waiting", "working"])
def test_an_interrupt_goes_on_as_itself_and_the_others_are_told(
    size: int, culprit: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C on one rank fails the others at once."""
    groups = make_groups(size)
    succeed(size, lambda rank: meet(groups[rank]))
    if when == "waiting":
        transport = groups[culprit]._rounds.transport
        wait = "collect" if culprit == 0 else "verdict"
        original = getattr(transport, wait)

        def interrupted(*args: Any) -> Any:
            monkeypatch.setattr(transport, wait, original)
            if culprit:  # its message is sent, so this round succeeds
                original(*args).close()
            raise KeyboardInterrupt

        monkeypatch.setattr(transport, wait, interrupted)

    def rank(rank: int) -> None:
        with groups[rank].collective("work", LONG) as collective:
            if when == "waiting":
                collective.exchange("step")
            elif rank == culprit:
                raise KeyboardInterrupt

    begin = time.monotonic()
    results = run_ranks(size, rank)
    assert time.monotonic() - begin < SOON
    assert isinstance(results.pop(culprit), KeyboardInterrupt)
    assert kinds(results) == {RendezvousError}
    assert all("KeyboardInterrupt" in str(error) for error in results)
    succeed(size, lambda rank: meet(groups[rank]))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("absent", [0, 1, 2])
def test_who_does_not_come_is_named_by_all_and_told_when_it_comes(size: int, absent: int, fresh: bool) -> None:
    """PeerTimeoutError within the timeout; the late rank raises at once.

    It may have skipped a call, so the others raise once more, in the same call; then all go on together.
    """
    groups = make_groups(size)
    if not fresh:
        succeed(size, lambda rank: meet(groups[rank]))
    given_up = threading.Barrier(size)
    took = {}

    def rank(rank: int) -> None:
        if rank == absent:
            given_up.wait(LONG)
        begin = time.monotonic()
        try:
            meet(groups[rank], timeout=1.0 if rank != absent else LONG)
        finally:
            took[rank] = time.monotonic() - begin
            if rank != absent:
                given_up.wait(LONG)

    results = run_ranks(size, rank)
    assert kinds(results) == {PeerTimeoutError}
    assert max(took.values()) < SOON
    for rank_, error in enumerate(results):
        if rank_ != absent:
            assert absent in error.peers
            assert (error.rank is not None, error.group, error.hint is not None) == (True, "threads", True)
            assert "timeout 1 s" in str(error)
    others = [groups[rank] for rank in range(size) if rank != absent]
    for error in run_ranks(len(others), lambda number: meet(others[number])):
        assert isinstance(error, PeerTimeoutError)
        assert f"ranks [{absent}] did not come to the last call in time. They have come now" in str(error)
    succeed(size, lambda rank: meet(groups[rank]))


def test_a_ranks_own_failure_counts_before_one_that_only_waited(size: int) -> None:
    """All ranks raise the cause, not the timeouts that follow from it."""
    groups = make_groups(size)
    succeed(size, lambda rank: meet(groups[rank]))
    withdrawn = threading.Event()

    def rank(rank: int) -> None:
        if rank == 0:
            withdrawn.wait(LONG)
        if rank == 2:
            groups[2].fail("prepare", ResourceLimitError("too many"))
            withdrawn.wait(LONG)
            return
        try:
            meet(groups[rank], timeout=0.2 if rank == 1 else LONG)
        finally:
            if rank == 1:
                withdrawn.set()

    results = run_ranks(size, rank)
    assert isinstance(results[1], PeerTimeoutError)  # rank 0 did not answer it
    assert isinstance(results[0], ResourceLimitError)
    assert (results[0].rank, results[0].step) == (2, "prepare")


def test_different_steps_are_told_with_ranks(size: int) -> None:
    """Ranks at different steps raise at once; the error names the step of every rank."""
    groups = make_groups(size)
    begin = time.monotonic()
    results = run_ranks(size, lambda rank: meet(groups[rank], "odd" if rank == 1 else "even", LONG))
    assert time.monotonic() - begin < SOON
    assert kinds(results) == {MismatchError}
    assert all(error.peers == (1,) for error in results)
    assert all("'odd: join' on rank 1" in str(e) and "'even: join' on ranks 0, 2" in str(e) for e in results)
    succeed(size, lambda rank: meet(groups[rank]))


def test_a_failed_preparation_fails_the_next_collective_once(size: int) -> None:
    """``fail`` does not block, and skips an error that all ranks have raised."""
    groups = make_groups(size)
    error = OutOfMemoryError("full")
    groups[1].fail("allocate", error)
    results = run_ranks(size, lambda rank: meet(groups[rank], timeout=LONG) if rank != 1 else None)
    assert [type(result) for result in results] == [OutOfMemoryError, type(None), OutOfMemoryError]
    groups[0].fail("allocate", results[0])
    succeed(size, lambda rank: meet(groups[rank]))


# The join.

ROUNDS = ("join", "connect", "watch", "joined", "agree")


# Nothing can fail after `joined`.
@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize(
    ("at", "moment"), [(at, moment) for at in ROUNDS for moment in ("before", "after") if at + moment != "joinedafter"]
)
def test_a_failure_at_any_round_of_the_bootstrap_leaves_all_able_to_meet(
    culprit: int, at: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks raise the culprit's error at once, and a failed join can be tried again."""
    groups = make_groups(3)

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def fails(rounds: Rounds, operation: Any, step: str, *rest: Any) -> Any:
            fails_here = step == at and operation.group.rank == culprit
            if fails_here and moment == "before":
                raise OSError(24, "Too many open files")
            received = original(rounds, operation, step, *rest)
            if fails_here:
                if step == "watch":
                    received.close()
                raise OSError(24, "Too many open files")
            return received

        return fails

    begin = time.monotonic()
    with monkeypatch.context() as patched:
        for name in ("exchange", "settle"):
            patched.setattr(Rounds, name, failing(getattr(Rounds, name)))
        results = run_ranks(3, lambda rank: meet(groups[rank], timeout=LONG))
    if (at, moment) == ("agree", "after"):  # the others had agreed; they raise in the next round
        assert isinstance(results.pop(culprit), ResourceLimitError)
        assert results == [None, None]
        results = run_ranks(3, lambda rank: meet(groups[rank], timeout=LONG) if rank != culprit else None)
        assert results.pop(culprit) is None
    assert time.monotonic() - begin < SOON
    if (at, moment) == ("connect", "after") and culprit:  # the others use sockets already
        assert isinstance(results.pop(culprit), ResourceLimitError)
        assert kinds(results) == {PeerLostError}
        assert {error.peers for error in results} == {(culprit,)}
    else:
        assert kinds(results) == {ResourceLimitError}, results
        assert {error.rank for error in results} == {culprit}
        assert all("RLIMIT_NOFILE" in str(error) for error in results)
    succeed(3, lambda rank: meet(groups[rank]))
    assert all(group._rounds.passes_descriptors for group in groups)


@pytest.mark.parametrize("fails", ["Listener", "Listener.accept", "connect", "watch_process"])
def test_no_descriptors_left_for_the_bootstrap_is_the_named_error_on_all(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while the leader accepts reaches the followers over the store, at once."""
    groups = make_groups(3)

    def full(*args: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        if fails == "Listener":
            patch.setattr(scm.Listener, "__init__", full)
        elif fails == "Listener.accept":
            patch.setattr(scm.Listener, "accept", full)
        elif fails == "connect":
            original = scm.connect
            patch.setattr(scm, "connect", lambda w, rank, d: full() if rank == 2 else original(w, rank, d))
        else:
            patch.setattr(os, "pidfd_open", full)
        begin = time.monotonic()
        results = run_ranks(3, lambda rank: meet(groups[rank], timeout=LONG))
    assert time.monotonic() - begin < SOON
    assert kinds(results) == {ResourceLimitError}, results
    assert len({error.rank for error in results}) == 1 or fails == "watch_process"
    succeed(3, lambda rank: meet(groups[rank]))


def test_without_pidfds_groups_work_and_say_what_they_lack(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kernel without pidfd_open causes a warning, not an error."""

    def missing(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    groups = make_groups(2)
    succeed(2, lambda rank: meet(groups[rank]))
    assert "cannot watch processes" in caplog.text
    assert groups[0].lost() == ()
    caplog.clear()  # the errors in it refer to the groups


def test_a_follower_refused_by_uid_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader refuses a connection of another user; no rank waits for the timeout."""
    groups = make_groups(3)
    original = scm.peer_of  # type: ignore[attr-defined]

    def other_user(sock: socket.socket) -> tuple[int, int]:
        pid, uid = original(sock)
        return pid, uid + (threading.current_thread().name in ("0", "symmem-join"))

    with monkeypatch.context() as patch:
        patch.setattr(scm, "peer_of", other_user)
        begin = time.monotonic()
        results = run_ranks(3, lambda rank: meet(groups[rank], timeout=LONG))
    assert time.monotonic() - begin < SOON
    assert kinds(results) == {PeerLostError}
    assert {error.peers for error in results} == {(1, 2)}
    assert all("refused" in str(error) and "same user" in str(error) for error in results)
    succeed(3, lambda rank: meet(groups[rank]))


def test_a_leader_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower sends nothing to a socket of another user."""
    groups = make_groups(2)
    original = scm.peer_of  # type: ignore[attr-defined]

    def other_user(sock: socket.socket) -> tuple[int, int]:
        pid, uid = original(sock)
        return pid, uid + (threading.current_thread().name == "1")

    with monkeypatch.context() as patch:
        patch.setattr(scm, "peer_of", other_user)
        results = run_ranks(2, lambda rank: meet(groups[rank], timeout=LONG))
    assert kinds(results) == {RendezvousError}
    assert all(f"belongs to user {os.getuid() + 1}" in str(error) and error.rank == 1 for error in results)
    succeed(2, lambda rank: meet(groups[rank]))


# Locations.


@pytest.mark.parametrize("place_of", [lambda rank: rank // 8, lambda rank: rank % 1024, lambda rank: 0])
def test_the_places_of_many_ranks_are_a_short_text(place_of: Callable[[int], int]) -> None:
    """Every rank reads it when it joins."""
    locations = [Location(f"boot {place_of(rank)}", 1, f"node{place_of(rank)}", rank) for rank in range(8192)]
    places = Places.of(locations)
    assert places.of_ranks == tuple(map(place_of, range(8192)))
    assert places.are_connected == (place_of(1023) == 0)
    assert len(places.pack()) < 4000
    assert Places.unpack(places.pack()) == places
    if not places.are_connected:
        assert "and 1008 more" in str(places.not_connectable())


@pytest.mark.parametrize(
    ("other", "texts"),
    [
        (OTHER_HOST, ("host node (boot) on ranks 0, 2", "host node2 (another boot) on rank 1", "spans hosts")),
        (OTHER_CONTAINER, ("namespace 1) on ranks 0, 2", "namespace 2) on rank 1", "--network=host")),
    ],
)
def test_descriptors_between_places_are_refused_on_all_ranks(
    other: Location, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names ranks and locations. Exchanges without descriptors use the store."""
    stand_at(monkeypatch, HOST, other, HOST)
    groups = make_groups(3)

    def rank(rank: int) -> None:
        with groups[rank].collective("map", LONG) as collective:
            assert not collective.passes_descriptors
            collective.exchange("files", b"", [0])

    results = run_ranks(3, rank)
    assert kinds(results) == {RendezvousError}
    for error in results:
        assert error.peers == (1,)
        assert all(text in str(error) for text in texts), str(error)
    succeed(3, lambda rank: meet(groups[rank]))


def test_a_group_cannot_be_pickled() -> None:
    group = Group.from_store(0, 1, dist.HashStore(), "local")
    with pytest.raises(GroupError, match="cannot be pickled"):
        pickle.dumps(group)
    group.close()


def test_differing_names_the_minority() -> None:
    """On a draw, rank 0 counts as the majority; ranks are written as spans."""
    assert differing([1, 1, 2, 1, 1]) == ("1 on ranks 0-1, 3-4, 2 on rank 2", (2,))
    assert differing(["a", "b"]) == ("a on rank 0, b on rank 1", (1,))


# The store: the number of requests, and the keys that stay.


class CountingStore(dist.Store):
    """Counts the requests to a store and the keys in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dist.HashStore()
        self.requests = 0
        self.keys: set[str] = set()
        self._lock = threading.Lock()

    def _count(self, key: str | None = None) -> None:
        with self._lock:
            self.requests += 1
            if key is not None:
                self.keys.add(key)

    def set(self, key: str, value: Any) -> None:
        self._count(key)
        self.inner.set(key, value)

    def add(self, key: str, amount: int) -> int:
        self._count(key)
        return self.inner.add(key, amount)

    def get(self, key: str) -> bytes:
        self._count()
        return self.inner.get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests += len(keys)
        return self.inner.multi_get(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._count()
        return self.inner.compare_set(key, expected, desired)

    def check(self, keys: list[str]) -> bool:
        there = self.inner.check(keys)
        if there:  # how often a rank asks in vain depends on time
            self._count()
        return there

    def has_extended_api(self) -> bool:
        return True

    def delete_key(self, key: str) -> bool:
        with self._lock:
            self.requests += 1
            self.keys.discard(key)
        return self.inner.delete_key(key)


def test_requests_to_the_store_grow_linearly_and_stop_once_sockets_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader reads n keys, and a second collective does not use the store."""
    monkeypatch.setattr("symmem.group.transports._PROMPT", LONG)  # on a busy machine, ranks would look for others
    asked = {}
    for size in (2, 8, 32, 64):
        store = CountingStore()
        groups = make_groups(size, store, f"of {size}")
        succeed(size, lambda rank, groups=groups: meet(groups[rank], timeout=LONG))  # type: ignore[misc]
        asked[size] = store.requests / size
        # All keys of the join are deleted, except every rank's count of groups with this name.
        assert [key for key in store.keys if "/met/" not in key] == []
        assert len(store.keys) == size
        before = store.requests
        succeed(size, lambda rank, groups=groups: meet(groups[rank], timeout=LONG))  # type: ignore[misc]
        assert store.requests == before
    assert max(asked.values()) < 1.5 * asked[2], asked
    assert asked[64] < 25, asked


def test_keys_of_rounds_are_deleted_also_after_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several hosts, only the keys of the last round stay; keys of failed rounds are deleted too."""
    stand_at(monkeypatch, HOST, OTHER_HOST, HOST)
    store = CountingStore()
    groups = make_groups(3, store)
    for turn in range(6):

        def rank(rank: int, turn: int = turn) -> None:
            with groups[rank].collective("work", LONG):
                if turn % 2 and rank == turn % 3:
                    raise OutOfMemoryError("full")

        run_ranks(3, rank)
    succeed(3, lambda rank: meet(groups[rank]))
    keys = {key for key in store.keys if "/met/" not in key}
    rounds = {re.search(r"/(\d+)/[^/]+$", key)[1] for key in keys}  # type: ignore[index]
    assert len(rounds) == 1
    assert len(keys) == 3 + 3
    assert len(store.keys - keys) == 3  # every rank's count of groups with this name


@pytest.mark.parametrize("kind", ["file", "tcp", "prefix"])
def test_any_store_will_do(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group works with every kind of store that torch has; its timeouts are named errors."""
    stand_at(monkeypatch, HOST, OTHER_HOST)
    stores: list[dist.Store]
    if kind == "file":
        stores = [dist.FileStore(str(tmp_path / "store"), 2) for _ in range(2)]
    elif kind == "tcp":
        first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stores = [first, dist.TCPStore("127.0.0.1", first.port, is_master=False)]
    else:
        stores = [dist.PrefixStore("p", dist.HashStore())] * 2
    groups = [Group.from_store(rank, 2, stores[rank], f"any {kind}") for rank in range(2)]
    for payload in (b"", bytes(range(256)), b"\0" * 100_000):

        def rank(rank: int, payload: bytes = payload) -> None:
            with groups[rank].collective("talk", LONG) as collective:
                assert [c.payload for c in collective.exchange("x", payload)] == [payload] * 2

        succeed(2, rank)
    for lonely in (0, 1):
        with pytest.raises(PeerTimeoutError, match=r"timeout 0[.]2 s") as caught:
            meet(groups[lonely], timeout=0.2)
        assert caught.value.peers == (1 - lonely,)
        with pytest.raises(PeerTimeoutError, match=r"timeout 0[.]2 s"):
            meet(groups[1 - lonely], timeout=0.2)
        with pytest.raises(PeerTimeoutError, match="They have come now"):
            meet(groups[lonely])
        succeed(2, lambda rank: meet(groups[rank]))


def test_a_broken_store_is_told_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """If the store's server is gone, the error is neither a hang nor a bare error of torch."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    group = Group.from_store(1, 2, client, "broken store")
    del server
    begin = time.monotonic()
    with pytest.raises(RendezvousError) as caught:
        meet(group, timeout=LONG)
    assert time.monotonic() - begin < SOON
    assert (caught.value.rank, caught.value.group) == (1, "broken store")
    caplog.clear()  # the errors in it refer to the store


def test_a_restarted_job_does_not_see_old_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun restarted the worker group on the same store; without the count it would read old keys."""
    store = dist.HashStore()

    def start(count: int, size: int = 2) -> list[Any]:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        groups = make_groups(2, store, "restart")
        return run_ranks(size, lambda rank: meet(groups[rank], timeout=LONG))

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    old = make_groups(2, store, "restart")
    old[1].fail("work", OutOfMemoryError("of the old workers"))
    assert start(1) == [None, None]
    assert start(2) == [None, None]
    assert kinds(start(0, size=1)) == {OutOfMemoryError}  # without the count, it reads the old keys


def test_groups_of_one_name_made_anew_do_not_mix() -> None:
    """The second group with the same name and store uses other keys."""
    store = dist.HashStore()
    for _ in range(3):
        groups = make_groups(2, store, "again")
        succeed(2, lambda rank, groups=groups: meet(groups[rank]))  # type: ignore[misc]
        for group in groups:
            group.close()


# Life.


def test_closing_tells_the_peers() -> None:
    """All ranks name a rank that left, at once. On that rank the error says that the group is closed."""
    groups = make_groups(3)
    succeed(3, lambda rank: meet(groups[rank]))
    groups[1].close()
    groups[1].close()
    begin = time.monotonic()
    results = run_ranks(3, lambda rank: meet(groups[rank], timeout=LONG))
    assert time.monotonic() - begin < SOON
    assert [type(result) for result in results] == [PeerLostError, GroupError, PeerLostError]
    assert results[0].peers == results[2].peers == (1,)
    assert "is closed" in str(results[1])


def test_closing_rank_0_tells_the_peers() -> None:
    """The others notice the leader's end at once too."""
    groups = make_groups(3)
    succeed(3, lambda rank: meet(groups[rank]))
    groups[0].close()
    results = run_ranks(3, lambda rank: meet(groups[rank], timeout=LONG) if rank else None)
    assert {error.peers for error in results[1:]} == {(0,)}
    assert kinds(results[1:]) == {PeerLostError}


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0), (0, -1)])
def test_a_rank_outside_of_the_group_is_refused(rank: int, size: int) -> None:
    """GroupError, before any request to the store."""
    with pytest.raises(GroupError, match=f"rank {rank} of {size}"):
        Group.from_store(rank, size, dist.HashStore())


def test_a_group_of_one_needs_nobody() -> None:
    """With one rank, descriptors come back as duplicates."""
    (group,) = make_groups(1)
    with group.collective("alone") as collective, collective.exchange("x", b"y", [0]) as received:
        assert received[0].payload == b"y"
        assert os.fstat(received[0].descriptors[0]).st_ino == os.fstat(0).st_ino
        assert received[0].descriptors != (0,)
    with pytest.raises(RankError), group.collective("alone"):
        raise RankError("mine")
    assert group._rounds.number > 0


def test_a_group_that_spans_threads_collects_with_no_reference() -> None:
    """A group without references closes its sockets, without communication."""
    before = descriptors()
    groups = make_groups(2)
    succeed(2, lambda rank: meet(groups[rank]))
    assert descriptors() > before
    groups.clear()
    gc.collect()
    assert descriptors() == before


def test_descriptors_pass_in_any_number() -> None:
    """More descriptors than the 253 that the kernel takes in one message."""
    groups = make_groups(2)
    file = os.memfd_create("many")
    try:
        for number in (1, 200, 253, 254, 400):

            def rank(rank: int, number: int = number) -> None:
                with groups[rank].collective("pass", LONG) as collective:
                    received = collective.exchange("files", b"", [file] * (number if rank else 1))
                with received:
                    assert [len(c.descriptors) for c in received] == [1, number]
                    inodes = {os.fstat(fd).st_ino for c in received for fd in c.descriptors}
                    assert inodes == {os.fstat(file).st_ino}
                    assert not any(os.get_inheritable(fd) for fd in received[1].descriptors)

            succeed(2, rank)
    finally:
        os.close(file)


def test_what_one_rank_cannot_receive_fails_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower at its descriptor limit cannot read a verdict; the others raise its error in the next round."""
    groups = make_groups(3)
    succeed(3, lambda rank: meet(groups[rank]))
    original = scm.receive

    def full(*args: Any) -> Any:
        header, body, fds = original(*args)
        if fds and threading.current_thread().name == "1":
            close_all(fds)
            raise ResourceLimitError("does not fit")
        return header, body, fds

    def rank(rank: int) -> None:
        with groups[rank].collective("pass", LONG) as collective, collective.exchange("files", b"", [0]):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(scm, "receive", full)
        begin = time.monotonic()
        results = run_ranks(3, rank)
    assert time.monotonic() - begin < SOON
    assert kinds(results) == {ResourceLimitError}
    assert {error.rank for error in results} == {1}
    succeed(3, rank)


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_slept_past_its_deadline_takes_what_has_come(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that was stopped before its wait does not fail a round that the others have passed."""
    groups = make_groups(2)
    succeed(2, lambda rank: meet(groups[rank]))
    transport = groups[late]._rounds.transport
    name = "verdict" if late else "collect"
    original = getattr(transport, name)
    peer = transport._peers[1 - late]  # type: ignore[attr-defined]

    def after_its_deadline(sequence: int, deadline: float) -> Any:
        assert select.select([peer], [], [], LONG)[0]  # the message of the other rank has come
        return original(sequence, 0.0)

    monkeypatch.setattr(transport, name, after_its_deadline)
    results = run_ranks(2, lambda rank: meet(groups[rank], timeout=LONG))
    assert results == [None, None]


def test_two_groups_of_a_rank_do_not_disturb_each_other() -> None:
    """Collectives of two groups, interleaved by two threads per rank."""
    first, second = make_groups(2, name="first"), make_groups(2, name="second")

    def rank(rank: int) -> None:
        groups = first if rank < 2 else second
        for _ in range(30):
            meet(groups[rank % 2])

    succeed(4, rank)


def test_ranks_in_a_step_are_told_in_the_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    """One line per collective step, with rank, group, step and duration."""
    groups = make_groups(2)
    with caplog.at_level("DEBUG", "symmem.group"):
        succeed(2, lambda rank: meet(groups[rank], "measure"))
    for rank in range(2):
        assert re.search(rf"measure: rank {rank} of group 'threads', rounds 0 to \d+, \d+\.\d+ ms", caplog.text)
