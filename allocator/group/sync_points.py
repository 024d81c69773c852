"""Synchronisation points: a rank waits here for all others, although it is not certain that they come.

Functions with state that all ranks keep alike, such as compiled functions, run without communication while the state
stays. Before a rank changes the state together with the others, it comes to a synchronisation point. Either all ranks
come, or all raise an error at once that names the rank and the point. A point that fails takes no round of the group.

Protocol. Every rank has a slot in the shared memory of the group's :mod:`.ledger`. Points have serial numbers. A rank
that comes to a point writes it to its slot, sets the mark of all other ranks, and waits until all slots show the point.
A rank with a mark reads the slots in its next call of such a function, and while it waits for a signal. If it has
passed the point without coming, it can no longer come: it writes an error to its slot, and raises it. A rank that finds
such an error raises the same one. So every rank passes or fails every point, or finds that the others are further.

A rank that did not come in time is told when it comes. It may have skipped a call: then the others wait for it in their
next call while it is told of the one before, so they give up two points in a row. In that case their next call fails
too, as soon as all ranks have been told. So all ranks make the call after that together.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from symmem.backends import pending_waits
from symmem.backends.libc import fence, futex_wait, futex_wake
from symmem.backends.pending_waits import Wait
from symmem.errors import DivergenceError, PeerLostError, PeerTimeoutError, SymmemError
from symmem.group.call_site import program_line
from symmem.group.ledger import RING, Ledger

if TYPE_CHECKING:
    from symmem.backends.base import RankGroup

__all__ = ["Stateful", "SyncPoints", "is_of_sync_point"]

# The uint64 words of a slot. A rank writes its own, except that all ranks set its mark.
_MARK, _CHANGES = 0, 1
_COMING = 2  # the latest point to which the rank has come
_KEYS = slice(3, 6), slice(7, 10)  # its function, call and step; by parity, because others still read the point before
_TEXTS = 6, 10
_FAILED, _FUNCTION, _CAUSE, _ERROR = 11, 12, 13, 14  # the latest point that failed here, and the text of the error
_LEFT = 15  # whether the rank has left the group
_ACTS = 16, 17  # number of its latest act when it came, by parity
_HEAD = 18
_GAVE_UP = 19  # the latest point that the rank gave up at its timeout
_IN_A_ROW = 20  # how many points without a gap it gave up so, up to that one
_CAME_LATE = 21  # the latest point of which it was told without having waited for it

_LOW = 0xFFFFFFFF
_NAP = 0.05  # seconds between two checks that the awaited ranks are alive
_SPINS = 20  # loads, with a yield after every load, before it sleeps

_HINT = (
    "addresses of symmetric arguments and sizes must change on all ranks in the same call. All ranks have forgotten "
    "what they had agreed on for this function, so its next call works"
)


class Stateful(Protocol):
    """A function of which all ranks make the same calls."""

    def has_passed(self, call: int, waits: bool) -> bool:
        """Whether this rank can no longer come to a point in a call.

        Args:
            call: The number of the call.
            waits: Whether this thread waits for the rank that has come to the point.
        """

    def forget(self) -> None:
        """Forget the state. The next call is the first one."""


class SyncPoints:
    """The synchronisation points of one group.

    Args:
        ledger: The ledger of the group.
        group: The group.

    Attributes:
        mark: A word that is not 0 if this rank should :meth:`look`.
        acts_left: How many acts may follow before the next point.
    """

    def __init__(self, ledger: Ledger, group: RankGroup) -> None:
        self._ledger, self._group = ledger, weakref.ref(group)
        self._rank, self._process = group.rank, os.getpid()
        self._slots = [ledger.sync_slot(rank) for rank in range(group.size)]
        self._address = [ledger.sync_address(rank) + 8 * _CHANGES for rank in range(group.size)]
        self._own = self._slots[group.rank]
        self._others = [rank for rank in range(group.size) if rank != group.rank]
        self.mark = self._own[:1]
        self._neighbours = ledger.neighbours
        self._rings, ring = ledger.sync_rings(self._own[_HEAD : _HEAD + 1], self.mark)
        self._enter: Callable[[int, int, int], bool] = ring.enter
        self._acts = 0  # number of the latest act; the same on all ranks
        self.acts_left = 0
        self._serial = 0  # of the last point that this rank has passed or failed
        self._unsettled = 0  # the last point that has failed here, until :meth:`_settle` has dealt with it
        self._count = 0  # number of functions that have passed a point
        self._functions: weakref.WeakValueDictionary[int, Stateful] = weakref.WeakValueDictionary()
        self._indices: weakref.WeakKeyDictionary[Stateful, int] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def meet(self, function: Stateful, call: int, step: str, why: str, timeout: float) -> None:
        """Wait until all ranks have come to the same point. Collective. A round of the group must follow.

        It returns early if a rank has ended or left the group, because the round raises for that.

        Args:
            function: The function that needs the point.
            call: The number of its call.
            step: The step that all ranks do next; the same on all ranks.
            why: Why this rank does it, for the error.
            timeout: Seconds.

        Raises:
            DivergenceError: A rank has passed the point without coming, or is at another one. On all ranks.
            PeerTimeoutError: A rank did not come in time, or was late for the last two points.
        """
        if os.getpid() != self._process:
            return  # the round raises
        with self._lock:
            self._settle(step, timeout)
            serial = max(self._serial + 1, *(self._slots[rank][_COMING] for rank in self._others))
            for rank in self._others:
                if self._slots[rank][_FAILED] >= serial:
                    raise self._told(rank, came_late=True)
            index = self._indices.get(function, self._count)
            key = index, call, zlib.crc32(step.encode())
            text = f"{step} at {program_line(sys._getframe(1))}"
            own = self._own
            try:
                own[_KEYS[serial & 1]] = _words(key)
                own[_TEXTS[serial & 1]] = self._ledger.add_text(f"{text}, because {why}")
                own[_ACTS[serial & 1]] = self._acts
                self._publish(_COMING, serial)
                self._wait(serial, key, step, text, timeout)
            except BaseException as error:
                if self._serial < serial:
                    if isinstance(error, PeerTimeoutError):
                        own[_IN_A_ROW], own[_GAVE_UP] = 1 + self._given_up(serial - 1), serial
                    self._fail(serial, index, self._rank, f"rank {self._rank} gave up {text}: {error}")
                raise
            self._serial = serial
            # Beyond all acts of any rank, so that words in the rings that are older never count.
            self._acts = max(slot[_ACTS[serial & 1]] for slot in self._slots) + RING
            self.acts_left = RING // 2
            if index == self._count:
                self._count += 1
                self._functions[index], self._indices[function] = function, index

    def _wait(self, serial: int, key: tuple[int, int, int], step: str, text: str, timeout: float) -> None:
        def has_come(rank: int) -> bool:
            if self._slots[rank][_FAILED] >= serial:
                raise self._told(rank)
            return self._slots[rank][_COMING] >= serial

        for rank in self._wait_for_all(has_come, step, text, timeout):
            slot = self._slots[rank]
            if slot[_COMING] == serial and tuple(slot[_KEYS[serial & 1]]) != key:
                ranks = sorted((self._rank, rank))
                texts = ", ".join(f"{self._text(each, _TEXTS[serial & 1])} on rank {each}" for each in ranks)
                raise self._fail(serial, key[0], rank, f"the ranks are at different steps: {texts}")
        fence()

    def _settle(self, step: str, timeout: float) -> None:
        """If ranks gave up the last two points, wait until all have been told, and fail this call too. Once."""
        serial = self._unsettled
        if self._given_up(serial) < 2 or self._own[_CAME_LATE] == serial:
            return
        text = f"{step} at {program_line(sys._getframe(2))}"
        told = list(self._wait_for_all(lambda rank: self._slots[rank][_FAILED] >= serial, step, text, timeout))
        self._unsettled = 0
        if late := tuple(rank for rank in told if self._slots[rank][_CAME_LATE] == serial):
            raise PeerTimeoutError(
                f"ranks {list(late)} did not come in time to the last two steps, so they may have skipped a call. They "
                "have come now, so the next call works",
                hint=f"find out why ranks {list(late)} were late or skipped a call",
                rank=self._rank,
                group=self._ledger.name,
                step=step,
                peers=late,
            )

    def _given_up(self, serial: int) -> int:
        """How many points in a row, up to this one, ranks have given up at their timeouts."""
        return max(slot[_IN_A_ROW] if slot[_GAVE_UP] == serial else 0 for slot in self._slots)

    def _wait_for_all(self, is_here: Callable[[int], bool], step: str, text: str, timeout: float) -> Iterator[int]:
        """Yield the other ranks, one after the other, when they are here. It ends early if a rank ended or left.

        Raises:
            PeerTimeoutError: A rank is not here in time.
        """
        deadline, end = time.monotonic() + timeout, None
        try:
            for rank in self._others:
                slot, spins = self._slots[rank], 0
                while True:
                    changes = slot[_CHANGES]
                    if is_here(rank):
                        break
                    if (spins := spins + 1) < _SPINS:
                        os.sched_yield()
                        continue
                    if end is None:
                        end = self._ledger.show_wait(text, deadline)
                    group, remaining = self._group(), deadline - time.monotonic()
                    if group is None or group.lost() or slot[_LEFT] or self._own[_LEFT]:
                        return
                    if remaining <= 0:
                        raise self._late(is_here, step, timeout)
                    futex_wait(self._address[rank], changes & 0xFFFFFFFF, min(_NAP, remaining))
                yield rank
        finally:
            if end is not None:
                end()

    def act(self, function: Stateful, value: int, step: str) -> None:
        """Compare a value between points, without a wait: the second rank of two finds a difference. Local.

        Args:
            function: The function that compares.
            value: 32 bits; the same on all ranks.
            step: What the value stands for, for the error.

        Raises:
            DivergenceError: The values differ. On all ranks: here, or as in :meth:`look`.
        """
        with self._lock:
            self._acts = number = self._acts + 1
            self.acts_left -= 1
            if not self._enter(number, value, 0):
                return
            for rank in self._neighbours:
                word = self._rings[rank][number % RING]
                if word >> 32 == number & _LOW and word & _LOW != value:
                    line = program_line(sys._getframe(1))
                    what = f"rank {rank} uses {step} differently than rank {self._rank} at {line}"
                    serial = max(self._serial + 1, *(self._slots[other][_COMING] for other in self._others))
                    raise self._fail(serial, self._indices.get(function, self._count), rank, what)
            self.look()

    def look(self, missing: Callable[[], Sequence[int]] = tuple) -> None:
        """Raise if another rank has come to a point that this rank has passed, or has failed a point. Local.

        Args:
            missing: Returns the ranks that this thread waits for.

        Raises:
            DivergenceError: It is so. On all ranks.
        """
        if os.getpid() != self._process or not self._lock.acquire(blocking=False):
            return  # another thread is at a point, and looks itself
        try:
            self._own[_MARK] = 0
            fence()
            undecided = False
            for rank in self._others:
                slot = self._slots[rank]
                if slot[_FAILED] > self._serial:
                    raise self._told(rank, came_late=True)
                serial = slot[_COMING]
                if serial <= self._serial:
                    continue
                index, call, _step = slot[_KEYS[serial & 1]]
                text = self._text(rank, _TEXTS[serial & 1])
                function = self._functions.get(index)
                passed = index < self._count and (function is None or function.has_passed(call, rank in missing()))
                if passed and slot[_COMING] == serial:
                    line = program_line(sys._getframe(1))
                    what = f"rank {rank} waits for all ranks in {text}; rank {self._rank} went on without, to {line}"
                    raise self._fail(serial, index, rank, what)
                undecided = True
            if undecided:
                self._own[_MARK] = 1
        finally:
            self._lock.release()

    def absorb(self) -> None:
        """Note that this rank has raised an error, so that the failures of others so far do not concern it any more."""
        with self._lock:
            for rank in self._others:
                if self._slots[rank][_FAILED] > self._serial:
                    self._told(rank)

    def left(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """The ranks among these that have left the group, and show no wait that explains why."""
        left = [rank for rank in ranks if self._slots[rank][_LEFT]]
        return () if left and self._ledger.waits_of(left) else tuple(left)

    def leave(self) -> None:
        """Let no rank wait for this one any more."""
        if os.getpid() == self._process:
            self._publish(_LEFT, 1)

    def _publish(self, word: int, value: int) -> None:
        fence()
        self._own[word] = value
        self._own[_CHANGES] += 1
        fence()
        futex_wake(self._address[self._rank])
        for rank in self._others:
            self._slots[rank][_MARK] = 1

    def _fail(self, serial: int, index: int, cause: int, what: str) -> DivergenceError:
        """Fail a point, and let the other ranks raise the same error, which is returned."""
        self._serial = self._unsettled = serial
        self.acts_left = 0  # not all ranks have made the same acts
        self._own[_FUNCTION], self._own[_CAUSE] = index, cause
        self._own[_ERROR] = self._ledger.add_text(what)
        self._publish(_FAILED, serial)
        self._forget(index)
        error = DivergenceError(what, hint=_HINT, rank=self._rank, group=self._ledger.name, peers=(cause,))
        error.propagated_to = self._ledger.name
        error.of_sync_point = True  # type: ignore[attr-defined]
        return error

    def _told(self, rank: int, came_late: bool = False) -> DivergenceError:
        slot = self._slots[rank]
        if came_late:
            self._own[_CAME_LATE] = slot[_FAILED]
        return self._fail(slot[_FAILED], slot[_FUNCTION], slot[_CAUSE], self._text(rank, _ERROR))

    def _forget(self, index: int) -> None:
        if (function := self._functions.get(index)) is not None:
            function.forget()

    def _late(self, is_here: Callable[[int], bool], step: str, timeout: float) -> PeerTimeoutError:
        late = tuple(rank for rank in self._others if not is_here(rank))
        waits = "".join(f"; rank {rank} waits in {text}" for rank, text in self._ledger.waits_of(late).items())
        return PeerTimeoutError(
            f"ranks {list(late)} did not come in time (timeout {timeout:g} s){waits}",
            hint=f"see what ranks {list(late)} do. If they are only slow, raise rendezvous_timeout",
            rank=self._rank,
            group=self._ledger.name,
            step=step,
            peers=late,
        )

    def _text(self, rank: int, word: int) -> str:
        return self._ledger.text_of(rank, self._slots[rank][word])


def is_of_sync_point(error: BaseException) -> bool:
    """Whether a point has failed with this error, so that its function has forgotten its state on this rank."""
    return getattr(error, "of_sync_point", False)


def _words(values: Sequence[int]) -> memoryview:
    return memoryview(b"".join(value.to_bytes(8, sys.byteorder) for value in values)).cast("Q")


def _told(wait: Wait) -> SymmemError | None:
    """The error with which a wait must end, because a rank that it waits for does not come."""
    points = getattr(wait.group, "sync_points", None)
    if points is not None and (left := points.left(wait.missing())):
        return PeerLostError(
            f"ranks {list(left)} closed the group",
            hint="look at their logs for the first error",
            rank=wait.group.rank,
            group=wait.group.name,
            step=wait.step,
            peers=left,
        )
    if points is not None and points.mark[0]:
        try:
            points.look(wait.missing)
        except DivergenceError as error:
            error.step = wait.step
            return error
    return None


pending_waits.told = _told
