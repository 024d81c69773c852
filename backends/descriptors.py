"""Messages and file descriptors between processes of one host, over private, authenticated unix sockets.

One rank, the leader, listens on an abstract socket with a random name. The others connect to it (a star). Descriptors
pass by SCM_RIGHTS (unix(7)). This needs no privilege; containers forbid the alternative, ``pidfd_getfd(2)``.

Both sides authenticate. They check the user of the peer with SO_PEERCRED, and prove that they know a secret that is
only in the group's store: the follower shows its first half, the leader its second half. The connection of a stranger
is refused, and its user is logged once. It delays no rank: a thread of the leader empties the queue and never waits for
the data of a connection, and a follower that finds the queue full tries again.
"""

from __future__ import annotations

import array
import contextlib
import hmac
import json
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from symmem.backends.libc import Descriptor, Inbox, close_all
from symmem.config.machine import peer_of
from symmem.errors import PeerLostError, PeerTimeoutError, RendezvousError, ResourceLimitError, SymmemError

__all__ = ["Contribution", "Listener", "Received", "Welcome", "connect", "receive", "send"]

log = logging.getLogger("symmem.descriptors")

_PREFIX = struct.Struct("!III")  # bytes of header, bytes of body, number of descriptors
_HELLO = struct.Struct("!32sI")  # first half of the secret, rank
_BATCH = 200  # Linux passes at most SCM_MAX_FD = 253 descriptors per message
_CHUNK = 1 << 20  # bytes; the most to allocate before data has arrived
_BACKLOG = 4096  # queued connections; the kernel's default limit (net.core.somaxconn)
_SILENT = 256  # connections of this user that have not sent a proof, besides one per rank
_PAUSE = 0.01  # seconds, after a failure to accept, for example for want of descriptors
_RETRY = 0.001  # seconds until the next try to connect to a full queue


@dataclass(frozen=True)
class Contribution:
    """The contribution of one rank to an exchange."""

    payload: bytes
    descriptors: tuple[int, ...] = ()


@dataclass(eq=False)
class Received:
    """The contributions of all ranks to an exchange, in rank order. It owns their descriptors."""

    contributions: list[Contribution] = field(default_factory=list)

    def __iter__(self) -> Iterator[Contribution]:
        return iter(self.contributions)

    def __getitem__(self, rank: int) -> Contribution:
        return self.contributions[rank]

    def __len__(self) -> int:
        return len(self.contributions)

    def close(self) -> None:
        """Close all descriptors. May be called again."""
        contributions, self.contributions = self.contributions, []
        for contribution in contributions:
            close_all(contribution.descriptors)

    def __enter__(self) -> Received:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _remaining(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def send(
    sock: socket.socket,
    header: dict[str, Any],
    body: bytes,
    descriptors: Sequence[int],
    deadline: float,
    sent: list[int] | None = None,
) -> None:
    """Send one message.

    Args:
        sock: The connection.
        header: Plain data.
        body: The body.
        descriptors: They stay open, and belong to the caller.
        deadline: When it gives up, by ``time.monotonic()``.
        sent: The bytes that have been sent. If an exception ends the call, another call goes on from there.

    Raises:
        TimeoutError: The peer did not read it by ``deadline``.
        OSError: The peer is gone.
    """
    head = json.dumps(header).encode()
    prefix = _PREFIX.pack(len(head), len(body), len(descriptors))
    batches = [descriptors[start : start + _BATCH] for start in range(0, len(descriptors), _BATCH)]
    data = prefix + bytes(len(batches)) + head + body
    sent = [] if sent is None else sent
    # A single call of C code sends and counts, so that no exception comes in between.
    while (at := sum(sent)) < len(data):
        sock.settimeout(_remaining(deadline))
        if batches and at < len(prefix):
            sent.extend(map(sock.send, (prefix[at:],)))
        elif 0 <= (batch := at - len(prefix)) < len(batches):
            control = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", batches[batch])
            sent.extend(map(sock.sendmsg, ([b"\0"],), ([control],)))
        else:
            sent.extend(map(sock.send, (memoryview(data)[at:],)))


class PartialMessage:
    """The parts of a message that have come."""

    def __init__(self) -> None:
        self.prefix: list[bytes] = []
        self.inboxes: list[Inbox] = []
        self.rest: list[bytes] = []


def receive(
    sock: socket.socket, deadline: float, progress: PartialMessage | None = None
) -> tuple[dict[str, Any], bytes, tuple[Descriptor, ...]]:
    """Receive one message: its header, body and descriptors.

    Args:
        sock: The connection.
        deadline: When it gives up, by ``time.monotonic()``.
        progress: If an exception ends the call, another call goes on from there.

    Raises:
        EOFError: The peer closed the connection.
        TimeoutError: No complete message came by ``deadline``.
        ResourceLimitError: This process may not have so many descriptors. The received ones are closed.
        RendezvousError: The data is not a message.
    """
    progress = progress or PartialMessage()
    sizes = _PREFIX.unpack(_receive_exactly(sock, _PREFIX.size, deadline, progress.prefix))
    inboxes = progress.inboxes
    for start in range(0, sizes[2], _BATCH):
        if len(inboxes) * _BATCH <= start:
            inboxes.append(Inbox(min(_BATCH, sizes[2] - start)))
        _receive_into(inboxes[start // _BATCH], sock, deadline)
    body = _receive_exactly(sock, sizes[0] + sizes[1], deadline, progress.rest)
    descriptors = tuple(descriptor for inbox in inboxes for descriptor in inbox.take())
    try:
        if any(inbox.is_truncated for inbox in inboxes):
            raise ResourceLimitError(
                f"of {sizes[2]} file descriptors that peers sent, {len(descriptors)} fit under this process's "
                "limit (RLIMIT_NOFILE)",
                hint="raise it (`ulimit -n`), or hold fewer symmetric tensors at a time",
            )
        if len(descriptors) != sizes[2]:
            raise RendezvousError(f"a peer announced {sizes[2]} file descriptors, and {len(descriptors)} came")
        return parse_header(body[: sizes[0]]), body[sizes[0] :], descriptors
    except SymmemError:
        close_all(descriptors)
        raise


def _receive_into(inbox: Inbox, sock: socket.socket, deadline: float) -> None:
    """Wait for a byte and its descriptors."""
    ready = select.poll()
    ready.register(sock, select.POLLIN)
    while not inbox.has_come:
        if not ready.poll(_remaining(deadline) * 1000):
            raise TimeoutError("timed out")
        with contextlib.suppress(BlockingIOError, InterruptedError):
            if not inbox.receive(sock):
                raise EOFError("the peer closed the connection")


def parse_header(data: bytes) -> dict[str, Any]:
    """Parse the header of a message.

    Raises:
        RendezvousError: It is not a header.
    """
    try:
        header = json.loads(data)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise RendezvousError(f"a peer sent data that is not a message: {data[:40]!r}")
    return header


def _receive_exactly(sock: socket.socket, nbytes: int, deadline: float, parts: list[bytes] | None = None) -> bytes:
    """Receive bytes, after the ``parts`` that have come."""
    parts = [] if parts is None else parts
    while missing := nbytes - sum(map(len, parts)):
        sock.settimeout(_remaining(deadline))
        parts.extend(map(sock.recv, (min(missing, _CHUNK),)))  # a single call of C code, as in `send`
        if not parts[-1]:
            raise EOFError("the peer closed the connection")
    return b"".join(parts)


def _close_sockets(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


@dataclass(frozen=True)
class Welcome:
    """The address of a leader and the secret of its group. It passes only through the group's store."""

    address: str
    secret: str

    @property
    def halves(self) -> tuple[bytes, bytes]:
        """The proof of a follower and the proof of the leader, 32 bytes per proof."""
        secret = bytes.fromhex(self.secret)
        return secret[:32], secret[32:]


class Listener:
    """The leader's side of the star.

    A thread empties the queue from the start, so strangers cannot fill it for long. It closes connections of other
    users at once, and logs every such user once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.welcome = Welcome(f"symmem-{secrets.token_hex(16)}", secrets.token_hex(64))
        self._members: dict[int, socket.socket] = {}
        self._silent: deque[socket.socket] = deque()  # of this user, without a proof so far; the oldest first
        self._refused: set[int] = set()  # users that the log has named
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind("\0" + self.welcome.address)
            self._socket.listen(max(size, _BACKLOG))
            self._socket.setblocking(False)
            self._thread = threading.Thread(target=self._serve, name="symmem-join", daemon=True)
            self._thread.start()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Stop listening, and close the connections that :meth:`accept` has not returned."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._socket.close()
        _close_sockets((*self._members.values(), *self._silent))
        self._members, self._silent = {}, deque()

    def accept(self) -> dict[int, socket.socket]:
        """Accept every follower exactly once, and refuse all other processes. It does not wait for a connection.

        All followers must have returned from :func:`connect`, so that they are in the queue, or have left it.

        Returns:
            The connections to all ranks from 1 on.

        Raises:
            PeerLostError: Some ranks did not connect or were refused; the text names them.
            OSError: This process may not have so many descriptors.
        """
        with self._lock:
            self._empty_queue()
            while self._silent:
                self._refuse(self._silent.popleft())
            members, self._members = self._members, {}
        for sock in members.values():
            with contextlib.suppress(ConnectionError):  # it died: the next message to or from it fails
                sock.sendall(self.welcome.halves[1])
        if missing := tuple(rank for rank in range(1, self.size) if rank not in members):
            _close_sockets(members.values())
            raise PeerLostError(
                f"ranks {list(missing)} did not connect to this rank's socket, or were refused",
                hint="start all ranks as the same user; the log of rank 0 names the refused processes",
                peers=missing,
            )
        return members

    def _serve(self) -> None:
        queue = select.poll()
        queue.register(self._socket, select.POLLIN)
        while not self._over.is_set():
            queue.poll()
            try:
                with self._lock:
                    self._empty_queue()
            except OSError as error:  # accept() tries again, and raises it if it lasts
                log.debug("cannot accept a connection: %s", error)
                self._over.wait(_PAUSE)

    def _empty_queue(self) -> None:
        """Take the connections in the queue. Strangers may add more at any time, so it ends after a full queue."""
        for _ in range(max(self.size, _BACKLOG)):
            try:
                sock = self._socket.accept()[0]
            except BlockingIOError:
                break
            if peer_of(sock)[1] == os.getuid():
                sock.setblocking(False)
                self._silent.append(sock)
                if len(self._silent) > max(self.size, _SILENT):
                    self._identify_silent()
            else:
                self._refuse(sock)
        self._identify_silent()

    def _identify_silent(self) -> None:
        """Read the proofs that have come. Of connections without a proof, only the newest are kept."""
        for _ in range(len(self._silent)):
            sock = self._silent.popleft()
            try:
                hello = sock.recv(_HELLO.size)
            except BlockingIOError:
                self._silent.append(sock)
                continue
            except ConnectionError:
                hello = b""
            rank = self._rank_of(hello)
            if rank is None:
                self._refuse(sock)
                continue
            self._members[rank] = sock
        while len(self._silent) > max(self.size, _SILENT):
            self._refuse(self._silent.popleft())

    def _rank_of(self, hello: bytes) -> int | None:
        """The rank that shows this proof, or None for a stranger, or a second connection of a rank."""
        if len(hello) != _HELLO.size:
            return None
        secret, rank = _HELLO.unpack(hello)
        if not hmac.compare_digest(secret, self.welcome.halves[0]) or not 0 < rank < self.size:
            return None
        return None if rank in self._members else int(rank)

    def _refuse(self, sock: socket.socket) -> None:
        pid, user = peer_of(sock)
        sock.close()
        if user not in self._refused:
            self._refused.add(user)
            log.warning(
                "refused a connection of process %d of user %d: it is not a rank of this group. More connections of "
                "this user are refused without a line in the log",
                *(pid, user),
            )


def connect(welcome: Welcome, rank: int, deadline: float) -> socket.socket:
    """Connect to a leader and show membership; :func:`check_leader` must follow once the leader accepts.

    Raises:
        PeerLostError: The leader is gone.
        RendezvousError: The leader runs as another user, or strangers fill its queue.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _connect(sock, "\0" + welcome.address, deadline)
        uid = peer_of(sock)[1]
        if uid != os.getuid():
            raise RendezvousError(
                f"the socket of rank 0 belongs to user {uid}, this process runs as user {os.getuid()}",
                hint="start all ranks as the same user, in the same user namespace",
            )
        with contextlib.suppress(ConnectionError):  # rank 0 has refused it already, and will say so
            sock.sendall(_HELLO.pack(welcome.halves[0], rank))
    except BaseException as error:
        sock.close()
        if isinstance(error, BlockingIOError):
            raise RendezvousError(
                "the queue of rank 0's socket was full of strangers until the deadline",
                hint="a process of this machine connects to it all the time; the log of rank 0 names it: stop it",
            ) from error
        if isinstance(error, ConnectionError):
            raise PeerLostError("rank 0 no longer listens at its socket", peers=(0,)) from error
        raise
    return sock


def _connect(sock: socket.socket, address: str, deadline: float) -> None:
    """Connect; while the queue is full, try again until the deadline."""
    sock.settimeout(_remaining(deadline))
    while True:
        try:
            return sock.connect(address)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY)


def check_leader(sock: socket.socket, welcome: Welcome, deadline: float) -> None:
    """Check that the process that accepted is the group's leader.

    Raises:
        PeerLostError: It is not the leader, or it is gone.
        PeerTimeoutError: It did not answer by ``deadline``.
    """
    try:
        shown = _receive_exactly(sock, 32, deadline)
    except TimeoutError as error:
        raise PeerTimeoutError("rank 0 did not accept this rank's connection in time", peers=(0,)) from error
    except (EOFError, OSError) as error:
        raise PeerLostError(f"rank 0 did not accept this rank's connection: {error}", peers=(0,)) from error
    if not hmac.compare_digest(shown, welcome.halves[1]):
        raise PeerLostError("the process at rank 0's socket is not this group's leader", peers=(0,))
