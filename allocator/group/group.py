"""Groups of ranks, and the one way they meet: agree or fail.

A :class:`Group` wraps a ``torch.distributed`` process group, or a rank, size and store, and offers
:meth:`Group.collective`: a ``with`` block in which ranks exchange bytes and file descriptors. At the end of the
block, and at each exchange in it, either all ranks go on or all raise the same error: the first failing rank's,
or one that names who died, did not come, or is at another step. Nothing else in symmem waits for a peer, but
signals, which have their own timeout.

Protocol. Rounds are numbered. In each, every rank submits a message or its error to rank 0, which publishes either
all messages or one error (see :mod:`symmem.group.transports`). A rank that fails outside of an exchange submits its
error to the round that is next, so the others learn of it at once. A rank whose time is up withdraws its message. The
first rounds go over the store and tell who is where; when all ranks can pass descriptors to each other, the following
go over sockets.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import operator
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch.distributed as dist

from symmem.backends import descriptors as scm
from symmem.backends.descriptors import Contribution, Received
from symmem.backends.kernel_status import failure
from symmem.backends.libc import duplicate, is_limit, limit_error
from symmem.config import Settings, load_settings
from symmem.config.kinds import MAX_SECONDS
from symmem.errors import (
    ForkedError,
    GroupError,
    InvalidArgumentError,
    MismatchError,
    OutOfMemoryError,
    PeerLostError,
    PeerTimeoutError,
    RendezvousError,
    SymmemError,
    from_wire,
    to_wire,
)
from symmem.group.observers import group_made
from symmem.group.transports import Message, SocketWire, StoreWire, Wire, watch_process, within

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

__all__ = [
    "Collective",
    "Group",
    "GroupLike",
    "Place",
    "check_timeout",
    "default_group",
    "differing",
    "known_groups",
    "resolve_group",
]

T = TypeVar("T")

log = logging.getLogger("symmem.group")

GRACE = 0.5
"""Seconds a rank waits for rank 0's verdict past its own timeout, so that all ranks raise the same error."""

_groups: weakref.WeakSet[Group] = weakref.WeakSet()
_by_process_group: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()


def check_timeout(timeout: float) -> float:
    """Return ``timeout`` if it is a number of seconds that can be waited for.

    Raises:
        InvalidArgumentError: It is not.
    """
    # The comparison is also false for NaN.
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= MAX_SECONDS:
        raise InvalidArgumentError(
            f"timeout must be a positive number of seconds, at most {MAX_SECONDS} (24 days), not {timeout!r}"
        )
    return timeout


def differing(values: Sequence[object]) -> tuple[str, tuple[int, ...]]:
    """Say which ranks have which value, and which ranks are not with the majority (on a draw: with rank 0)."""
    ranks: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    text = ", ".join(f"{value} on rank{'s' * (len(r) > 1)} {_spans(r)}" for value, r in ranks.items())
    common = max(ranks.values(), key=len)
    return text, tuple(rank for rank in range(len(values)) if rank not in common)


def _spans(ranks: list[int]) -> str:
    """Write sorted ranks compactly: 0-3, 6."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ", ".join("-".join(map(str, span)) for span in spans)


@dataclass(frozen=True)
class Place:
    """Where a rank runs: which ranks can pass descriptors to which.

    Attributes:
        host: SYMMEM_HOST_ID, else the kernel's boot id, which containers of one host share.
        network: The network namespace; abstract sockets do not reach out of it.
        name: The host's name, for messages.
        pid: The process, in its own PID namespace.
    """

    host: str
    network: int
    name: str
    pid: int

    @classmethod
    def here(cls) -> Place:
        """The place of this process."""
        host = os.environ.get("SYMMEM_HOST_ID") or Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(host, os.stat("/proc/self/ns/net").st_ino, socket.gethostname(), os.getpid())


class Collective:
    """One collective operation in progress; made by :meth:`Group.collective`."""

    def __init__(self, group: Group, operation: str, timeout: float) -> None:
        self.group = group
        self.operation = operation
        self.timeout = timeout
        self.deadline = time.monotonic() + timeout
        self.told = False  # whether the other ranks know of the error that is on its way

    @property
    def serial(self) -> int:
        """How many rounds the group has had; the same on all ranks."""
        return self.group._sequence

    @property
    def passes_descriptors(self) -> bool:
        """See :attr:`symmem.backends.base.Collective.passes_descriptors`."""
        return self.group._passes_descriptors

    def exchange(self, step: str, payload: bytes = b"", descriptors: Sequence[int] = ()) -> Received:
        """See :meth:`symmem.backends.base.Collective.exchange`."""
        if descriptors:
            self.group._require_descriptors()
        return self.group._round(self, step, Contribution(payload, tuple(descriptors)))


class Group:
    """Ranks that meet. Make one with :func:`resolve_group`, or from a store with :meth:`from_store`.

    Making one is local; all ranks make the groups of one name in the same order. Two threads of a rank may use a
    group, but their collectives must be in the same order on all ranks, as with any process group.

    Attributes:
        name: The process group's name, or the name given.
        rank: This process's rank within the group.
        size: Number of ranks.
        settings: The configuration for this group, as it was when the group was first used.
        extensions: State that layers above keep for this group, by the class of the state; see :meth:`extension`.
        process: The id of the one it was made in; a forked child is no rank.
        closed: Whether :meth:`close` was called.
        made_from_store: Whether there never was a process group: see :meth:`from_store`.
    """

    def __init__(
        self, store: Store, rank: int, size: int, name: str, process_group: ProcessGroup | None = None
    ) -> None:
        try:
            rank, size = operator.index(rank), operator.index(size)
        except TypeError:
            raise GroupError(f"rank and size of a group are integers, not {rank!r} and {size!r}") from None
        if not isinstance(store, dist.distributed_c10d.Store):
            raise GroupError(
                f"a group needs a torch.distributed.Store that all its ranks share, not a {type(store).__name__}",
                hint="pass a TCPStore, FileStore or HashStore",
            )
        if size < 1 or not 0 <= rank < size:
            raise GroupError(f"rank {rank} of {size} is not a rank of a group: 0 <= rank < size is needed")
        self.name, self.rank, self.size = name, rank, size
        self.made_from_store = process_group is None
        # Weak, so that a destroyed process group and what hangs on it can go.
        self._process_group = weakref.ref(process_group) if process_group is not None else lambda: None
        self.settings: Settings = load_settings(group=name)
        self._store = store
        self._socket_wire: SocketWire | None = None
        self._places: tuple[Place, ...] | None = None
        self._watched: dict[int, int] = {}  # pidfd -> rank
        self._poll = select.poll()
        self._watch_lock = threading.Lock()  # of the two above; never held for long
        self.extensions: dict[type, Any] = {}
        self._sequence = 0
        self._lock = threading.RLock()  # of the rounds: held for a whole collective
        self._under_way: tuple[str, float, int] | None = None  # of the thread that holds it: operation, since when
        self._waiting: tuple[str, int, float, float] | None = None  # round: step, number, since when, deadline
        self._identity: str | None = None  # the same on all ranks once they have met, and no other group's
        self._unsaid: deque[tuple[str, BaseException]] = deque()  # what `fail` left to the holder of the lock
        self.process = os.getpid()
        self.closed = False
        _groups.add(self)
        for callback in group_made:
            callback(self)

    @classmethod
    def from_store(cls, rank: int, size: int, store: Store, name: str = "default") -> Group:
        """A group without ``torch.distributed`` process groups.

        Args:
            rank: This process's rank.
            size: Number of ranks.
            store: Any ``torch.distributed.Store`` that all of them share; TCPStore, FileStore, HashStore.
            name: The same on all ranks, and different for groups of different ranks on one store.

        Raises:
            GroupError: The rank is not in range(size).
        """
        return cls(store, rank, size, name)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ``torch.distributed.ProcessGroup``; None if it was destroyed, or for a group made from a store."""
        return self._process_group()

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

    # The collective.

    @contextlib.contextmanager
    def collective(self, operation: str, timeout: float | None = None) -> Iterator[Collective]:
        """Begin a collective operation; all ranks must.

        Args:
            operation: Named in errors and logs; the same on all ranks.
            timeout: Seconds for the whole of it; default ``settings.rendezvous_timeout``.

        Raises:
            SymmemError: The same on all ranks: the error that any rank raised within the block (of another
                library: as RendezvousError), PeerLostError, PeerTimeoutError, MismatchError.
            ForkedError: This process was forked after the group was made.
            InvalidArgumentError: The timeout is not more than 0 and at most 24 days.
        """
        self._check_usable(operation)
        timeout = self.settings.rendezvous_timeout if timeout is None else check_timeout(timeout)
        try:
            with self._lock:
                self._check_usable(operation)  # it may have been closed while this thread waited
                self._check_not_under_way(operation)
                self._under_way = operation, time.monotonic(), threading.get_ident()
                try:
                    yield from self._collective(operation, timeout)
                finally:
                    self._under_way = None
        finally:
            self._catch_up()

    def _collective(self, operation: str, timeout: float) -> Iterator[Collective]:
        collective = Collective(self, operation, timeout)
        before = self._sequence
        try:
            self._join(collective)
            yield collective
            self._round(collective, "agree", Contribution(b""))
        except _Agreed as agreed:
            agreed.error.known_to = self.name
            raise agreed.error from agreed.__cause__
        except BaseException as error:
            local = _named(error) if collective.told else self._report(collective, error)
            local.known_to = self.name
            if local is error or not isinstance(error, Exception):
                raise
            raise local from error
        finally:
            if self._places is None:
                self._disconnect()  # half-way: the next collective begins anew
            log.debug(
                "%s: rank %d of group %r, rounds %d to %d, %.3f ms",
                *(operation, self.rank, self.name, before, self._sequence),
                (time.monotonic() - collective.deadline + timeout) * 1e3,
            )

    def fail(self, operation: str, error: BaseException) -> None:
        """Let the next collective of this group fail on all other ranks with this rank's error.

        Does not wait for a collective of another thread: that thread tells the error once it is done. Nothing is
        done if the error came out of a collective of this group: then all ranks have it.
        """
        if self.closed or os.getpid() != self.process or getattr(error, "known_to", None) == self.name:
            return
        self._unsaid.append((operation, error))
        self._catch_up()

    def _catch_up(self) -> None:
        """Do what :meth:`fail` and :meth:`close` left to the thread that held the lock: each looks after it let go."""
        while (self._unsaid or self.closed) and self._lock.acquire(blocking=False):
            try:
                if self.closed:
                    self._unsaid.clear()
                    self._leave()
                    return
                with contextlib.suppress(IndexError):  # another thread said it
                    operation, error = self._unsaid.popleft()
                    self._report(Collective(self, operation, 1.0), error)
            finally:
                self._lock.release()

    def _report(self, collective: Collective, error: BaseException) -> SymmemError:
        """Submit an error instead of a contribution; returns what the other ranks will raise."""
        wire_error = _named(error)
        wire_error.located(rank=self.rank, group=self.name, step=collective.operation)
        message = self._message(collective, collective.operation, error=wire_error)
        if self.size > 1:
            try:
                self._publish_or_submit(message)
            except (SymmemError, RuntimeError, OSError) as unsent:
                log.warning("could not tell the group of %s: %s", wire_error, unsent)
        return wire_error

    def _message(
        self,
        collective: Collective,
        step: str,
        contributions: Sequence[Contribution] = (),
        error: SymmemError | None = None,
    ) -> Message:
        self._sequence += 1
        wired = to_wire(error) if error else None
        return Message(self._sequence, step, collective.deadline, list(contributions), wired)

    @functools.cached_property
    def _store_wire(self) -> StoreWire:
        # A worker group that torchrun restarted must not see keys of the one before.
        job = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        # How many groups of this name have met on this store: counted at the first collective, not when the group is
        # made, which a single rank may do; and by the store, for this process may have met others elsewhere.
        key = f"symmem/{job}/{self.name}/met/{self.rank}"
        generation = within(time.monotonic() + 10.0, self._store.add, key, 1)
        return StoreWire(self._store, f"symmem/{job}/{self.name}/{generation}", self.rank, self.size)

    @property
    def _wire(self) -> Wire:
        return self._socket_wire or self._store_wire

    def _publish_or_submit(self, message: Message) -> None:
        if self.rank == 0:
            self._wire.publish(message)
        else:
            self._wire.submit(message)

    def _round(self, collective: Collective, step: str, contribution: Contribution) -> Received:
        """Exchange contributions; every error raised from here is known to all ranks (:class:`_Agreed`)."""
        if self.closed:  # meanwhile
            raise GroupError(f"the group {self.name!r} is closed", rank=self.rank, step=collective.operation)
        message = self._message(collective, f"{collective.operation}: {step}", [contribution])
        if self.size == 1:
            return Received([Contribution(contribution.payload, duplicate(contribution.descriptors))])
        self._waiting = message.step, message.sequence, time.monotonic(), message.deadline
        try:
            verdict = (self._lead if self.rank == 0 else self._follow)(message, collective)
        finally:
            self._waiting = None
        if verdict.error:
            verdict.close()
            raise _Agreed(from_wire(verdict.error))
        return Received(verdict.contributions)

    def _lead(self, message: Message, collective: Collective) -> Message:
        try:
            messages = self._wire.collect(message.sequence, collective.deadline)
        except BaseException as error:
            named = _named(error)
            self._explain(named, message, collective)
            verdict = self._publish(message, error=named)
            if isinstance(error, Exception):
                return verdict
            collective.told = True  # an interrupt goes on here, as itself
            raise
        try:
            wrong = _judge({0: message} | messages)
            if wrong is not None:
                wrong.located(rank=self.rank, group=self.name, step=message.step)
                return self._publish(message, error=wrong)
            everything = [messages[rank].contributions[0] for rank in range(1, self.size)]
            try:
                verdict = self._publish(message, [*message.contributions, *everything])
            except BaseException as error:
                # Who has the verdict drops this, and learns it in the round that is next.
                with contextlib.suppress(SymmemError, RuntimeError, OSError):
                    self._publish(message, error=_named(error))
                raise
            # The leader's own descriptors stay the caller's; what it returns must be closed by the receiver.
            own = duplicate(message.descriptors())
            verdict.contributions[0] = Contribution(message.contributions[0].payload, own)
            messages = {}
            return verdict
        finally:
            for unused in messages.values():
                unused.close()

    def _publish(
        self, message: Message, contributions: Sequence[Contribution] = (), error: SymmemError | None = None
    ) -> Message:
        verdict = Message(
            message.sequence,
            message.step,
            message.deadline,
            list(contributions),
            to_wire(error) if error else None,
        )
        self._wire.publish(verdict)
        return verdict

    def _follow(self, message: Message, collective: Collective) -> Message:
        try:
            self._wire.submit(message)
            return self._wire.verdict(message.sequence, collective.deadline + GRACE)
        except PeerTimeoutError as error:
            self._explain(error, message, collective)
            self._withdraw(message, error)
            raise _Agreed(error) from None
        except PeerLostError as error:
            reason = self._last_words(message.sequence) or error
            self._explain(reason, message, collective)
            raise _Agreed(reason) from reason.__cause__
        except SymmemError as error:
            # The verdict came and this rank could not take it: the others learn of that in the round that is next.
            self._explain(error, message, collective)
            raise
        except BaseException as error:  # an interrupt: this rank does not know how the round ends
            named = _named(error)
            self._explain(named, message, collective)
            self._withdraw(message, named)
            verdict = self._hear_out(message.sequence)
            if verdict is not None and verdict.error is None:
                raise  # too late: the others have passed this round, and learn of it in the one that is next
            if isinstance(error, Exception):
                raise _Agreed(from_wire(verdict.error) if verdict and verdict.error else named) from error
            collective.told = True
            raise

    def _withdraw(self, message: Message, error: SymmemError) -> None:
        """Take back what was submitted; rank 0 finds the error in its place, unless it has decided the round."""
        withdrawal = Message(message.sequence, message.step, message.deadline, error=to_wire(error))
        with contextlib.suppress(SymmemError, RuntimeError, OSError):
            self._wire.submit(withdrawal)

    def _hear_out(self, sequence: int) -> Message | None:
        """How a round ended that this rank has withdrawn from; None if rank 0 is gone, or has not come yet.

        In the latter case it will find the withdrawal, so either way all ranks go on with the same number.
        """
        with contextlib.suppress(SymmemError, RuntimeError, OSError):
            verdict = self._wire.verdict(sequence, time.monotonic() + GRACE)
            verdict.close()
            return verdict
        return None

    def _last_words(self, sequence: int) -> SymmemError | None:
        """Why rank 0 left amid the join, if it could tell: it had no sockets yet, thus by the store."""
        if self._places is None:
            with contextlib.suppress(SymmemError, RuntimeError):
                verdict = self._store_wire.verdict(sequence, time.monotonic() + GRACE)
                return from_wire(verdict.error) if verdict.error else None
        return None

    def _explain(self, error: SymmemError, message: Message, collective: Collective) -> None:
        """Complete an error of the wire with what only the group knows."""
        error.located(rank=self.rank, group=self.name, step=message.step)
        if isinstance(error, PeerTimeoutError) and not error.hint:
            error.what += f" (timeout {collective.timeout:g} s)"
            error.hint = (
                f"see what ranks {list(error.peers)} do; all ranks must make the same calls in the same order. "
                "If they are only slow, raise rendezvous_timeout"
            )

    # Who is where.

    def _join(self, collective: Collective) -> None:
        """On the first collective: tell each other who is where, and set up sockets if they can reach all."""
        if self.size == 1 or self._places is not None:
            return
        listener = scm.Listener(self.size) if self.rank == 0 else None
        with contextlib.ExitStack() as undo:
            if listener:
                undo.callback(listener.close)
            card = {"place": asdict(Place.here()), "welcome": asdict(listener.welcome) if listener else None}
            cards = [json.loads(c.payload) for c in self._round(collective, "join", Contribution(_dump(card)))]
            places = tuple(Place(**card["place"]) for card in cards)
            if len({(place.host, place.network) for place in places}) == 1:
                self._connect(collective, listener, scm.Welcome(**cards[0]["welcome"]))
                self._watch(self._exchange_own_process(collective))
                # So that either all ranks have sockets from here on, or none has.
                self._round(collective, "joined", Contribution(b""))
            self._places, self._identity = places, cards[0]["welcome"]["address"]
            if self.rank == 0 and self._socket_wire is not None:
                self._store_wire.forget(self._sequence)

    def _connect(self, collective: Collective, listener: scm.Listener | None, welcome: scm.Welcome) -> None:
        with contextlib.ExitStack() as undo:
            peers = {}
            if listener is None:
                with self._hearing_last_words():
                    peers = {0: scm.connect(welcome, self.rank, collective.deadline)}
                undo.callback(peers[0].close)
            # Once all agree that they are connected, the leader finds every rank in its queue.
            self._round(collective, "connect", Contribution(b""))
            if listener is not None:
                peers = listener.accept()
            self._socket_wire = SocketWire(peers)
            undo.pop_all()
        if listener is None:
            with self._hearing_last_words():
                scm.check_leader(peers[0], welcome, collective.deadline)

    @contextlib.contextmanager
    def _hearing_last_words(self) -> Iterator[None]:
        """If rank 0 is found to be gone within the block, raise what it told."""
        try:
            yield
        except PeerLostError as error:
            if reason := self._last_words(self._sequence + 1):
                self._sequence += 1  # as rank 0 did when it told
                raise _Agreed(reason) from error
            raise

    def _exchange_own_process(self, collective: Collective) -> Received:
        own = watch_process(os.getpid())
        try:
            return self._round(collective, "watch", Contribution(b"", () if own is None else (own,)))
        finally:
            if own is not None:
                os.close(own)

    def _watch(self, received: Received) -> None:
        """Take over the descriptors of all processes."""
        with self._watch_lock:
            for rank, contribution in enumerate(received):
                for descriptor in contribution.descriptors:
                    self._watched[descriptor] = rank
                    if rank != self.rank:
                        self._poll.register(descriptor, select.POLLIN)

    def lost(self) -> tuple[int, ...]:
        """Ranks whose process is known to have ended; only ranks of the same host are watched."""
        # Locked: threads may not share a poll object at a time, nor may what it polls be closed meanwhile.
        with self._watch_lock:
            return tuple(sorted(self._watched[descriptor] for descriptor, _event in self._poll.poll(0)))

    @property
    def _passes_descriptors(self) -> bool:
        return self._socket_wire is not None or self.size == 1

    def _require_descriptors(self) -> None:
        if self._passes_descriptors:
            return
        places = self._places or ()
        text, peers = differing([f"{place.name} (network namespace {place.network})" for place in places])
        if len({place.host for place in places}) > 1:
            text, peers = differing([f"host {place.name} ({place.host})" for place in places])
            hint = "choose a backend that spans hosts (`nvshmem`), or a group within one host"
        else:
            hint = (
                "the ranks are in different containers of one host: let them share the network namespace "
                "(docker: --network=host; Kubernetes: one pod), or choose a backend that spans hosts (`nvshmem`)"
            )
        raise RendezvousError(f"file descriptors cannot pass between all ranks: {text}", hint=hint, peers=peers)

    def status(self) -> dict[str, Any]:
        """What this rank of the group is at, as plain data. Local; waits for nobody, whatever other threads hold.

        Returns:
            ``name``, ``identity`` (the same on all ranks once they have met), ``rank``, ``size``, ``closed``, ``wire``
            (how the ranks meet: ``store`` or ``sockets``), ``rounds`` (how many this rank has begun), ``lost`` (ranks
            whose process has ended), ``operation`` (the collective operation under way: ``name``, ``seconds``,
            ``thread``; or None), ``round`` (where in it this rank waits: ``step``, ``number``, ``seconds``,
            ``seconds_left``, ``waits_for``; or None). ``waits_for`` is what this rank knows of it: the followers wait
            for rank 0, which gathers; and rank 0 knows whom it lacks, but over the store: then it is None.
        """
        now, under_way, waiting, wire = time.monotonic(), self._under_way, self._waiting, self._socket_wire
        operation = round_ = None
        if under_way is not None:
            operation = {"name": under_way[0], "seconds": now - under_way[1], "thread": under_way[2]}
        if waiting is not None:
            step, number, began, deadline = waiting
            known = [0] if self.rank else list(wire.awaited) if wire else None
            round_ = {"step": step, "number": number, "seconds": now - began, "seconds_left": deadline - now}
            round_["waits_for"] = known
        return {
            "name": self.name,
            "identity": self._identity,
            "rank": self.rank,
            "size": self.size,
            "closed": self.closed,
            "wire": "sockets" if wire else "store",
            "rounds": self._sequence,
            "lost": list(self.lost()),
            "operation": operation,
            "round": round_,
        }

    # Life.

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

    def _check_not_under_way(self, operation: str) -> None:
        if self._under_way is not None:
            raise GroupError(
                f"{operation!r} was begun amid {self._under_way[0]!r} of the same group, on the same thread",
                hint="make no collective call from a finalizer, a signal handler or another callback",
                rank=self.rank,
                group=self.name,
                step=operation,
            )

    def _leave(self) -> None:
        if self._socket_wire is not None:
            self._socket_wire.close()
            self._socket_wire = None

    def _disconnect(self) -> None:
        self._leave()
        with self._watch_lock:
            watched, self._watched, self._poll = self._watched, {}, select.poll()
            scm.close_all(tuple(watched))

    def close(self) -> None:
        """Leave the group; peers that still wait for this rank are told. Local; may be called again.

        A collective of another thread fails at once, and that thread gives up the connections. Memory that was
        mapped stays, and its barriers go on to notice the death of a rank: the descriptors that watch for it are
        closed when the last reference to the group is gone.
        """
        self.closed = True
        if wire := self._socket_wire:
            wire.leave()
        self._catch_up()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # a constructor that raised, or the end of the interpreter
            self._disconnect()


class _Agreed(Exception):  # not an error of its own: it carries one
    """An error that the other ranks know of already."""

    def __init__(self, error: SymmemError) -> None:
        super().__init__(error)
        self.error = error


def _named(error: BaseException) -> SymmemError:
    """The error of this vocabulary for one of another library or of the system."""
    if isinstance(error, SymmemError):
        return error
    if isinstance(error, RuntimeError) and (known := failure()):
        return known  # of CUDA, which says only that a kernel has stopped
    if isinstance(error, OSError) and is_limit(error):
        return limit_error(error, "a system call failed")
    if isinstance(error, MemoryError):
        return OutOfMemoryError("this process may have no more memory", hint="raise `ulimit -v`, or allocate less")
    return from_wire(to_wire(error))


def _dump(value: object) -> bytes:
    return json.dumps(value).encode()


def _judge(messages: dict[int, Message]) -> SymmemError | None:
    """What is wrong with a round, if anything; a rank's own failure counts before one that only waited."""
    errors = [from_wire(message.error) for _rank, message in sorted(messages.items()) if message.error]
    if errors:
        return next((error for error in errors if not isinstance(error, PeerTimeoutError)), errors[0])
    steps = [message.step for _rank, message in sorted(messages.items())]
    if len(set(steps)) == 1:
        return None
    text, peers = differing([f"{step!r}" for step in steps])
    return MismatchError(
        f"ranks are at different steps: {text}",
        hint="all ranks of a group must make the same collective calls in the same order",
        peers=peers,
    )


GroupLike: TypeAlias = "Group | ProcessGroup | DeviceMesh | str | None"
"""Whatever names a group; see :func:`resolve_group`."""


def resolve_group(group: GroupLike = None) -> Group:
    """The :class:`Group` of whatever names one; the same object each time. Local.

    Args:
        group: A Group, a process group or subgroup, the name of one, a one-dimensional DeviceMesh, or None for
            the default process group.

    Raises:
        GroupError: There is no such group, or this process is not in it, or the mesh has more dimensions.
    """
    if group is None and (known := default_group()):
        return known
    if isinstance(group, Group):
        return group
    process_group = _process_group(group)
    known = _by_process_group.get(process_group)
    if known is None or known.closed:
        from torch.distributed.distributed_c10d import _get_process_group_store

        rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
        store = _get_process_group_store(process_group)
        known = Group(store, rank, size, process_group.group_name, process_group)
        _by_process_group[process_group] = known
    return known


def known_groups() -> list[Group]:
    """All groups of this process that are in use. Local."""
    return sorted(_groups, key=lambda group: group.name)


_c10d: Any = dist.distributed_c10d if dist.is_available() else None
_default: tuple[weakref.ref[Any], weakref.ref[Group]] | None = None  # the default process group seen last, its group


def default_group() -> Group | None:
    """The :class:`Group` of the default process group; None if there is none. Local."""
    global _default
    process_group = _c10d._world.default_pg if _c10d else None  # dist.group.WORLD, in half the time
    if process_group is None:
        return None
    if _default is not None and _default[0]() is process_group:
        known = _default[1]()
        if known is not None and not known.closed:
            return known
    known = resolve_group(process_group)
    _default = weakref.ref(process_group), weakref.ref(known)
    return known


def _process_group(group: ProcessGroup | DeviceMesh | str | None) -> ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise GroupError(
            "torch.distributed is not initialised, so there is no process group",
            hint="call torch.distributed.init_process_group(), or pass symmem.Group.from_store(rank, size, store)",
        )
    if group is None:
        return dist.group.WORLD  # type: ignore[return-value]
    if isinstance(group, str):
        names = sorted(dist.distributed_c10d._world.pg_names.values())
        if group not in names:
            raise GroupError(f"there is no process group {group!r} here; there are {names}")
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
    if isinstance(group, dist.ProcessGroup):
        if group not in dist.distributed_c10d._world.pg_map:
            raise GroupError(
                "torch does not know the process group: it was destroyed, or made in another way than by "
                "torch.distributed.new_group()",
                hint="make it anew, and pass that",
            )
        if dist.get_rank(group) < 0:
            raise GroupError("this process is not a member of the group")
        return group
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
        raise GroupError("this process is not a member of the group", hint="call it on its members only")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise GroupError(
                f"a DeviceMesh of {group.ndim} dimensions is several groups",
                hint=f"pass one dimension, such as mesh[{(group.mesh_dim_names or ('name',))[0]!r}]",
            )
        return group.get_group()
    raise GroupError(
        f"{type(group).__name__} is not a group",
        hint="pass a process group, its name, a one-dimensional DeviceMesh, a symmem.Group, or None",
    )


def _leave_in_child() -> None:
    """A forked child closes its copies of the sockets; else the parent's death would not show at its peers."""
    for group in list(_groups):
        # The threads that held the locks at the fork are not there to release them.
        group._lock, group._watch_lock = threading.RLock(), threading.Lock()
        group._disconnect()


os.register_at_fork(after_in_child=_leave_in_child)
