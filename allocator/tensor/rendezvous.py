"""The rendezvous of one block of memory: compare metadata, map peers' memory, agree on the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from symmem.arena.arena import used_arenas
from symmem.arena.reclaim import ReclaimRound
from symmem.backends.base import Capability
from symmem.errors import ClosedError, MismatchError, UnsupportedError
from symmem.group.agreement import CollectiveOperation
from symmem.group.compare import compare
from symmem.group.group import Group
from symmem.memory import cuda_graphs
from symmem.version import VERSION

if TYPE_CHECKING:
    from symmem.memory.block import Block
    from symmem.memory.layout import Layout

__all__ = ["rendezvous"]

_HINTS = {
    "symmem": "install the same version of symmem on all ranks",
    "bytes of the signal pad": "before the ranks allocate, set the same size of signal pads on all, and enable "
    "symmem.torch_backend on all or on none",
    "backend": "choose one backend for all ranks, by argument, environment or SYMMEM_CONFIG",
}


def _check_second_group(block: Block, group: Group) -> None:
    """Raise UnsupportedError on all ranks if the backend supports one group per tensor and this would be another."""
    backend, groups = block.allocation.backend, block.groups
    if groups and group not in groups and Capability.SECOND_GROUP not in backend.capabilities:
        raise UnsupportedError(
            f"memory of the backend {backend.name!r} belongs to one group; this tensor belongs to {groups[0].name!r}",
            hint="allocate another tensor for this group, or choose a backend that has `second_group` "
            "(`symmem doctor` lists what each can do)",
            rank=group.rank,
            group=group.name,
            step="rendezvous",
        )


def rendezvous(block: Block, layout: Layout, group: Group, timeout: float | None) -> None:
    """Let all ranks of ``group`` reach each other's memory. Collective.

    ``layout`` must be the same on all ranks: the block's layout, or the layout of a view.

    A tensor of an arena maps the arena's whole segment, once per group. A further group of an arena's tensor uses
    separate signal pads.

    Raises:
        MismatchError: Versions, backends, shapes, strides, dtypes or offsets differ. All ranks raise it before any
            memory is mapped.
        UnsupportedError: The backend supports only one group per tensor.
        SymmemError: Any other error on any rank; all ranks raise it.
    """
    _check_second_group(block, group)
    allocation, mapping = block.allocation, block.mapping_for(group)
    metadata = {
        "symmem": VERSION,
        "backend": allocation.backend.name,
        "dtype": str(layout.dtype),
        "shape": list(layout.sizes),
        "strides": list(layout.strides),
        "offset in bytes": block.offset + layout.offset,
        # Before the sum that may include it.
        "bytes of the signal pad": allocation.pad_nbytes or allocation.backend.pad_nbytes(group.size),
        "allocated bytes": allocation.nbytes,
        "group of the arena": block.home and block.home[:2],
    }
    # The same round reclaims what all ranks have dropped from the group's arenas.
    with ReclaimRound([arena.log for arena in used_arenas(group)]) as reclaim_round:
        with group.collective("rendezvous", timeout) as collective:
            cuda_graphs.refuse(allocation.device, "a first rendezvous cannot be made")
            state: dict[str, Any] = {
                "mapped": mapping is not None,
                "dropped": block.dropped_pads(group),
                "arenas": reclaim_round.metadata(),
                "home": block.home and block.home[2],
                "line": collective.line if block.home else f"{collective.line}, allocated at {block.site}",
            }
            received = compare(
                collective,
                metadata,
                state,
                hint="all ranks must make the same allocations and rendezvous in the same order",
                hints=_HINTS,
            )
            if block.home and len({peer["home"] for peer in received}) < group.size:
                raise MismatchError(
                    f"the ranks do not share an arena: each has one of a group that is named {block.home[0]!r}",
                    hint="allocate in the arena of a group that has all of these ranks, or with arena=False",
                )
            reclaim_round.agree(collective, [peer["arenas"] for peer in received])
            # A rank that failed after the others had agreed has no mapping; then all ranks map again.
            if mapping is None or not all(peer["mapped"] for peer in received):
                mapping = allocation.backend.rendezvous(allocation, collective)
                mapping.serial = collective.serial
            pads = _pads(block, group, collective, [peer["dropped"] for peer in received])
        reclaim_round.apply()
    block.enter(group, mapping, pads)
    block.compared |= {block.key(group, layout)}
    if block.closed:  # another thread closed it; checked last, so that one of the two threads drops the mapping
        block.close()
        raise ClosedError(
            "the tensor was closed during its rendezvous", rank=group.rank, group=group.name, step="rendezvous"
        )


def _pads(block: Block, group: Group, collective: CollectiveOperation, dropped: list[list[int] | None]) -> list[int]:
    """Return the offset of every rank's signal pad for a further group; empty if the mapping has the pads."""
    known = [set(slots) for slots in dropped if slots is not None]
    if len(known) < group.size:
        return []
    block.free_pads(group, sorted(set.intersection(*known)))  # all ranks have dropped these tensors
    with collective.exchange("pads", str(block.pad_for(group)).encode()) as received:
        return [int(contribution.payload) for contribution in received]
