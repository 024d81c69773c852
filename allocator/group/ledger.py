"""The ledger: compare what all ranks of a group must do alike, without a message and without a wait.

Acts, such as allocations from an arena, belong to sequences. All ranks must make the acts of a sequence in the same
order. Every rank publishes its acts in memory that the other ranks of the group map. Act n is one word in a ring: the
low 32 bits of n, and 32 bits of a rolling hash of the acts 1 to n.

Protocol (as in Dekker's mutual exclusion). A rank stores its word of act n, executes a full fence, and then loads
word n of its two neighbours, the ranks before and after it. Because every rank stores before it loads, at least one
of two neighbours sees the other's word. There are three cases:

- The neighbour's word is of act n. If the words differ, the ranks have diverged.
- The neighbour has not come to act n. It compares when it comes, unless this rank has overwritten word n by then.
  Before that can happen, and with every use of peers' memory while it is that far ahead, this rank compares the
  neighbour's latest act with its own record of the same act. Because the hash is rolling, that covers all acts before.
- The neighbour is ahead by more than the ring, so its word n is overwritten. It compares, as in the second case.

The hot path is in C (``symmem/native/ledger.c``). Without a compiler, Python does the same, and takes four times as
long.

A rank that finds a difference writes the error into its memory, and marks the memory of all other ranks. All ranks look
at their mark with every use of peers' memory, which raises the error on every rank. An act only logs it: all ranks come
to the use, and none of them waits in another library for a rank that has raised. Once a rank has raised the error, it
no longer comes to the others' calls, so then acts raise it too.

Two neighbours are enough: if not all ranks have the same word n, then in the circle of ranks at least two pairs of
neighbours differ, and one rank of each such pair finds out, as soon as it has come.

Before a rank uses the memory of another one, it compares with that rank too. If that rank is behind, this rank
publishes which act it relies on, and then sets a flag in the other's mark. The other rank sees the flag with its next
act, compares with this rank, and raises a difference in the act itself: this rank may already have a view of the wrong
place, so the other rank must not go on and let it read. The other rank stores its word before it loads the flag, and
this rank stores the flag before it loads the other's word again, so one of the two compares.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from symmem import native
from symmem.backends import pending_waits
from symmem.backends.libc import PAGE, Region, full_fence, round_up
from symmem.backends.memory_files import check_memory_file, make_memory_file
from symmem.backends.pending_waits import Wait
from symmem.errors import DivergenceError, PeerTimeoutError, SymmemError, from_wire, to_wire
from symmem.group.call_site import program_line
from symmem.group.compare import SAME_CALLS, differing

if TYPE_CHECKING:
    from types import FrameType

    from symmem.backends.base import RankGroup

log = logging.getLogger("symmem.group")

__all__ = ["RING", "ActSequence", "Ledger", "explained"]

RING = 1024
"""Acts of a sequence that the other ranks can see: the latest ones."""

_SEQUENCES = 16  # of a group; further ones are compared only when the ranks meet
_ERROR = 16 << 10  # bytes for the error of a sequence
_LONGEST = 2000  # characters of its text
_MARKS = _ERROR * _SEQUENCES  # after the errors that this rank has found
_HEADS = _MARKS + 8 * _SEQUENCES
_SLOTS = 8  # waits that a rank can show at a time
_WAITS = _HEADS + 8 * _SEQUENCES  # for every wait, the id of its text, and when it is no longer shown
_RELIED_ON = _WAITS + 16 * _SLOTS  # for every sequence, the last act of another rank that this rank has not seen made
_RINGS = _RELIED_ON + 8 * _SEQUENCES
_IDS = _RINGS + 8 * _SEQUENCES * RING
_TEXTS = _IDS + 4 * _SEQUENCES * RING
_TEXT_NBYTES = 1 << 18
_SYNC = _TEXTS + _TEXT_NBYTES  # the slot of synchronisation points
_SYNC_WORDS = _SYNC + 12 * RING  # after a ring of acts and their ids
_SYNC_NBYTES = 12 * RING + 256
_NBYTES = round_up(_SYNC + _SYNC_NBYTES, PAGE)
_LOW = 0xFFFFFFFF
_HIGH = 0xFFFFFFFF << 32
_FOREVER = (1 << 63) - 1
_IS_RAISED, _IS_RELIED_ON = 4, 5  # bytes of a mark
# Nanoseconds that a wait is shown after its timeout, because peers give up a little later. Counted by the wall clock,
# because the monotonic one may differ between containers.
_SHOWN = 2_000_000_000


class Ledger:
    """The acts of one group, as this rank sees them.

    Args:
        rank: This rank.
        size: Number of ranks. All must be on one host.
        name: The name of the group, for errors.

    Attributes:
        file: This rank's memory, for the other ranks. The caller closes it after sending it.
        memory: The memory of all ranks, by rank.
        claimed: The number of sequences so far.
        passed: The number of the last round of the group that this rank has completed.
    """

    def __init__(self, rank: int, size: int, name: str) -> None:
        self.rank, self.size, self.name = rank, size, name
        self.file = make_memory_file(_NBYTES)
        self.memory: list[memoryview] = []
        self.claimed = self.passed = 0
        self._end, self._generation = 0, 1  # of the texts; id 0 is no text
        self._own_waits: list[memoryview] = []
        self._wait_texts: dict[str, int] = {}
        self._sequences: weakref.WeakSet[ActSequence] = weakref.WeakSet()
        self._lock = threading.RLock()  # of the texts and the waits; a signal handler may wait during a wait

    @property
    def neighbours(self) -> list[int]:
        """The ranks before and after this one."""
        return sorted({(self.rank - 1) % self.size, (self.rank + 1) % self.size} - {self.rank})

    def attach(self, descriptors: Sequence[int]) -> None:
        """Map the memory of all ranks, in rank order. The descriptors stay open, and belong to the caller."""
        self._region = Region(self.size * _NBYTES)
        for rank, descriptor in enumerate(descriptors):
            check_memory_file(descriptor, _NBYTES, rank)
            address = self._region.place(rank * _NBYTES, descriptor, _NBYTES)
            self.memory.append(memoryview((ctypes.c_uint8 * _NBYTES).from_address(address)).cast("B"))

        self._own_waits = self._waits(self.rank)

    def sync_slot(self, rank: int) -> memoryview:
        """The uint64 words of a rank for :mod:`.sync_points`."""
        return self.memory[rank][_SYNC_WORDS : _SYNC + _SYNC_NBYTES].cast("Q")

    def sync_address(self, rank: int) -> int:
        """The address of :meth:`sync_slot`."""
        return self._region.address + rank * _NBYTES + _SYNC_WORDS

    def sync_rings(self, head: memoryview, mark: memoryview) -> tuple[list[memoryview], Any]:
        """The rings of all ranks for acts between :mod:`.sync_points`, and this rank's object that enters them."""
        rings = [memory[_SYNC : _SYNC + 8 * RING].cast("Q") for memory in self.memory]
        ids = self.memory[self.rank][_SYNC + 8 * RING : _SYNC_WORDS].cast("I")
        neighbours = tuple(rings[peer] for peer in self.neighbours)
        return rings, _ring_type()(rings[self.rank], ids, head, mark, neighbours)

    def claim(self, index: int, name: str) -> ActSequence | None:
        """The sequence with an index on which all ranks have agreed.

        The index is the highest :attr:`claimed` of any rank, or that of a sequence that all ranks have cleared.

        Returns:
            None if there is no room for another sequence. Its acts are compared when the ranks meet.
        """
        self.claimed = max(self.claimed, index + 1)
        if index >= _SEQUENCES:
            return None
        sequence = ActSequence(self, index, name)
        self._sequences.add(sequence)
        return sequence

    def clear(self, index: int) -> None:
        """Forget this rank's acts of a sequence and the error in it. Then all ranks may claim the sequence again.

        All ranks must have raised the error before.
        """
        own = self.memory[self.rank]
        parts = (_ERROR, 0, 4), *((8, begin, 8) for begin in (_MARKS, _HEADS, _RELIED_ON)), (8 * RING, _RINGS, 8 * RING)
        for stride, begin, nbytes in parts:
            own[begin + stride * index : begin + stride * index + nbytes] = bytes(nbytes)
        full_fence()

    def add_text(self, text: str) -> int:
        """Write a text into this rank's memory; returns its id.

        If the memory is full, all texts are forgotten, and so are the ids in :attr:`ActSequence.known`.
        """
        with self._lock:
            data = text.encode()[:_LONGEST]
            if self._end + 8 + len(data) > _TEXT_NBYTES:
                self._end, self._generation = 0, self._generation + 1
                self._wait_texts.clear()
                for sequence in list(self._sequences):
                    sequence.forget()
            begin, text_id = _TEXTS + self._end, self._generation << 18 & _LOW | self._end
            self._end += 8 + len(data) + 7 & -8
            own = self.memory[self.rank]
            own[begin : begin + 8] = text_id.to_bytes(4, "little") + len(data).to_bytes(4, "little")
            own[begin + 8 : begin + 8 + len(data)] = data
            return text_id

    def text_of(self, rank: int, text_id: int) -> str:
        """The text with an id that a rank has published."""
        begin, memory = _TEXTS + text_id % _TEXT_NBYTES, self.memory[rank]
        nbytes = int.from_bytes(memory[begin + 4 : begin + 8], "little")
        text = bytes(memory[begin + 8 : begin + 8 + nbytes]).decode(errors="replace")
        known = int.from_bytes(memory[begin : begin + 4], "little") == text_id  # read last: it is overwritten first
        return text if known else "an act without a record"

    def show_wait(self, text: str, deadline: float, number: int = 0) -> Callable[[], None]:
        """Show the other ranks where this rank waits; the returned function ends this.

        Args:
            text: The operation, and the line of the program.
            deadline: When the wait gives up, by ``time.monotonic``.
            number: The number of the round, for a wait in a round.
        """
        with self._lock:
            now = time.time_ns()
            slot = next((slot for slot in self._own_waits if slot[1] <= now), None)
            if slot is None:
                return lambda: None
            if (text_id := self._wait_texts.get(text)) is None:
                text_id = self._wait_texts[text] = self.add_text(text)
            slot[0], slot[1] = number << 32 & _HIGH | text_id, _FOREVER

        def end(_ledger: Ledger = self) -> None:  # the slot is memory of the ledger, which must live until then
            slot[1] = time.time_ns() + _SHOWN if time.monotonic() >= deadline else 0

        return end

    def explain(self, error: PeerTimeoutError, step: str, collective: bool) -> SymmemError:
        """Look where the ranks wait that were too late for ``step``.

        Args:
            error: The error of a wait of this rank.
            step: The operation.
            collective: Whether all ranks must make it. A signal may be late because the peer does something else.

        Returns:
            DivergenceError if a rank waits in another barrier, signal or operation instead of a collective one; else
            the error itself, which says where the ranks wait, as far as this is known. A wait in a round of the group
            does not count: a rank may skip a barrier, and meet the others after their timeout.
        """
        if "gave up" in error.what:
            return error  # the others have given up, and wait elsewhere by now
        where = f"{step} at {program_line(sys._getframe(1))}"
        known = self.waits_of(error.peers)
        if not known:
            return error
        in_rounds = known.keys() - self.waits_of(error.peers, rounds=False).keys()
        steps = {text.partition(" at ")[0] for text in known.values()}
        if not collective or in_rounds or steps == {step}:
            error.what += "".join(f"; rank {rank} waits in {text}" for rank, text in known.items())
            return error
        ranks = sorted({self.rank: where, **known}.items())
        return DivergenceError(
            f"the ranks wait in different calls: {', '.join(f'{text} on rank {rank}' for rank, text in ranks)}",
            hint=SAME_CALLS,
            rank=error.rank,
            group=error.group,
            step=error.step,
            peers=tuple(known),
        )

    def waits_of(self, ranks: Sequence[int], rounds: bool = True) -> dict[int, str]:
        """Where ranks wait: the operation and the line of the program, by rank, as far as this is known.

        Args:
            ranks: The ranks.
            rounds: Whether waits in rounds of the group count.
        """
        now, known = time.time_ns(), {}
        for rank in ranks:
            for slot in self._waits(rank):
                # A rank may still show a round that the others have passed.
                number = slot[0] >> 32
                if slot[1] > now and (not number or (rounds and number > self.passed)):
                    known[rank] = self.text_of(rank, slot[0] & _LOW)
        return known

    def _waits(self, rank: int) -> list[memoryview]:
        begin, memory = _WAITS, self.memory[rank]
        return [memory[begin + 16 * slot : begin + 16 * slot + 16].cast("Q") for slot in range(_SLOTS)]

    def publish(self, error: SymmemError, index: int) -> None:
        """Let every rank raise this error with its next act or call of the sequence with that index."""
        wire = to_wire(error)
        data = json.dumps(wire, ensure_ascii=False).encode()
        while len(data) > _ERROR - 4:
            wire["what"] = wire["what"][: len(wire["what"]) * 3 // 4]
            data = json.dumps(wire, ensure_ascii=False).encode()
        own, begin = self.memory[self.rank], _ERROR * index
        own[begin + 4 : begin + 4 + len(data)] = data
        full_fence()  # others may read as soon as the length is there
        own[begin : begin + 4] = len(data).to_bytes(4, "little")
        full_fence()
        for memory in self.memory:
            found_by = _word(memory, _MARKS, index).cast("B").cast("I")
            if not found_by[0]:
                found_by[0] = 1 + self.rank

    def flag(self, index: int, byte: int, ranks: Iterable[int], value: int = 1) -> None:
        """Set a flag in the marks of ranks. Each has its own byte, because several ranks may write at the same time."""
        for rank in ranks:
            self.memory[rank][_MARKS + 8 * index + byte] = value

    def published(self, rank: int, index: int) -> SymmemError | None:
        """The error of a sequence that a rank has published, if any."""
        memory, begin = self.memory[rank], _ERROR * index
        nbytes = int.from_bytes(memory[begin : begin + 4], "little")
        return from_wire(json.loads(bytes(memory[begin + 4 : begin + 4 + nbytes]))) if nbytes else None


def _word(memory: memoryview, begin: int, index: int) -> memoryview:
    return memory[begin + 8 * index : begin + 8 * index + 8].cast("Q")


def explained(group: RankGroup, error: PeerTimeoutError, step: str | None, collective: bool = True) -> SymmemError:
    """See :meth:`Ledger.explain`. Without a ledger, return the error."""
    ledger = getattr(group, "ledger", None)
    return error if ledger is None or step is None else ledger.explain(error, step, collective)


def _publish(wait: Wait) -> Callable[[], None]:
    ledger = getattr(wait.group, "ledger", None)
    if ledger is None:
        return lambda: None
    end: Callable[[], None] = ledger.show_wait(f"{wait.step} at {program_line(sys._getframe(2))}", wait.deadline)
    return end


pending_waits.publish = _publish


class ActSequence:
    """One sequence of acts; made by :meth:`Ledger.claim`. The owner's lock must be held during every call that enters,
    compares or publishes.

    Args:
        ledger: The ledger.
        index: The number of the sequence.
        name: The kind of the arena; see :class:`DivergenceError`.

    Attributes:
        index: The number of the sequence in the ledger.
        mark: One word. The low 32 bits are 0, or 1 + the rank that has found a difference. Two bytes above are flags: a
            rank has raised the error; a rank relies on acts that this rank had not made.
        enter: ``enter(number, digest, text_id)`` publishes act ``number`` (from 1) with the rolling hash ``digest``,
            and compares. It returns whether :meth:`look` must be called.
        add_text: See :meth:`Ledger.add_text`.
        known: What the owner remembers of call sites, with ids of texts: by name, fingerprint of the layout, and the
            ids of the code objects and the instructions of a frame and of its caller.
        find: ``find(name, fingerprint, frame)`` looks that up; None if it is not there.
        forget: Clears :attr:`known`.
        is_ahead: Whether a neighbour was so far behind at the last look that its acts may not find this rank's words.
    """

    def __init__(self, ledger: Ledger, index: int, name: str) -> None:
        self.index = index
        self._ledger, self._name = ledger, name
        self.mark = _word(ledger.memory[ledger.rank], _MARKS, index)
        self._heads = [_word(memory, _HEADS, index) for memory in ledger.memory]
        at, ids = _RINGS + 8 * RING * index, _IDS + 4 * RING * index
        self._rings = [memory[at : at + 8 * RING].cast("Q") for memory in ledger.memory]
        self._ids = [memory[ids : ids + 4 * RING].cast("I") for memory in ledger.memory]
        rank, neighbours = ledger.rank, ledger.neighbours
        self._own = self._rings[rank]
        self.known: dict[Any, Any] = {}
        places = self._own, self._ids[rank], self._heads[rank], self.mark
        ring = _ring_type()(*places, tuple(self._rings[peer] for peer in neighbours), self.known)
        self.find: Callable[[str | None, int, FrameType], Any] = ring.find
        self.forget: Callable[[], None] = ring.forget
        self.enter: Callable[[int, int, int], bool] = ring.enter
        self.add_text = ledger.add_text
        self.is_ahead = False
        # Hashes of the acts after `_before` that the ring may have lost, but that a neighbour may not have made yet.
        self._history = array("I")
        self._before = 0
        self._at_timeout: dict[int, tuple[int, int]] = {}  # by late rank: acts of this rank and of that one
        self._neighbours = neighbours
        others = [peer for peer in range(ledger.size) if peer != rank]
        self._relied_on = {peer: _word(ledger.memory[peer], _RELIED_ON, index) for peer in others}
        self._own_relied_on = _word(ledger.memory[rank], _RELIED_ON, index)
        self._compared = dict.fromkeys(others, 0)  # the latest act of a rank that was found equal
        self._awaited = dict.fromkeys(others, -1)  # acts of a rank when a wait for it ran out

    def publish(self, error: SymmemError) -> None:
        """Let every rank raise this error with its next call."""
        self._ledger.publish(error, self.index)

    def note_raised(self) -> None:
        """Let every rank raise the error with its next act too, because this rank has raised it."""
        self._ledger.flag(self.index, _IS_RAISED, range(self._ledger.size))

    @property
    def is_found(self) -> bool:
        """Whether a rank has found a difference."""
        return self.mark[0] & _LOW != 0

    @property
    def is_raised(self) -> bool:
        """Whether a rank has raised the error."""
        return self.mark[0] >> 8 * _IS_RAISED & 1 != 0

    @property
    def is_relied_on(self) -> bool:
        """Whether a rank relies on an act that comes after all acts that this rank has compared."""
        compared = max(self._compared.values(), default=0)
        return any(word[0] > compared for word in self._relied_on.values())

    def uncompared(self, number: int, ranks: Iterable[int]) -> list[int]:
        """The other ranks among these that this rank has not compared an act with."""
        return [rank for rank in ranks if self._compared.get(rank, number) < number]

    def await_ranks(self, number: int, ranks: Iterable[int], seconds: float) -> None:
        """Wait until other ranks have made an act too, or a rank has found a difference.

        A wait that runs out raises nothing. A rank that has made no act since then is not waited for again.

        Args:
            number: The act.
            ranks: The ranks.
            seconds: How long to wait at most.
        """
        deadline = time.monotonic() + seconds
        for rank in ranks:
            head = self._heads[rank]
            while self._is_behind(rank, number) and not self.is_found:
                if self._awaited[rank] == head[0]:
                    break
                if time.monotonic() > deadline:
                    self._awaited[rank] = head[0]
                    break
                time.sleep(1e-4)

    def rely_on(self, number: int, ranks: Iterable[int], latest: int) -> None:
        """Compare an act with other ranks, before this rank uses their memory. Those that are behind compare later.

        Args:
            number: The act that made the memory.
            ranks: The ranks.
            latest: This rank's latest act.

        Raises:
            DivergenceError: See :meth:`look`.
        """
        self._remember(latest)
        for rank in ranks:
            if self._is_behind(rank, number):
                self._own_relied_on[0] = max(self._own_relied_on[0], number)
                full_fence()
                self._ledger.flag(self.index, _IS_RELIED_ON, [rank])
                full_fence()
            if not self._is_behind(rank, number):
                self._compare(rank, latest)

    def _is_behind(self, rank: int, number: int) -> bool:
        return 0 < (number - (self._heads[rank][0] >> 32)) & _LOW < 0x80000000

    def look(self, number: int) -> None:
        """Look closer: at the mark of this rank, and at the latest acts of the neighbours.

        Args:
            number: This rank's latest act.

        Raises:
            DivergenceError: The ranks differ. All ranks raise it, with their next act or call at the latest.
        """
        if self.is_found:
            error = self._ledger.published((self.mark[0] & _LOW) - 1, self.index)
            assert error is not None  # it was written before the mark
            raise error
        self._remember(number)
        for neighbour in self._neighbours:
            self._compare(neighbour, number)
        if self.mark[0] >> 8 * _IS_RELIED_ON & 1:
            self._compare_with_relying(number)
        self.is_ahead = number - min(map(self._compared.__getitem__, self._neighbours), default=number) >= RING // 2
        behind = [(number - (self._heads[rank][0] >> 32)) & _LOW for rank in self._compared]
        settled = number - max((each for each in behind if each < 0x80000000), default=0) - RING
        if settled > self._before:
            del self._history[: settled - self._before]
            self._before = settled

    def _compare_with_relying(self, number: int) -> None:
        """Compare with the ranks that rely on acts of this rank. Forget the flag when it has made these acts."""
        for rank, relied_on in self._relied_on.items():
            if relied_on[0] > self._compared[rank]:
                self._compare(rank, number)
        if all(relied_on[0] <= number for relied_on in self._relied_on.values()):
            own = self._ledger.rank
            self._ledger.flag(self.index, _IS_RELIED_ON, [own], 0)
            full_fence()
            if any(relied_on[0] > number for relied_on in self._relied_on.values()):  # a rank has just set it
                self._ledger.flag(self.index, _IS_RELIED_ON, [own])

    def compare_counts(self, number: int, late: Sequence[int]) -> None:
        """Compare the number of acts, after ranks have not come to a barrier in time.

        If such a rank waits in a barrier too, and has made more acts or fewer, one of the two may have skipped some: it
        waits with another tensor. The same if the rank was as many acts behind at the last timeout: it has made as many
        acts since, and did not come to either barrier.

        Args:
            number: This rank's latest act.
            late: The ranks.

        Raises:
            DivergenceError: The numbers differ. All ranks raise it, with their next act or call at the latest.
        """
        waits = self._ledger.waits_of(late, rounds=False)
        for rank in late:
            made, text = self._heads[rank][0] >> 32, waits.get(rank, "")
            before, self._at_timeout[rank] = self._at_timeout.get(rank), (number & _LOW, made)
            is_waiting = text.startswith("barrier on channel")
            stays = before is not None and before[1] < made and before[0] - before[1] == (number & _LOW) - made
            if made != number & _LOW and (is_waiting or stays):
                self._at_timeout.clear()
                does = f"waits in {text}" if is_waiting else "was as far behind at the timeout before"
                raise self._found(
                    f"the ranks have made different numbers of allocations from the arena of {self._name}: rank "
                    f"{self._ledger.rank} has made {number & _LOW}, rank {rank} has made {made} and {does}",
                    (rank,),
                )

    def _remember(self, number: int) -> None:
        """Copy hashes from the ring. Called at least twice per ring, so that no hash is lost."""
        known = self._before + len(self._history)
        self._history.extend(self._own[n % RING] & _LOW for n in range(known + 1, number + 1))

    def _compare(self, neighbour: int, number: int) -> None:
        """Compare the latest act that this rank and a neighbour have both made."""
        head = self._heads[neighbour][0]
        behind = (number - (head >> 32)) & _LOW
        if behind >= 0x80000000:  # it is ahead: take its word of this rank's latest act, if it is still there
            head = self._rings[neighbour][number % RING]
            if head >> 32 != number & _LOW:
                return
            behind = 0
        last = number - behind
        if last > self._compared[neighbour]:
            if self._history[last - self._before - 1] != head & _LOW:
                raise self._diverged(neighbour, last)
            self._compared[neighbour] = last

    def _diverged(self, neighbour: int, last: int) -> DivergenceError:
        """The error for a difference in the acts up to ``last``."""
        first = max(self._compared[neighbour], last - RING) + 1
        number = next((n for n in range(first, last) if self._differs(neighbour, n)), last)
        acts = {rank: self._text(rank, number) for rank in range(self._ledger.size)}
        acted = {rank: text for rank, text in acts.items() if text is not None}
        text, _ = differing([text or self._absence(rank, number) for rank, text in acts.items()])
        if len(set(acted.values())) == 1:  # for example after an interrupt
            text += "; the calls are the same, but their places in memory differ"
        _, others = differing(list(acted.values()))
        peers = tuple(list(acted)[other] for other in others)
        return self._found(
            f"the ranks have allocated differently from the arena of {self._name}; the first difference is "
            f"allocation {number}: {text}",
            peers,
        )

    def _found(self, what: str, peers: tuple[int, ...]) -> DivergenceError:
        """Make the error for a difference, and publish it to all ranks."""
        error = DivergenceError(
            what[:_LONGEST],
            hint="all ranks must allocate the same from an arena, in the same order and from the same lines. If the "
            "lines differ on purpose, give the tensors the same name=. If only some ranks need a tensor, allocate it "
            "with arena=False, or in a group of these ranks",
            peers=peers,
            arena=self._name,
        )
        error.located(rank=self._ledger.rank, group=self._ledger.name, step="allocate")
        self.publish(error)
        return error

    def _differs(self, neighbour: int, number: int) -> bool:
        word = self._rings[neighbour][number % RING]
        return word >> 32 == number & _LOW and self._history[number - self._before - 1] != word & _LOW

    def _text(self, rank: int, number: int) -> str | None:
        """The text of a rank's act; None if its ring does not have the act."""
        at = number % RING
        text_id, word = self._ids[rank][at], self._rings[rank][at]
        return self._ledger.text_of(rank, text_id) if word >> 32 == number & _LOW else None

    def _absence(self, rank: int, number: int) -> str:
        before = (self._heads[rank][0] >> 32) - number & _LOW >= 0x80000000
        return "nothing yet" if before else "one that is forgotten"


class PythonRing:
    """The same as ``Ring`` in ``native/ledger.c``, for machines without a C compiler."""

    def __init__(
        self,
        own: memoryview,
        ids: memoryview,
        head: memoryview,
        mark: memoryview,
        neighbours: tuple[memoryview, ...],
        known: dict[Any, Any] | None = None,
    ) -> None:
        self._own, self._ids, self._head, self._mark, self._neighbours = own, ids, head, mark, neighbours
        self._known = {} if known is None else known
        self.forget = self._known.clear

    def find(self, name: str | None, fingerprint: int, frame: FrameType) -> Any:
        """See :attr:`ActSequence.find`."""
        outer = frame.f_back or frame
        key = name, fingerprint, id(frame.f_code), frame.f_lasti, id(outer.f_code), outer.f_lasti
        return self._known.get(key)

    def enter(self, number: int, digest: int, text_id: int) -> bool:
        """See :attr:`ActSequence.enter`."""
        at, word = number % RING, (number & _LOW) << 32 | digest & _LOW
        self._ids[at] = text_id
        self._own[at] = self._head[0] = word
        full_fence()
        look = not number % (RING // 2) or self._mark[0] != 0
        for ring in self._neighbours:
            other = ring[at]
            look |= other != word and other >> 32 == word >> 32
        return look


def _ring_type() -> Any:
    return getattr(native.module(), "Ring", PythonRing)
