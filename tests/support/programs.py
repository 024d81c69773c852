"""Programs of one process, which need torch but seldom its import.

An import of torch takes two seconds of a CPU. So a server imports it once in a run of tests, and each program runs in a
process forked from the server. The program is ``__main__``, and symmem is not imported yet.

Tests of the end of a process take :func:`run_to_the_end`. Programs that import something before torch, or set variables
that Python or torch read when they start, take :func:`run_python`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from patience import TASK

Run = Callable[[str], subprocess.CompletedProcess[str]]
"""Of :func:`run_program` and :func:`run_python`."""

_VARIABLE = "SYMMEM_TEST_PROGRAMS"


@contextmanager
def serving() -> Iterator[None]:
    """Have a server for this process and its children. The server imports torch when the first program is started."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("program_server.py")), str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
        os.environ[_VARIABLE] = f"{folder}/socket"
        with server:  # closes its standard input at the end, and waits for it
            yield
            del os.environ[_VARIABLE]


class Program:
    """A program that runs.

    Args:
        text: Python.
        arguments: ``sys.argv[1:]``.
        env: Its environment; None for the environment of this process.
        folder: Its working directory.
    """

    def __init__(
        self, text: str, *arguments: str, env: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(os.environ[_VARIABLE])
        message = json.dumps((text, arguments, dict(os.environ if env is None else env), str(folder or Path.cwd())))
        socket.send_fds(self._connection, [message.encode()], [self._out.fileno(), self._err.fileno()])
        self._done: subprocess.CompletedProcess[str] | None = None
        self.pid = int(self._connection.recv(32))

    def kill(self) -> None:
        """End it by SIGKILL, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """How it ended and what it wrote. A program that does not end in time is killed."""
        if self._done is None:
            with self._connection, self._out, self._err:
                code = self._exit_code()
                self._out.seek(0)
                self._err.seek(0)
                self._done = subprocess.CompletedProcess((), code, self._out.read(), self._err.read())
        return self._done

    def _exit_code(self) -> int:
        self._connection.settimeout(TASK)
        try:
            return int(self._connection.recv(32))
        except TimeoutError:
            self.kill()
            raise


def run_program(
    text: str, *arguments: str, env: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; see :class:`Program`."""
    return Program(text, *arguments, env=env, folder=folder).wait()


def run_to_the_end(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose end is tested: the last collection of garbage goes through the objects of torch too."""
    return run_program(f"import gc; gc.unfreeze(); del gc\n{text}", *arguments)


def run_python(text: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program in a new interpreter, without torch."""
    return subprocess.run(
        [sys.executable, "-c", text, *arguments], env=env, capture_output=True, text=True, timeout=TASK
    )
