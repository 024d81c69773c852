"""A store of a job that notes what is asked of it, and by which rank."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

__all__ = ["Ledger", "RankStore", "Request"]


class Request(NamedTuple):
    """One call of the store.

    Attributes:
        rank: Who called.
        operation: ``set``, ``add``, ``get``, ``multi_get``, ``wait``, ``check`` or ``delete``.
        step: The round whose keys it was about, from 1; 0 for the count of groups of one name.
        sent: Bytes of the names of keys, and of the value.
        received: Bytes of the values that came back.
        made: 1 if the key was not there before.
        missed: 1 if the key to delete was not there.
    """

    rank: int
    operation: str
    step: int
    sent: int
    received: int
    made: int
    missed: int


class Ledger:
    """The store of a whole job, and a note of each request to it.

    Attributes:
        store: What holds the keys.
        most: The largest number of keys that were there at a time.
    """

    def __init__(self) -> None:
        # Any: torch's stubs leave out bytes as values.
        self.store: Any = dist.HashStore()  # type: ignore[attr-defined]
        self.most = 0
        self._keys: set[str] = set()
        self._requests: list[Request] = []
        self._lock = threading.Lock()

    @property
    def keys(self) -> int:
        """Number of keys that are there now."""
        return len(self._keys)

    def note(self, rank: int, operation: str, keys: Sequence[str], sent: int = 0, received: int = 0) -> None:
        """Enter a request that was answered."""
        *_, step, _name = keys[0].split("/")
        number = 0 if step == "met" else int(step)
        with self._lock:
            there = keys[0] in self._keys
            made, missed = operation in ("set", "add") and not there, operation == "delete" and not there
            if made:
                self._keys.add(keys[0])
                self.most = max(self.most, len(self._keys))
            elif operation == "delete":
                self._keys.discard(keys[0])
            sent += sum(map(len, keys))
            self._requests.append(Request(rank, operation, number, sent, received, made, missed))

    def take(self) -> list[Request]:
        """The requests since this was called last."""
        with self._lock:
            taken, self._requests = self._requests, []
        return taken


class RankStore(Store):
    """The store of the job as one rank has it. What is not here, symmem does not call; torch then raises.

    Attributes:
        called: Set once the rank has made its first request.
    """

    def __init__(self, ledger: Ledger, rank: int) -> None:
        super().__init__()
        self.called = threading.Event()
        self._ledger, self._rank, self._store = ledger, rank, ledger.store

    def set(self, key: str, value: Any) -> None:
        """One request."""
        self._store.set(key, value)
        self._ledger.note(self._rank, "set", [key], sent=len(value))

    def add(self, key: str, value: int) -> int:
        """One request; integers count as 8 bytes."""
        self.called.set()
        total: int = self._store.add(key, value)
        self._ledger.note(self._rank, "add", [key], sent=8, received=8)
        return total

    def get(self, key: str) -> bytes:
        """One request."""
        value: bytes = self._store.get(key)
        self._ledger.note(self._rank, "get", [key], received=len(value))
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """One request for all keys."""
        values: list[bytes] = self._store.multi_get(keys)
        self._ledger.note(self._rank, "multi_get", keys, received=sum(map(len, values)))
        return values

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """One request, however long it takes."""
        self._store.wait(keys, timeout or timedelta(seconds=60))
        self._ledger.note(self._rank, "wait", keys)

    def check(self, keys: list[str]) -> bool:
        """One request for all keys."""
        there: bool = self._store.check(keys)
        self._ledger.note(self._rank, "check", keys)
        return there

    def delete_key(self, key: str) -> bool:
        """One request."""
        deleted: bool = self._store.delete_key(key)
        self._ledger.note(self._rank, "delete", [key])
        return deleted

    def has_extended_api(self) -> bool:
        """As TCPStore; asks nothing of the server."""
        return True
