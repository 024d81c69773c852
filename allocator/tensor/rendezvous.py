"""The rendezvous of one block of memory: compare, map, agree."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from symmem.arena.reclaim import Meeting, arenas_of
from symmem.errors import ClosedError, MismatchError
from symmem.group.group import Collective, Group, differing
from symmem.memory import cuda_graphs
from symmem.version import VERSION

if TYPE_CHECKING:
    from symmem.memory.block import Block
    from symmem.memory.layout import Layout

__all__ = ["rendezvous"]

_HINTS = {
    "symmem": "install the same version of symmem on all ranks",
    "backend": "choose one backend for all ranks, by argument, environment or SYMMEM_CONFIG",
}


def rendezvous(block: Block, layout: Layout, group: Group, timeout: float | None) -> None:
    """Let all ranks of ``group`` reach each other's memory. Collective.

    ``layout`` is what must be the same everywhere: of the block, or of a view of it.

    For a tensor of an arena, the memory as a whole is mapped once for each group, and the signal pads of a further
    group are this tensor's.

    Raises:
        MismatchError: On all ranks, before any memory is mapped: versions, backends, shapes, strides, dtypes or
            offsets differ.
        SymmemError: On all ranks: what else failed on any of them.
    """
    allocation, mapping = block.allocation, block.mapping_for(group)
    card = {
        "symmem": VERSION,
        "backend": allocation.backend.name,
        "dtype": str(layout.dtype),
        "shape": list(layout.sizes),
        "strides": list(layout.strides),
        "offset in bytes": block.offset + layout.offset,
        "allocated bytes": allocation.nbytes,
        "group of the arena": block.home and block.home[:2],
    }
    # The ranks meet anyway: so they settle as well what became of the group's arenas.
    with Meeting(arenas_of(group)) as meeting:
        with group.collective("rendezvous", timeout) as collective:
            cuda_graphs.refuse(allocation.device, "a first rendezvous cannot be made")
            told: dict[str, Any] = {
                "mapped": mapping is not None,
                "dropped": block.dropped_pads(group),
                "arenas": meeting.card(),
                "home": block.home and block.home[2],
            }
            cards = _compare(collective, card, told)
            if block.home and len({each["home"] for each in cards}) < group.size:
                raise MismatchError(
                    f"the ranks do not share an arena: each has one of a group that is named {block.home[0]!r}",
                    hint="allocate in the arena of a group that all of them are in, or with arena=False",
                )
            meeting.agree(collective, [each["arenas"] for each in cards])
            # A rank that failed after all had agreed is alone without a mapping: then all map anew.
            if mapping is None or not all(each["mapped"] for each in cards):
                mapping = allocation.backend.rendezvous(allocation, collective)
                mapping.serial = collective.serial
            pads = _pads(block, group, collective, [each["dropped"] for each in cards])
        meeting.settle()
    block.enter(group, mapping, pads)
    block.compared |= {block.key(group, layout)}
    if block.closed:  # by another thread, meanwhile; looked at last, so that one of the two lets go of the mapping
        block.close()
        raise ClosedError(
            "the tensor was closed during its rendezvous", rank=group.rank, group=group.name, step="rendezvous"
        )


def _pads(block: Block, group: Group, collective: Collective, dropped: list[list[int] | None]) -> list[int]:
    """Offset of each rank's signal pad for a further group of an arena's tensor; none if the mapping has its own."""
    known = [set(slots) for slots in dropped if slots is not None]
    if len(known) < group.size:
        return []
    block.free_pads(group, sorted(set.intersection(*known)))  # of tensors that all ranks of the group have dropped
    with collective.exchange("pads", str(block.pad_for(group)).encode()) as received:
        return [int(contribution.payload) for contribution in received]


def _compare(collective: Collective, card: dict[str, Any], told: dict[str, Any]) -> list[dict[str, Any]]:
    """Raise unless all ranks have the same card; returns what they have told."""
    received = collective.exchange("compare", json.dumps({**card, **told}).encode())
    cards = [json.loads(contribution.payload) for contribution in received]
    for key in card:
        values = [json.dumps(each.get(key)) for each in cards]
        if len(set(values)) > 1:
            text, peers = differing(values)
            raise MismatchError(
                f"ranks disagree on {key!r}: {text}",
                hint=_HINTS.get(key, "all ranks must allocate alike and rendezvous in the same order"),
                peers=peers,
            )
    return cards
