"""``symmem bench scale``: what groups of a large job ask of its store, counted, with the ranks as threads."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from symmem.backends.base import Allocation, Backend, Capability, Collective, Mapping
from symmem.backends.base import Group as AnyGroup
from symmem.errors import RendezvousError
from symmem.group.group import Group
from symmem.memory.block import Block
from symmem.memory.layout import Layout
from symmem.tensor.rendezvous import rendezvous
from symmem.tools.bench.counting import Ledger, RankStore, Request
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.progress import SILENT, Progress

__all__ = ["HANDLE", "SITUATIONS", "Cost", "Curve", "Job", "curve", "job", "line", "run", "simulate"]

SITUATIONS = ("one_host", "many_hosts")
"""All ranks of a group on one host, so that sockets take over from the store; each rank on a host of its own."""

HANDLE = 64
"""Bytes that each rank gives to the others in the one exchange of the backend: as a fabric handle of CUDA."""

_SIZES = (2, 4, 8, 16, 36, 72)
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Cost:
    """What one rendezvous of a group asked of the store.

    Attributes:
        ranks: Of the group.
        requests: Calls of the store, of all ranks.
        leader: Those of rank 0.
        messages: What a TCPStore sends for them: it puts a wait of its own before each get.
        keys: Keys that were made.
        left: Keys that were made and not deleted, less those of earlier ones that were.
        sent: Bytes of the names of keys and of the values, to the store.
        received: Bytes of the values that came back.
    """

    ranks: int
    requests: int
    leader: int
    messages: int
    keys: int
    left: int
    sent: int
    received: int

    @classmethod
    def of(cls, ranks: int, requests: Sequence[Request]) -> Cost:
        """The sum of some requests."""
        deleted = sum(request.operation == "delete" and not request.missed for request in requests)
        keys = sum(request.made for request in requests)
        return cls(
            ranks=ranks,
            requests=len(requests),
            leader=sum(request.rank == 0 for request in requests),
            messages=len(requests) + sum(request.operation in ("get", "multi_get") for request in requests),
            keys=keys,
            left=keys - deleted,
            sent=sum(request.sent for request in requests),
            received=sum(request.received for request in requests),
        )


@dataclass(frozen=True)
class Curve:
    """Groups of several sizes, each alone on its store.

    Attributes:
        situation: Of :data:`SITUATIONS`.
        first: The first rendezvous of each group, which also says where each rank runs.
        again: One more, of new memory.
        requests: Of the first rendezvous of the last, largest group.
    """

    situation: str
    first: list[Cost]
    again: list[Cost]
    requests: list[Request]


@dataclass(frozen=True)
class Job:
    """Groups that met one after the other on the store of one job.

    Attributes:
        situation: Of :data:`SITUATIONS`.
        ranks: Of the job.
        groups: The one rendezvous of each group.
        left: Keys that were there at the end.
        most: The largest number of keys that were there at a time.
    """

    situation: str
    ranks: int
    groups: list[Cost]
    left: int
    most: int


class _NoMemory(Backend):
    """Exchanges what a backend must, and maps nothing: the store does not see the difference."""

    device_type = "cpu"
    capabilities = Capability.MULTI_HOST

    def probe(self) -> None:
        pass

    def allocate(self, nbytes: int, device: torch.device, group: AnyGroup | None) -> Allocation:
        return Allocation(self, device, nbytes, 0)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> Mapping:
        collective.exchange("map", bytes(HANDLE)).close()
        return Mapping(self, collective.group, allocation.device, [0] * collective.group.size)


def _meet(group: Group) -> None:
    """A rendezvous of new memory, as ``SymmetricTensor.rendezvous`` has it."""
    layout = Layout.make(1 << 20, torch.float32, None)
    memory = _NoMemory("counted").allocate(layout.nbytes, torch.device("cpu"), None)
    rendezvous(Block(memory, layout), layout, group, _TIMEOUT)


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Leave SYMMEM_HOST_ID as it was."""
    before = os.environ.get("SYMMEM_HOST_ID")
    try:
        yield
    finally:
        os.environ.pop("SYMMEM_HOST_ID", None)
        if before is not None:
            os.environ["SYMMEM_HOST_ID"] = before


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """For all ranks in one process: on one host each watches each; and a thread for each call of the store."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    stack = threading.stack_size(1 << 18)  # bytes; a large stack takes longer to make than the call itself
    try:
        yield
    finally:
        threading.stack_size(stack)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _first(groups: Sequence[Group], stores: Sequence[RankStore], pool: ThreadPoolExecutor, *, apart: bool) -> None:
    """Let all ranks meet for the first time; ``apart``, each reads in the environment that it has a host of its own.

    All threads have one environment, so a rank begins once the one before has read it, as each does before it first
    calls the store.
    """
    meetings: list[Future[None]] = []
    with _same_environment():
        for rank, (group, store) in enumerate(zip(groups, stores, strict=True)):
            if apart:
                os.environ["SYMMEM_HOST_ID"] = str(uuid.UUID(int=rank))  # as long as what it stands for
            meetings.append(pool.submit(_meet, group))
            if apart and len(groups) > 1 and not store.called.wait(_TIMEOUT):
                raise RendezvousError(f"rank {rank} of {group.name!r} did not call the store")
        for meeting in meetings:
            meeting.result()


def simulate(ledger: Ledger, name: str, size: int, situation: str, meetings: int = 1) -> list[list[Request]]:
    """Make a group on the store of the job, and let its ranks rendezvous so many times.

    Args:
        ledger: The store; nobody else uses it meanwhile.
        name: Of the group, different for each.
        size: Number of ranks, each a thread.
        situation: Of :data:`SITUATIONS`.
        meetings: Number of rendezvous, each of new memory.

    Returns:
        The requests of each rendezvous.
    """
    stores = [RankStore(ledger, rank) for rank in range(size)]
    with _room(), contextlib.ExitStack() as undo:
        groups = [Group.from_store(rank, size, store, name) for rank, store in enumerate(stores)]
        for group in groups:
            undo.callback(group.close)
        pool = undo.enter_context(ThreadPoolExecutor(size))
        _first(groups, stores, pool, apart=situation == "many_hosts")
        requests = [ledger.take()]
        for _ in range(meetings - 1):
            list(pool.map(_meet, groups))
            requests.append(ledger.take())
    return requests


def _name(first: int) -> str:
    """Of the group that begins at this rank of the job; equally long for all, for the names of keys are counted too."""
    return f"ranks-from-{first:06}"


def curve(sizes: Sequence[int], situation: str) -> Curve:
    """Groups of these sizes, in ascending order, each alone on its store and with two rendezvous."""
    first, again = [], []
    requests: list[Request] = []
    for size in sizes:
        requests, more = simulate(Ledger(), _name(0), size, situation, 2)
        first.append(Cost.of(size, requests))
        again.append(Cost.of(size, more))
    return Curve(situation, first, again, requests)


def job(ranks: int, group_size: int, situation: str, progress: Progress = SILENT) -> Job:
    """All groups of a job, one after the other on one store; the last is smaller if it does not come out even."""
    ledger = Ledger()
    groups = []
    for first in range(0, ranks, group_size):
        size = min(group_size, ranks - first)
        progress.step(f"the group of {size} from rank {first} of {ranks}")
        [requests] = simulate(ledger, _name(first), size, situation)
        groups.append(Cost.of(size, requests))
    return Job(situation, ranks, groups, ledger.keys, ledger.most)


def line(costs: Sequence[Cost], what: str) -> tuple[float, float]:
    """Slope (a rank) and constant part of the line through the two smallest groups; of one group: no constant part."""
    (n, y), (m, z) = [(cost.ranks, getattr(cost, what)) for cost in (costs[0], costs[min(1, len(costs) - 1)])]
    slope = (z - y) / (m - n) if m != n else y / n
    return slope, y - slope * n


# What is shown of a cost: its attribute, the name of the figure and the unit.
_SHOWN = (
    ("requests", "store_requests", "count"),
    ("keys", "store_keys", "count"),
    ("left", "store_keys_left", "count"),
    ("sent", "store_bytes_in", "bytes"),
    ("received", "store_bytes_out", "bytes"),
)


def _curve_figures(situation: str, costs: Sequence[Cost]) -> list[Figure]:
    """Beside each figure, what it would be if it grew along the line through those of the two smallest groups."""
    figures = []
    for what, name, unit in _SHOWN:
        slope, constant = line(costs, what)
        for cost in costs:
            value, expected = getattr(cost, what), slope * cost.ranks + constant
            figures.append(Figure(f"{name}_{situation}", "any", cost.ranks, 0, value, unit, "line", expected))
    return figures


def _job_figures(job: Job, alone: Cost) -> list[Figure]:
    """Of the groups of full size what one asked at most, beside one that was alone on its store; and of the job."""
    full = [cost for cost in job.groups if cost.ranks == alone.ranks]
    figures = []
    for what, name, unit in _SHOWN:
        value = max(getattr(cost, what) for cost in full)
        figures.append(Figure(f"{name}_in_job", "any", alone.ranks, 0, value, unit, "alone", getattr(alone, what)))
    total = sum(cost.requests for cost in job.groups)
    for name, value in (("store_requests", total), ("store_keys_left", job.left), ("store_keys_most", job.most)):
        figures.append(Figure(f"{name}_of_job", "any", job.ranks, 0, value, "count"))
    return figures


def run(ranks: int, group_size: int, report: Path | None, progress: Progress = SILENT) -> Iterator[Figure]:
    """All figures of a job; writes the report if a path is given."""
    group_size = min(ranks, group_size)
    sizes = [*(size for size in _SIZES if size < group_size), group_size]
    progress.expect(len(SITUATIONS) + math.ceil(ranks / group_size))
    curves = []
    for situation in SITUATIONS:
        progress.step(f"groups of {sizes[0]} to {sizes[-1]} ranks, {situation}")
        curves.append(curve(sizes, situation))
    whole = job(ranks, group_size, SITUATIONS[-1], progress)
    for each in curves:
        yield from _curve_figures(each.situation, each.first)
        yield from _curve_figures(f"{each.situation}_again", each.again)[: len(sizes)]  # the requests
    yield from _job_figures(whole, curves[-1].first[-1])
    if report is not None:
        from symmem.tools.bench.scale_report import write

        write(report, curves, whole)
