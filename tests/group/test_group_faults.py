"""Interrupts, threads, forks and unusual stores must not make the ranks of a group disagree; ranks are threads."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist
from patience import LONG, SOON
from programs import Run, run_python, run_to_the_end
from thread_ranks import make_groups, meet, run_ranks, succeed

import symmem.backends
import symmem.group.group
import symmem.memory.registry
from symmem.errors import (
    ClosedError,
    GroupError,
    InvalidArgumentError,
    OutOfMemoryError,
    PeerTimeoutError,
    RendezvousError,
)
from symmem.group import agreement, transports
from symmem.group.group import Group
from symmem.group.interrupts import held_back
from symmem.group.transports import Message, SocketTransport, StoreTransport
from symmem.tensor.tensor import SymmetricTensor, allocate


@pytest.fixture(autouse=True)
def sockets_are_closed() -> Iterator[None]:
    """Close the sockets here, because errors refer to groups, and the collector warns of open sockets."""
    yield
    for group in list(symmem.group.group._groups):
        group._disconnect()


def met(size: int, **kwargs: Any) -> list[Group]:
    groups = make_groups(size, **kwargs)
    succeed(size, lambda rank: meet(groups[rank]))
    return groups


# Skipped calls.


@pytest.mark.parametrize("skips", range(3))
@pytest.mark.parametrize("over_the_store", [False, True])
def test_ranks_go_on_together_after_a_rank_skipped_calls(
    skips: int, over_the_store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program makes a collective call in every step. In some steps a rank skips it: then one more step fails."""
    if over_the_store:
        monkeypatch.setattr("symmem.group.join.Places.are_connected", False)
    groups = met(3)
    assert groups[0].status()["wire"] == ("store" if over_the_store else "sockets")

    def step(timeout: float, *skipped: int) -> set[str]:
        ranks = [rank for rank in range(3) if rank not in skipped]
        results = run_ranks(len(ranks), lambda number: exchange(groups[ranks[number]], timeout))
        return {result if isinstance(result, str) else type(result).__name__ for result in results}

    def exchange(group: Group, timeout: float) -> str:
        with group.collective("work", timeout) as collective:
            received = collective.exchange("step", str(group.rank).encode())
        return " ".join(contribution.payload.decode() for contribution in received)

    for times in (1, 2):
        for _ in range(times):
            assert step(0.2, skips) == {"PeerTimeoutError"}
        assert step(LONG) == {"PeerTimeoutError"}
        assert step(LONG) == step(LONG) == {"0 1 2"}
    if not over_the_store:  # which rank skipped the call shows in the clock of the host
        assert step(0.2, 0, 2) == {"PeerTimeoutError"}
        assert step(LONG) == {"PeerTimeoutError"}
        assert step(LONG) == step(LONG) == {"0 1 2"}
    assert len({group._rounds.number for group in groups}) == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("before", ["_exchange", "_catch_up"])
def test_an_interrupt_before_a_rank_takes_part_is_told_in_that_round(
    rank: int, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = met(3)
    if before == "_catch_up":  # the rank is late
        late = run_ranks(2, lambda number: meet(groups[[0, 1, 2][number + (number >= rank)]], timeout=0.2))
        assert {type(error) for error in late} == {PeerTimeoutError}
    rounds = groups[rank]._rounds

    def interrupted(*_: Any) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, before, interrupted)
    results = run_ranks(3, lambda rank: meet(groups[rank]))
    assert type(results.pop(rank)) is KeyboardInterrupt
    assert all("KeyboardInterrupt" in str(error) for error in results)
    for _ in range(2):
        succeed(3, lambda rank: meet(groups[rank]))
    assert len({group._rounds.number for group in groups}) == 1


def test_a_late_rank_0_passes_on_the_error_of_another() -> None:
    groups = met(2)
    assert type(run_ranks(1, lambda _: meet(groups[1], timeout=0.2))[0]) is PeerTimeoutError
    groups[1].fail("work", OutOfMemoryError("(meant)"))
    results = run_ranks(1, lambda _: meet(groups[0]))
    assert type(results[0]) is PeerTimeoutError
    succeed(2, lambda rank: meet(groups[rank]))


def test_a_failure_of_its_own_takes_the_place_of_the_step_after_a_late_rank() -> None:
    groups = met(3)
    results = run_ranks(2, lambda rank: meet(groups[rank], timeout=0.2))
    assert {type(result) for result in results} == {PeerTimeoutError}
    groups[1].fail("work", OutOfMemoryError("(meant)"))
    results = run_ranks(2, lambda number: meet(groups[(0, 2)[number]]))
    assert type(results[0]) is OutOfMemoryError
    assert type(results[1]) is PeerTimeoutError
    succeed(3, lambda rank: meet(groups[rank]))


# Interrupts.


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OverflowError])
def test_an_interrupt_while_the_verdict_is_awaited_fails_that_round_everywhere(
    interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The follower withdraws its message from the round, so no rank passes it."""
    groups = met(3)
    withdrawn = threading.Event()
    transport = groups[1]._rounds.transport
    original, submit = transport.verdict, transport.submit

    def verdict(*args: Any) -> Message:
        monkeypatch.setattr(transport, "verdict", original)
        monkeypatch.setattr(transport, "submit", withdraw)
        raise interrupt("now")

    def withdraw(message: Message) -> None:
        submit(message)
        withdrawn.set()

    monkeypatch.setattr(transport, "verdict", verdict)
    passed = []

    def rank(rank: int) -> None:
        if rank == 0:
            withdrawn.wait(LONG)
        with groups[rank].collective("work", LONG) as collective:
            collective.exchange("step")
            passed.append(rank)

    results = run_ranks(3, rank)
    assert passed == []
    expected = interrupt if interrupt is KeyboardInterrupt else RendezvousError
    assert [type(result) for result in results] == [RendezvousError, expected, RendezvousError]
    assert interrupt.__name__ in str(results[0])
    assert len({group._rounds.number for group in groups}) == 1
    succeed(3, lambda rank: meet(groups[rank]))


def test_an_interrupt_after_the_verdict_is_told_in_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is too late to withdraw, so the others raise the error in their next round."""
    groups = met(2)
    transport = groups[1]._rounds.transport
    original = transport.verdict

    def verdict(*args: Any) -> Message:
        monkeypatch.setattr(transport, "verdict", original)
        original(*args).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(transport, "verdict", verdict)
    results = run_ranks(2, lambda rank: meet(groups[rank], timeout=LONG))
    assert results[0] is None
    assert isinstance(results[1], KeyboardInterrupt)
    results = run_ranks(2, lambda rank: meet(groups[rank], timeout=LONG) if rank == 0 else None)
    assert "KeyboardInterrupt" in str(results[0])
    succeed(2, lambda rank: meet(groups[rank]))


@pytest.mark.parametrize("way", ["send", "receive"])
def test_an_interrupt_within_a_message_comes_after_it(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is whole, and the connection can be used."""
    ours, theirs = socket.socketpair()
    transport, peer = SocketTransport({1: ours}), SocketTransport({0: theirs})
    original = getattr(transports.scm, way)  # type: ignore[attr-defined]

    def interrupted(*args: Any) -> Any:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    soon, before = time.monotonic() + LONG, signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(transports.scm, way, interrupted)  # type: ignore[attr-defined]
        if way == "send":
            with pytest.raises(KeyboardInterrupt):
                transport.publish(Message(1, "step", soon))
        else:
            peer.submit(Message(1, "step", soon))
            monkeypatch.setattr(transports.scm, way, interrupted)  # type: ignore[attr-defined]
            with pytest.raises(KeyboardInterrupt):
                transport.collect(1, soon)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    if way == "send":
        assert peer.verdict(1, soon).step == "step"
    else:
        assert [message.step for message in transport.collect(1, soon).values()] == ["step"]
    transport.publish(Message(2, "next", soon))
    assert peer.verdict(2, soon).step == "next"
    transport.close()
    peer.close()


def test_an_interrupt_in_the_first_call_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has counted the rank, and the rank does not know: it must not be counted twice."""
    groups, original = make_groups(2), transports.within

    def interrupted(deadline: float, call: Callable[..., Any], *arguments: Any) -> Any:
        result = original(deadline, call, *arguments)
        if call == groups[1]._rounds._come:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(agreement, "within", interrupted)
    told, interrupt = run_ranks(2, lambda rank: meet(groups[rank]))
    assert isinstance(interrupt, KeyboardInterrupt)
    assert "KeyboardInterrupt" in str(told)
    succeed(2, lambda rank: meet(groups[rank]))


def test_an_interrupt_comes_after_a_block_that_raises_too() -> None:
    def block() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            raise ValueError

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            block()
        assert isinstance(caught.value.__context__, ValueError)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("way", ["send", "receive"])
def test_another_exception_within_a_message_ends_the_connection(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next data on the stream would be read as the rest of that message."""
    ours, theirs = socket.socketpair()
    transport = SocketTransport({1: ours})
    if way == "receive":
        theirs.sendall(b"\0\0\0")

    def broken(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(transports.scm, way, broken)  # type: ignore[attr-defined]
    soon = time.monotonic() + 1
    call = (
        (lambda: transport.publish(Message(1, "step", soon))) if way == "send" else (lambda: transport.collect(1, soon))
    )
    with pytest.raises(MemoryError):
        call()
    theirs.settimeout(LONG)
    assert theirs.recv(1) == b""
    transport.close()
    theirs.close()


def test_a_peer_that_does_not_read_does_not_hold_up_the_verdict_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that read come first. The rank that stopped is given up after a bounded time."""
    monkeypatch.setattr(transports, "PATIENCE", 4.0)  # seconds
    pairs = {peer: socket.socketpair() for peer in (1, 2, 3)}
    pairs[1][0].setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            pairs[1][0].send(b"x" * 4096)
    transport = SocketTransport({peer: pair[0] for peer, pair in pairs.items()})
    begin = time.monotonic()
    publishing = threading.Thread(target=transport.publish, args=(Message(1, "step", begin + 60),))
    publishing.start()
    for peer in (2, 3):
        pairs[peer][1].settimeout(LONG)
        assert pairs[peer][1].recv(1)
    assert publishing.is_alive()  # it waits for the peer that does not read
    publishing.join(LONG)
    assert not publishing.is_alive()
    assert transport._gone == {1}
    transport.close()
    for _ours, theirs in pairs.values():
        theirs.close()


# A tensor with a mapping on some ranks only.


def test_a_tensor_that_is_mapped_on_some_ranks_only_can_be_tried_again() -> None:
    """An interrupt after the agreement leaves one rank without a mapping; then all ranks map again."""
    groups = make_groups(2)
    tensors = [allocate(8, backend="host") for _ in range(2)]
    succeed(2, lambda rank: tensors[rank].rendezvous(groups[rank]))
    tensors[1]._block.mappings = {}
    for tensor in tensors:
        tensor._block.compared = frozenset()
    succeed(2, lambda rank: tensors[rank].rendezvous(groups[rank]))

    def rank(rank: int) -> None:
        tensors[rank].tensor.fill_(rank + 1)
        tensors[rank].barrier(timeout=LONG)
        assert tensors[rank].remote_tensor(1 - rank)[0] == 2 - rank
        tensors[rank].barrier(timeout=LONG)

    succeed(2, rank)


def test_a_tensor_closed_during_its_rendezvous_keeps_no_mapping() -> None:
    """If another thread closes the tensor, peers' memory is released too."""
    groups = met(2)
    tensors: list[SymmetricTensor] = [allocate(8, backend="host") for _ in range(2)]

    closed = threading.Event()

    def close() -> None:
        tensors[1].close()
        closed.set()

    def rank(rank: int) -> None:
        if rank == 0:
            closed.wait(LONG)
        tensors[rank].rendezvous(groups[rank])

    closing = threading.Timer(0.1, close)
    closing.start()
    results = run_ranks(2, rank)
    closing.join()
    assert results[0] is tensors[0] or results[0] is None
    assert isinstance(results[1], ClosedError)
    assert tensors[1]._block.mappings == {}


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9, True, "1"])
def test_times_beyond_what_the_system_can_wait_are_refused(timeout: Any) -> None:
    """The bounds are the same as in the configuration."""
    (group,) = make_groups(1)
    tensor = allocate(8, backend="host").rendezvous(group)
    calls: list[Callable[[], Any]] = [
        lambda: tensor.rendezvous(group, timeout=timeout),
        lambda: tensor.barrier(timeout=timeout),
        lambda: meet(group, timeout=timeout),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="timeout"):
            call()
    meet(group, timeout=24 * 86400)


# Threads.


def test_many_threads_may_ask_who_is_lost_while_one_disconnects() -> None:
    """One thread at a time uses the poll object, and no polled descriptor is closed meanwhile."""
    groups = met(2)
    errors = []
    stop = threading.Event()

    class SlowPoll:
        """Polls with a pause, so that another thread could come in between."""

        inner, busy = groups[0]._watch._poll, False

        def poll(self, timeout: int) -> list[tuple[int, int]]:
            if SlowPoll.busy:
                errors.append("two at a time")
            SlowPoll.busy = True
            time.sleep(0.001)
            SlowPoll.busy = False
            for descriptor in watched:
                os.fstat(descriptor)
            return self.inner.poll(timeout)

    watched = list(groups[0]._watch._ranks)
    groups[0]._watch._poll = SlowPoll()  # type: ignore[assignment]

    def ask() -> None:
        while not stop.is_set():
            try:
                assert groups[0].lost() == ()
            except BaseException as error:
                errors.append(repr(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    groups[0]._disconnect()
    assert isinstance(groups[0]._watch._poll, select.poll().__class__)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


def test_fail_does_not_wait_for_a_collective_of_another_thread() -> None:
    """The thread with the collective reports the error when it is done."""
    groups = met(2)
    inside, go = threading.Event(), threading.Event()

    def rank(rank: int) -> None:
        with groups[rank].collective("long", LONG):
            if rank == 1:
                inside.set()
                go.wait(LONG)

    def failing() -> None:
        inside.wait(LONG)
        begin = time.monotonic()
        groups[1].fail("allocate", OutOfMemoryError("full"))
        took.append(time.monotonic() - begin)
        go.set()

    took: list[float] = []
    thread = threading.Thread(target=failing)
    thread.start()
    succeed(2, rank)
    thread.join(LONG)
    assert max(took) < SOON
    results = run_ranks(2, lambda rank: meet(groups[rank], timeout=LONG) if rank == 0 else None)
    assert isinstance(results[0], OutOfMemoryError)
    succeed(2, lambda rank: meet(groups[rank]))


def test_closing_ends_a_collective_of_another_thread_and_still_watches() -> None:
    """It ends at once, no polled descriptor is closed, and deaths are still noticed."""
    groups = met(2)
    threading.Timer(0.2, groups[1].close).start()
    begin = time.monotonic()
    results = run_ranks(2, lambda rank: meet(groups[rank], timeout=LONG) if rank else time.sleep(1))
    assert time.monotonic() - begin < SOON
    assert isinstance(results[1], (RendezvousError, GroupError))
    assert groups[1]._rounds.sockets is None
    assert groups[1]._watch._ranks
    assert groups[1].lost() == ()


def test_a_forked_child_does_not_wait_for_threads_of_its_parent() -> None:
    """The child gets new locks for those that other threads held at the fork."""
    (group,) = make_groups(1)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with group._lock, group._watch._lock, symmem.memory.registry._lock, symmem.backends._lock:
            held.set()
            release.wait(LONG)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(LONG)
    child = os.fork()
    if child == 0:
        signal.alarm(int(SOON))
        group.lost()
        group.close()
        symmem.memory.registry.block_at(1)
        symmem.backends.get_backend("host")
        os._exit(0)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Stores.


def test_a_group_meets_whatever_its_processes_did_on_other_stores() -> None:
    """The store counts the groups with a name, not the process."""
    first, second = dist.HashStore(), dist.HashStore()
    with pytest.raises(RendezvousError):
        meet(Group.from_store(1, 2, first, "default"), timeout=0.1)
    groups = make_groups(2, second, "default")
    succeed(2, lambda rank: meet(groups[rank]))


class _StoppedStore:
    """A store that does not answer until ``go_on`` is set, as if its process were stopped."""

    def __init__(self, go_on: threading.Event) -> None:
        self._go_on = go_on

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._go_on.wait(LONG)


def test_a_store_that_does_not_answer_is_named_in_time() -> None:
    """Every step of a collective has a time limit, whatever serves the store."""
    go_on = threading.Event()
    group = Group.from_store(1, 2, dist.HashStore(), "stopped")
    vars(group._rounds)["store"] = StoreTransport(_StoppedStore(go_on), "stopped", 1, 2)  # type: ignore[arg-type]
    begin = time.monotonic()
    try:
        with pytest.raises(PeerTimeoutError, match="the job's store does not answer"), group.collective("meet", 0.2):
            pass
        assert time.monotonic() - begin < SOON
    finally:
        go_on.set()


# The end of the process.

ALIVE_AT_EXIT = """
import sys, threading

store = dist.HashStore()
groups = [symmem.Group.from_store(rank, 2, store) for rank in range(2)]

def join(rank):
    with groups[rank].collective("join"):
        pass

threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert groups[0].status()["wire"] == "sockets"
sys.kept, torch.kept, cycle = groups[0], groups[1], [groups]
cycle.append(cycle)
"""


@pytest.mark.parametrize(
    ("run", "imports"),
    [
        (run_python, "import symmem, torch, torch.distributed as dist"),
        (run_to_the_end, "import torch, torch.distributed as dist, symmem"),
        (run_python, "from symmem.group.group import Group; import symmem, torch, torch.distributed as dist"),
        (run_python, "import symmem.tensor.tensor, symmem, torch, torch.distributed as dist"),
    ],
)
def test_a_group_that_lives_until_exit_prints_nothing(run: Run, imports: str) -> None:
    """At exit, modules lose their globals before the last groups are deleted."""
    done = run(f"{imports}\n{ALIVE_AT_EXIT}")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
