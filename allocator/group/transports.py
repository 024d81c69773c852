"""How the ranks of a group pass messages: over the job's store, or over unix sockets on one host.

Both are stars around rank 0, the leader: every other rank submits one message a round, the leader collects them
and publishes one verdict. What a round asks of the store grows linearly with the group, and the sockets ask
nothing of it: only a group's first round, or a group that spans hosts, uses the store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import select
import socket
import struct
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from symmem.backends import descriptors as scm
from symmem.backends.descriptors import Contribution
from symmem.backends.libc import is_limit, limit_error
from symmem.errors import (
    PeerLostError,
    PeerTimeoutError,
    RendezvousError,
    ResourceLimitError,
    SymmemError,
    from_wire,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.distributed.distributed_c10d import Store

__all__ = ["Message", "SocketWire", "StoreWire", "Wire", "watch_process", "within"]

T = TypeVar("T")

log = logging.getLogger("symmem.wires")

PATIENCE = 2.0
"""Seconds that rank 0 tries to send a verdict to a rank whose buffer is full, before it takes that rank for gone; and
that the store may be late with an answer."""

TURN = 1.0
"""Seconds that the first request of the store may wait, and the following ones longer. A client of it serves one at a
time, so two threads whose groups meet at once would otherwise wait for each other."""


@dataclass
class Message:
    """What a rank submits (one contribution or an error), or the leader publishes (all of them or an error).

    ``sequence`` numbers the group's rounds; what is left over from an earlier round is recognised and dropped.
    ``deadline`` is on CLOCK_MONOTONIC, thus meaningful within one host only.
    """

    sequence: int
    step: str
    deadline: float
    contributions: list[Contribution] = field(default_factory=list)
    error: dict[str, Any] | None = None

    def header(self) -> dict[str, Any]:
        """Everything but the payloads and descriptors, as plain data."""
        return {
            "sequence": self.sequence,
            "step": self.step,
            "deadline": self.deadline,
            "sizes": [len(c.payload) for c in self.contributions],
            "counts": [len(c.descriptors) for c in self.contributions],
            "error": self.error,
        }

    @classmethod
    def unpack(cls, header: dict[str, Any], body: bytes, descriptors: tuple[int, ...] = ()) -> Message:
        """The inverse of :meth:`header` and the concatenated payloads and descriptors.

        Raises:
            RendezvousError: It is not; the descriptors are closed.
        """
        if not _is_sound(header, len(body), len(descriptors)):
            scm.close_all(descriptors)
            raise RendezvousError(f"a peer sent something that is no message: {str(header)[:80]}")
        contributions, at, first = [], 0, 0
        for size, count in zip(header["sizes"], header["counts"], strict=True):
            contributions.append(Contribution(body[at : at + size], descriptors[first : first + count]))
            at, first = at + size, first + count
        return cls(header["sequence"], header["step"], header["deadline"], contributions, header["error"])

    def body(self) -> bytes:
        """All payloads in order."""
        return b"".join(c.payload for c in self.contributions)

    def descriptors(self) -> tuple[int, ...]:
        """All descriptors in order."""
        return tuple(d for c in self.contributions for d in c.descriptors)

    def close(self) -> None:
        """Close the descriptors of a message that was received and is not used."""
        scm.close_all(self.descriptors())


def _is_sound(header: dict[str, Any], nbytes: int, descriptors: int) -> bool:
    """Whether a header is that of a message with a body of ``nbytes`` bytes and so many descriptors."""
    try:
        sizes, counts = header["sizes"], header["counts"]
        if header["error"] is not None:
            from_wire(header["error"])
        return (
            isinstance(header["sequence"], int)
            and isinstance(header["step"], str)
            and math.isfinite(header["deadline"])
            and len(sizes) == len(counts)
            and all(isinstance(number, int) and number >= 0 for number in (*sizes, *counts))
            and (sum(sizes), sum(counts)) == (nbytes, descriptors)
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return False


class Wire(Protocol):
    """A star around rank 0."""

    carries_descriptors: bool

    def submit(self, message: Message) -> None:
        """Send to the leader; replaces what this rank submitted in the same round."""

    def collect(self, sequence: int, deadline: float) -> dict[int, Message]:
        """At the leader: the message of every other rank; returns early, with fewer, once one carries an error."""

    def publish(self, message: Message) -> None:
        """At the leader: send to all others."""

    def verdict(self, sequence: int, deadline: float) -> Message:
        """At the others: what the leader published in this round; asked again, its error or none is enough."""

    def close(self) -> None:
        """Give up all resources."""


class StoreWire:
    """Messages as keys of a ``torch.distributed.Store``.

    A round of n ranks takes 2 requests from each rank (its message, a counter), one wait each, and a read of n keys
    by the leader. The last rank to come, or the first that failed, sets ``ready``, so nobody polls.

    Of a store's calls only ``wait`` has a limit, and none if the process that serves it is stopped. So they are made on
    a thread that is given up when time is up.
    """

    carries_descriptors = False

    def __init__(self, store: Store, prefix: str, rank: int, size: int) -> None:
        self._store: Any = store  # torch's stubs leave out bytes as values, and has_extended_api
        self._prefix, self._rank, self._size = prefix, rank, size
        self._kept = 1  # the first round whose keys are still there
        self._collected = 0  # the last round that was collected here; those that sockets carried left no keys

    def _key(self, sequence: int, name: object) -> str:
        return f"{self._prefix}/{sequence}/{name}"

    def submit(self, message: Message) -> None:
        within(message.deadline, self._submit, message)

    def collect(self, sequence: int, deadline: float) -> dict[int, Message]:
        return within(deadline, self._collect, sequence, deadline)

    def publish(self, message: Message) -> None:
        within(message.deadline, self._set, self._key(message.sequence, "verdict"), message)

    def verdict(self, sequence: int, deadline: float) -> Message:
        return within(deadline, self._verdict, sequence, deadline)

    def _submit(self, message: Message) -> None:
        sequence = message.sequence
        self._set(self._key(sequence, self._rank), message)
        if message.error or self._store.add(self._key(sequence, "count"), 1) == self._size - 1:
            self._store.set(self._key(sequence, "ready"), b"1")

    def _collect(self, sequence: int, deadline: float) -> dict[int, Message]:
        ranks = range(1, self._size)
        self._collected = sequence
        self._store.set(self._key(sequence, 0), b"")  # only so that the others can tell whether rank 0 came
        self._wait(self._key(sequence, "ready"), deadline, sequence, ranks)
        keys = {rank: self._key(sequence, rank) for rank in ranks}
        if self._store.has_extended_api() and self._store.check(list(keys.values())):
            values = dict(zip(keys, self._store.multi_get(list(keys.values())), strict=True))
        else:
            values = {r: self._store.get(key) for r, key in keys.items() if self._store.check([key])}
        messages = {rank: self._decode(value) for rank, value in values.items()}
        if len(messages) == len(keys) and not any(m.error for m in messages.values()):
            self._forget(sequence)
        return messages

    def forget(self, sequence: int) -> None:
        """At the leader: all ranks have come to this round, so all have read the verdicts before: their keys can go."""
        within(time.monotonic(), self._forget, sequence)

    def _forget(self, sequence: int) -> None:
        for past in range(self._kept, min(sequence, self._collected + 1)):
            for name in ("verdict", "ready", "count", *range(self._size)):
                self._store.delete_key(self._key(past, name))
        self._kept = max(self._kept, sequence)

    def _verdict(self, sequence: int, deadline: float) -> Message:
        key = self._key(sequence, "verdict")
        self._wait(key, deadline, sequence, range(self._size))
        return self._decode(self._store.get(key))

    def close(self) -> None:
        pass  # the store belongs to the job

    def _set(self, key: str, message: Message) -> None:
        head = json.dumps(message.header()).encode()
        self._store.set(key, struct.pack("!I", len(head)) + head + message.body())

    @staticmethod
    def _decode(value: bytes) -> Message:
        size = int.from_bytes(value[:4], "big")
        return Message.unpack(scm.parse_header(value[4 : 4 + size]), value[4 + size :])

    def _wait(self, key: str, deadline: float, sequence: int, ranks: Iterable[int]) -> None:
        turn = TURN
        while not self._comes(key, min(time.monotonic() + turn, deadline)):
            if time.monotonic() < deadline:
                turn = min(2 * turn, 4 * TURN)  # torch logs each that was in vain
                time.sleep(0.02)  # so that another thread gets hold of the client
                continue
            absent = tuple(
                rank for rank in ranks if rank != self._rank and not self._store.check([self._key(sequence, rank)])
            )
            raise PeerTimeoutError(
                f"ranks {list(absent)} did not come in time" if absent else "rank 0 did not answer in time",
                peers=absent or (0,),
            )

    def _comes(self, key: str, end: float) -> bool:
        """Wait for a key for a while; meanwhile no other thread of this process can ask the store anything."""
        try:
            self._store.wait([key], timedelta(seconds=max(end - time.monotonic(), 0.001)))
        except RuntimeError as error:
            # Stores differ in what they raise when time is up; the clock tells a timeout from a broken store.
            if time.monotonic() < end - 0.05:
                raise RendezvousError(
                    f"the job's store failed: {error}", hint="the process that serves it may have ended"
                ) from error
            return False
        return True


def within(deadline: float, call: Callable[..., T], *arguments: Any) -> T:
    """The result of a call of the store, or an error if there is none some time after ``deadline``."""
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(*arguments), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, name="symmem-store", daemon=True).start()
    try:
        value, error = answers.get(timeout=max(deadline - time.monotonic(), 0.0) + PATIENCE)
    except queue.Empty:
        raise PeerTimeoutError(
            "the job's store does not answer", hint="see whether the process that serves it is stopped, or overloaded"
        ) from None
    if error is not None:
        raise error
    return cast("T", value)


def watch_process(pid: int) -> int | None:
    """A descriptor that polls readable once the process has ended (pidfd_open(2)), or None on a kernel without.

    Raises:
        ResourceLimitError: This process may have no more descriptors.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if is_limit(error):
            raise limit_error(error, "cannot watch a process") from error
        log.warning("cannot watch processes (%s): a peer's death in a barrier shows only at the timeout", error)
        return None


class SocketWire:
    """Messages and descriptors over unix sockets; the death of a rank shows at once.

    Args:
        peers: At the leader a connection to each other rank; at the others one to rank 0.
    """

    carries_descriptors = True

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self._peers = peers
        # Holds the sockets: the collector, which finalises a circle in any order, must not come to them before this.
        self._closing = weakref.finalize(self, _close_sockets, tuple(peers.values()))
        self._closing.atexit = False
        self._inbox: dict[int, deque[Message]] = {peer: deque() for peer in peers}
        self._gone: set[int] = set()
        self.awaited: tuple[int, ...] = ()  # at the leader: whose message of this round has not come
        self._heard: Message | None = None  # the last verdict, without its contributions
        self._poll = select.poll()
        self._at: dict[int, int] = {}
        for peer, sock in peers.items():
            self._poll.register(sock, select.POLLIN)
            self._at[sock.fileno()] = peer

    def submit(self, message: Message) -> None:
        # If rank 0 is gone: what it told before it left is still to be read.
        with contextlib.suppress(PeerLostError):
            self._send(0, message)

    def publish(self, message: Message) -> None:
        # Who reads goes first, and who stopped reading holds the others up for no longer than its patience.
        ready = select.poll()
        for peer in self._peers.keys() - self._gone:
            ready.register(self._peers[peer], select.POLLOUT)
        readers = {self._at[descriptor] for descriptor, _event in ready.poll(0)}
        for peer in sorted(self._peers, key=lambda peer: peer not in readers):
            # A rank that cannot be told is dead or stuck: the next round that needs it says so.
            with contextlib.suppress(SymmemError):
                self._send(peer, message, time.monotonic() + PATIENCE)

    def collect(self, sequence: int, deadline: float) -> dict[int, Message]:
        messages: dict[int, Message] = {}
        try:
            looked = False
            while True:
                deadline = min([deadline, *self._take(sequence, messages)])
                self.awaited = missing = tuple(peer for peer in self._peers if peer not in messages)
                if any(message.error for message in messages.values()) or (looked and not missing):
                    return messages
                if gone := tuple(peer for peer in missing if peer in self._gone):
                    raise _lost(gone)
                if missing and looked and time.monotonic() > deadline:
                    raise PeerTimeoutError(f"ranks {list(missing)} did not come in time", peers=missing)
                # When all are here, look once more at what has arrived: somebody may have withdrawn. Look too when
                # time is up: it may be this rank that was late.
                looked = not self._receive(deadline if missing else 0.0)
        except BaseException:
            for message in messages.values():
                message.close()
            raise

    def _take(self, sequence: int, messages: dict[int, Message]) -> list[float]:
        """Move this round's messages out of the inboxes, drop older ones; returns the deadlines that came."""
        deadlines = []
        for peer, inbox in self._inbox.items():
            while inbox and inbox[0].sequence <= sequence:
                message = inbox.popleft()
                if message.sequence < sequence:
                    message.close()
                    continue
                if peer in messages:  # withdrawn
                    messages[peer].close()
                messages[peer] = message
                deadlines.append(message.deadline)
        return deadlines

    def verdict(self, sequence: int, deadline: float) -> Message:
        inbox = self._inbox[0]
        while True:
            while inbox:
                message = inbox[0]
                if message.sequence == sequence:
                    # Noted first: an interrupt from here on must not leave this rank in doubt about the round.
                    self._heard = Message(sequence, message.step, message.deadline, error=message.error)
                    return inbox.popleft()
                inbox.popleft().close()
            if self._heard is not None and self._heard.sequence == sequence:
                return self._heard
            if self._gone:
                raise _lost((0,))
            if not self._receive(deadline) and time.monotonic() > deadline:
                raise PeerTimeoutError("rank 0, which gathers for the group, did not answer in time", peers=(0,))

    def close(self) -> None:
        self._closing()
        for inbox in self._inbox.values():
            while inbox:
                inbox.popleft().close()

    def leave(self) -> None:
        """Tell all peers, and a thread of this process that waits for them, that it is over; any thread may."""
        for sock in self._peers.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _send(self, peer: int, message: Message, deadline: float | None = None) -> None:
        try:
            deadline = deadline or max(message.deadline, time.monotonic() + 1.0)
            scm.send(self._peers[peer], message.header(), message.body(), message.descriptors(), deadline)
        except ConnectionError as error:
            raise _lost((peer,)) from error
        except OSError as error:
            self._drop(peer)  # it may have got a part, and would take what follows for the rest
            if isinstance(error, TimeoutError):
                raise PeerTimeoutError(f"rank {peer} does not read its messages", peers=(peer,)) from error
            raise limit_error(error, f"cannot send to rank {peer}") from error
        except BaseException:
            self._drop(peer)
            raise

    def _drop(self, peer: int) -> None:
        """Take a rank for gone: what would come from it next cannot be told from the rest of what came last."""
        if peer not in self._gone:
            self._gone.add(peer)
            self._poll.unregister(self._peers[peer])
            with contextlib.suppress(OSError):
                self._peers[peer].shutdown(socket.SHUT_RDWR)

    def _receive(self, deadline: float) -> bool:
        """Wait until ``deadline`` for messages and put them into the inboxes; False if nothing happened."""
        remaining = max(deadline - time.monotonic(), 0.0)
        events = self._poll.poll(remaining * 1000)
        for descriptor, _event in events:
            peer = self._at[descriptor]
            try:
                message = Message.unpack(*scm.receive(self._peers[peer], max(deadline, time.monotonic() + 1.0)))
            except (EOFError, ConnectionError):
                self._drop(peer)
            except TimeoutError as error:
                self._drop(peer)
                raise PeerTimeoutError(f"rank {peer} stopped amid a message", peers=(peer,)) from error
            except ResourceLimitError:
                raise  # the message was read to its end
            except BaseException:
                self._drop(peer)
                raise
            else:
                self._inbox[peer].append(message)
        return bool(events)


def _close_sockets(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _lost(peers: tuple[int, ...]) -> PeerLostError:
    named = f"rank{'s' * (len(peers) > 1)} {', '.join(map(str, peers))}"
    return PeerLostError(
        f"{named} died, or left the group",
        hint=f"look at the log of {named} for the first error; then restart the job, or make a new group",
        peers=peers,
    )
