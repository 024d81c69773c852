"""``symmem bench scale``: counts the requests that rendezvous make to the store of a large job.

Every rank is a thread of this process. The code is the same as in a real job (groups, rounds, transports, sockets), but
the backend maps no memory. Figures of groups of several sizes have the peer ``line``: the value at this size if the
figure grew linearly, along the line through the two smallest groups. Figures ``..._in_job`` are the largest value of a
full group of the job, beside a group that is alone on its store (``alone``).
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from symmem.backends.base import Allocation, Backend, Capability, Collective, Mapping
from symmem.backends.base import Group as AnyGroup
from symmem.distributed.process_group import meet
from symmem.errors import RendezvousError
from symmem.group.group import Group
from symmem.memory.block import Block
from symmem.memory.layout import Layout
from symmem.tensor.rendezvous import rendezvous
from symmem.tools.bench.figures import Figure
from symmem.tools.bench.progress import SILENT, Progress

__all__ = ["SITUATIONS", "Counter", "StoreRequests", "run", "simulate"]

SITUATIONS = ("one_host", "many_hosts")
"""All ranks on one host, so that sockets replace the store after two rounds; every rank on its own host."""

Act: TypeAlias = Callable[[Group], object]

_SIZES = (2, 4, 8, 16, 36, 72)
_MOST_ON_ONE_HOST = 128  # every rank watches every other one, and all descriptors are in this process
_HANDLE = 64  # bytes that every rank exchanges for its memory, as many as a fabric handle has
_TIMEOUT = 600.0


class StoreRequests(NamedTuple):
    """Requests of one rendezvous to the store, summed over ranks.

    Attributes:
        requests: Number of calls.
        keys: Number of new keys.
        keys_left: New keys less deleted keys.
        bytes_in: Bytes of key names and of values that the store receives.
        bytes_out: Bytes of values that the store returns.
    """

    requests: int = 0
    keys: int = 0
    keys_left: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class Counter:
    """The store of a job, with a count of the requests to it.

    Attributes:
        store: Holds the keys.
        keys: Names of the keys in the store.
    """

    def __init__(self) -> None:
        self.store: Any = dist.HashStore()  # Any: the stubs lack bytes as values
        self.keys: set[str] = set()
        self._requests = StoreRequests()
        self._lock = threading.Lock()

    def note(self, names: Sequence[str], sent: int = 0, received: int = 0, new: bool = False) -> None:
        """Count a request; ``new`` if it makes the key ``names[0]``."""
        with self._lock:
            made = int(new and names[0] not in self.keys)
            if new:
                self.keys.add(names[0])
            self._add(StoreRequests(1, made, made, sum(map(len, names)) + sent, received))

    def note_deleted(self, name: str) -> None:
        """Count a request that deletes a key."""
        with self._lock:
            self._add(StoreRequests(1, 0, -int(name in self.keys), len(name), 0))
            self.keys.discard(name)

    def _add(self, more: StoreRequests) -> None:
        self._requests = StoreRequests(*map(sum, zip(self._requests, more, strict=True)))

    def take(self) -> StoreRequests:
        """Return the count since the last call."""
        with self._lock:
            taken, self._requests = self._requests, StoreRequests()
        return taken


class _RankStore(Store):
    """One rank's handle of the store. It has the methods that symmem calls; torch raises for any other."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.called = threading.Event()  # the rank made its first request
        self._counter, self._store = counter, counter.store

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value)
        self._counter.note([key], sent=len(value), new=True)

    def add(self, key: str, value: int) -> int:
        self.called.set()
        total: int = self._store.add(key, value)
        self._counter.note([key], sent=8, received=8, new=True)
        return total

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(key)
        self._counter.note([key], received=len(value))
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values: list[bytes] = self._store.multi_get(keys)
        self._counter.note(keys, received=sum(map(len, values)))
        return values

    def check(self, keys: list[str]) -> bool:
        there: bool = self._store.check(keys)
        if there:  # how often a rank asks in vain depends on time
            self._counter.note(keys)
        return there

    def compare_set(self, key: str, expected: Any, value: Any) -> Any:
        found: bytes = self._store.compare_set(key, expected, value)
        self._counter.note([key], sent=len(expected) + len(value), received=len(found))
        return found

    def delete_key(self, key: str) -> bool:
        deleted: bool = self._store.delete_key(key)
        self._counter.note_deleted(key)
        return deleted

    def has_extended_api(self) -> bool:
        return True


class _NoMemory(Backend):
    """Exchanges the bytes that a backend must exchange, and maps nothing."""

    device_type = "cpu"
    capabilities = Capability.MULTI_HOST

    def probe(self) -> None:
        pass

    def allocate(self, nbytes: int, device: torch.device, group: AnyGroup | None) -> Allocation:
        return Allocation(self, device, nbytes, 0)

    def rendezvous(self, allocation: Allocation, collective: Collective) -> Mapping:
        collective.exchange("map", bytes(_HANDLE)).close()
        return Mapping(self, collective.group, allocation.device, [0] * collective.group.size)


def _rendezvous(group: Group) -> None:
    """One rendezvous of new memory, as ``SymmetricTensor.rendezvous`` does it."""
    layout = Layout.make(1 << 20, torch.float32, None)
    memory = _NoMemory("counted").allocate(layout.nbytes, torch.device("cpu"), None)
    rendezvous(Block(memory, layout), layout, group, _TIMEOUT)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Raise the limit of descriptors, because all ranks are in one process, and give their threads small stacks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    stack = threading.stack_size(1 << 18)
    try:
        yield
    finally:
        threading.stack_size(stack)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _first(
    act: Act, groups: Sequence[Group], stores: Sequence[_RankStore], pool: ThreadPoolExecutor, *, apart: bool
) -> None:
    """Run the first act of all ranks; with ``apart``, every rank reads its own host id in SYMMEM_HOST_ID.

    Threads share the environment, so the next rank starts after this one has called the store: by then it has read it.
    """
    before = os.environ.get("SYMMEM_HOST_ID")
    try:
        running = []
        for rank, (group, store) in enumerate(zip(groups, stores, strict=True)):
            if apart:
                os.environ["SYMMEM_HOST_ID"] = str(uuid.UUID(int=rank))
            store.called.clear()  # the group has called it when it was made
            running.append(pool.submit(act, group))
            if apart and len(groups) > 1 and not store.called.wait(_TIMEOUT):
                raise RendezvousError(f"rank {rank} of {group.name!r} did not call the store")
        for future in running:
            future.result()
    finally:
        os.environ.pop("SYMMEM_HOST_ID", None)
        if before is not None:
            os.environ["SYMMEM_HOST_ID"] = before


def simulate(
    size: int, situation: str, counter: Counter, first: int = 0, rounds: int = 1, act: Act = _rendezvous
) -> list[StoreRequests]:
    """Make a group and let its ranks rendezvous; returns the requests of every rendezvous.

    Args:
        size: Number of ranks.
        situation: One of :data:`SITUATIONS`.
        counter: The store of the job; nothing else uses it meanwhile.
        first: The group's first rank in the job. Names of groups have the same length, because they count as bytes.
        rounds: Number of rendezvous, all of new memory.
        act: What the ranks do instead of a rendezvous.
    """
    stores = [_RankStore(counter) for _ in range(size)]
    with _limits(), contextlib.ExitStack() as undo:
        groups = [Group.from_store(rank, size, store, f"ranks-from-{first:06}") for rank, store in enumerate(stores)]
        for group in groups:
            undo.callback(group.close)
        pool = undo.enter_context(ThreadPoolExecutor(size))
        _first(act, groups, stores, pool, apart=situation == "many_hosts")
        counts = [counter.take()]
        for _ in range(rounds - 1):
            list(pool.map(act, groups))
            counts.append(counter.take())
    return counts


def _figure(name: str, ending: str, world: int, value: int, peer: str = "", peer_value: float | None = None) -> Figure:
    unit = "bytes" if name.startswith("bytes") else "count"
    return Figure(f"store_{name}_{ending}", "any", world, 0, value, unit, peer, peer_value)


def _beside_line(situation: str, counts: dict[int, StoreRequests]) -> Iterator[Figure]:
    n, m = [*counts, *counts][:2]
    for index, name in enumerate(StoreRequests._fields):
        y, z = counts[n][index], counts[m][index]
        slope = (z - y) / (m - n) if m != n else y / n
        for size, found in counts.items():
            yield _figure(name, situation, size, found[index], "line", y + slope * (size - n))


def run(ranks: int, group_size: int, progress: Progress = SILENT) -> Iterator[Figure]:
    """Yield the figures of groups of several sizes, each alone on its store, and of a job of many groups."""
    group_size = min(ranks, group_size)
    sizes = [*(size for size in _SIZES if size < group_size), group_size]
    alone: dict[int, StoreRequests] = {}
    for situation in SITUATIONS:
        again: dict[int, StoreRequests] = {}
        for size in sizes:
            if situation == "one_host" and size > _MOST_ON_ONE_HOST:
                continue
            progress.step(f"a group of {size} ranks, {situation}")
            alone[size], again[size] = simulate(size, situation, Counter(), rounds=2)
        yield from _beside_line(situation, alone)
        for figure in _beside_line(f"{situation}_again", again):
            if figure.figure.startswith("store_requests"):
                yield figure
    meetings: dict[int, StoreRequests] = {}
    for size in sizes:
        progress.step(f"the first meeting of a process group of {size} ranks")
        meetings[size] = simulate(size, SITUATIONS[-1], Counter(), act=meet)[0]
    yield from _beside_line("meeting", meetings)
    counter, counts = Counter(), dict[int, StoreRequests]()
    for first in range(0, ranks, group_size):
        progress.step(f"the group from rank {first} of {ranks}")
        counts[first] = simulate(min(group_size, ranks - first), SITUATIONS[-1], counter, first)[0]
    full = [counts[first] for first in counts if first + group_size <= ranks]
    for index, name in enumerate(StoreRequests._fields):
        largest = max(found[index] for found in full)
        yield _figure(name, "in_job", group_size, largest, "alone", alone[group_size][index])
    yield _figure("requests", "of_job", ranks, sum(found.requests for found in counts.values()))
    yield _figure("keys_left", "of_job", ranks, len(counter.keys))
