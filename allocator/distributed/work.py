"""Collective operations on the CPU that a program does not wait for: the thread that runs them, and their handles."""

from __future__ import annotations

import concurrent.futures
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import Work

from symmem.errors import PeerTimeoutError
from symmem.group.call_site import program_line, submitted

__all__ = ["AsynchronousWork", "WorkThread"]


class AsynchronousWork(Work):
    """The handle of an operation. A :class:`WorkThread` completes ``done``.

    Args:
        outputs: The tensors that torch expects from :meth:`result` and from the future.
    """

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.submitted_at = program_line(sys._getframe(1))
        self._outputs = outputs

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until the operation is complete.

        Args:
            timeout: 0 for the timeout of the group.

        Raises:
            SymmemError: The error of the operation.
            PeerTimeoutError: It is not complete in time.
        """
        try:
            self.done.result(timeout.total_seconds() or None)
        except concurrent.futures.TimeoutError:
            raise PeerTimeoutError(
                f"the operation is not complete after {timeout.total_seconds():g} s",
                hint="look at the other ranks; or wait longer",
                step="wait",
            ) from None
        return True

    def synchronize(self) -> None:
        """Wait until the operation is complete."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the operation has ended."""
        return self.done.done()

    def is_success(self) -> bool:
        """Whether the operation has ended without an error."""
        return self.done.done() and self.done.exception() is None

    def exception(self) -> BaseException | None:
        """The error of an operation that has ended."""
        return self.done.exception() if self.done.done() else None

    def result(self) -> Any:
        """Wait, and return the tensors with the results."""
        self.wait()
        return self._outputs

    def get_future(self) -> torch.futures.Future[Any]:
        """A future with the results. Its error is a RuntimeError with the text of the operation's error."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        self.done.add_done_callback(lambda done: future.set_result(None))

        def outputs(_: object) -> Any:
            if (error := self.done.exception()) is not None:
                raise error.with_traceback(None)  # torch puts the traceback into the text
            return self._outputs

        return future.then(outputs)


class WorkThread:
    """Runs the asynchronous operations of one process group in their order. The thread begins with the first one."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Callable[[], None], AsynchronousWork] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._latest: AsynchronousWork | None = None
        self.close = weakref.finalize(self, self._waiting.put, None)
        """End the thread behind its last operation, without waiting for it. It also ends when this object goes."""

    @property
    def is_idle(self) -> bool:
        """Whether all operations have ended. Otherwise the next one must be behind them."""
        return self._latest is None or self._latest.done.done()

    def submit(self, call: Callable[[], None], outputs: Any) -> AsynchronousWork:
        """Run a call behind all earlier ones."""
        if self._thread is None or not self._thread.is_alive():  # in a forked child it is not
            self._thread = threading.Thread(target=_run, args=(self._waiting,), name="symmem work", daemon=True)
            self._thread.start()
        work = self._latest = AsynchronousWork(outputs)
        self._waiting.put((call, work))
        return work


def _run(waiting: queue.SimpleQueue[tuple[Callable[[], None], AsynchronousWork] | None]) -> None:
    # In inference mode a thread may write to any tensor: to parameters, and to tensors that were made in this mode.
    with torch.inference_mode():
        while (item := waiting.get()) is not None:
            call, work = item
            submitted.at = work.submitted_at
            try:
                call()
            except BaseException as error:
                work.done.set_exception(error)
            else:
                work.done.set_result(None)
            del item, call, work  # while the thread waits, nothing may keep tensors alive
