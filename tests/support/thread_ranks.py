"""Ranks as threads of one process: enough for what a group does, and quick."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from patience import LONG, TASK

from symmem.group.group import Group


def run_ranks(size: int, function: Callable[[int], Any], timeout: float = TASK) -> list[Any]:
    """Call ``function(rank)`` in a thread for each rank, named by the rank; returns what each returned or raised."""
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(rank)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(timeout)
        assert not thread.is_alive(), f"rank {rank} hangs"
    return results


def succeed(size: int, function: Callable[[int], Any]) -> list[Any]:
    """Like :func:`run_ranks`; raises what any rank raised."""
    results = run_ranks(size, function)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def make_groups(size: int, store: dist.Store | None = None, name: str = "threads") -> list[Group]:
    """One group of ``size`` ranks, as each rank sees it."""
    store = dist.HashStore() if store is None else store
    return [Group.from_store(rank, size, store, name) for rank in range(size)]


def meet(group: Group, operation: str = "meet", timeout: float = LONG) -> None:
    with group.collective(operation, timeout):
        pass


def open_files() -> set[tuple[str, str]]:
    """The descriptors of this process, each with the file that it is open on."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
