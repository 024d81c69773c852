"""Forks a process for each program that a test runs; see programs.py.

Its argument is the descriptor of a socket that listens. Standard input is a pipe from the tests; the server ends when
they close it. A message has the text of the program, its arguments, environment and folder, and two descriptors for its
output and errors. The answers are the id of the process and, later, its exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys


def _import_torch() -> None:
    """Collections of garbage in a program, of which the last one is at its end, leave out what this makes."""
    gc.disable()
    importlib.import_module("torch")
    gc.freeze()
    gc.enable()


def _next_connection() -> socket.socket:
    """Accept connections, each in a forked process; returns in such a process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for these processes
    listener = socket.socket(fileno=int(sys.argv[1]))
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        _import_torch()  # not before, because many runs of tests have no programs
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return connection
        connection.close()
    sys.exit()


def _become_program(connection: socket.socket) -> str:
    """Fork the process of a program, and return its text there. This process waits for it and tells how it ended."""
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 18, 2)
    if child := os.fork():
        connection.send(str(child).encode())
        status = os.waitpid(child, 0)[1]
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    text, arguments, environment, folder = json.loads(message)
    descriptors.insert(0, os.open(os.devnull, os.O_RDONLY))
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0], sys.argv = "", ["-c", *arguments]
    del globals()["__file__"]  # the program has no file, which a child of it would look for
    return str(text)


# At the top level, so that the process ends as an interpreter does.
exec(compile(_become_program(_next_connection()), "<string>", "exec", dont_inherit=True))
