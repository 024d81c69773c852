"""Agree or fail: the rounds in which the ranks of a group exchange contributions, or all raise the same error.

Rounds are numbered. In every round, all ranks submit a message or an error to rank 0. Rank 0 publishes either all
messages or one error (see :mod:`symmem.group.transports`).

A rank that fails outside an exchange submits its error to the next round, so the other ranks raise it at once. A rank
that runs out of time withdraws its message.

A rank that did not come in time may be late, or may have skipped the call. When it comes, it gets the error of that
round at once, and tells the others which call it made: the operation and the line. The next call of every rank that
waited in the round waits for that. If it is another call, the rank was late: all ranks go on. If it is the same call,
the rank may have skipped one: this call fails too, and all ranks make their next call together.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from symmem.backends.descriptors import Contribution, Received
from symmem.backends.kernel_status import failure
from symmem.backends.libc import duplicate, is_limit, limit_error
from symmem.errors import (
    GroupError,
    MismatchError,
    OutOfMemoryError,
    PeerLostError,
    PeerTimeoutError,
    SymmemError,
    from_wire,
    to_wire,
)
from symmem.group.call_site import CallSite, caller
from symmem.group.compare import SAME_CALLS, called_at, differing
from symmem.group.interrupts import held_back
from symmem.group.ledger import Ledger
from symmem.group.locations import Places
from symmem.group.presence import Presence
from symmem.group.transports import Message, NotComingError, SocketTransport, StoreTransport, Transport, within

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from symmem.backends.base import RankGroup
    from symmem.group.sync_points import SyncPoints

__all__ = ["AgreedError", "CollectiveOperation", "Rounds", "as_symmem_error"]

log = logging.getLogger("symmem.group")

_NOTHING = Contribution(b"")

Decide: TypeAlias = "Callable[[list[bytes]], bytes]"
"""Makes one answer of the payloads of all ranks."""


def _ignore(payloads: list[bytes]) -> bytes:
    return b""


_BACK_IN_STEP = "back in step"  # the step of the round after a round that was given up for a late rank

GRACE = 0.5
"""Seconds that a rank waits for rank 0's verdict after its own timeout, so that all ranks raise the same error."""


_text_of: Callable[[CallSite], str] = functools.lru_cache(1024)(str)


class CollectiveOperation:
    """A collective operation in progress; :meth:`Group.collective` makes it.

    Attributes:
        group: The group.
        name: The name of the operation.
        timeout: Seconds for the whole operation.
        deadline: The end of that time, by ``time.monotonic()``.
        propagated: Whether the other ranks know the error that this rank is about to raise.
        is_agreeing: Whether this rank has done its part. If it fails from now on, other ranks may have succeeded.
        half_done: Called with the error in that case. It returns what the others raise in their next round instead.
    """

    def __init__(self, group: RankGroup, rounds: Rounds, name: str, timeout: float) -> None:
        self.group, self.name, self.timeout = group, name, timeout
        self.deadline = time.monotonic() + timeout
        self._site = caller(sys._getframe(1))
        self.propagated = self.is_agreeing = False
        self.half_done: Callable[[BaseException], SymmemError] | None = None
        self._rounds = rounds

    @functools.cached_property
    def line(self) -> str:
        """The line of the program that called the operation."""
        return _text_of(self._site)

    @property
    def call(self) -> bytes:
        """The operation and the line, to compare them with the calls of other ranks."""
        return f"{self.name} at {self.line}".encode()

    @property
    def serial(self) -> int:
        """How many rounds the group has begun; the same on all ranks."""
        return self._rounds.number

    @property
    def passes_descriptors(self) -> bool:
        """See :attr:`symmem.backends.base.Collective.passes_descriptors`."""
        return self._rounds.passes_descriptors

    def exchange(self, step: str, payload: bytes = b"", descriptors: Sequence[int] = ()) -> Received:
        """See :meth:`symmem.backends.base.Collective.exchange`."""
        if descriptors and not self.passes_descriptors:
            raise self._rounds.places.not_connectable()
        return self._rounds.exchange(self, step, Contribution(payload, tuple(descriptors)))


class Rounds:
    """The rounds of one group.

    Args:
        store: The store that all ranks share; it carries the messages until the ranks have joined.
        rank: This process's rank.
        size: Number of ranks.
        name: The group's name.
        lost_elsewhere: See :class:`symmem.group.presence.Presence`.

    Attributes:
        presence: The processes of the ranks, until they have joined.
        number: How many rounds this rank has begun; the same on all ranks.
        waiting: The round that this rank waits in: step, number, start, deadline. Else None.
        joined: Whether the ranks know each other's locations; see :mod:`symmem.group.join`.
        places: Where the ranks run, once they have joined.
        identity: A text that is the same on all ranks, once they have joined, and different for every group.
        sockets: The sockets between the ranks; None if messages go over the store.
        ledger: The acts of all ranks; None unless descriptors can pass between all of them.
        sync_points: The synchronisation points in the ledger.
        closed: Whether this rank has left the group.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        name: str,
        lost_elsewhere: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        self._store, self._rank, self._size, self._name = store, rank, size, name
        # A worker group that torchrun restarted must not see the keys of its predecessor.
        job = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self._prefix = f"symmem/{job}/{name}"
        self.presence = Presence(store, self._prefix, rank, size, lost_elsewhere)
        self._generation, self._coming = 0, threading.Lock()
        self.number = 0
        self._sent = 0  # the last round to which this rank has sent something
        self._reported = 0  # the last round to which this rank has sent an error without waiting for the outcome
        self._late: tuple[int, ...] = ()  # the ranks for which the last round was given up, if this rank waited in it
        self.waiting: tuple[str, int, float, float] | None = None
        self.joined = size == 1
        self.places = Places((0,) * size)
        self.identity: str | None = None
        self.sockets: SocketTransport | None = None
        self.ledger: Ledger | None = None
        self.sync_points: SyncPoints | None = None
        self.closed = False

    @functools.cached_property
    def store(self) -> StoreTransport:
        """The transport over the store."""
        # The store counts the groups of this name at their first collective. Making a group does not count, because a
        # single rank may do that. This process cannot count, because it may have used other stores.
        generation = within(time.monotonic() + 10.0, self._come)
        return StoreTransport(self._store, f"{self._prefix}/{generation}", self._rank, self._size, self.presence.check)

    def _come(self) -> int:
        with self._coming:  # the thread of an interrupted call may still be at it
            if not self._generation:
                self._generation = self._store.add(f"{self._prefix}/met/{self._rank}", 1)
            self.presence.come(self._generation)
            return self._generation

    @property
    def transport(self) -> Transport:
        """The transport of the next round."""
        return self.sockets or self.store

    @property
    def passes_descriptors(self) -> bool:
        """Whether descriptors can pass between all ranks."""
        return self.sockets is not None or self._size == 1

    def disconnect(self) -> None:
        """Close the sockets, stop watching processes, and release the ledger."""
        self.presence.close()
        if self.sync_points is not None:
            self.sync_points.leave()
        self.ledger = self.sync_points = None
        if self.sockets is not None:
            self.sockets.close()
            self.sockets = None

    @contextlib.contextmanager
    def operation(self, group: RankGroup, name: str, timeout: float) -> Iterator[CollectiveOperation]:
        """Run a block as a collective operation: at its end all ranks agree, or raise the same error."""
        operation = CollectiveOperation(group, self, name, timeout)
        before = self.number
        try:
            if self._reported:
                self._follow_report(operation)
            if self._late:
                self._get_back_in_step(operation)
            yield operation
            operation.is_agreeing = True
            self.settle(operation, "agree")
        except AgreedError as agreed:
            agreed.error.propagated_to = self._name
            raise agreed.error from agreed.__cause__
        except BaseException as error:
            if operation.propagated:
                local = as_symmem_error(error)
            elif operation.is_agreeing and operation.half_done is not None:
                local = self.report(operation, operation.half_done(error))
            else:
                local = self.report(operation, error)
            local.propagated_to = error.propagated_to = self._name  # type: ignore[attr-defined]  # not to report it twice
            if local is error or not isinstance(error, Exception):
                raise
            raise local from error
        finally:
            log.debug(
                "%s: rank %d of group %r, rounds %d to %d, %.3f ms",
                *(name, self._rank, self._name, before, self.number),
                (time.monotonic() - operation.deadline + timeout) * 1e3,
            )

    def report(self, operation: CollectiveOperation, error: BaseException) -> SymmemError:
        """Submit an error instead of a contribution; returns the error that the other ranks raise."""
        reported = as_symmem_error(error)
        reported.located(rank=self._rank, group=self._name, step=operation.name)
        self.number = self._sent  # an interrupt may have come before this rank took part in a round that it began
        self._skip_given_up(operation)
        message = self._message(operation, operation.name, error=reported)
        self._sent = self._reported = message.sequence
        self._late = ()
        if self._size > 1:
            try:
                if self._rank == 0:
                    self.transport.publish(message)
                else:
                    self.transport.submit(message)
            except (SymmemError, RuntimeError, OSError) as unsent:
                log.warning("could not send this error to the group: %s; because: %s", reported, unsent)
        return reported

    def _skip_given_up(self, operation: CollectiveOperation) -> None:
        """Go on to the round in which the others get back in step, if they gave up the next one for this rank.

        Does not wait.
        """
        given_up = self._size > 1
        while given_up:
            sequence, now = self.number + 1, time.monotonic()
            found: dict[int, Message] = {}
            with contextlib.suppress(SymmemError, RuntimeError, OSError):
                if self._rank:
                    found[0] = self.transport.verdict(sequence, now)
                else:  # collect() returns after an error, although there may be more messages
                    for _ in range(self._size):
                        found |= self.transport.collect(sequence, now)
            for each in found.values():
                each.close()
            given_up = any(self._rank in each.late for each in found.values())
            if given_up:
                message = self._message(operation, operation.name)
                if self._rank == 0:  # the others that did not wait in the round look for its verdict
                    waited = {rank: each.error for rank, each in found.items() if each.late}
                    late, since = set(range(self._size)) - waited.keys(), _given_up(found.values())
                    with contextlib.suppress(SymmemError, RuntimeError, OSError):
                        self.transport.publish(message.replace((), next(iter(waited.values())), late, since))

    def _follow_report(self, operation: CollectiveOperation) -> None:
        """If the others had given up the round of this rank's last report, take part in the next one. Does not wait."""
        reported, self._reported = self._reported, 0
        if self._rank and reported == self._sent:
            with contextlib.suppress(SymmemError, RuntimeError, OSError):
                verdict = self.transport.verdict(reported, time.monotonic())
                verdict.close()
                if self._rank in verdict.late:
                    self._catch_up(operation)

    def exchange(self, operation: CollectiveOperation, step: str, contribution: Contribution = _NOTHING) -> Received:
        """Exchange contributions.

        Raises:
            AgreedError: An error that all ranks know.
        """
        message = self._begin(operation, step, contribution)
        if self._size == 1:
            return Received([Contribution(contribution.payload, duplicate(contribution.descriptors))])
        return self._exchange(operation, message)

    def settle(
        self, operation: CollectiveOperation, step: str, payload: bytes = b"", decide: Decide = _ignore
    ) -> bytes:
        """Let rank 0 alone read the payloads of all ranks; returns its answer, the same on all ranks.

        So the bytes of the round grow linearly with the group, if the answer is short.

        Args:
            operation: The operation in progress.
            step: The name of the step.
            payload: What rank 0 gets.
            decide: Makes the answer from all payloads, in rank order. Only rank 0 calls it, and all ranks raise its
                SymmemError.

        Raises:
            AgreedError: An error that all ranks know.
        """
        message = self._begin(operation, step, Contribution(payload))
        if self._size == 1:
            return decide([payload])
        with self._exchange(operation, message, decide) as received:
            return received[0].payload

    def _begin(self, operation: CollectiveOperation, step: str, contribution: Contribution) -> Message:
        if self.closed:  # by another thread
            raise GroupError(f"the group {self._name!r} is closed", rank=self._rank, step=operation.name)
        message = self._message(operation, f"{operation.name}: {step}", [contribution])
        if self._size == 1:
            self._sent = message.sequence
        return message

    def _exchange(self, operation: CollectiveOperation, message: Message, decide: Decide | None = None) -> Received:
        self.waiting = message.step, message.sequence, time.monotonic(), message.deadline
        began = time.time()
        end, ledger = None, self.ledger  # another thread may close the group
        if ledger is not None:
            end = ledger.show_wait(f"{message.step} at {operation.line}", message.deadline, message.sequence)
        try:
            verdict = self._follow(message, operation) if self._rank else self._lead(message, operation, decide)
        finally:
            self.waiting = None
            if end is not None:
                end()
        if ledger is not None:
            ledger.passed = message.sequence
        if verdict.error:
            verdict.close()
            # On one host, all ranks have the same wall clock. So a rank knows that others gave up before it came.
            if self._rank in verdict.late or (verdict.late and self.sockets and began > verdict.given_up):
                self._catch_up(operation)
            else:
                self._late = verdict.late
            raise AgreedError(from_wire(verdict.error))
        if verdict.step == _BACK_IN_STEP != message.step:  # from rank 0, which catches up
            raise self._skipped((0,), operation)
        return Received(verdict.contributions)

    def _get_back_in_step(self, operation: CollectiveOperation) -> None:
        """Wait for the ranks for which the last round was given up.

        Raises:
            AgreedError: They make the same call as this rank, so they may have skipped one.
        """
        late, self._late = self._late, ()
        message = self._message(operation, _BACK_IN_STEP, [Contribution(operation.call)])
        with self._exchange(operation, message) as received:
            calls = [contribution.payload for contribution in received]
        # The lines may differ by rank, so all ranks look at all calls. A late rank 0 does not wait for the others'.
        waited = {operation.call} if 0 in late else {calls[rank] for rank in range(self._size) if rank not in late}
        if any(calls[rank] in waited for rank in late):
            raise self._skipped(late, operation)

    def _skipped(self, late: tuple[int, ...], operation: CollectiveOperation) -> AgreedError:
        error = PeerTimeoutError(
            f"ranks {list(late)} did not come to the last call in time. They have come now, so the next call works",
            hint=f"find out why ranks {list(late)} were late or skipped a call; {SAME_CALLS}",
            peers=late,
        )
        error.located(rank=self._rank, group=self._name, step=operation.name)
        return AgreedError(error)

    def _catch_up(self, operation: CollectiveOperation) -> None:
        """Take part in the next rounds of the others, who gave up a round because of this rank. Does not wait."""
        gave_up = True
        while gave_up:  # this round too
            call = Contribution(operation.call)
            message, now = self._message(operation, _BACK_IN_STEP, [call] * self._size), time.monotonic()
            found: list[Message] = []
            with contextlib.suppress(SymmemError, RuntimeError, OSError):
                if self._rank == 0:
                    found += self.transport.collect(message.sequence, now).values()
                else:
                    found.append(self.transport.verdict(message.sequence, now))
            for each in found:
                each.close()
            gave_up = any(self._rank in each.late for each in found)
            own_error = next((each.error for each in found if each.error and not each.late), None)
            self._sent = message.sequence
            with contextlib.suppress(SymmemError, RuntimeError, OSError):
                if self._rank == 0:
                    self.transport.publish(message.replace((), own_error) if own_error else message)
                elif not found:
                    self.transport.submit(message.replace([call], None))

    def _message(
        self,
        operation: CollectiveOperation,
        step: str,
        contributions: Sequence[Contribution] = (),
        error: SymmemError | None = None,
    ) -> Message:
        self.number += 1
        return Message(
            self.number,
            step,
            operation.deadline,
            list(contributions),
            error=to_wire(error) if error else None,
            line=operation.line,
        )

    # Rank 0.

    def _lead(self, message: Message, operation: CollectiveOperation, decide: Decide | None) -> Message:
        try:
            self._sent = message.sequence
            messages = self.transport.collect(message.sequence, operation.deadline)
        except BaseException as error:
            reason = as_symmem_error(error)
            self._complete(reason, message, operation)
            late = error.peers if isinstance(error, PeerTimeoutError) else ()
            verdict = self._publish(message, error=reason, late=late, given_up=time.time())
            if isinstance(error, Exception):
                return verdict
            operation.propagated = True  # an interrupt keeps its type on this rank
            raise
        try:
            wrong = _judge({0: message} | messages)
            if wrong is None:
                contributions = [*message.contributions, *(messages[r].contributions[0] for r in range(1, self._size))]
                if decide is not None:
                    try:
                        contributions = [Contribution(decide([each.payload for each in contributions]))]
                    except SymmemError as error:
                        wrong = error
            if wrong is not None:
                wrong.located(rank=self._rank, group=self._name, step=message.step)
                late = tuple({rank for each in messages.values() for rank in each.late})
                return self._publish(message, error=wrong, late=late, given_up=_given_up(messages.values()))
            is_published = False
            try:
                with held_back():  # all ranks get the verdict, or none
                    verdict = self._publish(message, contributions)
                    is_published = True
            except BaseException as error:
                # A rank that already has the verdict drops this message. It gets the error in the next round.
                with contextlib.suppress(SymmemError, RuntimeError, OSError):
                    self._publish(message, error=as_symmem_error(error))
                operation.propagated = not is_published and not isinstance(error, Exception)
                raise
            # The caller keeps its own descriptors; the receiver must close the returned ones.
            own = duplicate(message.descriptors())
            verdict.contributions[0] = Contribution(contributions[0].payload, own)
            messages = {}
            return verdict
        finally:
            for unused in messages.values():
                unused.close()

    def _publish(
        self,
        message: Message,
        contributions: Sequence[Contribution] = (),
        error: SymmemError | None = None,
        late: Iterable[int] = (),
        given_up: float = 0.0,
    ) -> Message:
        verdict = message.replace(contributions, to_wire(error) if error else None, late, given_up)
        self.transport.publish(verdict)
        return verdict

    # The other ranks.

    def _follow(self, message: Message, operation: CollectiveOperation) -> Message:
        try:
            self._sent = message.sequence
            self.transport.submit(message)
            return self.transport.verdict(message.sequence, operation.deadline + GRACE)
        except PeerTimeoutError as error:
            self._complete(error, message, operation)
            self._withdraw(message, error, error.peers)
            self._late = error.peers
            raise AgreedError(error) from None
        except NotComingError as error:
            self._complete(error.error, message, operation)
            self._withdraw(message, error.error)
            raise AgreedError(error.error) from None
        except PeerLostError as error:
            reason = self.last_words(message.sequence) or error
            self._complete(reason, message, operation)
            raise AgreedError(reason) from reason.__cause__
        except SymmemError as error:
            # This rank could not read the verdict. The others get the error in the next round.
            self._complete(error, message, operation)
            raise
        except BaseException as error:  # an interrupt: the outcome of the round is unknown here
            reason = as_symmem_error(error)
            self._complete(reason, message, operation)
            self._withdraw(message, reason)
            verdict = self._outcome(message.sequence)
            if verdict is not None and verdict.error is None:
                raise  # the others have passed this round; they get the error in the next one
            if isinstance(error, Exception):
                raise AgreedError(from_wire(verdict.error) if verdict and verdict.error else reason) from error
            operation.propagated = True
            raise

    def _withdraw(self, message: Message, error: SymmemError, late: Iterable[int] = ()) -> None:
        """Replace a submitted message by an error. Too late if rank 0 has decided the round."""
        with contextlib.suppress(SymmemError, RuntimeError, OSError):
            self.transport.submit(message.replace((), to_wire(error), late, time.time()))

    def _outcome(self, sequence: int) -> Message | None:
        """Return the verdict on a round from which this rank has withdrawn; None if rank 0 is gone or late.

        A late rank 0 finds the withdrawal. So all ranks continue with the same round number.
        """
        with contextlib.suppress(SymmemError, RuntimeError, OSError):
            verdict = self.transport.verdict(sequence, time.monotonic() + GRACE)
            verdict.close()
            return verdict
        return None

    def last_words(self, sequence: int) -> SymmemError | None:
        """Return the error that rank 0 published to the store before it left during the join, if any."""
        if not self.joined:
            with contextlib.suppress(SymmemError, RuntimeError):
                verdict = self.store.verdict(sequence, time.monotonic() + GRACE)
                return from_wire(verdict.error) if verdict.error else None
        return None

    def _complete(self, error: SymmemError, message: Message, operation: CollectiveOperation) -> None:
        """Add the facts to a transport's error that only the group knows."""
        error.located(rank=self._rank, group=self._name, step=message.step)
        if isinstance(error, PeerTimeoutError) and not error.hint:
            error.what += f" (timeout {operation.timeout:g} s)"
            if self.ledger is not None:
                waits = self.ledger.waits_of(error.peers)
                error.what += "".join(f"; rank {rank} waits in {text}" for rank, text in waits.items())
            error.hint = (
                f"see what ranks {list(error.peers)} do; {SAME_CALLS}. If they are only slow, raise rendezvous_timeout"
            )


class AgreedError(Exception):
    """Carries an error that the other ranks already know."""

    def __init__(self, error: SymmemError) -> None:
        super().__init__(error)
        self.error = error


def as_symmem_error(error: BaseException) -> SymmemError:
    """Convert an error of another library or of the system to the vocabulary of :mod:`symmem.errors`."""
    if isinstance(error, SymmemError):
        return error
    if isinstance(error, NotComingError):
        return error.error
    if isinstance(error, RuntimeError) and (known := failure()):
        return known  # CUDA itself says only that a kernel has stopped
    if isinstance(error, OSError) and is_limit(error):
        return limit_error(error, "a system call failed")
    if isinstance(error, MemoryError):
        return OutOfMemoryError("this process may have no more memory", hint="raise `ulimit -v`, or allocate less")
    return from_wire(to_wire(error))


def _given_up(messages: Iterable[Message]) -> float:
    """When the first rank gave up the round of these messages, by the wall clock."""
    return min((each.given_up for each in messages if each.late), default=0.0)


def _judge(messages: dict[int, Message]) -> SymmemError | None:
    """Return the error of a round, if any. A rank's own failure takes precedence over a timeout."""
    errors = [from_wire(message.error) for _rank, message in sorted(messages.items()) if message.error]
    if errors:
        return next((error for error in errors if not isinstance(error, PeerTimeoutError)), errors[0])
    # In the join, ranks compare their operations after the settings that decide about them.
    steps = ["join" if message.step.endswith(": join") else message.step for _rank, message in sorted(messages.items())]
    if len(set(steps)) == 1:
        return None
    text, peers = differing([f"{step!r}" for step in steps])
    lines = called_at([message.line for _rank, message in sorted(messages.items())])
    return MismatchError(f"ranks are at different steps: {text}{lines}", hint=SAME_CALLS, peers=peers)
