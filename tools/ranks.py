"""Pools of rank processes that live for many tasks. The demo, the benchmarks and the tests use them.

A rank is forked from a server process that has already imported torch, so a pool starts in a fraction of a second. The
parent process serves the ranks' TCPStore, so any rank, including rank 0, may die without stopping the store.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.abc
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import Store

from symmem.tools import assertions
from symmem.tools.outcomes import Outcome, RanksFailedError

__all__ = ["PRELOAD", "Outcome", "RankPool", "RanksFailedError", "resolve_function"]

PRELOAD = [__name__, "symmem.ops.functions", "symmem.backends.host", "symmem.redirect.context"]
"""Modules that are imported before the first rank is forked, so that ranks share them. The first pool reads it."""

_context = multiprocessing.get_context("forkserver")
_loader: importlib.abc.Loader | None = None  # rewrites the assertions of a module; in ranks, if the parent has pytest


class RankPool:
    """``size`` processes in a default process group that run functions on demand.

    Args:
        size: Number of ranks.
        env: Changes to this process's environment for the ranks; None as a value removes a variable. Variables that
            torch reads at import come from the environment at the time of the first pool, because the server process
            imports torch then.
        timeout: Seconds that a task may take, unless :meth:`run` gives another timeout.
        process_group: The ``torch.distributed`` backend to initialise; "auto" for gloo, and NCCL if there are GPUs;
            None for no process group.
    """

    def __init__(
        self,
        size: int,
        *,
        env: Mapping[str, str | None] | None = None,
        timeout: float = 60.0,
        process_group: str | None = "auto",
    ) -> None:
        self.size = size
        self.timeout = timeout
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        environ = dict(os.environ)
        rewriting = assertions.rewriting()
        _context.set_forkserver_preload([*PRELOAD, *(assertions.PRELOAD if rewriting is not None else [])])
        for rank in range(size):
            here, there = _context.Pipe()
            process = _context.Process(
                target=_serve,
                args=(there, rank, size, self._store.port, environ, dict(env or {}), process_group, rewriting),
                name=f"rank{rank}",
                daemon=True,
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes]

    @property
    def alive(self) -> bool:
        """Whether the pool is open and all ranks are alive."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def kill(self, rank: int) -> None:
        """Kill a rank with SIGKILL."""
        self._processes[rank].kill()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call ``function(*args)`` on all ranks, and return the results in rank order.

        Args:
            function: A module-level function. The ranks load its module by name, or from its file.
            *args: Picklable arguments.
            timeout: Seconds that the task may take.

        Raises:
            RanksFailedError: A rank raised, died, or did not answer in time (then all ranks are killed).
        """
        __tracebackhide__ = True  # pytest shows the ranks' tracebacks instead of this function
        outcomes = self.outcomes(function, *args, timeout=timeout)
        if any(outcome.error is not None for outcome in outcomes):
            raise RanksFailedError(outcomes)
        return [outcome.value for outcome in outcomes]

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Outcome]:
        """Like :meth:`run`, but return the outcome of every rank instead of raising."""
        self.submit(function, *args)
        return self.collect(timeout)

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a task on all ranks; :meth:`collect` must follow."""
        reference = (function.__module__, inspect.getfile(function), function.__qualname__)
        task = pickle.dumps((reference, pickle.dumps(args)))
        for pipe in self._pipes:
            try:
                pipe.send_bytes(task)
            except OSError:  # the rank is dead; `collect` reports it
                continue

    def collect(self, timeout: float | None = None) -> list[Outcome]:
        """Wait for the task that :meth:`submit` began."""
        deadline = time.monotonic() + (timeout or self.timeout)
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < self.size and (remaining := deadline - time.monotonic()) > 0:
            # A child of a dead rank may keep the pipe open, so wait for the sentinel, too.
            pending: dict[Any, int] = {}
            for rank in set(range(self.size)) - outcomes.keys():
                pending |= {self._pipes[rank]: rank, self._processes[rank].sentinel: rank}
            for rank in {pending[ready] for ready in wait(list(pending), remaining)}:
                try:
                    if not self._pipes[rank].poll():
                        raise EOFError
                    outcomes[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(5)
                    code = self._processes[rank].exitcode
                    outcomes[rank] = Outcome(error=RuntimeError(f"rank {rank} died with exit code {code}"))
                except Exception as error:  # for example an exception that cannot be unpickled
                    outcomes[rank] = Outcome(error=RuntimeError(f"rank {rank}'s answer cannot be read: {error!r}"))
        if len(outcomes) < self.size:
            self._show_stacks([rank for rank in range(self.size) if rank not in outcomes])
        hung = Outcome(error=RuntimeError(f"did not answer in {timeout or self.timeout:g} s and was killed"))
        return [outcomes.get(rank, hung) for rank in range(self.size)]

    def _show_stacks(self, ranks: list[int]) -> None:
        """Make hung ranks print their stacks, then kill all ranks, because the pool is unusable."""
        for rank in ranks:
            print(f"--- rank {rank} hangs at:", file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError):  # it died meanwhile
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.2)
        for rank in range(self.size):
            self.kill(rank)
        for process in self._processes:  # so that `alive` is false from here on
            process.join(5)

    def close(self) -> None:
        """End all ranks. May be called more than once."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._pipes, self._processes = [], []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is KeyboardInterrupt:  # the ranks still run a task
            for rank in range(len(self._processes)):
                self.kill(rank)
        self.close()


def _serve(
    pipe: Connection,
    rank: int,
    size: int,
    port: int,
    environ: dict[str, str],
    env: dict[str, str | None],
    process_group: str | None,
    rewriting: assertions.Rewriting | None,
) -> None:
    global _loader
    gc.freeze()  # what the server imported is not garbage; a collection need not look at it
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent handles it
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    for name, value in {**{key: str(number) for key, number in local.items()}, **env}.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if rewriting is not None:
        _loader = assertions.install(rewriting)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    if process_group is not None:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        if process_group == "auto":
            process_group = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(process_group, store=store, rank=rank, world_size=size)
    globals()["store"] = store
    while True:
        try:
            reference, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the pool is closed: skip destructors that may wait for other ranks
        pipe.send_bytes(_outcome(reference, args))


def _outcome(reference: tuple[str, str, str], args: bytes) -> bytes:
    try:
        # Load the module first, because arguments may be instances of its classes.
        function = resolve_function(*reference)
        return pickle.dumps(Outcome(value=function(*pickle.loads(args))))
    except BaseException as error:
        assertions.add_values(error)
        trace = traceback.format_exc()
        try:
            # The traceback's frames would keep tensors alive.
            return pickle.dumps(Outcome(error=error.with_traceback(None), trace=trace))
        except Exception:
            return pickle.dumps(Outcome(error=RuntimeError(f"{type(error).__name__}: {error}"), trace=trace))


def resolve_function(module_name: str, file: str, qualified: str) -> Any:
    """Find the function. A test module that cannot be imported by name is loaded from its file."""
    if module_name not in sys.modules:
        try:
            importlib.import_module(module_name)
        except ImportError:
            spec = importlib.util.spec_from_file_location(module_name, file, loader=_loader)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    target: Any = sys.modules[module_name]
    for part in qualified.split("."):
        target = getattr(target, part)
    return target


def rank_store() -> Store:
    """Return the store that all ranks of the pool share. Call it in a rank."""
    store: Store = globals()["store"]
    return store
