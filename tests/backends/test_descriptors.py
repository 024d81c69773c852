"""Messages and descriptors over unix sockets, and authentication."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import LONG, SOON
from thread_ranks import run_ranks

from symmem.backends import descriptors as scm
from symmem.backends import libc
from symmem.backends.memory_files import make_memory_file
from symmem.errors import PeerLostError, PeerTimeoutError, RendezvousError, ResourceLimitError

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


Pair = tuple[socket.socket, socket.socket]


def soon(seconds: float = LONG) -> float:
    return time.monotonic() + seconds


# Messages.


@pytest.mark.parametrize("number", [0, 1, 199, 200, 201, 253, 254, 600])
@pytest.mark.parametrize("nbytes", [0, 1, 3 << 20])
def test_any_number_of_descriptors_and_bytes_pass(number: int, nbytes: int, pair: Pair) -> None:
    """The kernel takes 253 descriptors per message. They come in order, and no exec'd program inherits them."""
    files = [libc.Descriptor.of(os.memfd_create(f"file{index}")) for index in range(3)]
    body = os.urandom(nbytes)
    try:
        sender = threading.Thread(
            target=scm.send, args=(pair[0], {"a": [1]}, body, [files[i % 3] for i in range(number)], soon())
        )
        sender.start()
        header, got, fds = scm.receive(pair[1], soon())
        sender.join()
        assert (header, got, len(fds)) == ({"a": [1]}, body, number)
        for index, fd in enumerate(fds):
            assert os.path.sameopenfile(fd, files[index % 3])
            assert not os.get_inheritable(fd)
        libc.close_all(fds)
    finally:
        libc.close_all(files)


def test_messages_in_a_row_keep_their_bounds(pair: Pair) -> None:
    """Bytes of the next message are not read with this message."""
    for turn in range(20):
        scm.send(pair[0], {"turn": turn}, b"x" * turn, [0] * (turn % 3), soon())
    for turn in range(20):
        header, body, fds = scm.receive(pair[1], soon())
        assert (header, body, len(fds)) == ({"turn": turn}, b"x" * turn, turn % 3)
        libc.close_all(fds)


@pytest.mark.parametrize("room", [0, 1, 200, 399])
def test_descriptors_beyond_the_limit_are_an_error_and_the_next_message_is_whole(room: int, pair: Pair) -> None:
    """MSG_CTRUNC: RLIMIT_NOFILE admits only some descriptors. They are closed, and the connection still works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    scm.send(pair[0], {}, b"first", [0] * 400, soon())
    scm.send(pair[0], {}, b"second", [0], soon())
    # Numbers that are free. By dup(2), because fstat(2) does not show the one that a thread in accept(2) has reserved.
    free = libc.duplicate([0] * (room + 1))
    libc.close_all(free)
    before = descriptors_by_fstat()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[room], hard))
        with pytest.raises(ResourceLimitError, match=rf"of 400 file descriptors .* {room} fit .*RLIMIT_NOFILE"):
            scm.receive(pair[1], soon())
        assert descriptors_by_fstat() == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    _header, body, fds = scm.receive(pair[1], soon())
    assert (body, len(fds)) == (b"second", 1)
    libc.close_all(fds)


def descriptors_by_fstat() -> list[int]:
    """Open descriptors, counted without opening another."""
    found = []
    for number in range(2000):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.append(number)
    return found


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0" * 11])
def test_a_connection_that_ends_amid_a_message_says_so(sent: bytes, pair: Pair) -> None:
    pair[0].sendall(sent)
    pair[0].close()
    with pytest.raises(EOFError):
        scm.receive(pair[1], soon())


def test_a_message_that_does_not_come_is_a_timeout(pair: Pair) -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        scm.receive(pair[1], soon(0.05))
    assert time.monotonic() - begin < SOON


def test_a_peer_that_does_not_read_is_a_timeout(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        scm.send(pair[0], {}, bytes(8 << 20), [], soon(0.1))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_named_error(data: bytes) -> None:
    """No other exception is raised, and no memory is allocated for announced bytes that have not come."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((EOFError, RendezvousError)):
            scm.receive(mine, soon())


@given(st.binary(max_size=60))
def test_a_header_is_a_dictionary_or_a_named_error(data: bytes) -> None:
    header: object = None
    with contextlib.suppress(RendezvousError):
        header = scm.parse_header(data)
    try:
        expected = json.loads(data)
    except ValueError:
        expected = None
    assert header == (expected if isinstance(expected, dict) else None)


def test_a_deep_header_is_a_named_error() -> None:
    with pytest.raises(RendezvousError):
        scm.parse_header(b"[" * 100_000)


def test_received_descriptors_are_closed_once() -> None:
    """``close`` may be called again, and does not close descriptors opened since."""
    first, second = libc.duplicate([0, 0])
    received = scm.Received([scm.Contribution(b"a", (first,)), scm.Contribution(b"b", (second,))])
    assert (len(received), received[1].payload, [c.payload for c in received]) == (2, b"b", [b"a", b"b"])
    with received:
        pass
    again = os.dup(0)
    assert again in (first, second)
    received.close()
    os.fstat(again)
    os.close(again)


@pytest.mark.parametrize("number", [1, 3])
def test_an_interrupt_right_after_the_system_call_loses_no_descriptor(number: int, pair: Pair) -> None:
    """A handler runs as soon as recvmsg(2) returns, before Python has seen what came."""
    before = descriptors_by_fstat()
    scm.send(pair[0], {}, b"", [0] * number, soon())
    came: list[int] = []

    def interrupt(*arguments: object) -> None:
        came.extend(set(descriptors_by_fstat()) - set(before))
        raise KeyboardInterrupt

    libc._libc.recvmsg.errcheck = interrupt  # type: ignore[assignment]
    try:
        with pytest.raises(KeyboardInterrupt):
            scm.receive(pair[1], soon())
    finally:
        del libc._libc.recvmsg.errcheck
    assert len(came) == number
    assert descriptors_by_fstat() == before


def test_a_descriptor_closes_with_its_last_reference() -> None:
    before = descriptors_by_fstat()
    descriptor = libc.Descriptor.of(os.dup(0))
    also = (descriptor,)
    del descriptor
    os.fstat(also[0])
    del also
    assert descriptors_by_fstat() == before


def test_interrupts_lose_no_memory_file_and_are_not_lost() -> None:
    """The loop ends only by the interrupt: if one is lost, the test does not end."""
    before = descriptors_by_fstat()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(500):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 5e-6 + turn * 1e-7)
                while True:
                    make_memory_file(4096)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert descriptors_by_fstat() == before


# Authentication.


@pytest.fixture
def listener() -> Iterator[scm.Listener]:
    made = scm.Listener(3)
    yield made
    made.close()


def test_all_followers_join_and_both_sides_are_shown_to_be_who_they_are(listener: scm.Listener) -> None:
    """In any order; the leader never waits."""
    socks = {rank: scm.connect(listener.welcome, rank, soon()) for rank in (2, 1)}
    members = listener.accept()
    assert sorted(members) == [1, 2]
    for rank, sock in socks.items():
        scm.check_leader(sock, listener.welcome, soon())
        sock.sendall(b"%d" % rank)
        assert members[rank].recv(1) == b"%d" % rank
        assert not os.get_inheritable(sock.fileno())
        assert not os.get_inheritable(members[rank].fileno())
        sock.close()
        members[rank].close()


def test_every_listener_has_its_own_name_and_secret() -> None:
    """Abstract and random; nothing is left in the file system."""
    made = [scm.Listener(2) for _ in range(20)]
    assert len({listener.welcome.address for listener in made}) == 20
    assert len({listener.welcome.secret for listener in made}) == 20
    assert len(made[0].welcome.secret) == 128
    lines = Path("/proc/net/unix").read_text()
    assert all(f"@{listener.welcome.address}" in lines for listener in made)
    for listener in made:
        listener.close()
    assert made[0].welcome.address not in Path("/proc/net/unix").read_text()


def stranger(listener: scm.Listener, data: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect("\0" + listener.welcome.address)
    sock.sendall(data)
    return sock


def test_strangers_are_turned_away_and_cost_no_time(listener: scm.Listener, caplog: pytest.LogCaptureFixture) -> None:
    """They send nothing, a part, garbage, a wrong secret, or the right secret with an invalid or used rank."""
    right, proof = listener.welcome.halves
    hellos = [b"", b"a", b"b" * 500, scm._HELLO.pack(b"\0" * 32, 1), scm._HELLO.pack(proof, 1)]
    hellos += [scm._HELLO.pack(right, rank) for rank in (0, 3, 2**31)]
    strangers = [stranger(listener, hello) for hello in hellos]
    gone = stranger(listener, b"x")
    gone.close()
    first = scm.connect(listener.welcome, 1, soon())
    strangers.append(stranger(listener, scm._HELLO.pack(right, 1)))  # rank 1 again
    second = scm.connect(listener.welcome, 2, soon())
    begin = time.monotonic()
    members = listener.accept()
    assert time.monotonic() - begin < SOON
    assert sorted(members) == [1, 2]
    first.sendall(b"me")
    assert members[1].recv(2) == b"me"
    (record,) = [record for record in caplog.records if "refused a connection" in record.getMessage()]
    assert f"process {os.getpid()} of user {os.getuid()}" in record.getMessage()
    for sock in strangers[:-1]:
        sock.settimeout(2)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    for sock in (first, second, *strangers, *members.values()):
        sock.close()


def test_who_did_not_connect_is_named_at_once(listener: scm.Listener) -> None:
    """The leader looks only at the queue and does not wait. Accepted connections are closed."""
    sock = scm.connect(listener.welcome, 2, soon())
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match=r"ranks \[1\]") as caught:
        listener.accept()
    assert time.monotonic() - begin < SOON
    assert caught.value.peers == (1,)
    assert sock.recv(32) == listener.welcome.halves[1]
    assert sock.recv(1) == b""
    sock.close()


def test_a_follower_that_died_in_the_queue_is_found_at_the_next_message(listener: scm.Listener) -> None:
    """It had sent its secret; the closed connection shows that it is gone."""
    for rank in (1, 2):
        scm.connect(listener.welcome, rank, soon()).close()
    members = listener.accept()
    for sock in members.values():
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        sock.close()


def fill(listener: scm.Listener, most: int = 1000) -> list[socket.socket]:
    """Connect until the queue is full."""
    made: list[socket.socket] = []
    with contextlib.suppress(BlockingIOError):
        while len(made) < most:
            made.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            made[-1].setblocking(False)
            made[-1].connect("\0" + listener.welcome.address)
    return made


def test_a_queue_full_of_strangers_until_the_deadline_is_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader does not take them, for example because it is stopped. A follower whose queue empties gets in."""
    monkeypatch.setattr(scm, "_BACKLOG", 4)
    monkeypatch.setattr(scm.Listener, "_serve", lambda self: None)
    listener = scm.Listener(3)
    strangers = fill(listener)
    assert 4 <= len(strangers) < 100
    begin = time.monotonic()
    with pytest.raises(RendezvousError, match="full of strangers until the deadline"):
        scm.connect(listener.welcome, 1, soon(0.2))
    assert 0.2 <= time.monotonic() - begin < 5
    later = threading.Timer(0.1, listener._empty_queue)
    later.start()
    socks = [scm.connect(listener.welcome, rank, soon()) for rank in (1, 2)]
    later.join()
    members = listener.accept()
    assert sorted(members) == [1, 2]
    for sock in (*strangers, *socks, *members.values()):
        sock.close()
    listener.close()


def test_few_connections_without_a_proof_are_kept(listener: scm.Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of this user that connects again and again does not use up the descriptors of the leader."""
    monkeypatch.setattr(scm, "_SILENT", 5)
    before = len(os.listdir("/proc/self/fd"))
    silent = [stranger(listener, b"") for _ in range(50)]
    deadline = soon()
    while len(os.listdir("/proc/self/fd")) - before - len(silent) > 5:
        assert time.monotonic() < deadline
    first = scm.connect(listener.welcome, 1, soon())
    second = scm.connect(listener.welcome, 2, soon())
    members = listener.accept()
    assert sorted(members) == [1, 2]
    for sock in (*silent, first, second, *members.values()):
        sock.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect as another user")
def test_a_flood_by_another_user_holds_nobody_up(listener: scm.Listener, caplog: pytest.LogCaptureFixture) -> None:
    """It fills the queue as long as the ranks join. The log has one line about it."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500))
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            end = time.monotonic() + 20
            while time.monotonic() < end:
                with contextlib.suppress(OSError):  # the kernel drops them all at the end of the block
                    scm._close_sockets(fill(listener, most=400))
        finally:
            os._exit(0)
    try:
        deadline = soon()
        while "of user 65534" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        begin = time.monotonic()
        socks = []
        for rank in (2, 1):
            socks.append(scm.connect(listener.welcome, rank, soon(10)))
            time.sleep(0.2)
        members = listener.accept()
        assert sorted(members) == [1, 2]
        assert time.monotonic() - begin < 5
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert caplog.text.count("refused a connection") == 1
    for sock in (*socks, *members.values()):
        sock.close()


def test_there_is_room_for_hundreds_of_strangers(listener: scm.Listener) -> None:
    """The leader finds the followers among them."""
    strangers = [stranger(listener, b"?") for _ in range(300)]
    socks = [scm.connect(listener.welcome, rank, soon()) for rank in (1, 2)]
    begin = time.monotonic()
    members = listener.accept()
    assert time.monotonic() - begin < SOON
    for sock in (*strangers, *socks, *members.values()):
        sock.close()


def test_nobody_listens_any_more(listener: scm.Listener) -> None:
    """The leader died or gave up."""
    listener.close()
    with pytest.raises(PeerLostError, match="no longer listens") as caught:
        scm.connect(listener.welcome, 1, soon())
    assert caught.value.peers == (0,)


@pytest.mark.parametrize("answer", [b"", b"short", b"\0" * 32, b"right"])
def test_a_false_leader_is_found_out(answer: bytes) -> None:
    """Another process listens at the name. It cannot know the second half of the secret."""
    real = scm.Listener(2)
    welcome = real.welcome
    real.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as false:
        false.bind("\0" + welcome.address)
        false.listen()

        def rank(rank: int) -> None:
            if rank == 0:
                sock = false.accept()[0]
                hello = sock.recv(100)
                assert hello[:32] == welcome.halves[0]
                sock.sendall(hello[:32] if answer == b"right" else answer)
                sock.close()
                return
            sock = scm.connect(welcome, 1, soon())
            try:
                scm.check_leader(sock, welcome, soon())
            finally:
                sock.close()

        served, refused = run_ranks(2, rank)
    assert served is None
    assert isinstance(refused, PeerLostError)
    assert refused.peers == (0,)
    assert ("not this group's leader" if len(answer) in (5, 32) and answer != b"short" else "did not accept") in str(
        refused
    )


def test_a_leader_that_does_not_answer_is_a_timeout(listener: scm.Listener) -> None:
    """The leader is stopped, not gone."""
    sock = scm.connect(listener.welcome, 1, soon())
    with pytest.raises(PeerTimeoutError) as caught:
        scm.check_leader(sock, listener.welcome, soon(0.05))
    assert caught.value.peers == (0,)
    sock.close()
