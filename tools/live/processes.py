"""Asks the inspectable processes of this user on this host."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symmem.config.machine import peer_of
from symmem.errors import InspectionError
from symmem.service.socket_paths import VERSION, Name, at, directories, opened

__all__ = ["Process", "ask_all"]

log = logging.getLogger("symmem.tools")

_AT_ONCE = 64  # processes asked in parallel
_MOST_NBYTES = 1 << 30  # size limit of an answer
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Process:
    """One process, with its answer or the reason why it gave none.

    Attributes:
        job: The job of the process; without an answer, the part of it that is in the socket's name.
        pid: Process id, in the process's own PID namespace.
        answer: See :func:`symmem.service.status.answer`.
        problem: Why there is no answer.
    """

    job: str
    pid: int
    answer: dict[str, Any] | None = None
    problem: str = ""

    @property
    def rank(self) -> int | None:
        """The rank in the job, if known."""
        rank: int | None = self.answer["rank"] if self.answer else None
        return rank

    def __str__(self) -> str:
        return f"process {self.pid}" if self.rank is None else f"rank {self.rank} (process {self.pid})"


def ask_all(parts: Sequence[str], job: str | None = None, timeout: float = 10.0) -> list[Process]:
    """Ask all processes of this user in parallel. Removes the sockets of dead processes.

    Args:
        parts: Some of :data:`symmem.service.socket_paths.PARTS`.
        job: Ask only the processes of this job.
        timeout: Seconds that a process has to answer.

    Returns:
        The processes, sorted by job, rank and process id.
    """
    found: list[Process | None] = []
    with contextlib.ExitStack() as stack:
        places = []
        for directory in directories():
            try:
                places.append(stack.enter_context(opened(directory)))
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            except InspectionError as error:
                log.warning("%s", error)
        names = [(place, text, name) for place in places for text, name in _names(place)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(lambda each: _ask(each[0], each[1], each[2], parts, timeout), names))
    label = None if job is None else Name(job, 0, "").label  # a process without an answer has only a label
    wanted = [each for each in found if each is not None and label in (None, Name(each.job, 0, "").label)]
    return sorted(wanted, key=lambda each: (each.job, each.rank is None, each.rank or 0, each.pid))


def _names(place: int) -> list[tuple[str, Name]]:
    return [(text, name) for text in sorted(os.listdir(place)) if (name := Name.parse(text)) is not None]


def _ask(place: int, text: str, name: Name, parts: Sequence[str], timeout: float) -> Process | None:
    """Ask one process; None if it has ended."""
    pid = name.pid
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        deadline = time.monotonic() + timeout
        sock.settimeout(timeout)
        try:
            sock.connect(at(place, text))
            pid, user = peer_of(sock)
            if user != os.geteuid():
                return Process(name.job, name.pid, problem=f"its socket belongs to user {user}")
            sock.sendall(json.dumps({"version": VERSION, "parts": list(parts)}).encode() + b"\n")
            answer = json.loads(_receive_line(sock, deadline))
        except ConnectionRefusedError:  # the process is dead
            with contextlib.suppress(FileNotFoundError):
                os.unlink(text, dir_fd=place)
            return None
        except FileNotFoundError:
            return None
        except (TimeoutError, BlockingIOError):
            return Process(name.job, name.pid, problem=f"does not answer: {_state(pid)}")
        except (OSError, EOFError, ValueError, RecursionError) as error:
            if not _lives(pid):
                return None
            return Process(name.job, name.pid, problem=f"gave no valid answer: {error}")
    if not isinstance(answer, dict) or answer.get("version") != VERSION or "error" in answer:
        why = answer.get("error") if isinstance(answer, dict) else None
        return Process(name.job, name.pid, problem=f"gave no answer of version {VERSION}: {why or 'another version'}")
    return Process(answer["job"], answer["pid"], answer)


def _receive_line(sock: socket.socket, deadline: float) -> bytes:
    """Receive one line.

    Raises:
        EOFError: The peer closed the connection before the end of the line, or the line is too long.
        TimeoutError: The line was not complete in time.
    """
    data = bytearray()
    while not data.endswith(b"\n"):
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        chunk = sock.recv(_CHUNK)
        if not chunk or len(data) > _MOST_NBYTES:
            raise EOFError(f"the answer ended after {len(data)} bytes")
        data += chunk
    return bytes(data)


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _state(pid: int) -> str:
    """Describe the state of a process that does not answer."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "this process is not visible from here"
    if fields[0] in "Tt":
        return "it is stopped (by a signal or a debugger); SIGCONT resumes it"
    return f"its state is {fields[0]!r}; native code may hold the interpreter's lock (py-spy shows it)"
