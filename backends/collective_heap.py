"""Memory that all ranks of a job must allocate and free together, such as NVSHMEM's symmetric heap.

Such a library has two dangers. If a rank allocates alone, or allocates another size, the job hangs or breaks. So the
ranks compare their requests first, in a collective operation with a timeout. And the garbage collector frees memory
at different times and in a different order on every rank. So garbage collection only adds to a local list. At the next
allocation the ranks compare their lists, and free the memory that is on all lists, in the order of allocation.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from symmem.backends.base import Collective, RankGroup
from symmem.backends.untraced import untraced
from symmem.errors import GroupError, MismatchError, OutOfMemoryError

__all__ = ["CollectiveHeap", "job_group"]

T = TypeVar("T")


def job_group(backend: str, group: RankGroup | None, known: RankGroup | None) -> RankGroup:
    """The group of all ranks of the job, for a collective allocation.

    Args:
        backend: Its name in errors.
        group: The group that the user named, or the default process group. A group made from a store alone counts as
            the whole job.
        known: The group of the last allocation. It is used if ``group`` is only a part of the job.

    Raises:
        GroupError: Neither group is the whole job, or the job has grown.
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
        f"the backend {backend!r} allocates on all ranks of the job together, and {group.name!r} is only a part",
        hint="let all ranks allocate, without group= or with the default group, and rendezvous over the subgroup",
        rank=group.rank,
        group=group.name,
        step="allocate",
    )


def _is_job(group: RankGroup) -> bool:
    """Whether the group is all ranks of the job, in their order."""
    if _is_first(group):
        return True
    if group.process_group is None or not dist.is_initialized():
        return False
    return dist.get_process_group_ranks(group.process_group) == list(range(dist.get_world_size()))


def _is_first(group: RankGroup) -> bool:
    """Whether it is the default group, or a group made from a store, which counts as the default group."""
    if group.process_group is None:
        return True
    return dist.is_initialized() and group.process_group is dist.group.WORLD


class CollectiveHeap(Generic[T]):
    """The log of such memory on this rank. All ranks of the job number their allocations in the same way.

    Args:
        backend: Its name in errors.
        free: Frees one allocation. All ranks call it in the same order, within the collective operation.
        quiesce: Waits for the work that this rank has enqueued, because it may still use released memory. It is called
            before the other ranks learn of the release.
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
        job: RankGroup,
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
            room: Returns the free bytes of the device. Together with all memory ever freed here, they must suffice on
                every rank. This is checked before ``make``, because ``make`` might hang.
            timeout: Seconds.

        Returns:
            The number for :meth:`release`, and the result of ``make``.

        Raises:
            MismatchError: Sizes differ, or some rank missed an allocation. Raised on all ranks before ``make``.
            OutOfMemoryError: A rank has no room.
            SymmemError: ``make`` raised it on some rank. Memory that other ranks have made cannot be freed and is kept.
        """
        with self._lock:
            number = None
            try:
                with job.collective("allocate", timeout) as collective:
                    facts = {"bytes": nbytes, "allocations before this one": self._next}
                    rooms = self._compare_and_free(collective, facts, room())
                    self._check_room(nbytes, rooms)
                    number, self._next = self._next, self._next + 1
                    resource = make(collective)
                    self._held[number] = resource, nbytes
            except BaseException:
                if number in self._held:
                    self._released.add(number)
                raise
            return number, resource

    @untraced
    def release(self, number: int) -> None:
        """Record that this rank no longer uses an allocation. Local, and safe in the garbage collector."""
        self._collected.append(number)

    def _compare_and_free(self, collective: Collective, facts: dict[str, int], free: int) -> list[int]:
        """Compare facts and free the memory that all have released; returns an upper bound of free bytes per rank."""
        while self._collected:
            self._released.add(self._collected.popleft())
        if self._released:
            self._quiesce()
        room = free + self._reusable + sum(self._held[number][1] for number in self._released)
        own = facts | {"released": sorted(self._released), "room": room}
        with collective.exchange("compare", json.dumps(own).encode()) as received:
            entries = [json.loads(contribution.payload) for contribution in received]
        for key in facts:
            self._compare(key, [entry[key] for entry in entries])
        for number in sorted(set.intersection(*(set(entry["released"]) for entry in entries))):
            resource, nbytes = self._held.pop(number)
            self._released.discard(number)
            self._reusable += nbytes
            self._free(resource)
        return [entry["room"] for entry in entries]

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
