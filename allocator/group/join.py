"""The join of a group's ranks, in their first collective operation: locations, sockets, watched processes.

The first rounds go over the store. They tell every rank where the others run. If unix sockets can connect all ranks,
the later rounds go over sockets, and every rank watches the processes of the others.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from symmem.backends import descriptors as scm
from symmem.backends.descriptors import Contribution
from symmem.backends.libc import close_all
from symmem.errors import PeerLostError
from symmem.group.agreement import AgreedError, CollectiveOperation, Rounds
from symmem.group.compare import SAME_CALLS, check_equal
from symmem.group.ledger import Ledger
from symmem.group.locations import Location, Places
from symmem.group.presence import ProcessWatch
from symmem.group.sync_points import SyncPoints
from symmem.group.transports import SocketTransport, watch_process
from symmem.version import VERSION

__all__ = ["join"]

_EQUAL_SETTINGS = ("allocation_check", "collective_check")  # they decide which collective operations a rank makes


def join(rounds: Rounds, operation: CollectiveOperation, watch: ProcessWatch) -> None:
    """Join the ranks, unless they have joined. Collective.

    Args:
        rounds: The group's rounds; they use sockets afterwards if all ranks can.
        operation: The operation in progress.
        watch: Receives the processes of all ranks if they have sockets.
    """
    if rounds.joined:
        return
    rank, size = operation.group.rank, operation.group.size
    listener = scm.Listener(size) if rank == 0 else None
    with contextlib.ExitStack() as undo:
        if listener:
            undo.callback(listener.close)
        settings = operation.group.settings
        own = {
            "version": VERSION,
            "step": f"{operation.name}: join",
            "line": operation.line,
            "settings": {name: getattr(settings, name) for name in _EQUAL_SETTINGS},
            "place": asdict(Location.here()),
            "welcome": asdict(listener.welcome) if listener else None,
        }
        answer = json.loads(rounds.settle(operation, "join", json.dumps(own).encode(), _compare))
        places, welcome = Places.unpack(answer["places"]), scm.Welcome(**answer["welcome"])
        if places.are_connected:
            _connect(rounds, operation, listener, welcome)
            _exchange_processes(rounds, operation, watch)
            # If this round succeeds, all ranks have sockets; else none keeps them.
            rounds.settle(operation, "joined")
        rounds.places, rounds.identity, rounds.joined = places, welcome.address, True
        rounds.presence.leave()
        if rank == 0 and rounds.sockets is not None:
            rounds.store.forget(rounds.number)


def _connect(
    rounds: Rounds, operation: CollectiveOperation, listener: scm.Listener | None, welcome: scm.Welcome
) -> None:
    with contextlib.ExitStack() as undo:
        peers = {}
        if listener is None:
            with _last_words(rounds):
                peers = {0: scm.connect(welcome, operation.group.rank, operation.deadline)}
            undo.callback(peers[0].close)
        # After this round, the connections of all ranks are in the leader's queue.
        rounds.settle(operation, "connect")
        if listener is not None:
            peers = listener.accept()
        rounds.sockets = SocketTransport(peers)
        undo.pop_all()
    if listener is None:
        with _last_words(rounds):
            scm.check_leader(peers[0], welcome, operation.deadline)


@contextlib.contextmanager
def _last_words(rounds: Rounds) -> Iterator[None]:
    """If the block finds that rank 0 is gone, raise the error that rank 0 left behind."""
    try:
        yield
    except PeerLostError as error:
        if reason := rounds.last_words(rounds.number + 1):
            rounds.number += 1  # rank 0 did the same when it published the error
            raise AgreedError(reason) from error
        raise


def _compare(payloads: list[bytes]) -> bytes:
    """At rank 0: compare what all ranks must have alike before they do anything else, and tell where they run.

    The answer does not grow with the group, because every rank reads it.
    """
    ranks: list[dict[str, Any]] = [json.loads(payload) for payload in payloads]
    check_equal(
        [each.get("version") for each in ranks],
        "the ranks run different versions of symmem:",
        "install the same version on all hosts",
    )
    for name in _EQUAL_SETTINGS:
        check_equal(
            [each["settings"][name] for each in ranks],
            f"the setting {name!r} differs:",
            f"set {name} to the same value on all ranks; `symmem config show` says where a value comes from",
        )
    lines = [each["line"] for each in ranks]
    check_equal([repr(each["step"]) for each in ranks], "ranks are at different steps:", SAME_CALLS, lines=lines)
    places = Places.of([Location(**each["place"]) for each in ranks])
    return json.dumps({"places": places.pack(), "welcome": ranks[0]["welcome"]}).encode()


def _exchange_processes(rounds: Rounds, operation: CollectiveOperation, watch: ProcessWatch) -> None:
    """Exchange the memory of the ledger and a pidfd of every process."""
    group = operation.group
    ledger = Ledger(group.rank, group.size, group.name)
    own = watch_process(os.getpid())
    descriptors = (ledger.file,) if own is None else (ledger.file, own)
    try:
        received = rounds.exchange(operation, "watch", Contribution(b"", descriptors))
    finally:
        close_all(descriptors)
    memory = [contribution.descriptors[0] for contribution in received]
    try:
        for rank, contribution in enumerate(received):
            for descriptor in contribution.descriptors[1:]:
                watch.add(rank, descriptor, watched=rank != group.rank)
        ledger.attach(memory)
    finally:
        close_all(memory)
    rounds.ledger, rounds.sync_points = ledger, SyncPoints(ledger, group)
