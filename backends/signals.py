"""Signals between processes of one host: words in shared memory, and futexes to sleep on.

A rank's pad holds uint32 words, all 0 at first::

    flag[channel, source]    1 while a signal from `source` has not been taken; `source` sets it, the owner clears it
    arrived[channel]         number of barriers on this channel that the owner has reached, modulo 2**32
    abandoned[channel]       1 + the rank that made the owner give up a barrier; the highest bit is set if that rank
                             came, but was interrupted

A word has one writer at a time: the value of a flag says which side may write it. So no atomic read-modify-write is
needed, only aligned 32-bit stores, a fence between data and word, and futex(2). A futex compares the word and sleeps
in one step, so no wake-up is lost.

A barrier is one store and world - 1 loads per rank (all-to-all, one round). It counts instead of setting and clearing,
so a rank may enter the next barrier while others still read the words of this one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from symmem.backends import pending_waits
from symmem.backends.base import SIGNAL_CHANNELS, RankGroup
from symmem.backends.libc import fence, futex_wait, futex_wake
from symmem.errors import PeerLostError, PeerTimeoutError, RendezvousError, SymmemError

if TYPE_CHECKING:
    from symmem.backends.pending_waits import Wait

__all__ = ["SharedSignals"]

_SPINS = 20  # loads, with a yield after every load, before it sleeps
_INTERRUPTED = 0x80000000  # in the word `abandoned`
_NAP = 0.05  # seconds between two checks that the awaited process is alive


class SharedSignals:
    """Signal pads of all ranks, mapped into this process.

    Args:
        group: Gives the rank, size, name and lost ranks.
        pads: Address of every rank's pad.
        owner: The object that keeps the pads mapped. It is kept alive.
        purpose: Returns the name of the operation that a wait is part of, if it is not just a signal.

    Attributes:
        stopped: If this returns true, waits end early, as if they had timed out. The caller knows the reason.
    """

    def __init__(
        self, group: RankGroup, pads: Sequence[int], owner: object, purpose: Callable[[], str] | None = None
    ) -> None:
        self._group = group
        self._owner, self._purpose = owner, purpose
        self.stopped: Callable[[], bool] = bool
        self._told: SymmemError | None = None  # the error with which all ranks leave a barrier
        self._rank, size = group.rank, group.size
        words = SIGNAL_CHANNELS * (size + 2)
        self._pads = tuple(pads)
        self._words = [(ctypes.c_uint32 * words).from_address(pad) for pad in pads]
        self._arrived = SIGNAL_CHANNELS * size
        self._abandoned = SIGNAL_CHANNELS * (size + 1)
        self._peers = [(self._rank + i) % size for i in range(1, size)]

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes of one pad in a group of ``size`` ranks."""
        return 4 * SIGNAL_CHANNELS * (size + 2)

    def signal_pad(self, rank: int) -> tuple[int, int]:
        """See :meth:`Mapping.signal_pad`. The words behind the flags are private."""
        return self._pads[rank], 4 * SIGNAL_CHANNELS * self._group.size

    def check(self) -> None:
        """See :meth:`Mapping.check`. Nothing to do: a signal on the host fails in its call."""

    def barrier(self, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.barrier`. After a rank gives up, no rank can use the barrier of this channel again."""
        self._check_abandoned(self._rank, channel)
        try:
            self._arrive(channel)
            self._complete(channel, timeout, leaves=True)
        except BaseException as error:
            if error is self._told:
                self._retract(channel)
            else:
                self._abandon(channel, error)
            raise

    def arrive(self, channel: int) -> None:
        """The first half of a barrier: the others no longer wait for this rank. :meth:`complete` must follow."""
        self._check_abandoned(self._rank, channel)
        self._arrive(channel)

    def complete(self, channel: int, timeout: float) -> None:
        """The second half of a barrier: wait for the others. Errors are the same as in :meth:`barrier`."""
        try:
            self._complete(channel, timeout)
        except BaseException as error:
            self._abandon(channel, error)
            raise

    def _arrive(self, channel: int) -> None:
        at, own = self._arrived + channel, self._words[self._rank]
        fence()
        own[at] = (own[at] + 1) & 0xFFFFFFFF
        futex_wake(self._pads[self._rank] + 4 * at)

    def _retract(self, channel: int) -> None:
        """Undo :meth:`_arrive`. The others leave the barrier too, so the next one can follow."""
        at, own = self._arrived + channel, self._words[self._rank]
        own[at] = (own[at] - 1) & 0xFFFFFFFF
        self._told = None

    def _complete(self, channel: int, timeout: float, leaves: bool = False) -> None:
        at = self._arrived + channel
        target = self._words[self._rank][at]
        deadline = time.monotonic() + timeout
        for peer in self._peers:
            if (self._words[peer][at] - target) & 0x80000000:
                self._wait(
                    peer,
                    at,
                    lambda word: (word - target) & 0x80000000 == 0,
                    peer,
                    deadline,
                    f"barrier on channel {channel}",
                    channel,
                    leaves,
                )
            self._check_abandoned(peer, channel)
        fence()

    def _abandon(self, channel: int, error: BaseException) -> None:
        """Make the channel unusable. This rank already counted in the barrier, so a retry would count twice."""
        cause = error.peers[0] if isinstance(error, RendezvousError) else self._rank
        interrupted = not isinstance(error, PeerLostError | PeerTimeoutError)
        self._words[self._rank][self._abandoned + channel] = (1 + cause) | (_INTERRUPTED if interrupted else 0)
        futex_wake(self._pads[self._rank] + 4 * (self._arrived + channel))

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
    ) -> None:
        """Wait until ``peer`` has made word ``at`` of ``pad`` ready: spin, then sleep.

        With ``leaves``, it ends early if all ranks leave the wait.
        """
        words = self._words[pad]
        for _ in range(_SPINS):
            if ready(words[at]):
                return
            os.sched_yield()  # the awaited rank may need this processor
        wait: Wait | None = None
        try:
            while not ready(word := words[at]):
                if leaves and wait is not None and pending_waits.told is not None:
                    self._told = pending_waits.told(wait)
                    if self._told is not None:
                        raise self._told
                if channel is not None:
                    self._check_abandoned(peer, channel)
                lost = self._group.lost()
                remaining = 0.0 if self.stopped() else deadline - time.monotonic()
                if (peer in lost or remaining <= 0) and not ready(words[at]):
                    raise self._error(peer, step, lost)
                futex_wait(self._pads[pad] + 4 * at, word, min(_NAP, max(remaining, 0.0)))
                if wait is None:  # after the first sleep: a short wait costs nothing
                    missing = functools.partial(self._missing, peer, channel)
                    wait = pending_waits.note(
                        self._group, self._purpose() if self._purpose else step, missing, deadline
                    )
        finally:
            if wait is not None:
                pending_waits.forget(wait)

    def _missing(self, peer: int, channel: int | None) -> tuple[int, ...]:
        """The ranks that a wait for ``peer`` waits for: in a barrier, all ranks that have not come."""
        if channel is None:
            return (peer,)
        at = self._arrived + channel
        target = self._words[self._rank][at]
        return tuple(sorted(peer for peer in self._peers if (self._words[peer][at] - target) & 0x80000000))

    def _error(self, peer: int, step: str, lost: tuple[int, ...]) -> PeerLostError | PeerTimeoutError:
        error: PeerLostError | PeerTimeoutError
        if peer in lost:
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

    def _check_abandoned(self, rank: int, channel: int) -> None:
        word = self._words[rank][self._abandoned + channel]
        if not word:
            return
        cause = (word & ~_INTERRUPTED) - 1
        kind: type[RendezvousError] = PeerTimeoutError
        reason = "did not come in time"
        if cause in self._group.lost():
            kind, reason = PeerLostError, "died"
        elif word & _INTERRUPTED:
            kind, reason = RendezvousError, "was interrupted in it"
        raise kind(
            f"rank {rank} gave up a barrier on this channel when {'it' if cause == rank else f'rank {cause}'} {reason}",
            hint="fix the cause; then use another channel, or allocate the tensor again",
            peers=(cause,),
            rank=self._rank,
            group=self._group.name,
            step=f"barrier on channel {channel}",
        )
