"""What the ranks of a group know about each other before they have joined.

When a rank makes a group, it writes to the store which process it is. So the others can watch that process while they
wait for it. A rank that will not come leaves a note: its configuration is wrong, or its process ends. A rank that waits
at the store looks at the processes and at the note, instead of waiting for its whole timeout.

All of this is best effort. It never waits long, and never fails the rank that writes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symmem.backends.libc import Descriptor, close_all
from symmem.backends.untraced import untraced
from symmem.errors import PeerLostError, SymmemError, from_wire, to_wire
from symmem.group import loss_notices
from symmem.group.transports import NotComingError, watch_process, within

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["Presence", "RankProcess", "ProcessWatch"]

ALL = 16
"""Up to this size of a group, every rank watches all others until they have joined; else it watches the rank before it,
so that the number of requests to the store grows linearly."""

_BRIEF = 0.3  # seconds that a rank waits for the store to take a note
_ABSENT = "absent"  # no value of a key
_STARTED = 19  # the field of a process's status that says when it started


class ProcessWatch:
    """Notices the end of the ranks' processes, by a pidfd per rank. Any thread may ask."""

    def __init__(self) -> None:
        self._ranks: dict[int, int] = {}  # by pidfd
        self._watched: dict[int, int] = {}  # the same without this rank
        self._functions: list[Callable[[int], None]] = []
        self._poll = select.poll()
        # Threads must not use a poll object at the same time, and its descriptors must stay open meanwhile.
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._ranks).atexit = False

    def add(self, rank: int, descriptor: int, watched: bool = True) -> None:
        """Take ownership of a rank's pidfd. If ``watched`` is false, it is only kept: it is this process's own."""
        with self._lock:
            self._ranks[descriptor] = rank
            if watched:
                self._watched[descriptor] = rank
                self._poll.register(descriptor, select.POLLIN)
                for function in self._functions:
                    loss_notices.notify(descriptor, functools.partial(function, rank))

    def lost(self) -> tuple[int, ...]:
        """Return the ranks with an ended process."""
        with self._lock:
            return tuple(sorted(self._ranks[descriptor] for descriptor, _event in self._poll.poll(0)))

    def when_lost(self, function: Callable[[int], None]) -> None:
        """Call ``function(rank)`` when the process of a rank ends, or has ended; see :meth:`RankGroup.when_lost`."""
        with self._lock:
            self._functions.append(function)
            for descriptor, rank in self._watched.items():
                loss_notices.notify(descriptor, functools.partial(function, rank))

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock:
            self._poll = select.poll()
            self._watched.clear()
            _close_all(self._ranks)

    def renew_lock(self) -> None:
        """Replace the lock in a forked child, where the thread that held it does not exist."""
        self._lock = threading.Lock()


@untraced
def _close_all(ranks: dict[int, int]) -> None:
    descriptors = tuple(ranks)
    ranks.clear()
    for descriptor in descriptors:
        loss_notices.forget(descriptor)
    close_all(descriptors)


@dataclass(frozen=True)
class RankProcess:
    """A process, for others on the same host.

    Attributes:
        boot: The boot id of the kernel.
        namespace: The inode of the PID namespace, in which ``pid`` has its meaning.
        pid: The process id.
        started: When the process started, in the kernel's unit. A process that reuses the id has another value.
    """

    boot: str
    namespace: int
    pid: int
    started: int

    @classmethod
    def here(cls) -> RankProcess:
        """Return this process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> RankProcess:
        """Return a process that this one sees."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot, os.stat("/proc/self/ns/pid").st_ino, pid, int(_status(pid)[_STARTED]))

    def has_ended(self) -> bool:
        """Whether a process that this one sees has ended, also if its parent has not collected it yet."""
        try:
            status = _status(self.pid)
        except OSError:
            return True
        return status[0] in "ZX" or int(status[_STARTED]) != self.started

    def watch(self) -> Descriptor | None:
        """Return a descriptor that becomes readable when the process ends; None if it cannot be watched from here.

        Raises:
            ProcessLookupError: The process has ended.
        """
        here = RankProcess.here()
        if (self.boot, self.namespace) != (here.boot, here.namespace) or self.pid == here.pid:
            return None
        descriptor = watch_process(self.pid)
        if descriptor is None:
            os.kill(self.pid, 0)  # raises if there is no such process
            return None
        started = self.started
        with contextlib.suppress(OSError):  # a system may hide the processes of other users
            started = int(_status(self.pid)[_STARTED])
        if started != self.started:
            descriptor.close()
            raise ProcessLookupError(self.pid)
        return descriptor


def _status(pid: int) -> list[str]:
    """The fields of a process that follow its name, from its state on. The name may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Presence:
    """The processes and the note of one group in the store.

    Args:
        store: The store that all ranks share.
        prefix: The beginning of the group's keys, without the generation.
        rank: This process's rank.
        size: Number of ranks.
        lost_elsewhere: Returns the ranks with a process that has ended, as other groups of this process know. It may
            list ranks of which a new process has come.
    """

    def __init__(
        self, store: Store, prefix: str, rank: int, size: int, lost_elsewhere: Callable[[], Iterable[int]]
    ) -> None:
        self._store: Any = store
        self._prefix, self._rank, self._size = prefix, rank, size
        self._lost_elsewhere = lost_elsewhere
        self._generation: int | None = None  # the last one in which this process is written
        self._watch = ProcessWatch()
        self._known: dict[int, bool] = {}  # whether the process of a rank lives, or may live; by rank

    def announce(self, error: SymmemError | None = None) -> None:
        """Write that this rank has made the group; or that it cannot, because of ``error``."""
        self._briefly(self._announce, error)

    def end(self, reason: str) -> None:
        """Write that the process of this rank ends."""
        if self._generation is not None:
            what = f"rank {self._rank}'s process ended{reason}"
            hint = f"look at the log of rank {self._rank} for the first error; then restart the job"
            self._briefly(self._write_note, PeerLostError(what, hint=hint, peers=(self._rank,)))

    def come(self, generation: int) -> None:
        """Write that this rank is about to join in a generation. The caller limits the time."""
        if self._generation != generation:
            self._write(generation)

    def leave(self) -> None:
        """Delete what this rank has written, and stop watching: the ranks have joined."""
        if self._generation is not None:
            self._briefly(self._store.delete_key, self._key("process", self._rank))
        self.close()

    def close(self) -> None:
        """Stop watching."""
        self._known.clear()
        self._watch.close()

    def renew_lock(self) -> None:
        """See :meth:`ProcessWatch.renew_lock`."""
        self._watch.renew_lock()

    def check(self) -> None:
        """Look whether all ranks can still come. The caller limits the time.

        Raises:
            NotComingError: A rank cannot.
        """
        if (note := self._peek(self._key("note"))) is not None:
            raise NotComingError(from_wire(note["error"]))
        everyone = self._size <= ALL
        for rank in range(self._size) if everyone else ((self._rank - 1) % self._size,):
            self._look(rank)
        gone = {rank for rank, lives in self._known.items() if not lives} | {*self._watch.lost()}
        for rank in self._lost_elsewhere():
            self._look(rank)
            if not self._known.get(rank):
                gone.add(rank)
        if gone:
            named = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, sorted(gone)))}"
            raise NotComingError(
                PeerLostError(
                    f"the process of {named} ended",
                    hint=f"look at the log of {named} for the first error; then restart the job. If another process "
                    "replaces it, close the groups of the old one first",
                    peers=tuple(sorted(gone)),
                )
            )

    def _look(self, rank: int) -> None:
        """Begin to watch the process of a rank, if it has come."""
        if rank == self._rank or rank in self._known or (found := self._peek(self._key("process", rank))) is None:
            return
        try:
            descriptor = RankProcess(**found).watch()
        except ProcessLookupError:
            self._known[rank] = False
            return
        self._known[rank] = True
        if descriptor is not None:
            self._watch.add(rank, descriptor)

    def _announce(self, error: SymmemError | None) -> None:
        # A group joins in the generation after those that this rank has joined in.
        self._write(self._store.add(f"{self._prefix}/met/{self._rank}", 0) + 1)
        if error is not None:
            self._write_note(error)
        elif (note := self._peek(self._key("note"))) is not None and note["rank"] == self._rank:
            self._store.delete_key(self._key("note"))

    def _write(self, generation: int) -> None:
        self._generation = generation
        self._store.set(self._key("process", self._rank), json.dumps(asdict(RankProcess.here())).encode())

    def _peek(self, key: str) -> Any:
        """The value of a key; None if there is none. Does not wait, as get() does if another rank deletes the key."""
        value = self._store.compare_set(key, _ABSENT, _ABSENT)  # changes nothing
        return None if value == _ABSENT.encode() else json.loads(value)

    def _write_note(self, error: SymmemError) -> None:
        self._store.set(self._key("note"), json.dumps({"rank": self._rank, "error": to_wire(error)}).encode())

    def _key(self, *names: object) -> str:
        return "/".join(map(str, (self._prefix, self._generation, *names)))

    def _briefly(self, call: Callable[..., object], *arguments: object) -> None:
        if self._size > 1:
            with contextlib.suppress(Exception):
                within(time.monotonic() + _BRIEF, call, *arguments, patience=0.0)
