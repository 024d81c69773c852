"""Groups of ranks: identity, settings, life and status.

A :class:`Group` wraps a ``torch.distributed`` process group, or a rank, size and store. :meth:`Group.collective` is a
``with`` block in which ranks exchange bytes and file descriptors. At every exchange and at the end of the block, either
all ranks continue or all raise the same error. That is the error of the first failing rank, or an error that names the
ranks that died, did not come, or are at another step. Nothing else in symmem waits for a peer, except signals, which
have a timeout of their own.

See :mod:`.agreement` for the rounds behind it, and :mod:`.join` for the first one.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import operator
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch.distributed as dist

from symmem.backends.kernel_status import take_error
from symmem.backends.neutral import neutral_mode
from symmem.backends.untraced import untraced
from symmem.config import Settings, load_settings
from symmem.config.kinds import MAX_SECONDS
from symmem.config.settings import unmatched_entries
from symmem.errors import DivergenceError, ForkedError, GroupError, InvalidArgumentError, PeerLostError, SymmemError
from symmem.group import launcher_peers
from symmem.group.agreement import CollectiveOperation, Rounds
from symmem.group.join import join
from symmem.group.ledger import Ledger
from symmem.group.observers import group_made
from symmem.group.presence import ProcessWatch
from symmem.group.sync_points import SyncPoints

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

__all__ = ["Group", "check_timeout", "known_groups"]

T = TypeVar("T")

log = logging.getLogger("symmem.group")

_MAX_SIZE = 2**20  # ranks; more are a mistake, and the signal pads of a larger group would fill the memory

_groups: weakref.WeakSet[Group] = weakref.WeakSet()
_names: set[str] = set()  # of all groups that this process has made


def check_timeout(timeout: float) -> float:
    """Return ``timeout`` if it is a valid number of seconds.

    Raises:
        InvalidArgumentError: It is not.
    """
    # The comparison is also false for NaN.
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= MAX_SECONDS:
        raise InvalidArgumentError(
            f"timeout must be a positive number of seconds, at most {MAX_SECONDS} (24 days), not {timeout!r}"
        )
    return timeout


class Group:
    """A group of ranks. Make one with :func:`resolve_group`, or from a store with :meth:`from_store`.

    Making one waits for no other rank. It writes to the store which process this rank is. All ranks make the groups of
    a name in the same order. Two threads of a rank may use a group, but their collectives must have the same order on
    all ranks, as with any process group.

    Attributes:
        name: The process group's name, or the given name.
        rank: This process's rank within the group.
        size: Number of ranks.
        settings: The configuration for this group when it was made.
        extensions: State that layers above keep for this group, by the class of the state; see :meth:`extension`.
        process: The id of the process that made it. A forked child is no rank.
        closed: Whether :meth:`close` was called.
        made_from_store: Whether it was made without a process group; see :meth:`from_store`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        name: str,
        process_group: ProcessGroup | None = None,
        aliases: Collection[str] = (),
        job_ranks: Sequence[int] = (),
    ) -> None:
        try:
            if isinstance(rank, bool) or isinstance(size, bool):
                raise TypeError("a bool is not an integer")
            rank, size = operator.index(rank), operator.index(size)
        except TypeError:
            raise GroupError(f"rank and size of a group are integers, not {rank!r} and {size!r}") from None
        try:
            job_ranks = tuple(map(operator.index, job_ranks))
        except TypeError:
            raise GroupError(f"job_ranks is a list of integers, not {job_ranks!r}") from None
        if not isinstance(store, dist.distributed_c10d.Store):
            raise GroupError(
                f"a group needs a torch.distributed.Store that all its ranks share, not a {type(store).__name__}",
                hint="pass a TCPStore, FileStore or HashStore",
            )
        if not 0 <= rank < size <= _MAX_SIZE:
            raise GroupError(
                f"rank {rank} of {size} is not a rank of a group: 0 <= rank < size <= {_MAX_SIZE} is needed"
            )
        if not isinstance(name, str):
            raise GroupError(f"the name of a group is a str, not {name!r}")
        own = os.environ.get("RANK")
        if job_ranks and (len(job_ranks) != size or str(job_ranks[rank]) != own):
            raise GroupError(
                f"job_ranks names the variable RANK of all {size} ranks of the group, {own} for this rank {rank}, not "
                f"{list(job_ranks)}"
            )
        self.name, self.rank, self.size = name, rank, size
        self.made_from_store, self._job_ranks = process_group is None, job_ranks
        # Weak, so that a destroyed process group and everything that refers to it can be collected.
        self._process_group = weakref.ref(process_group) if process_group is not None else lambda: None
        self.extensions: dict[type, Any] = {}
        self.on_divergence: list[Callable[[DivergenceError], object]] = []
        self.before_collective: list[Callable[[], object]] = []  # raise what this rank has told the others already
        myself = weakref.ref(self)
        self._rounds = Rounds(store, rank, size, name, lambda: _lost_elsewhere(myself()))
        try:
            self.settings: Settings = load_settings(group=(name, *aliases))
        except SymmemError as error:
            self._rounds.presence.announce(error)  # the others would wait for this rank
            raise
        _names.update((name, *aliases))
        self._watch = ProcessWatch()
        self._lock = threading.RLock()  # held during a collective
        self._under_way: tuple[str, float, int] | None = None  # the holder's operation, its start, its thread
        self._unreported: deque[tuple[str, BaseException]] = deque()  # errors that the holder of the lock must report
        self.process = os.getpid()
        self.closed = False
        self._rounds.presence.announce()
        if size > 1:
            launcher_peers.find()
        _groups.add(self)
        for callback in group_made:
            callback(self)

    @classmethod
    @untraced
    def from_store(
        cls, rank: int, size: int, store: Store, name: str = "default", *, job_ranks: Sequence[int] = ()
    ) -> Group:
        """Make a group without ``torch.distributed`` process groups.

        Args:
            rank: This process's rank.
            size: Number of ranks.
            store: Any ``torch.distributed.Store`` that all ranks share: TCPStore, FileStore, HashStore.
            name: The same on all ranks, and different for groups of different ranks on one store.
            job_ranks: The launcher's number (the variable RANK) of every rank of the group, if it is known. Then nobody
                waits for a process that has ended, if another group of this process knows it. A group of all ranks of
                the job needs no numbers.

        Raises:
            GroupError: The rank is not in range(size), the size is more than 2**20, an argument has a wrong type, or
                ``job_ranks`` does not fit size and rank.
        """
        return cls(store, rank, size, name, job_ranks=job_ranks)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ``torch.distributed.ProcessGroup``; None if it was destroyed, or for a group made from a store."""
        return self._process_group()

    @property
    def places(self) -> tuple[int, ...]:
        """The number of every rank's place: ranks of one place are on one host, and in one network namespace.

        All are 0 before the ranks have joined. Places are numbered in the order of their first ranks.
        """
        return self._rounds.places.of_ranks

    @property
    def ledger(self) -> Ledger | None:
        """The acts of all ranks; None before the ranks have joined, or if they are on several hosts."""
        return self._rounds.ledger

    @property
    def sync_points(self) -> SyncPoints | None:
        """The points where ranks wait that may come alone; None if there is no :attr:`ledger`."""
        return self._rounds.sync_points

    def __reduce__(self) -> NoReturn:
        raise GroupError(
            "a group cannot be pickled, because it belongs to its process",
            hint="send its name, and make the group in the other process",
            rank=self.rank,
            group=self.name,
        )

    def __repr__(self) -> str:
        return f"Group({self.name!r}, rank={self.rank}, size={self.size})"

    def extension(self, owner: type[T]) -> T:
        """Return the state that a layer above keeps for this group; make it at the first call. Local.

        Args:
            owner: The class of the state; it takes no arguments. For example ``group.extension(Arenas)``.
        """
        if owner not in self.extensions:
            self.extensions.setdefault(owner, owner())  # another thread may have been faster
        state: T = self.extensions[owner]
        return state

    @contextlib.contextmanager
    @untraced
    def collective(self, operation: str, timeout: float | None = None) -> Iterator[CollectiveOperation]:
        """Begin a collective operation; all ranks must.

        Args:
            operation: A name for errors and logs; the same on all ranks.
            timeout: Seconds for the whole operation; default ``settings.rendezvous_timeout``.

        Raises:
            SymmemError: The same on all ranks: the error that any rank raised within the block (an error of another
                library becomes a RendezvousError), PeerLostError, PeerTimeoutError, MismatchError.
            ForkedError: This process was forked after the group was made.
            InvalidArgumentError: The timeout is not more than 0 and at most 24 days.
        """
        self._check_usable(operation)
        for check in self.before_collective:
            check()
        timeout = self.settings.rendezvous_timeout if timeout is None else check_timeout(timeout)
        try:
            with self._lock:
                self._check_usable(operation)  # another thread may have closed the group meanwhile
                self._check_idle(operation)
                self._under_way = operation, time.monotonic(), threading.get_ident()
                try:
                    # Memory, mappings and engines are made in such a block, and outlive the caller's modes.
                    with neutral_mode(), self._rounds.operation(self, operation, timeout) as collective:
                        join(self._rounds, collective, self._watch)
                        yield collective
                except DivergenceError as error:
                    for tell in self.on_divergence:
                        tell(error)
                    raise
                finally:
                    if not self._rounds.joined:
                        self._disconnect()  # the join failed: the next collective starts over
                    self._under_way = None
        finally:
            self._catch_up()

    @untraced
    def fail(self, operation: str, error: BaseException) -> None:
        """Let the next collective of this group fail on all other ranks with this rank's error.

        Does not wait for a collective of another thread: that thread reports the error when it is done. Does nothing
        for an error that a collective of this group raised, because all ranks have that error.
        """
        if self.closed or os.getpid() != self.process or getattr(error, "propagated_to", None) == self.name:
            return
        self._unreported.append((operation, error))
        self._catch_up()

    def _catch_up(self) -> None:
        """Finish the work of :meth:`fail` and :meth:`close` that waits for the lock, unless a thread holds it.

        A thread that holds it calls this after the release.
        """
        while (self._unreported or self.closed) and self._lock.acquire(blocking=False):
            try:
                if self.closed:
                    self._unreported.clear()
                    self._rounds.disconnect()
                    return
                with contextlib.suppress(IndexError):  # another thread has reported it
                    operation, error = self._unreported.popleft()
                    self._rounds.report(CollectiveOperation(self, self._rounds, operation, 1.0), error)
            finally:
                self._lock.release()

    @untraced
    def lost(self) -> tuple[int, ...]:
        """Return the ranks with a process that is known to have ended. Only ranks of the same host are watched."""
        return self._watch.lost()

    def when_lost(self, function: Callable[[int], None]) -> None:
        """See :meth:`symmem.backends.base.RankGroup.when_lost`. It takes effect once the ranks have joined."""
        self._watch.when_lost(function)

    @untraced
    def check(self) -> None:
        """Raise if the process of a rank has ended, as far as this rank knows. Local; takes a few microseconds.

        Also raises, once, the error of collective operations on CUDA that gave up since the last check: see
        :mod:`symmem.ops.collectives`. It does not wait for operations that still run.

        Raises:
            PeerLostError: Names the ranks. Only ranks of the same host are watched.
            PeerTimeoutError: A rank came too late to an operation on CUDA.
            SymmemError: A rank refused an operation on CUDA; on the other ranks.
        """
        if lost := self.lost():
            named = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
            raise PeerLostError(
                f"the process of {named} ended",
                hint=f"look at the log of {named} for the first error; then restart the job, or make a new group of "
                "the ranks that are left",
                rank=self.rank,
                group=self.name,
                step="check",
                peers=lost,
            )
        if error := take_error(self):
            raise error

    @untraced
    def status(self) -> dict[str, Any]:
        """Return the state of this rank of the group as plain data. Local; takes no lock that another thread holds.

        Returns:
            ``name``, ``identity`` (the same on all ranks once they have joined), ``rank``, ``size``, ``closed``,
            ``wire`` (the transport of messages: ``store`` or ``sockets``), ``rounds`` (number of rounds that this rank
            has begun), ``lost`` (ranks with an ended process), ``operation`` (the current collective operation:
            ``name``, ``seconds``, ``thread``; or None), ``round`` (the round in which this rank waits: ``step``,
            ``number``, ``seconds``, ``seconds_left``, ``waits_for``; or None). ``waits_for`` lists ranks: the followers
            wait for rank 0; rank 0 waits for the ranks without a message. It is None on rank 0 if the store carries the
            messages.
        """
        now, under_way, waiting, sockets = time.monotonic(), self._under_way, self._rounds.waiting, self._rounds.sockets
        operation = round_ = None
        if under_way is not None:
            operation = {"name": under_way[0], "seconds": now - under_way[1], "thread": under_way[2]}
        if waiting is not None:
            step, number, began, deadline = waiting
            known = [0] if self.rank else list(sockets.missing) if sockets else None
            round_ = {"step": step, "number": number, "seconds": now - began, "seconds_left": deadline - now}
            round_["waits_for"] = known
        return {
            "name": self.name,
            "identity": self._rounds.identity,
            "rank": self.rank,
            "size": self.size,
            "closed": self.closed,
            "wire": "sockets" if sockets else "store",
            "rounds": self._rounds.number,
            "lost": list(self.lost()),
            "operation": operation,
            "round": round_,
        }

    def _check_usable(self, operation: str) -> None:
        if os.getpid() != self.process:
            raise ForkedError(
                f"the group {self.name!r} was made before this process was forked",
                hint="make a group in the child, or start workers with the 'spawn' method",
                group=self.name,
                step=operation,
            )
        if self.closed:
            raise GroupError(f"the group {self.name!r} is closed", rank=self.rank, step=operation)

    def _check_idle(self, operation: str) -> None:
        if self._under_way is not None:
            raise GroupError(
                f"{operation!r} was begun during {self._under_way[0]!r} of the same group, on the same thread",
                hint="make no collective call from a finalizer, a signal handler or another callback",
                rank=self.rank,
                group=self.name,
                step=operation,
            )

    def _disconnect(self) -> None:
        self._rounds.disconnect()
        self._watch.close()

    @untraced
    def close(self) -> None:
        """Leave the group. Local; may be called again. Peers that wait for this rank fail.

        A collective of another thread fails at once, and that thread closes the connections. Mapped memory stays, and
        its barriers still notice the death of a rank: the descriptors for that close with the last reference to the
        group.
        """
        self.closed = self._rounds.closed = True
        if sockets := self._rounds.sockets:
            sockets.leave()
        self._catch_up()


def known_groups() -> list[Group]:
    """Return all groups of this process that are in use. Local."""
    return sorted(_groups, key=lambda group: group.name)


def _world_ranks(group: Group) -> tuple[tuple[int, int], tuple[int, ...]] | None:
    """Return the size of the job's world and this process's rank in it, and the ranks of a group in the world.

    None if the group's ranks are not known to be ranks of a world.
    """
    if not group.made_from_store:
        process_group = group.process_group
        if process_group not in dist.distributed_c10d._world.pg_map:
            return None
        ranks = dist.get_process_group_ranks(process_group)
        return (dist.get_world_size(), dist.get_rank()), tuple(ranks)
    size, rank = os.environ.get("WORLD_SIZE"), os.environ.get("RANK")  # as launchers set them
    if group._job_ranks and size is not None and rank is not None:
        return (int(size), int(rank)), group._job_ranks
    if (size, rank) != (str(group.size), str(group.rank)):
        return None
    return (group.size, group.rank), tuple(range(group.size))


def _lost_elsewhere(group: Group | None) -> tuple[int, ...]:
    """Return the ranks of a group with a process that has ended, as the kernel or other groups of this process know."""
    with contextlib.suppress(RuntimeError):  # another thread makes a group, or destroys a process group
        if group is not None and (own := _world_ranks(group)):
            gone = launcher_peers.lost(*own[0])
            for other in known_groups():
                if other is not group and not other.closed and other.process == os.getpid() and (lost := other.lost()):
                    world = _world_ranks(other)
                    if world is not None and world[0] == own[0]:
                        gone.update(world[1][rank] for rank in lost)
            return tuple(rank for rank, world_rank in enumerate(own[1]) if world_rank in gone)
    return ()


@atexit.register
def _say_that_the_process_ends() -> None:
    """Tell ranks that may wait at the store. Those with sockets see the end of the connection."""
    error = getattr(sys, "last_value", None)
    reason = f" with {type(error).__name__}: {error}" if isinstance(error, BaseException) else ""
    for group in list(_groups):
        if group.process == os.getpid() and not group.closed and group._rounds.sockets is None:
            group._rounds.presence.end(reason)


@atexit.register
def _report_unmatched() -> None:
    """At exit, name the entries of the cluster file that matched no group. One rank of the job speaks for all."""
    if _names and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(SymmemError):
            if unmatched := unmatched_entries(_names):
                log.warning(
                    "%s: %s matched no group of this process; its groups had the names %s",
                    *(os.environ["SYMMEM_CONFIG"], ", ".join(unmatched), sorted(_names)),
                )


def _leave_in_child() -> None:
    """Close a forked child's copies of the sockets; otherwise peers would not notice the parent's death."""
    for group in list(_groups):
        # In the child, no thread releases the locks that other threads held at the fork.
        group._lock = threading.RLock()
        group._watch.renew_lock()
        group._rounds.presence.renew_lock()
        group._disconnect()


os.register_at_fork(after_in_child=_leave_in_child)
