"""Memory that all ranks of a job must allocate together and free together, such as NVSHMEM's symmetric heap.

Two dangers come with such a library. A rank that allocates alone, or another size, hangs the job or breaks it: so the
ranks meet first and compare (:meth:`Group.collective`, with its timeout). And the garbage collector frees at
other moments, and in another order, on each rank: so what is collected only goes on a local list. When the ranks
meet for the next allocation they compare their lists, and free what is on all of them, in the order of allocation.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from symmem.backends.base import Collective, Group
from symmem.errors import GroupError, MismatchError, OutOfMemoryError

__all__ = ["CollectiveHeap", "job_group"]

T = TypeVar("T")


def job_group(backend: str, group: Group | None, known: Group | None) -> Group:
    """The group of all ranks of the job, which has to meet for an allocation.

    Args:
        backend: Named in errors.
        group: What the user named, or the default process group. One that was made from a store alone counts as
            the whole job; of another one that is not, only its settings apply.
        known: The group that met the last time.

    Raises:
        GroupError: Neither is the whole job, or the job has grown.
    """
    if group is not None and _is_job(group):
        if known is None or (group.size == known.size and _is_first(group)):
            return group
        if group.size > known.size:
            raise GroupError(
                f"the backend {backend!r} began with the {known.size} ranks of {known.name!r} as the whole job, and "
                f"{group.name!r} has {group.size}",
                hint="let the first allocation be made by all ranks of the job",
                rank=group.rank,
                group=group.name,
                step="allocate",
            )
    if known is not None:
        return known
    if group is None:
        raise GroupError(
            f"the backend {backend!r} allocates on all ranks of the job together, and there is no process group",
            hint="call torch.distributed.init_process_group(), or pass group=symmem.Group.from_store(...) of all ranks",
        )
    raise GroupError(
        f"the backend {backend!r} allocates on all ranks of the job together, and the group {group.name!r} is not all",
        hint="let all ranks allocate, without group= or with the default group, and rendezvous over the subgroup",
        rank=group.rank,
        group=group.name,
        step="allocate",
    )


def _is_job(group: Group) -> bool:
    """Whether it is all ranks of the job, in their order."""
    if _is_first(group):
        return True
    if group.process_group is None or not dist.is_initialized():
        return False
    return dist.get_process_group_ranks(group.process_group) == list(range(dist.get_world_size()))


def _is_first(group: Group) -> bool:
    """Whether it is the default group, or one that was made from a store, which counts as such."""
    if group.process_group is None:
        return True
    return dist.is_initialized() and group.process_group is dist.group.WORLD


class CollectiveHeap(Generic[T]):
    """The book of such memory; every rank of the job has one, and they number allocations alike.

    Args:
        backend: Named in errors.
        free: Frees one allocation. Called on all ranks alike, in the same order, while they meet.
        quiesce: Waits for the work that this rank has enqueued, which may still use what it released. Called
            before the others are told of it.
    """

    def __init__(self, backend: str, free: Callable[[T], None], quiesce: Callable[[], None]) -> None:
        self._backend = backend
        self._free = free
        self._quiesce = quiesce
        self._held: dict[int, tuple[T, int]] = {}  # by number: the resource and its bytes
        self._next = 0
        self._collected: deque[int] = deque()
        self._released: set[int] = set()
        self._reusable = 0
        self._lock = threading.RLock()

    def allocate(
        self,
        job: Group,
        nbytes: int,
        make: Callable[[Collective], T],
        room: Callable[[], int],
        timeout: float | None = None,
    ) -> tuple[int, T]:
        """Free what all ranks have released, then allocate. Collective over the job.

        Args:
            job: All ranks.
            nbytes: The same on all ranks.
            make: Allocates; collective.
            room: Bytes that are free on the device. If they, with all that was ever freed here, cannot suffice on
                some rank, that is known before ``make``, which might not come back.
            timeout: Seconds.

        Returns:
            The number to :meth:`release` it by, and what ``make`` returned.

        Raises:
            MismatchError: Sizes differ, or some rank missed an allocation; on all ranks, before ``make``.
            OutOfMemoryError: A rank has no room.
            SymmemError: What ``make`` raised on any rank. What it made on others can't be freed and is kept.
        """
        with self._lock:
            number = None
            try:
                with job.collective("allocate", timeout) as collective:
                    rooms = self._meet(collective, {"bytes": nbytes, "allocations before this one": self._next}, room())
                    self._check_room(nbytes, rooms)
                    number, self._next = self._next, self._next + 1
                    resource = make(collective)
                    self._held[number] = resource, nbytes
            except BaseException:
                if number in self._held:
                    self._released.add(number)
                raise
            return number, resource

    def release(self, number: int) -> None:
        """Note that this rank no longer uses it. Local and safe in the garbage collector."""
        self._collected.append(number)

    def _meet(self, collective: Collective, facts: dict[str, int], free: int) -> list[int]:
        """Compare facts and free what all have released; returns how much each rank can have left at most."""
        while self._collected:
            self._released.add(self._collected.popleft())
        if self._released:
            self._quiesce()
        room = free + self._reusable + sum(self._held[number][1] for number in self._released)
        card = facts | {"released": sorted(self._released), "room": room}
        with collective.exchange("compare", json.dumps(card).encode()) as received:
            cards = [json.loads(contribution.payload) for contribution in received]
        for key in facts:
            self._compare(key, [card[key] for card in cards])
        for number in sorted(set.intersection(*(set(card["released"]) for card in cards))):
            resource, nbytes = self._held.pop(number)
            self._released.discard(number)
            self._reusable += nbytes
            self._free(resource)
        return [card["room"] for card in cards]

    def _compare(self, key: str, values: Sequence[Any]) -> None:
        differ = tuple(rank for rank, value in enumerate(values) if value != values[0])
        if differ:
            text = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise MismatchError(
                f"ranks disagree on {key!r} of the backend {self._backend!r}: {text}",
                hint="all ranks of the job must allocate the same sizes in the same order",
                peers=differ,
            )

    @staticmethod
    def _check_room(nbytes: int, rooms: Sequence[int]) -> None:
        short = tuple(rank for rank, room in enumerate(rooms) if room < nbytes)
        if short:
            raise OutOfMemoryError(
                f"{nbytes} bytes were asked for, and rank {short[0]} has at most {rooms[short[0]]} left",
                hint="free memory on that rank's GPU, or allocate less",
                peers=short,
            )
