"""The inspection server of a process; its clients are ``symmem top``, ``symmem inspect`` and ``symmem dump``.

The first group of the process starts one thread, which waits in accept(2) and costs nothing until a client connects. It
takes no lock that a rank may hold while it waits for others, and it holds the interpreter lock only for the answer. It
serves clients one after the other, for a limited time. See :mod:`.socket_paths` for access control.

A forked child has neither the thread nor the socket. The first group that the child makes starts a new server.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from symmem.config.machine import peer_of
from symmem.errors import InspectionError, InvalidArgumentError, SymmemError
from symmem.service.socket_paths import PARTS, VERSION, Name, at, directories, job_id, opened

__all__ = ["REQUEST_NBYTES", "Server", "begin", "end"]

log = logging.getLogger("symmem.inspection")

REQUEST_NBYTES = 4096
"""The maximum length of a request."""

_READING = 1.0  # seconds to receive the request
_WRITING = 5.0  # seconds to send the answer
_PAUSE = 1.0  # seconds to wait after accept(2) failed, for example because no descriptors are left
_BACKLOG = 128


class Server:
    """A socket, and a thread that answers requests on it.

    Args:
        directory: The directory of the socket.
        answer: Function from the requested parts to the answer, a mapping that :mod:`json` can write.

    Raises:
        InspectionError: Other users could reach the socket there.
        OSError: The directory or the socket cannot be made.
    """

    def __init__(self, directory: Path, answer: Callable[[Sequence[str]], dict[str, Any]]) -> None:
        self._directory, self._answer = directory, answer
        self._name = str(Name(job_id(), os.getpid(), secrets.token_hex(4)))
        self._client: socket.socket | None = None
        self._refused: set[int] = set()  # users that the log has named
        self._over = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with opened(directory, make=True) as folder:
                _tidy(folder)
                # Hidden until it listens, because the tools would take it for the socket of a dead process.
                hidden = f".{self._name}"
                self._socket.bind(at(folder, hidden))
                os.chmod(hidden, 0o600, dir_fd=folder)
                self._socket.listen(_BACKLOG)
                os.rename(hidden, self._name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="symmem-inspection", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        """The path of the socket."""
        return self._directory / self._name

    def close(self) -> None:
        """Stop answering, and remove the socket."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        with contextlib.suppress(OSError, InspectionError), opened(self._directory) as folder:
            os.unlink(self._name, dir_fd=folder)
        self._thread.join(_READING)
        self._socket.close()

    def leave(self) -> None:
        """In a forked child: close the copies of the sockets."""
        self._socket.close()
        if self._client is not None:
            self._client.close()

    def _serve(self) -> None:
        while not self._over.is_set():
            try:
                client = self._socket.accept()[0]
            except OSError as error:
                if not self._over.is_set():
                    log.warning("cannot accept a connection: %s", error)
                    self._over.wait(_PAUSE)
                continue
            self._client = client
            with client:
                try:
                    self._talk(client)
                except OSError as error:  # includes timeouts
                    log.debug("a client disconnected, or was too slow: %s", error)
            self._client = None

    def _talk(self, client: socket.socket) -> None:
        pid, user = peer_of(client)
        if user != os.geteuid():
            if user not in self._refused:
                self._refused.add(user)
                log.warning("refused process %d of user %d; the log does not name this user again", pid, user)
            return
        line = _read_line(client)
        if line is None:
            return
        try:
            text = _encode(self._answer(_parts(line)))
        except Exception as error:  # the client gets any error, and the thread continues
            if not isinstance(error, SymmemError):
                log.exception("cannot answer process %d", pid)
            text = _encode({"version": VERSION, "error": f"{type(error).__name__}: {error}"})
        client.settimeout(_WRITING)
        client.sendall(text)


def _read_line(client: socket.socket) -> bytes | None:
    """Read up to the end of a line, or up to the maximum length; None if the client disconnected.

    Raises:
        TimeoutError: The data did not come in time.
    """
    deadline, data = time.monotonic() + _READING, b""
    while b"\n" not in data and len(data) <= REQUEST_NBYTES:
        client.settimeout(max(deadline - time.monotonic(), 0.001))
        chunk = client.recv(REQUEST_NBYTES + 1 - len(data))
        if not chunk:
            return None
        data += chunk
    return data


def _parts(line: bytes) -> list[str]:
    """Return the parts that a request asks for.

    Raises:
        InvalidArgumentError: The line is not a request, or the request has another version.
    """
    try:
        request = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict) or not isinstance(request.get("parts"), list):
        raise InvalidArgumentError(
            f"this is not a request: one line of JSON with at most {REQUEST_NBYTES} bytes is expected"
        )
    if request.get("version") != VERSION:
        raise InvalidArgumentError(f"this process speaks version {VERSION}, not {request.get('version')!r}")
    if unknown := [part for part in request["parts"] if part not in PARTS]:
        raise InvalidArgumentError(f"unknown parts {unknown}; the parts are {list(PARTS)}")
    return list(request["parts"])


def _encode(answer: dict[str, Any]) -> bytes:
    """Encode an answer as one line. Elements of lists are encoded one by one, so that other threads can run between."""
    fields = []
    for name, value in answer.items():
        text = f"[{', '.join([json.dumps(each) for each in value])}]" if isinstance(value, list) else json.dumps(value)
        fields.append(f"{json.dumps(name)}: {text}")
    return f"{{{', '.join(fields)}}}\n".encode()


def _tidy(folder: int) -> None:
    """Remove sockets of crashed processes. The tools do this too; this covers hosts where they are not used."""
    for text in os.listdir(folder):
        name = Name.parse(text.removeprefix("."))
        if name is None or os.path.exists(f"/proc/{name.pid}"):
            continue
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)
            try:
                probe.connect(at(folder, text))  # the process may be in a container
            except ConnectionRefusedError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(text, dir_fd=folder)
            except OSError as error:
                log.debug("did not remove %s: %s", text, error)


_lock = threading.RLock()  # reentrant, because a finalizer may make a group
_server: Server | None = None
_settled = False  # whether this process has a server, or has given up


def begin() -> None:
    """Start the server of this process, once. Never raises; a failure goes to the log."""
    global _server, _settled
    if _settled:
        return
    with _lock:
        if _settled:
            return
        _settled = True
        reasons = []
        for directory in directories():
            try:
                _server = Server(directory, _load_and_answer)
                return
            except (OSError, RuntimeError) as error:  # a RuntimeError if no thread can be started
                reasons.append(f"{directory}: {error}")
    log.warning("this process cannot be inspected: %s", "; ".join(reasons))


def _load_and_answer(parts: Sequence[str]) -> dict[str, Any]:
    """Answer a request. The first request loads the modules, so a process without requests does not."""
    from symmem.service.status import answer

    return answer(parts)


def end() -> None:
    """Stop the server of this process, and start no other."""
    global _server, _settled
    with _lock:
        server, _server, _settled = _server, None, True
        if server is not None:
            server.close()


def _leave_in_child() -> None:
    global _lock, _server, _settled
    if _server is not None:
        _server.leave()
    _lock, _server, _settled = threading.RLock(), None, False


atexit.register(end)
os.register_at_fork(after_in_child=_leave_in_child)
