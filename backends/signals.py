"""Signals between processes of one host: words in shared memory, and futexes to sleep on.

A rank's pad holds uint32 words, all 0 at first::

    flag[channel, source]    1 while a signal from `source` has not been taken; `source` sets it, the owner clears it
    arrived[channel]         number of barriers on this channel that the owner has reached, modulo 2**32
    marks[parity, channel]   for the owner's latest barrier of that parity: why the owner gave it up (3 bits), the rank
                             that caused it (13 bits), and how many calls of the owner have failed in it (16 bits)

A word has one writer at a time: the value of a flag says which side may write it. So no atomic read-modify-write is
needed, only aligned 32-bit stores, a fence between data and word, and futex(2). A futex compares the word and sleeps
in one step, so no wake-up is lost.

A barrier is one store and world - 1 loads per rank (all-to-all, one round). It counts instead of setting and clearing,
so a rank may enter the next barrier while others still read the words of this one.

**Giving up.** A barrier is given up by all ranks or by none. A rank that wants to give up, because of a timeout or an
interrupt, sets its mark to `DOUBT` and then looks once more whether all ranks have arrived. If so, it withdraws the
mark: all ranks pass. If not, it sets its mark to the reason. A rank that has arrived looks at the marks. Because both
sides store before they load, the rank that is late finds the mark.

**Back in step.** A barrier that was given up stays the barrier of all later calls, until all ranks have arrived at it.
Every call that fails meanwhile is counted, in the same store that gives the barrier up. Once all ranks have arrived, no
count changes any more. So every rank finds the same number of calls that must fail on all ranks: the largest count, and
one more if a rank was late, because that rank has to raise too. A rank raises until it has made so many calls, and then
goes to the next barrier, as do all others. A rank that comes late joins the others, because nobody can know whether it
is late or has skipped calls: its call is the last one that must fail if all ranks have come, else the latest that
failed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from symmem.backends import pending_waits
from symmem.backends.base import SIGNAL_CHANNELS, RankGroup
from symmem.backends.libc import fence, full_fence, futex_wait, futex_wake
from symmem.errors import PeerLostError, PeerTimeoutError, RendezvousError, SymmemError

if TYPE_CHECKING:
    from symmem.backends.pending_waits import Wait

__all__ = ["SharedSignals"]

# Seconds of loads, with a yield after every load, before it sleeps: as long as a sleep and its end take on a virtual
# machine. If ranks that call one operation after the other fell asleep once, each would wake too late for the other.
_AWAKE = 100e-6
_NAP = 0.05  # seconds between two checks that the awaited process is alive

_DOUBT, _LATE, _INTERRUPTED, _REFUSED = 1, 2, 3, 4  # the reason in a mark
_LONGEST_DOUBT = 2.0  # seconds; a running process needs microseconds

_REASON, _CAUSED_BY, _COUNT = 0x7, 3, 16  # of a mark: bits of the reason; shifts of the rank and of the failed calls

_AFTER_TIMEOUT = "the next call of the ranks that waited fails too, and then all go on together"


class SharedSignals:
    """Signal pads of all ranks, mapped into this process.

    Args:
        group: Gives the rank, size, name and lost ranks.
        pads: Address of every rank's pad.
        owner: The object that keeps the pads mapped. It is kept alive.
        purpose: Returns the name of the operation that a wait is part of, if it is not just a signal.
        refusal: ``refusal(rank, number)`` returns the error with which a rank has refused barrier ``number``.

    Attributes:
        stopped: If this returns true, waits end early, as if they had timed out. The caller knows the reason.
        told: The error with which all ranks have left their last wait, if they have.
    """

    def __init__(
        self,
        group: RankGroup,
        pads: Sequence[int],
        owner: object,
        purpose: Callable[[], str] | None = None,
        refusal: Callable[[int, int], SymmemError] | None = None,
    ) -> None:
        self._group = group
        self._owner, self._purpose, self._refusal = owner, purpose, refusal
        self.stopped: Callable[[], bool] = bool
        self.told: SymmemError | None = None
        self._rank, size = group.rank, group.size
        assert size <= 1 << 13, "a mark has 13 bits for a rank"
        words = SIGNAL_CHANNELS * (size + 3)
        self._pads = tuple(pads)
        self._words = [(ctypes.c_uint32 * words).from_address(pad) for pad in pads]
        self._arrived = SIGNAL_CHANNELS * size
        self._marks = SIGNAL_CHANNELS * (size + 1)
        self._peers = [(self._rank + i) % size for i in range(1, size)]
        # Numbers of barriers that this rank has arrived at, but perhaps not all others, by channel.
        self._unfinished: dict[int, int] = {}
        # How many more calls must fail in such a barrier, by channel, if all ranks have arrived.
        self._behind: dict[int, int] = {}
        self._joined: set[int] = set()  # channels in which this rank came late with the call in progress
        self._quick: dict[int, Callable[[], bool]] = {}  # barriers in C, by channel

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes of one pad in a group of ``size`` ranks."""
        return 4 * SIGNAL_CHANNELS * (size + 3)

    def signal_pad(self, rank: int) -> tuple[int, int]:
        """See :meth:`Mapping.signal_pad`. The words behind the flags are private."""
        return self._pads[rank], 4 * SIGNAL_CHANNELS * self._group.size

    def quicken(self, channel: int, module: Any) -> None:
        """Use C for the barriers of a channel, as long as nothing goes wrong.

        Args:
            channel: The channel.
            module: The result of :func:`symmem.native.module`.
        """
        made = module.Barrier(
            pads=self._pads,
            rank=self._rank,
            arrived=self._arrived + channel,
            marks=(self._mark_at(channel, 0), self._mark_at(channel, 1)),
            unfinished=self._unfinished,
            channel=channel,
            awake=_AWAKE,
        )
        self._quick[channel] = made.meet

    def check(self) -> None:
        """See :meth:`Mapping.check`. Nothing to do: a signal on the host fails in its call."""

    def barrier(self, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.barrier`."""
        deadline = time.monotonic() + timeout
        if channel in self._unfinished:
            self.prepare(channel, timeout)
        if channel not in self._quick or self._behind or self._joined:
            self._arrive(channel)
        elif self._quick[channel]():
            return
        missing = self._is_missing(channel)
        if not missing:
            fence()
        error = self._given_up(channel)
        if error is not None:
            self._join(channel)
        if missing and (error is None or self._late(channel) is not None):
            told = self._wait_for_all(channel, deadline, heeds_marks=error is None)
            error = error or told or self._given_up(channel)
        if error is None:
            self._leave(channel)
            return
        self._fail(channel)
        raise error

    def prepare(self, channel: int, timeout: float) -> None:
        """Wait for a barrier that this rank has left early, so that it may arrive at the next one.

        Raises:
            PeerTimeoutError, PeerLostError: The barrier was given up for a rank that was late. Every rank that waited
                in it raises here, as soon as all ranks have arrived, and again after another timeout.
            RendezvousError: The barrier was interrupted, and other ranks have made more calls in it.
        """
        if self._unfinished.get(channel) != self.number(channel):
            return  # also if this rank was interrupted just before it arrived
        if (mark := self._mark(self._rank, channel)) & _REASON == _DOUBT:  # an exception came in between
            self._set_mark(channel, self.number(channel), mark & ~_REASON)
        if channel not in self._behind:
            self._wait_for_all(channel, time.monotonic() + timeout, heeds_marks=False)
        if not self._must_fail(channel):
            self._leave(channel)
            return
        error: SymmemError | None
        if (late := self._late(channel)) is None:
            error = self._given_up(channel) or self._error_of(self._rank, self._mark(self._rank, channel), channel)
        else:
            error = PeerTimeoutError(
                f"rank {late} did not come to the last barrier on this channel in time. It has come now, so the next "
                "call works",
                hint=f"find out why rank {late} was late or skipped a call; {_AFTER_TIMEOUT}",
                peers=(late,),
            )
        self._fail(channel)
        raise error.located(rank=self._rank, group=self._group.name, step=f"barrier on channel {channel}")

    def refuse(self, channel: int, timeout: float) -> None:
        """Arrive at the next barrier, in which all other ranks raise this rank's error. Does not wait for it."""
        self.prepare(channel, timeout)
        self._arrive(channel, _REFUSED | self._rank << _CAUSED_BY)
        self._join(channel)
        self._fail(channel)

    def is_unfinished(self, channel: int) -> bool:
        """Whether this rank has left the last barrier of a channel, perhaps before all others had arrived."""
        return channel in self._unfinished

    def is_given_up(self, channel: int) -> bool:
        """Whether the last barrier of a channel that this rank has arrived at was given up by all ranks."""
        return bool(self._mark(self._rank, channel)) or self._given_up(channel) is not None

    def number(self, channel: int) -> int:
        """How many barriers of a channel this rank has arrived at, modulo 2**32."""
        number: int = self._words[self._rank][self._arrived + channel]
        return number

    def _mark(self, rank: int, channel: int) -> int:
        """The mark of a rank for barriers of the parity of this rank's latest one."""
        word: int = self._words[rank][self._mark_at(channel, self.number(channel))]
        return word

    def _mark_at(self, channel: int, number: int) -> int:
        return self._marks + (number & 1) * SIGNAL_CHANNELS + channel

    def _set_mark(self, channel: int, number: int, mark: int) -> None:
        self._words[self._rank][self._mark_at(channel, number)] = mark

    def _arrive(self, channel: int, mark: int = 0) -> None:
        at, own = self._arrived + channel, self._words[self._rank]
        number = (own[at] + 1) & 0xFFFFFFFF
        self._set_mark(channel, number, mark)
        self._unfinished[channel] = number
        fence()
        own[at] = number
        futex_wake(self._pads[self._rank] + 4 * at)  # the kernel makes a full fence in it

    def _is_missing(self, channel: int) -> bool:
        """Whether a peer has not arrived at this rank's latest barrier."""
        at = self._arrived + channel
        target = self._words[self._rank][at]
        for peer in self._peers:  # noqa: SIM110 (a generator takes longer)
            if (self._words[peer][at] - target) & 0x80000000:
                return True
        return False

    def _wait_for_all(self, channel: int, deadline: float, heeds_marks: bool = True) -> SymmemError | None:
        """Wait until all ranks have arrived. If this fails, give up the barrier, unless they have arrived meanwhile.

        Args:
            channel: The channel.
            deadline: The end of the wait.
            heeds_marks: Whether to return the error of a peer that gives up the barrier.
        """
        at = self._arrived + channel
        target = self._words[self._rank][at]
        try:
            for peer in self._peers:
                if (self._words[peer][at] - target) & 0x80000000:
                    error = self._wait(
                        peer,
                        at,
                        lambda word: (word - target) & 0x80000000 == 0,
                        peer,
                        deadline,
                        f"barrier on channel {channel}",
                        channel,
                        leaves=heeds_marks,
                    )
                    if error is not None:
                        return error
        except (PeerLostError, PeerTimeoutError) as late:
            if self._give_up(channel, _LATE | late.peers[0] << _CAUSED_BY):
                raise
        except BaseException as error:
            interrupted = _INTERRUPTED | self._rank << _CAUSED_BY
            if error is self.told:
                self._retract(channel)
            elif self._give_up(channel, interrupted):
                pass
            elif self._must_fail(channel):
                self._fail(channel)
            elif not heeds_marks:  # the others are about to come to the next barrier, and so would have this rank
                self._leave(channel)
                self._arrive(channel, interrupted | 1 << _COUNT)
            raise
        fence()
        return None

    def _retract(self, channel: int) -> None:
        """Undo :meth:`_arrive`. The others leave the barrier too, so the next one can follow."""
        at, own = self._arrived + channel, self._words[self._rank]
        own[at] = (own[at] - 1) & 0xFFFFFFFF
        self._leave(channel)

    # Calls that fail.

    def _leave(self, channel: int) -> None:
        """The next call of this rank may arrive at the next barrier."""
        self._unfinished.pop(channel, None)
        if self._behind or self._joined:
            self._behind.pop(channel, None)
            self._joined.discard(channel)

    def _failing(self, channel: int) -> int:
        """How many calls must fail on every rank in this rank's latest barrier. Final if all ranks have arrived."""
        marks = [self._decided_mark(rank, channel) for rank in range(self._group.size)]
        reasons = {mark & _REASON for mark in marks} - {0}
        return max(max(mark >> _COUNT for mark in marks) + (_LATE in reasons), 1) if reasons else 0

    def _join(self, channel: int) -> None:
        """This rank has come to a barrier that was given up."""
        counts = (self._decided_mark(rank, channel) >> _COUNT for rank in self._peers)
        mark = self._mark(self._rank, channel)
        self._set_mark(channel, self.number(channel), mark | max([1, *counts]) - 1 << _COUNT)
        self._joined.add(channel)

    def _must_fail(self, channel: int) -> int:
        """How many calls of this rank must still fail. All ranks have arrived."""
        if channel not in self._behind:
            failed = self._mark(self._rank, channel) >> _COUNT
            self._behind[channel] = 1 if channel in self._joined else self._failing(channel) - failed
        return self._behind[channel]

    def _fail(self, channel: int) -> None:
        """Count that a call fails."""
        if self._is_missing(channel) and self._give_up(channel, 0):
            return
        self._behind[channel] = self._must_fail(channel) - 1
        if self._behind[channel] <= 0:
            self._leave(channel)

    def _give_up(self, channel: int, reason: int) -> bool:
        """Count a failed call in this rank's mark, unless all ranks have arrived. Returns whether it is counted.

        Args:
            channel: The channel.
            reason: The reason and the rank that caused it, if this rank gives up the barrier; else 0.
        """
        number = self.number(channel)
        decided = before = self._mark(self._rank, channel)
        try:
            self._set_mark(channel, number, before & ~_REASON | _DOUBT)
            full_fence()
            missing = self._is_missing(channel)
            if missing:
                kept = before & 0xFFFF
                if reason and (not kept or reason & _REASON == _LATE):
                    kept = reason
                decided = kept | min((before >> _COUNT) + 1, 0xFFFF) << _COUNT
                self._joined.discard(channel)
        finally:  # an exception of a signal handler must leave no doubt
            self._set_mark(channel, number, decided)
        futex_wake(self._pads[self._rank] + 4 * (self._arrived + channel))
        return missing

    def _decided_mark(self, rank: int, channel: int) -> int:
        """The mark of a rank for this rank's latest barrier, once it is no longer in doubt."""
        if (self._words[rank][self._arrived + channel] - self.number(channel)) & 0x80000000:
            return 0  # it has not arrived, and the mark is of the barrier before the last one
        deadline = time.monotonic() + _LONGEST_DOUBT
        while (mark := self._mark(rank, channel)) & _REASON == _DOUBT and rank not in self._group.lost():
            if time.monotonic() > deadline:
                return mark & ~0xFFFF | _LATE | rank << _CAUSED_BY  # it is stopped
            os.sched_yield()
        return 0 if mark & _REASON == _DOUBT else mark

    def _late(self, channel: int) -> int | None:
        """The rank for which ranks have given up the latest barrier, because it was late; None if there is none."""
        marks = (self._decided_mark(rank, channel) for rank in range(self._group.size))
        return next((_cause(mark) for mark in marks if mark & _REASON == _LATE), None)

    def _given_up(self, channel: int) -> SymmemError | None:
        """The error of a peer that has given up the latest barrier."""
        at = self._mark_at(channel, self.number(channel))
        for peer in self._peers:
            if self._words[peer][at] and (mark := self._decided_mark(peer, channel)) & _REASON:
                return self._error_of(peer, mark, channel)
        return None

    def _error_of(self, rank: int, mark: int, channel: int) -> SymmemError:
        reason, cause = mark & _REASON, _cause(mark)
        if reason == _REFUSED and self._refusal is not None:
            return self._refusal(rank, self.number(channel))
        kind: type[RendezvousError] = PeerTimeoutError
        what, hint = "did not come in time", f"find out why rank {cause} was late or skipped a call; {_AFTER_TIMEOUT}"
        if reason != _LATE:
            kind, what, hint = RendezvousError, "was interrupted in it", "the next call works"
        elif cause in self._group.lost():
            kind, what = PeerLostError, "died"
            hint = f"look in the log of rank {cause} for the first error; then restart the job"
        who = "it" if cause == rank else "this rank" if cause == self._rank else f"rank {cause}"
        return kind(
            f"rank {rank} gave up a barrier on this channel when {who} {what}",
            hint=hint,
            peers=(cause,),
            rank=self._rank,
            group=self._group.name,
            step=f"barrier on channel {channel}",
        )

    def put_signal(self, rank: int, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.put_signal`."""
        at = channel * self._group.size + self._rank
        deadline = time.monotonic() + timeout
        self._wait(rank, at, lambda word: word == 0, rank, deadline, f"put_signal on channel {channel}", leaves=True)
        fence()
        self._words[rank][at] = 1
        futex_wake(self._pads[rank] + 4 * at)

    def wait_signal(self, rank: int, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.wait_signal`."""
        at = channel * self._group.size + rank
        deadline = time.monotonic() + timeout
        self._wait(
            self._rank, at, lambda word: word != 0, rank, deadline, f"wait_signal on channel {channel}", leaves=True
        )
        fence()
        self._words[self._rank][at] = 0
        futex_wake(self._pads[self._rank] + 4 * at)

    def _wait(
        self,
        pad: int,
        at: int,
        ready: Callable[[int], bool],
        peer: int,
        deadline: float,
        step: str,
        channel: int | None = None,
        leaves: bool = False,
    ) -> SymmemError | None:
        """Wait until ``peer`` has made word ``at`` of ``pad`` ready: spin, then sleep.

        With ``leaves``, it ends early if all ranks leave the wait, or a peer gives up the barrier of the channel.

        Returns:
            None; or the error of a peer that gives up the barrier of the channel.
        """
        words = self._words[pad]
        awake_until = time.monotonic() + _AWAKE
        while not ready(words[at]):
            if time.monotonic() >= awake_until:
                break
            os.sched_yield()  # the awaited rank may need this processor
        else:
            return None
        wait: Wait | None = None
        try:
            while not ready(word := words[at]):
                if leaves and wait is not None and pending_waits.told is not None:
                    told = pending_waits.told(wait)
                    has_come = isinstance(told, PeerLostError) and ready(words[at])  # before it left the group
                    if told is not None and not has_come:
                        self.told = told
                        raise told
                if leaves and channel is not None and (error := self._given_up(channel)):
                    return error
                # In a barrier, any rank that has not come may be dead.
                lost = self._group.lost()
                gone = next((rank for rank in self._missing(peer, channel) if rank in lost), None) if lost else None
                remaining = 0.0 if self.stopped() else deadline - time.monotonic()
                if (gone is not None or remaining <= 0) and not ready(words[at]):
                    raise self._error(peer if gone is None else gone, step, gone is not None)
                futex_wait(self._pads[pad] + 4 * at, word, min(_NAP, max(remaining, 0.0)))
                if wait is None:  # after the first sleep: a short wait costs nothing
                    missing = functools.partial(self._missing, peer, channel)
                    wait = pending_waits.note(
                        self._group, self._purpose() if self._purpose else step, missing, deadline
                    )
        finally:
            if wait is not None:
                pending_waits.forget(wait)
        return None

    def _missing(self, peer: int, channel: int | None) -> tuple[int, ...]:
        """The ranks that a wait for ``peer`` waits for: in a barrier, all ranks that have not come."""
        if channel is None:
            return (peer,)
        at = self._arrived + channel
        target = self._words[self._rank][at]
        return tuple(sorted(peer for peer in self._peers if (self._words[peer][at] - target) & 0x80000000))

    def _error(self, peer: int, step: str, is_lost: bool) -> PeerLostError | PeerTimeoutError:
        error: PeerLostError | PeerTimeoutError
        if is_lost:
            error = PeerLostError(
                f"rank {peer}'s process ended before it came",
                hint=f"look in the log of rank {peer} for the first error; then restart the job",
                peers=(peer,),
            )
        else:
            error = PeerTimeoutError(
                f"rank {peer} did not come in time",
                hint=f"find out what rank {peer} does; if it is only slow, raise signal_timeout",
                peers=(peer,),
            )
        error.located(rank=self._rank, group=self._group.name, step=step)
        return error


def _cause(mark: int) -> int:
    return mark >> _CAUSED_BY & 0x1FFF
