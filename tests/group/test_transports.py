"""Messages and transports: any input leads to the documented errors, and leaks nothing."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st
from patience import LONG, SOON
from thread_ranks import descriptors, run_ranks

from symmem.backends import descriptors as scm
from symmem.backends.descriptors import Contribution, Received
from symmem.backends.libc import Descriptor
from symmem.errors import (
    OutOfMemoryError,
    PeerLostError,
    PeerTimeoutError,
    RendezvousError,
    ResourceLimitError,
    to_wire,
)
from symmem.group.transports import Message, SocketTransport, StoreTransport, within

pytestmark = pytest.mark.usefixtures("nothing_leaks")


def message(sequence: int = 1, *payloads: bytes, error: Exception | None = None, seconds: float = 5.0) -> Message:
    wired = to_wire(error) if error else None
    return Message(sequence, "step", time.monotonic() + seconds, [Contribution(p) for p in payloads], wired)


# Messages.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=8), values, max_size=4),
    max_leaves=8,
)
errors = st.none() | st.builds(
    lambda what, hint, rank, peers: to_wire(OutOfMemoryError(what, hint=hint, rank=rank, peers=tuple(peers))),
    st.text(),
    st.none() | st.text(),
    st.none() | st.integers(0, 99),
    st.lists(st.integers(0, 99)),
)


@given(
    st.integers(0, 2**40),
    st.text(),
    st.floats(-1e6, 1e6),
    st.lists(st.tuples(st.binary(), st.integers(0, 5))),
    errors,
)
def test_a_message_comes_out_as_it_went_in(
    sequence: int, step: str, seconds: float, parts: list[tuple[bytes, int]], error: dict[str, Any] | None
) -> None:
    numbers = iter(range(1000, 2000))
    contributions = [Contribution(payload, tuple(next(numbers) for _ in range(n))) for payload, n in parts]
    sent = Message(sequence, step, time.monotonic() + seconds, contributions, error)
    header = json.loads(json.dumps(sent.header()))
    got = Message.unpack(header, sent.body(), sent.descriptors())
    assert (got.sequence, got.step, got.contributions) == (sequence, step, contributions)
    assert 0 <= got.deadline - sent.deadline < 5  # later by the time on the way
    assert (got.error is None) == (error is None)
    assert error is None or got.error == json.loads(json.dumps(error))


def test_a_deadline_is_right_on_another_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another time namespace, or on another host, the clock of the receiver shows another time."""
    header = message(1, seconds=7.0).header()
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    assert 1e9 + 6 < Message.unpack(header, b"").deadline <= 1e9 + 7


HEADER = Message(3, "x", 1.0, [Contribution(b"abc")]).header()


@given(st.sampled_from(sorted(HEADER)), json_values, st.booleans())
def test_a_header_with_a_wrong_value_is_the_named_error_and_closes_descriptors(
    key: str, value: Any, drop: bool
) -> None:
    assume(drop or (key, value) != ("counts", [1]))  # this value counts the descriptor correctly
    header = {**HEADER, key: value}
    if drop:
        del header[key]
    ends = [Descriptor.of(end) for end in os.pipe()]
    try:
        with pytest.raises(RendezvousError, match="not a message"):
            Message.unpack(header, b"abc", (ends[0],))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(ends[0])
    finally:
        ends[1].close()


@given(json_values)
def test_a_header_that_is_none_is_the_named_error(value: Any) -> None:
    header = value if isinstance(value, dict) else {"sizes": value}
    with pytest.raises(RendezvousError):
        Message.unpack(header, b"")


@given(st.dictionaries(st.sampled_from(sorted(HEADER)), json_values), st.binary(max_size=8))
def test_any_header_is_taken_whole_or_refused(changed: dict[str, Any], body: bytes) -> None:
    try:
        got = Message.unpack({**HEADER, **changed}, body)
    except RendezvousError:
        return
    assert got.body() == body
    assert isinstance(got.sequence, int)
    assert isinstance(got.step, str)
    assert math.isfinite(got.deadline)


# Sockets.


@contextlib.contextmanager
def listening() -> Iterator[tuple[SocketTransport, socket.socket]]:
    """A leader, and the other end of its socket to rank 1."""
    mine, theirs = socket.socketpair()
    transport = SocketTransport({1: mine})
    try:
        yield transport, theirs
    finally:
        transport.close()
        theirs.close()


def leader_and(*ranks: int) -> tuple[SocketTransport, dict[int, SocketTransport]]:
    pairs = {rank: socket.socketpair() for rank in ranks}
    return SocketTransport({rank: p[0] for rank, p in pairs.items()}), {
        rank: SocketTransport({0: p[1]}) for rank, p in pairs.items()
    }


def close(leader: SocketTransport, followers: dict[int, SocketTransport]) -> None:
    for transport in (leader, *followers.values()):
        transport.close()


def soon(seconds: float = LONG) -> float:
    return time.monotonic() + seconds


def test_a_withdrawal_replaces_what_was_submitted() -> None:
    """A rank that runs out of time withdraws its message, even if all others have come."""
    leader, followers = leader_and(1, 2)
    followers[1].submit(message(1, b"here"))
    followers[1].submit(message(1, error=PeerTimeoutError("gave up")))
    followers[2].submit(message(1, b"here"))
    got = leader.collect(1, soon())
    assert got[1].error is not None
    assert got[1].contributions == []
    close(leader, followers)


def test_what_is_left_of_earlier_rounds_is_dropped_and_later_ones_wait() -> None:
    """Rounds are numbered, and the descriptors of dropped messages are closed."""
    leader, followers = leader_and(1)
    file = os.open("/dev/null", os.O_RDONLY)
    before = descriptors()
    for sequence in (1, 2, 3):
        followers[1].submit(Message(sequence, "s", soon(), [Contribution(b"%d" % sequence, (file,))]))
    got = leader.collect(2, soon())
    assert got[1].contributions[0].payload == b"2"
    got[1].close()
    third = leader.collect(3, soon())[1]
    assert third.contributions[0].payload == b"3"
    assert descriptors() == before + 1
    third.close()
    with pytest.raises(PeerTimeoutError) as caught:
        leader.collect(4, soon(0.05))
    assert caught.value.peers == (1,)
    followers[1].submit(Message(5, "s", soon(), [Contribution(b"", (file,))]))
    leader._receive(soon())
    assert descriptors() == before + 1
    close(leader, followers)  # closes the descriptors of unread messages
    os.close(file)


def test_a_lost_leader_is_told_after_what_it_said_last() -> None:
    """A verdict that arrived before the connection ended can still be read, although sending fails."""
    leader, followers = leader_and(1)
    leader.publish(message(7, error=OutOfMemoryError("full")))
    leader.close()
    followers[1].submit(message(7, b"x"))
    assert followers[1].verdict(7, soon()).error is not None
    with pytest.raises(PeerLostError) as caught:
        followers[1].verdict(8, soon())
    assert caught.value.peers == (0,)
    followers[1].close()


def test_lost_followers_are_named_and_nobody_else() -> None:
    """The leader notices it at once. A lost rank that has submitted a message is no error."""
    leader, followers = leader_and(1, 2, 3)
    followers[1].submit(message(1))
    followers[1].close()
    followers[3].close()
    with pytest.raises(PeerLostError, match="rank 3 died") as caught:
        leader.collect(1, soon())
    assert caught.value.peers == (3,)
    leader.publish(message(1))  # does not raise
    close(leader, followers)


def test_a_rank_that_does_not_read_is_cut_off() -> None:
    """It gets no further message, because it would read the rest of the first one as its beginning."""
    leader, followers = leader_and(1, 2)
    begin = time.monotonic()
    leader.publish(message(1, bytes(4 << 20), seconds=0.0))
    assert time.monotonic() - begin < SOON
    with pytest.raises((PeerLostError, PeerTimeoutError)):
        followers[1].verdict(1, soon(1))
    with pytest.raises(PeerLostError) as caught:
        leader.collect(2, soon())
    assert caught.value.peers == (1, 2)
    close(leader, followers)


@given(st.binary(min_size=1, max_size=200))
def test_garbage_on_a_socket_is_an_error_by_name(garbage: bytes) -> None:
    """Truncated or wrong bytes never cause a crash, a hang or a leak."""
    with listening() as (transport, theirs):
        before = descriptors()
        theirs.sendall(garbage)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((PeerLostError, RendezvousError)):
            transport.collect(1, soon())
        assert descriptors() == before


@given(st.binary(max_size=60), st.integers(0, 3), st.integers(0, 3), st.integers(-2, 2))
def test_garbage_with_descriptors_closes_them(head: bytes, promised: int, sent: int, off: int) -> None:
    """An invalid message leaves no descriptor open."""
    with listening() as (transport, theirs):
        before = descriptors()
        theirs.sendall(scm._PREFIX.pack(max(len(head) + off, 0), 0, promised))
        socket.send_fds(theirs, [b"\0"], [0] * sent)
        theirs.sendall(head)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((RendezvousError, PeerLostError, ResourceLimitError)):
            transport.collect(1, soon())
        assert descriptors() == before


def test_a_message_that_stops_amid_is_a_timeout_that_names_the_rank() -> None:
    """The connection is unusable afterwards."""
    with listening() as (transport, theirs):
        theirs.sendall(scm._PREFIX.pack(1000, 0, 0) + b"{")
        with pytest.raises(PeerTimeoutError, match="in the middle of a message") as caught:
            transport.collect(1, soon(0.05))
        assert caught.value.peers == (1,)
        with pytest.raises(BrokenPipeError):
            theirs.sendall(bytes(20))
        with pytest.raises(PeerLostError):
            transport.collect(2, soon())


# The store.


@given(st.binary(max_size=80))
def test_garbage_in_the_store_is_an_error_by_name(garbage: bytes) -> None:
    """A foreign program wrote the key."""
    store = dist.HashStore()
    transport = StoreTransport(store, "p", 1, 2)
    store.set("p/1/verdict", garbage)  # type: ignore[arg-type]
    with pytest.raises(RendezvousError, match="not a message"):
        transport.verdict(1, soon())


def test_over_the_store_an_error_is_seen_before_all_have_come() -> None:
    """A message with an error ends the wait of the leader at once."""
    store = dist.HashStore()
    leader, first = StoreTransport(store, "p", 0, 3), StoreTransport(store, "p", 1, 3)

    def rank(rank: int) -> Any:
        if rank == 0:
            return leader.collect(1, soon())
        return first.submit(message(1, error=OutOfMemoryError("full")))

    begin = time.monotonic()
    got = run_ranks(2, rank)[0]
    assert time.monotonic() - begin < SOON
    assert list(got) == [1]
    assert got[1].error["what"] == "full"


def test_who_is_waited_for_at_the_store_is_named() -> None:
    """The error names the ranks without a message, or rank 0 if all messages are there."""
    store = dist.HashStore()
    ranks = [StoreTransport(store, "p", rank, 4) for rank in range(4)]
    ranks[2].submit(message(1))
    with pytest.raises(PeerTimeoutError) as caught:
        ranks[0].collect(1, soon(0.05))
    assert caught.value.peers == (1, 3)
    with pytest.raises(PeerTimeoutError) as caught:
        ranks[2].verdict(1, soon(0.05))
    assert caught.value.peers == (1, 3)
    for rank in (1, 3):
        ranks[rank].submit(message(1))
    with pytest.raises(PeerTimeoutError, match="rank 0 did not answer") as caught:
        ranks[2].verdict(1, soon(0.05))
    assert caught.value.peers == (0,)


def test_a_store_that_fails_is_no_timeout() -> None:
    """The error differs from the error for ranks that do not come."""

    class Broken(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Broken pipe")

    with pytest.raises(RendezvousError, match="the job's store failed: Broken pipe") as caught:
        StoreTransport(Broken(), "p", 1, 2).verdict(1, soon())
    assert type(caught.value) is RendezvousError


def test_a_failed_call_of_the_store_keeps_nothing_of_its_caller() -> None:
    """Neither in the thread that called the store, nor in a cycle; else mappings would outlive a failed join."""

    class Resource:
        pass

    def fail() -> None:
        raise ValueError("a failure")

    def call() -> weakref.ref[Resource]:
        resource = Resource()
        with pytest.raises(ValueError, match="a failure"):
            within(time.monotonic() + 60.0, fail)
        return weakref.ref(resource)

    gc.collect()
    gc.disable()
    try:
        resource = call()
        assert resource() is None
    finally:
        gc.enable()
    assert "symmem-store" not in [thread.name for thread in threading.enumerate()]


class InterruptError(Exception):
    pass


def interrupt_at(instruction: int, names: set[str]) -> Callable[[], bool]:
    """Raise an exception before an instruction of these functions, as another thread can; returns whether it came."""
    left = instruction

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        caller = frame.f_back.f_code.co_name if frame.f_back else ""
        if frame.f_code.co_name not in names or caller == "__del__":  # there, Python ignores exceptions
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise InterruptError
        return trace

    sys.settrace(trace)
    return lambda: left < 0


@pytest.mark.parametrize("way", ["send", "receive"])
def test_an_exception_at_any_instruction_leaves_the_message_whole(way: str) -> None:
    """Also with descriptors. The connection stays, and the exception is raised after the message."""
    ours, theirs = socket.socketpair()
    leader, follower = SocketTransport({1: ours}), SocketTransport({0: theirs})
    names = {
        "send": {"send"},
        "receive": {"receive", "_receive_exactly", "_receive_into", "take", "read", "unpack"},
    }[way]
    before = descriptors()
    for sequence in range(1, 100_000):
        message = Message(sequence, "step", soon(), [Contribution(b"payload", (0, 1))])

        def publish(message: Message = message) -> None:
            leader.publish(message)

        def check(sequence: int = sequence) -> None:
            with Received(follower.verdict(sequence, soon()).contributions) as received:
                assert received[0].payload == b"payload"
                assert [os.fstat(descriptor).st_ino for descriptor in received[0].descriptors] == [
                    os.fstat(descriptor).st_ino for descriptor in (0, 1)
                ]

        if way == "receive":
            publish()
        has_come = interrupt_at(sequence - 1, names)
        try:
            (publish if way == "send" else check)()
            whole = way == "receive"
        except InterruptError:
            whole = False
        finally:
            sys.settrace(None)
        if not whole:
            check()
        if not has_come():
            break
    assert sequence > 50
    assert descriptors() == before
    leader.close()
    follower.close()
