"""The transports of a group's messages: the job's store, or unix sockets on one host.

Both are stars around rank 0, the leader. In a round, every other rank submits one message. The leader collects them and
publishes one verdict. The number of requests to the store grows linearly with the group. Only a group's first rounds,
or a group that spans hosts, use the store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from symmem.backends import descriptors as scm
from symmem.backends.descriptors import Contribution
from symmem.backends.libc import Descriptor, close_all, is_limit, limit_error
from symmem.backends.untraced import untraced
from symmem.errors import (
    PeerLostError,
    PeerTimeoutError,
    RendezvousError,
    ResourceLimitError,
    SymmemError,
    from_wire,
)
from symmem.group.interrupts import held_back, to_the_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.distributed.distributed_c10d import Store

__all__ = ["Message", "NotComingError", "SocketTransport", "StoreTransport", "Transport", "watch_process", "within"]

T = TypeVar("T")

log = logging.getLogger("symmem.group")

PATIENCE = 2.0
"""Seconds of tolerance. After this time, rank 0 gives up a rank with a full buffer, and a rank gives up the store."""

_PROMPT = 0.25
"""Seconds after which a rank that waits at the store begins to look whether the others can still come."""

_MOST_REQUESTS = 4000
"""Per second, from all ranks of a group that wait at the store for long; eight times as many at first."""


class NotComingError(RuntimeError):
    """A rank cannot come to a round over the store. All ranks learn that for themselves.

    Attributes:
        error: The error for all ranks.
    """

    def __init__(self, error: SymmemError) -> None:
        super().__init__(error)
        self.error = error


@dataclass
class Message:
    """A rank submits one contribution or an error; the leader publishes all contributions or an error.

    ``sequence`` is the number of the round, so that messages of earlier rounds can be dropped. ``deadline`` is by
    the clock of this process. The header carries the seconds until then, because other processes may have other clocks:
    on other hosts, or in another time namespace. ``line`` is the line of the program that called the operation.
    ``late`` names the ranks that did not come in time, if the sender gave up the round for them. ``given_up`` is when
    this was, by the wall clock, which is the same for all processes of a host.
    """

    sequence: int
    step: str
    deadline: float
    contributions: list[Contribution] = field(default_factory=list)
    error: dict[str, Any] | None = None
    line: str = ""
    late: tuple[int, ...] = ()
    given_up: float = 0.0

    def replace(
        self,
        contributions: Iterable[Contribution],
        error: dict[str, Any] | None,
        late: Iterable[int] = (),
        given_up: float = 0.0,
    ) -> Message:
        """Return a message of the same round with other contents."""
        contributions, late = list(contributions), tuple(late)
        return Message(self.sequence, self.step, self.deadline, contributions, error, late=late, given_up=given_up)

    def header(self) -> dict[str, Any]:
        """Return everything except the payloads and descriptors, as plain data."""
        return {
            "sequence": self.sequence,
            "step": self.step,
            "seconds": self.deadline - time.monotonic(),
            "sizes": [len(c.payload) for c in self.contributions],
            "counts": [len(c.descriptors) for c in self.contributions],
            "error": self.error,
            "line": self.line,
            "late": self.late,
            "given_up": self.given_up,
        }

    @classmethod
    def unpack(cls, header: dict[str, Any], body: bytes, descriptors: tuple[int, ...] = ()) -> Message:
        """Make a message from its header, its concatenated payloads and its descriptors.

        Raises:
            RendezvousError: They are not a message. The descriptors are closed.
        """
        if not _is_sound(header, len(body), len(descriptors)):
            close_all(descriptors)
            raise RendezvousError(f"a peer sent data that is not a message: {str(header)[:80]}")
        contributions, at, first = [], 0, 0
        for size, count in zip(header["sizes"], header["counts"], strict=True):
            contributions.append(Contribution(body[at : at + size], descriptors[first : first + count]))
            at, first = at + size, first + count
        deadline = time.monotonic() + header["seconds"]
        rest = header["error"], header["line"], tuple(header["late"]), header["given_up"]
        return cls(header["sequence"], header["step"], deadline, contributions, *rest)

    def body(self) -> bytes:
        """Return all payloads in order."""
        return b"".join(c.payload for c in self.contributions)

    def descriptors(self) -> tuple[int, ...]:
        """Return all descriptors in order."""
        return tuple(d for c in self.contributions for d in c.descriptors)

    def close(self) -> None:
        """Close the descriptors of a received message that is not used."""
        close_all(self.descriptors())


def _is_sound(header: dict[str, Any], nbytes: int, descriptors: int) -> bool:
    """Whether a header fits a body of ``nbytes`` bytes and this number of descriptors."""
    try:
        sizes, counts = header["sizes"], header["counts"]
        if header["error"] is not None:
            from_wire(header["error"])
        return (
            isinstance(header["sequence"], int)
            and isinstance(header["step"], str)
            and isinstance(header["line"], str)
            and math.isfinite(header["seconds"])
            and math.isfinite(header["given_up"])
            and len(sizes) == len(counts)
            and all(isinstance(number, int) and number >= 0 for number in (*sizes, *counts, *header["late"]))
            and (sum(sizes), sum(counts)) == (nbytes, descriptors)
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return False


class Transport(Protocol):
    """A star around rank 0."""

    def submit(self, message: Message) -> None:
        """Send to the leader; replaces an earlier message of this rank in the same round."""

    def collect(self, sequence: int, deadline: float) -> dict[int, Message]:
        """At the leader: return the message of every other rank; return early, with fewer, after an error."""

    def publish(self, message: Message) -> None:
        """At the leader: send to all others."""

    def verdict(self, sequence: int, deadline: float) -> Message:
        """At the others: return the message that the leader published in this round.

        If called again, the returned message may lack the contributions.
        """


class StoreTransport:
    """Messages as keys of a ``torch.distributed.Store``.

    In a round of n ranks, every rank makes 2 requests (its message, a counter), and the leader reads n keys. The last
    rank to come, or the first that failed, sets ``ready``. A rank that waits asks for its key again and again, and
    later looks whether the others can still come.

    The calls of a store have no timeout. So a thread makes them, and the caller abandons the thread at the deadline.
    """

    def __init__(
        self, store: Store, prefix: str, rank: int, size: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self._store: Any = store  # torch's stubs lack bytes as values, and has_extended_api
        self._check_others = check
        self._prefix, self._rank, self._size = prefix, rank, size
        self._kept = 1  # the first round with keys in the store
        self._collected = 0  # the last round collected here; rounds over sockets leave no keys

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
        self._store.set(self._key(sequence, 0), b"")  # shows the others that rank 0 has come
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
        """At the leader: delete the keys of the rounds before this one.

        All ranks have come to this round, so they have read the earlier verdicts.
        """
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

    def _set(self, key: str, message: Message) -> None:
        head = json.dumps(message.header()).encode()
        self._store.set(key, struct.pack("!I", len(head)) + head + message.body())

    @staticmethod
    def _decode(value: bytes) -> Message:
        size = int.from_bytes(value[:4], "big")
        return Message.unpack(scm.parse_header(value[4 : 4 + size]), value[4 + size :])

    def _wait(self, key: str, deadline: float, sequence: int, ranks: Iterable[int]) -> None:
        # The store's own wait would block other threads of this process, and torch logs its timeouts.
        begin = time.monotonic()
        nap, longest = max(0.0005, self._size / (8 * _MOST_REQUESTS)), max(0.25, self._size / _MOST_REQUESTS)
        while not self._has(key):
            if time.monotonic() > begin + _PROMPT:
                self._check_others()
            if (remaining := deadline - time.monotonic()) > 0:
                time.sleep(min(nap, remaining))
                nap = min(1.5 * nap, longest)
                continue
            absent = tuple(rank for rank in ranks if rank != self._rank and not self._has(self._key(sequence, rank)))
            raise PeerTimeoutError(
                f"ranks {list(absent)} did not come in time" if absent else "rank 0 did not answer in time",
                peers=absent or (0,),
            )

    def _has(self, key: str) -> bool:
        try:
            has: bool = self._store.check([key])
            return has
        except RuntimeError as error:
            raise RendezvousError(
                f"the job's store failed: {error}", hint="the process that serves it may have ended"
            ) from error


def within(deadline: float, call: Callable[..., T], *arguments: Any, patience: float = PATIENCE) -> T:
    """Return the result of a call of the store; raise PeerTimeoutError if it is later than ``deadline + patience``."""
    answers: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            answers.append((call(*arguments), None))
        except BaseException as error:
            answers.append((None, error))

    thread = threading.Thread(target=work, name="symmem-store", daemon=True)
    thread.start()
    # Not only for the answer: a thread that has not ended yet may hold the error, and with it the caller's frames.
    thread.join(max(deadline - time.monotonic(), 0.0) + patience)
    if thread.is_alive():
        raise PeerTimeoutError(
            "the job's store does not answer", hint="see whether the process that serves it is stopped, or overloaded"
        )
    value, error = answers.pop()
    try:
        if error is not None:
            raise error
    finally:
        del error  # its traceback has this frame
    return cast("T", value)


def watch_process(pid: int) -> Descriptor | None:
    """Return a descriptor that becomes readable when the process ends (pidfd_open(2)); None if the kernel has none.

    Raises:
        ProcessLookupError: There is no such process.
        ResourceLimitError: This process may have no more descriptors.
    """
    try:
        return Descriptor.from_call(os.pidfd_open, pid)
    except ProcessLookupError:
        raise
    except OSError as error:
        if is_limit(error):
            raise limit_error(error, "cannot watch a process") from error
        log.warning("cannot watch processes (%s): a peer's death in a barrier shows only at the timeout", error)
        return None


class SocketTransport:
    """Messages and descriptors over unix sockets. The death of a rank ends its connection at once.

    Args:
        peers: At the leader, a connection to every other rank; at the others, a connection to rank 0.

    Attributes:
        missing: At the leader, the ranks without a message in this round.
    """

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self._peers = peers
        self._inbox: dict[int, deque[Message]] = {peer: deque() for peer in peers}
        # It holds the sockets, because the collector may otherwise finalise the sockets of a cycle first. At the exit
        # of the interpreter it does nothing: the system closes the descriptors.
        self._closing = weakref.finalize(self, _close_all, tuple(peers.values()), self._inbox)
        self._closing.atexit = False
        self._gone: set[int] = set()
        self.missing: tuple[int, ...] = ()
        self._last_verdict: Message | None = None  # without its contributions
        self._poll = select.poll()
        self._at: dict[int, int] = {}
        for peer, sock in peers.items():
            self._poll.register(sock, select.POLLIN)
            self._at[sock.fileno()] = peer

    def submit(self, message: Message) -> None:
        # If rank 0 is gone, its last message may still be unread.
        with contextlib.suppress(PeerLostError):
            self._send(0, message)

    def publish(self, message: Message) -> None:
        # Ranks that read come first. A rank that does not read delays the others by PATIENCE at most.
        ready = select.poll()
        for peer in self._peers.keys() - self._gone:
            ready.register(self._peers[peer], select.POLLOUT)
        readers = {self._at[descriptor] for descriptor, _event in ready.poll(0)}
        for peer in sorted(self._peers, key=lambda peer: peer not in readers):
            # An unreachable rank is dead or stuck; the next round that needs it raises the error.
            with contextlib.suppress(SymmemError):
                self._send(peer, message, time.monotonic() + PATIENCE)

    def collect(self, sequence: int, deadline: float) -> dict[int, Message]:
        messages: dict[int, Message] = {}
        try:
            looked = False
            while True:
                deadline = min([deadline, *self._take(sequence, messages)])
                self.missing = missing = tuple(peer for peer in self._peers if peer not in messages)
                if any(message.error for message in messages.values()) or (looked and not missing):
                    return messages
                if gone := tuple(peer for peer in missing if peer in self._gone):
                    raise _lost(gone)
                if missing and looked and time.monotonic() > deadline:
                    raise PeerTimeoutError(f"ranks {list(missing)} did not come in time", peers=missing)
                # When all messages are here, read once more: a rank may have withdrawn. Read too when time is up,
                # because this rank itself may be late.
                looked = not self._receive(deadline if missing else 0.0)
        except BaseException:
            for message in messages.values():
                message.close()
            raise

    def _take(self, sequence: int, messages: dict[int, Message]) -> list[float]:
        """Move this round's messages out of the inboxes and drop older ones; return the deadlines of the moved ones."""
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
                    # Set first, so that this rank knows the outcome of the round even after an interrupt.
                    self._last_verdict = message.replace((), message.error, message.late, message.given_up)
                    return inbox.popleft()
                inbox.popleft().close()
            if self._last_verdict is not None and self._last_verdict.sequence == sequence:
                return self._last_verdict
            if self._gone:
                raise _lost((0,))
            if not self._receive(deadline) and time.monotonic() > deadline:
                raise PeerTimeoutError("rank 0, which gathers for the group, did not answer in time", peers=(0,))

    def close(self) -> None:
        """Close the sockets, and the descriptors of unread messages."""
        self._closing()

    def leave(self) -> None:
        """End the connections; peers, and a waiting thread of this process, wake up. Any thread may call it."""
        for sock in self._peers.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _send(self, peer: int, message: Message, deadline: float | None = None) -> None:
        deadline = deadline or max(message.deadline, time.monotonic() + 1.0)
        parts = message.header(), message.body(), message.descriptors(), deadline
        sent: list[int] = []
        with held_back():  # after a part of a message, the connection could not be used
            try:
                interrupt = to_the_end(lambda: scm.send(self._peers[peer], *parts, sent))
            except ConnectionError as error:
                raise _lost((peer,)) from error
            except OSError as error:
                self._drop(peer)  # it may have received a part, and would read the next message as the rest
                if isinstance(error, TimeoutError):
                    raise PeerTimeoutError(f"rank {peer} does not read its messages", peers=(peer,)) from error
                raise limit_error(error, f"cannot send to rank {peer}") from error
            except BaseException:
                self._drop(peer)
                raise
        if interrupt is not None:
            raise interrupt

    def _drop(self, peer: int) -> None:
        """Treat a rank as gone, because the next data on its stream could be the rest of an earlier message."""
        if peer not in self._gone:
            self._gone.add(peer)
            self._poll.unregister(self._peers[peer])
            with contextlib.suppress(OSError):
                self._peers[peer].shutdown(socket.SHUT_RDWR)

    def _receive(self, deadline: float) -> bool:
        """Wait until ``deadline`` for messages and put them into the inboxes; return False if none came."""
        remaining = max(deadline - time.monotonic(), 0.0)
        events = self._poll.poll(remaining * 1000)
        for descriptor, _event in events:
            with held_back():  # after a part of a message, the connection could not be used
                interrupt = self._read(self._at[descriptor], max(deadline, time.monotonic() + 1.0))
            if interrupt is not None:
                raise interrupt
        return bool(events)

    def _read(self, peer: int, deadline: float) -> BaseException | None:
        """Put a message that has begun to come into the inbox. Returns an exception that came in between."""
        inbox, progress, known = self._inbox[peer], scm.PartialMessage(), list[Message]()

        def read() -> None:
            if not known:
                known.append(Message.unpack(*scm.receive(self._peers[peer], deadline, progress)))
            if not inbox or inbox[-1] is not known[0]:
                inbox.append(known[0])

        try:
            return to_the_end(read)
        except (EOFError, ConnectionError):
            self._drop(peer)
            return None
        except TimeoutError as error:
            self._drop(peer)
            raise PeerTimeoutError(f"rank {peer} stopped in the middle of a message", peers=(peer,)) from error
        except ResourceLimitError:
            raise  # the message was read completely, so the connection stays usable
        except BaseException:
            self._drop(peer)
            raise


@untraced
def _close_all(sockets: Iterable[socket.socket], inboxes: dict[int, deque[Message]]) -> None:
    for sock in sockets:
        sock.close()
    for inbox in inboxes.values():
        while inbox:
            inbox.popleft().close()


def _lost(peers: tuple[int, ...]) -> PeerLostError:
    named = f"rank{'s' * (len(peers) > 1)} {', '.join(map(str, peers))}"
    return PeerLostError(
        f"{named} died, or left the group",
        hint=f"look at the log of {named} for the first error; then restart the job, or make a new group",
        peers=peers,
    )
