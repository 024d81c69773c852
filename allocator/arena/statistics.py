"""What symmetric memory a process has: figures, and a snapshot as plain data. Nothing here is collective."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from symmem.arena.allocation_log import AllocationRecord
from symmem.arena.arena import Arena
from symmem.arena.reclaim import Arenas
from symmem.arena.segment import Segment
from symmem.arena.slot_mask import masks_of, slots_of
from symmem.group.group import GroupLike, known_groups, resolve_group
from symmem.memory import cuda_graphs
from symmem.memory.block import Block
from symmem.memory.registry import live_ranges
from symmem.version import VERSION

if TYPE_CHECKING:
    from symmem.memory.layout import Layout

__all__ = ["figures", "layout_of", "memory_snapshot", "memory_stats", "outside_of_arenas", "quiet"]

_PATIENCE = 0.1  # seconds


def memory_stats(group: GroupLike = None) -> dict[str, int | float]:
    """The figures of a group's arenas on this rank together. Local.

    Args:
        group: See :meth:`SymmetricTensor.rendezvous`.

    Returns:
        By name, in bytes unless the name says otherwise: ``reserved_bytes`` (of all segments), ``live_bytes``,
        ``peak_live_bytes`` (the sum of each arena's peak), ``quarantined_bytes`` (dropped here, and not yet by all),
        ``free_bytes``, ``largest_free_bytes``, ``fragmentation`` (the part of the free bytes outside of each
        segment's largest free block), and the numbers of ``segments``, ``live_blocks``, ``quarantined_blocks``,
        ``allocations``, ``reclaims`` (blocks that came free), ``collections`` (meetings at which they did) and
        ``growths``.
    """
    return figures(list(resolve_group(group).extension(Arenas).values()))


def memory_snapshot() -> dict[str, Any]:
    """All symmetric memory of this process as plain data that :mod:`json` can write. Local.

    Returns:
        ``arenas``: of each arena its group, rank, figures, segments with their blocks by address, live bytes by call
        site, and what happened last, by the clock ``time.perf_counter`` in seconds; if it is in the middle of a
        ``meeting``, without the blocks. ``graphs``: how many blocks are kept for each CUDA graph that lives;
        ``tensors``: what has memory of its own. ``symmem memory-map`` makes a picture of it.
    """
    return {
        "symmem": VERSION,
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "arenas": [_arena(arena) for group in known_groups() for arena in list(group.extension(Arenas).values())],
        "graphs": {str(number): blocks for number, blocks in cuda_graphs.kept().items()},
        "tensors": outside_of_arenas(),
    }


@contextlib.contextmanager
def quiet(arena: Arena) -> Iterator[bool]:
    """Keep the arena from changing; False if it is in the middle of a meeting, which may take long."""
    held = arena.lock.acquire(timeout=_PATIENCE)
    try:
        yield held
    finally:
        if held:
            arena.lock.release()


def figures(arenas: Sequence[Arena]) -> dict[str, int | float]:
    """What :func:`memory_stats` says, of these."""
    for arena in arenas:
        with quiet(arena) as held:
            if held:
                arena.look()
                arena.note()
    segments = [segment for arena in arenas for segment in arena.segments]
    stats: dict[str, int | float] = {
        "segments": len(segments),
        "reserved_bytes": sum(segment.nbytes for segment in segments),
        "live_bytes": sum(arena.live_bytes for arena in arenas),
        "peak_live_bytes": sum(arena.peak_bytes for arena in arenas),
        "quarantined_bytes": sum(arena.quarantined_bytes for arena in arenas),
        "free_bytes": sum(segment.space.free_bytes for segment in segments) + sum(a.agreed_bytes for a in arenas),
        "largest_free_bytes": max((segment.space.largest_free for segment in segments), default=0),
        "live_blocks": sum(len(segment.slots) for segment in segments)
        - sum(arena.quarantined_blocks + arena.agreed.bit_count() for arena in arenas),
        "quarantined_blocks": sum(arena.quarantined_blocks for arena in arenas),
        "allocations": sum(arena.count for arena in arenas),
        "reclaims": sum(arena.reclaimed_blocks for arena in arenas),
        "collections": sum(arena.collections for arena in arenas),
        "growths": sum(arena.growths for arena in arenas),
    }
    free = sum(segment.space.free_bytes for segment in segments)
    usable = sum(segment.space.largest_free for segment in segments)
    return stats | {"fragmentation": 1 - usable / free if free else 0.0}


def _arena(arena: Arena) -> dict[str, Any]:
    with quiet(arena) as held:
        stats = figures([arena])
        agreed = set(slots_of(arena.agreed))
        gone = set(slots_of(masks_of(arena.marks)[0]))
        live: Counter[str] = Counter()
        blocks: Counter[str] = Counter()
        for slot, entry in enumerate(arena.entries):
            if entry is not None and slot not in gone:
                site = str(AllocationRecord.of(entry).site)
                live[site] += entry[5]
                blocks[site] += 1
        return {
            "backend": arena.backend.name,
            "device": str(arena.device),
            "group": arena.group.name,
            "rank": arena.group.rank,
            "world": arena.group.size,
            "stats": stats,
            "segments": [
                {
                    "index": segment.index,
                    "nbytes": segment.nbytes,
                    "blocks": list(_blocks(arena, segment, agreed, gone)) if held else [],
                }
                for segment in arena.segments
            ],
            "meeting": not held,
            "sites": [
                {"site": site, "live_bytes": nbytes, "live_blocks": blocks[site]} for site, nbytes in live.most_common()
            ],
            "events": _events(arena),
        }


def _blocks(arena: Arena, segment: Segment, agreed: set[int], gone: set[int]) -> Iterator[dict[str, Any]]:
    for offset, nbytes, in_use in segment.space.blocks():
        slot = segment.slots.get(offset)
        if not in_use or slot in agreed:
            yield {"offset": offset, "nbytes": nbytes, "state": "free"}
        elif slot is None:
            yield {"offset": offset, "nbytes": nbytes, "state": "live", "site": "signal pads", "name": "signal pads"}
        else:
            entry, known = arena.entries[slot], arena.blocks[slot]
            assert entry is not None
            record, block = AllocationRecord.of(entry), known() if known else None
            yield {
                "offset": offset,
                "nbytes": nbytes,
                "state": "quarantined" if slot in gone else "live",
                **layout_of(record.layout),
                "site": str(record.site),
                "name": record.name,
                "groups": [group.name for group in block.groups] if block else [],
            }
    if (tail := segment.nbytes - segment.space.capacity) > 0:
        site = "signal pads of further groups"
        yield {"offset": segment.space.capacity, "nbytes": tail, "state": "live", "site": site, "name": site}


def _events(arena: Arena) -> list[dict[str, Any]]:
    allocations = [
        {
            "time": record.time,
            "event": "allocate",
            "number": record.number,
            "segment": record.segment,
            "offset": record.offset,
            "nbytes": record.nbytes,
            "site": str(record.site),
        }
        for record in arena.records()
    ]
    others = [
        {"time": when, "event": what, "segment": entry[3], "offset": entry[4], "nbytes": entry[5]}
        for what, events in (("drop", arena.drops), ("reclaim", arena.reclaims))
        for when, entry, *_ in events
    ]
    changes = [
        {"time": when, "event": what, "segment": segment, "nbytes": nbytes}
        for when, what, segment, nbytes in arena.changes
    ]
    return sorted(allocations + others + changes, key=lambda event: event["time"])


def outside_of_arenas() -> list[dict[str, Any]]:
    """The tensors of this process that have memory of their own."""
    blocks = (memory for memory in live_ranges() if isinstance(memory, Block))
    return [_tensor(block) for block in blocks if block.process == os.getpid()]


def _tensor(block: Block) -> dict[str, Any]:
    return {
        "name": block.name,
        "site": str(block.site) if block.site else None,
        "backend": block.allocation.backend.name,
        "device": str(block.allocation.device),
        "nbytes": block.nbytes,
        **layout_of(block.layout),
        "groups": [group.name for group in block.groups],
    }


def layout_of(layout: Layout) -> dict[str, Any]:
    """Shape and dtype as plain data."""
    return {"shape": list(layout.sizes), "dtype": str(layout.dtype).removeprefix("torch.")}
