"""The rendezvous of one block of memory: compare, map, agree."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from symmem.errors import ClosedError, MismatchError
from symmem.group import Collective, Group, differing
from symmem.version import VERSION

if TYPE_CHECKING:
    from symmem.layout import Layout
    from symmem.live import Block

__all__ = ["rendezvous"]

_HINTS = {
    "symmem": "install the same version of symmem on all ranks",
    "backend": "choose one backend for all ranks, by argument, environment or SYMMEM_CONFIG",
}


def rendezvous(block: Block, layout: Layout, group: Group, timeout: float | None) -> None:
    """Let all ranks of ``group`` reach each other's memory. Collective.

    ``layout`` is what must be the same everywhere: of the block, or of a view of it.

    Raises:
        MismatchError: On all ranks, before any memory is mapped: versions, backends, shapes, strides, dtypes or
            offsets differ.
        SymmemError: On all ranks: what else failed on any of them.
    """
    allocation, mapping = block.allocation, block.mappings.get(group)
    card = {
        "symmem": VERSION,
        "backend": allocation.backend.name,
        "dtype": str(layout.dtype),
        "shape": list(layout.sizes),
        "strides": list(layout.strides),
        "offset in bytes": layout.offset,
        "allocated bytes": allocation.nbytes,
    }
    with group.collective("rendezvous", timeout) as collective:
        # A rank that failed after all had agreed is alone without a mapping: then all map anew.
        if not _compare(collective, card, mapping is not None) or mapping is None:
            mapping = allocation.backend.rendezvous(allocation, collective)
    block.mappings[group] = mapping
    block.compared.add((group, layout))
    if block.closed:  # by another thread, meanwhile; looked at last, so that one of the two lets go of the mapping
        block.close()
        raise ClosedError(
            "the tensor was closed during its rendezvous", rank=group.rank, group=group.name, step="rendezvous"
        )


def _compare(collective: Collective, card: dict[str, object], mapped: bool) -> bool:
    """Raise unless all ranks have the same card; returns whether all are mapped."""
    received = collective.exchange("compare", json.dumps({**card, "mapped": mapped}).encode())
    cards = [json.loads(contribution.payload) for contribution in received]
    for key in card:
        values = [json.dumps(card.get(key)) for card in cards]
        if len(set(values)) > 1:
            text, peers = differing(values)
            raise MismatchError(
                f"ranks disagree on {key!r}: {text}",
                hint=_HINTS.get(key, "all ranks must allocate alike and rendezvous in the same order"),
                peers=peers,
            )
    return all(card["mapped"] for card in cards)
