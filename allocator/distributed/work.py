"""Collective operations on the CPU that a program does not wait for: their order, their thread, and their handles.

The operations of a process group run one after the other. The thread that waits for one runs it, and those before it:
that is quicker than a change of threads. If no thread waits for a millisecond, or a future needs the result, a thread
of the group runs them, so that they go on while the program computes or communicates in other ways.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import Work

from symmem.errors import PeerTimeoutError
from symmem.group.call_site import program_line, submitted

__all__ = ["AsynchronousWork", "WorkQueue"]

_PATIENCE = 1e-3  # seconds in which a program may wait for an operation itself


class AsynchronousWork(Work):
    """The handle of an operation.

    Args:
        operations: Where the operation waits for its turn.
        call: Runs it.
        outputs: The tensors that torch expects from :meth:`result` and from the future.
        in_thread: Only the thread may run it.
    """

    def __init__(self, operations: WorkQueue, call: Callable[[], None], outputs: Any, in_thread: bool) -> None:
        super().__init__()
        self._operations, self._call, self._outputs, self._in_thread = operations, call, outputs, in_thread
        self._done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._submitted_at = program_line(sys._getframe(1))

    def run(self) -> None:
        """Run the operation. Does not raise."""
        before, submitted.at = submitted.at, self._submitted_at
        try:
            self._call()
        except BaseException as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)
        finally:
            submitted.at = before
            del self._call  # with the tensors

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until the operation is complete.

        Args:
            timeout: 0 for the timeout of the group.

        Raises:
            SymmemError: The error of the operation.
            PeerTimeoutError: It is not complete in time.
        """
        seconds = timeout.total_seconds()
        if seconds > 0 or self._in_thread:
            self._operations.wake(at_once=True)
        else:
            self._operations.run_until(self)
        try:
            self._done.result(seconds if seconds > 0 else None)
        except concurrent.futures.TimeoutError:
            raise PeerTimeoutError(
                f"the operation is not complete after {seconds:g} s",
                hint="look at the other ranks; or wait longer",
                step="wait",
            ) from None
        return True

    def synchronize(self) -> None:
        """Wait until the operation is complete."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the operation has ended."""
        return self._done.done()

    def is_success(self) -> bool:
        """Whether the operation has ended without an error."""
        return self._done.done() and self._done.exception() is None

    def exception(self) -> BaseException | None:
        """The error of an operation that has ended."""
        return self._done.exception() if self._done.done() else None

    def result(self) -> Any:
        """Wait, and return the tensors with the results."""
        self.wait()
        return self._outputs

    def get_future(self) -> torch.futures.Future[Any]:
        """A future with the results. Its error is a RuntimeError with the text of the operation's error."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        self._done.add_done_callback(lambda done: future.set_result(None))

        def outputs(_: object) -> Any:
            if (error := self._done.exception()) is not None:
                raise error.with_traceback(None)  # torch puts the traceback into the text
            return self._outputs

        result = future.then(outputs)
        self._operations.wake(at_once=True)
        return result


class WorkQueue:
    """The operations of one process group that have not run yet, and the thread that runs them in the end."""

    def __init__(self) -> None:
        self._waiting: deque[AsynchronousWork] = deque()
        self._turn = threading.RLock()  # held by the thread that runs operations; a callback may begin another one
        self._signals: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        self._is_woken = False
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], None], outputs: Any, in_thread: bool = False) -> AsynchronousWork:
        """Add an operation. See :class:`AsynchronousWork`."""
        work = AsynchronousWork(self, call, outputs, in_thread)
        self._waiting.append(work)
        self.wake(at_once=in_thread)
        return work

    def run(self, call: Callable[[], None]) -> None:
        """Run an operation now, behind those that wait."""
        with self._turn:
            while self._waiting:
                self._waiting.popleft().run()
            call()

    def run_until(self, work: AsynchronousWork) -> None:
        """Run the operations that wait, until this one is complete. If another thread runs some, leave them to it."""
        if not self._turn.acquire(blocking=False):
            self.wake(at_once=True)  # it may run later ones too, so this thread does not wait for its turn
            return
        try:
            while self._waiting and not work.is_completed():
                self._waiting.popleft().run()
        finally:
            self._turn.release()

    def wake(self, at_once: bool) -> None:
        """Let the thread run all operations that wait: at once, or soon."""
        if self._thread is None or not self._thread.is_alive():  # in a forked child it is not
            self._thread = threading.Thread(target=self._serve, name="symmem work", daemon=True)
            self._thread.start()
        if at_once:
            self._signals.put(True)
        elif not self._is_woken:
            self._is_woken = True
            self._signals.put(False)

    def close(self) -> None:
        """End the thread behind the operations that wait. Does not wait for it."""
        self._signals.put(None)
        self._thread = None

    def _serve(self) -> None:
        signal: bool | None = True
        while signal is not None:
            signal = self._signals.get()
            if signal is False:
                with contextlib.suppress(queue.Empty):
                    signal = self._signals.get(timeout=_PATIENCE)
            self._is_woken = False
            if self._waiting:
                self.run(lambda: None)
