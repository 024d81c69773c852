"""What ranks tell each other of their arenas when they meet: what they have allocated, and what they have dropped.

Each rank sends the number and the rolling hash of its allocations, and a mask of the slots that it has in quarantine.
A slot is the place of a live block in the arena's book, and the same on all ranks. All ranks then free the slots that
everyone has sent, in the same order. One exchange serves all of a group's arenas, however many blocks there are.

Before a rank sends a slot, its device has done all work that was enqueued: whatever used the block is over. Before a
slot is free, each rank has zeroed its signal pad if any rank has signalled with it. What is agreed takes effect once
the collective operation has succeeded on this rank; had it failed, nothing would have changed. Hence the round after
the exchange, in which the ranks agree: a rank that is interrupted amid the exchange, or whose pads cannot be zeroed,
would otherwise be left with a book of its own, and its next allocation at another offset than its peers'.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from symmem.arena.slot_mask import from_text, slots_of, to_text
from symmem.errors import DivergenceError, MismatchError
from symmem.group.group import Collective, differing
from symmem.memory import cuda_graphs

if TYPE_CHECKING:
    from symmem.arena.allocation_log import AllocationRecord
    from symmem.arena.arena import Arena
    from symmem.group.group import Group

__all__ = ["Arenas", "Meeting", "compare", "used_arenas"]


class Arenas(dict[tuple[str, torch.device], "Arena"]):
    """The arenas of one group by backend and device, oldest first; kept in ``group.extensions``."""


def used_arenas(group: Group) -> list[Arena]:
    """The arenas of a group that something was allocated from, in an order that all ranks share.

    A rank may have further arenas, from requests that failed or that asked for memory outside of arenas.
    """
    used = [arena for arena in list(group.extension(Arenas).values()) if arena.count]
    return sorted(used, key=lambda arena: (arena.backend.name, str(arena.device)))


class Meeting:
    """One meeting of a group over some of its arenas; a context manager that holds their locks.

    Args:
        arenas: The same, in the same order, on all ranks.
        trim: Whether segments in which nothing lives shall go.
    """

    def __init__(self, arenas: Sequence[Arena], trim: bool = False) -> None:
        self._arenas, self._trim = tuple(arenas), trim
        self._agreed: list[int] = []
        self._locks = contextlib.ExitStack()
        self._held = self._settling = False

    def __enter__(self) -> Meeting:
        with contextlib.ExitStack() as undo:
            for arena in self._arenas:
                undo.enter_context(arena.lock)
            self._locks = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._held and not self._settling:
            for arena in self._arenas:
                arena.amid = False
        self._locks.close()

    def hold(self, collective: Collective) -> None:
        """Exchange and agree, in a collective operation that does nothing else."""
        with collective.exchange("compare", json.dumps(self.card()).encode()) as received:
            self.agree(collective, [json.loads(contribution.payload) for contribution in received])

    def card(self) -> list[dict[str, Any]]:
        """What this rank tells."""
        cuda_graphs.forget_ended()
        for arena in self._arenas:
            arena.check_whole("meet")
        self._held = True
        for arena in self._arenas:
            arena.amid = True  # until what is agreed on has taken effect
        told = [(arena, *arena.quarantine()) for arena in self._arenas]
        for device in {arena.device for arena, dropped, _ in told if dropped and arena.device.type == "cuda"}:
            from symmem.backends.gpu import synchronize

            synchronize(device)
        return [
            {
                "arena": _kind(arena),
                "trim": self._trim,
                "number": arena.count,
                "digest": arena.digest,
                "quarantine": to_text(dropped),
                "signalled": to_text(signalled),
            }
            for arena, dropped, signalled in told
        ]

    def agree(self, collective: Collective, cards: Sequence[list[dict[str, Any]]]) -> None:
        """Compare what all ranks have told, and prepare what is to be freed. Collective if ranks have diverged.

        Raises:
            DivergenceError: On all ranks.
            MismatchError: Not all of them trim.
        """
        kinds = [[str(arena["arena"]) for arena in card] for card in cards]
        if any(kind != kinds[0] for kind in kinds):
            self._explain_kinds(collective, kinds)
        trims = [card[0]["trim"] if card else False for card in cards]
        if len(set(trims)) > 1:
            text, peers = differing(trims)
            raise MismatchError(
                f"ranks disagree on 'trim' of their arenas: {text}",
                hint="call collect() with the same arguments on all ranks",
                peers=peers,
            )
        self._agreed = []
        for arena, told in zip(self._arenas, zip(*cards, strict=True), strict=True):
            if len({(each["number"], each["digest"]) for each in told}) > 1:
                _explain(arena, collective)
            agreed = functools.reduce(operator.and_, [from_text(each["quarantine"]) for each in told])
            signalled = functools.reduce(operator.or_, [from_text(each["signalled"]) for each in told])
            arena.clean_pads(slots_of(agreed & signalled))
            self._agreed.append(agreed)

    def _explain_kinds(self, collective: Collective, kinds: Sequence[list[str]]) -> None:
        """Say which rank has allocated with a backend that others have not, and where. Collective."""
        common = set(kinds[0]).intersection(*kinds[1:])
        own = [arena for arena, kind in zip(self._arenas, kinds[collective.group.rank], strict=True)]
        only = [arena for arena in own if _kind(arena) not in common] or own
        mine = "; ".join(f"{_kind(arena)}: {next(iter(arena.records()))}" for arena in only) or "nothing"
        with collective.exchange("difference", mine.encode()) as received:
            text, peers = differing([contribution.payload.decode() for contribution in received])
        raise DivergenceError(
            f"the ranks have allocated with different backends, or on different devices: {text}",
            hint="all ranks of a group must allocate alike; what only some ranks need, allocate with arena=False or in "
            "a group of theirs",
            peers=peers,
        )

    def settle(self) -> int:
        """Free what was agreed on, once the operation has succeeded; returns bytes."""
        pairs = list(zip(self._arenas, self._agreed, strict=True))
        self._agreed = []
        self._settling = True  # an exception from here on leaves the arenas unusable
        freed = sum(arena.reclaim(agreed) for arena, agreed in pairs)
        if self._trim:
            for arena, _ in pairs:
                arena.trim()
        self._settling = False
        return freed


def _kind(arena: Arena) -> str:
    return f"{arena.backend.name} on {arena.device.type}"


def compare(arena: Arena, collective: Collective, proposed: AllocationRecord, nbytes: int, sites: bool = False) -> None:
    """Compare what the ranks have allocated from an arena, with no regard to what they have dropped. Collective.

    Args:
        arena: This rank's.
        collective: The operation in progress.
        proposed: The allocation that is to be made next.
        nbytes: What they are about to add to the arena.
        sites: Whether its call site must be the same as well.

    Raises:
        DivergenceError: On all ranks.
        MismatchError: They are to add different numbers of bytes for the same allocations.
    """
    told = [arena.count, proposed.digest, f"{proposed.site.code.co_name}:{proposed.site.line}" if sites else ""]
    with collective.exchange("compare", json.dumps([told, nbytes]).encode()) as received:
        cards = [json.loads(contribution.payload) for contribution in received]
    if any(card[0] != cards[0][0] for card in cards):
        _explain(arena, collective, proposed)
    values = [f"{card[1]} bytes" for card in cards]
    if len(set(values)) > 1:
        text, peers = differing(values)
        raise MismatchError(
            f"the arena of {arena.backend.name!r} would grow differently: by {text}",
            hint="set arena_size, arena_growth and arena_limit alike on all ranks",
            peers=peers,
        )


def _explain(arena: Arena, collective: Collective, proposed: AllocationRecord | None = None) -> None:
    """Find the first allocation in which the ranks differ, and raise the error. Collective."""
    entries = {entry.number: entry for entry in arena.records()}
    if proposed:
        entries[proposed.number] = proposed
    digests = {number: entry.digest for number, entry in entries.items()}
    with collective.exchange("history", json.dumps(list(digests.items())).encode()) as received:
        histories = [dict(json.loads(contribution.payload)) for contribution in received]
    first = max(min(history, default=1) for history in histories)  # what all remember
    last = max(max(history, default=0) for history in histories)
    number = next((n for n in range(first, last + 1) if len({history.get(n) for history in histories}) > 1), last)
    entry = entries.get(number)
    with collective.exchange("difference", str(entry or "nothing").encode()) as received:
        texts = [contribution.payload.decode() for contribution in received]
    text, peers = differing(texts)
    if len(set(texts)) == 1:  # which can come of an interrupt only
        text = f"none that is remembered (up to number {number}); where they lie, or what was freed, differs"
    forgotten = "" if first == 1 else f" since allocation {first}, before which it is not remembered"
    error = DivergenceError(
        f"the ranks have allocated differently from the arena of {arena.backend.name!r}; the first difference"
        f"{forgotten} is {'' if len(set(texts)) == 1 else f'allocation {number}: '}{text}",
        hint="all ranks of a group must allocate the same from its arena, in the same order; what only some ranks "
        "need, allocate with arena=False or in a group of theirs. allocation_check(each) finds the place at once",
        peers=peers,
    )
    raise arena.break_down(error)
