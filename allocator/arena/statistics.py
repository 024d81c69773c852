"""Statistics of the symmetric memory of this process, and a snapshot of it as plain data. Nothing is collective."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from symmem.arena.allocation_log import AllocationLog, AllocationRecord
from symmem.arena.arena import arenas_of
from symmem.arena.segment import Segment
from symmem.arena.slot_mask import masks_of, slots_of
from symmem.arena.torch_snapshot import to_torch
from symmem.backends.untraced import untraced
from symmem.errors import InvalidArgumentError
from symmem.group.group import known_groups
from symmem.group.resolve import GroupLike, resolve_group
from symmem.memory import cuda_graphs
from symmem.memory.block import Block
from symmem.memory.registry import live_ranges
from symmem.version import VERSION

if TYPE_CHECKING:
    from symmem.memory.layout import Layout

__all__ = ["figures", "layout_of", "memory_snapshot", "memory_stats", "outside_of_arenas", "quiet"]

_PATIENCE = 0.1  # seconds to wait for a lock


@untraced
def memory_stats(group: GroupLike = None) -> dict[str, int | float]:
    """Statistics of all arenas of a group on this rank. Local.

    Args:
        group: See :meth:`SymmetricTensor.rendezvous`.

    Returns:
        A dict. In bytes: ``reserved_bytes`` (of all segments), ``live_bytes``, ``peak_live_bytes`` (the sum of the
        arenas' peaks), ``quarantined_bytes`` (dropped here, but not yet by all ranks), ``free_bytes`` and
        ``largest_free_bytes``. Counts: ``segments``, ``live_blocks``, ``quarantined_blocks``, ``allocations``,
        ``reclaims`` (blocks that were freed), ``collections`` (reclaim rounds that freed them) and ``growths``. A
        fraction: ``fragmentation`` (free bytes outside of the largest free block of their segment).
    """
    return figures([log for arena in arenas_of(resolve_group(group)) for log in arena.logs])


@untraced
def memory_snapshot(format: Literal["symmem", "torch"] | None = None) -> dict[str, Any]:
    """All symmetric memory of this process, as plain data. Local.

    Args:
        format: "symmem" (the default), or "torch" for the format of ``torch.cuda.memory._snapshot()``. Write that with
            ``pickle.dump(..., protocol=4)`` for https://pytorch.org/memory_viz. A quarantined block is
            ``active_pending_free``, the stream is the number of the arena, and CPU memory is the device after the last
            GPU. It lacks tensors outside of arenas. During a reclaim round, a segment is shown as one live block.

    Returns:
        In the format "symmem", data that :mod:`json` can write.
        ``arenas``: per arena its group, rank, statistics, segments with their blocks by address, live bytes by call
        site, and the most recent events, with times in seconds of ``time.perf_counter``. During a reclaim round
        ``meeting`` is true and the blocks are left out. ``time`` and ``clock``: the time of the snapshot by
        ``time.time`` and by ``time.perf_counter``. ``graphs``: how many blocks are kept for every live CUDA graph.
        ``tensors``: the tensors outside of arenas. ``symmem memory-map`` shows and converts such data.

    Raises:
        InvalidArgumentError: ``format`` is something else.
    """
    if format not in (None, "symmem", "torch"):
        raise InvalidArgumentError(f"format must be 'symmem' or 'torch', not {format!r}")
    snapshot = {
        "symmem": VERSION,
        "time": time.time(),
        "clock": time.perf_counter(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "arenas": [_snapshot(log) for group in known_groups() for arena in arenas_of(group) for log in arena.logs],
        "graphs": {str(number): blocks for number, blocks in cuda_graphs.kept().items()},
        "tensors": outside_of_arenas(),
    }
    return to_torch(snapshot) if format == "torch" else snapshot


@contextlib.contextmanager
def quiet(log: AllocationLog) -> Iterator[bool]:
    """Try to lock an allocation log. Yields False if a reclaim round holds it, because that may take long."""
    held = log.lock.acquire(timeout=_PATIENCE)
    try:
        yield held
    finally:
        if held:
            log.lock.release()


def figures(logs: Sequence[AllocationLog]) -> dict[str, int | float]:
    """The statistics of :func:`memory_stats` for some arenas."""
    for log in logs:
        with quiet(log) as held:
            if held:
                log.count_drops()
                log.flush_events()
    segments = [segment for log in logs for segment in log.segments]
    free = sum(segment.space.free_bytes for segment in segments)
    usable = sum(segment.space.largest_free for segment in segments)
    return {
        "segments": len(segments),
        "reserved_bytes": sum(segment.nbytes for segment in segments),
        "live_bytes": sum(log.live_bytes for log in logs),
        "peak_live_bytes": sum(log.peak_bytes for log in logs),
        "quarantined_bytes": sum(log.quarantined_bytes for log in logs),
        "free_bytes": free + sum(log.agreed_bytes for log in logs),
        "largest_free_bytes": max((segment.space.largest_free for segment in segments), default=0),
        "live_blocks": sum(len(segment.slots) for segment in segments)
        - sum(log.quarantined_blocks + log.agreed.bit_count() for log in logs),
        "quarantined_blocks": sum(log.quarantined_blocks for log in logs),
        "allocations": sum(log.count - log.entries for log in logs),
        "reclaims": sum(log.reclaimed_blocks for log in logs),
        "collections": sum(log.collections for log in logs),
        "growths": sum(log.growths for log in logs),
        "fragmentation": 1 - usable / free if free else 0.0,
    }


def _snapshot(log: AllocationLog) -> dict[str, Any]:
    with quiet(log) as held:
        stats = figures([log])
        agreed = set(slots_of(log.agreed))
        dropped = set(slots_of(masks_of(log.slot_marks)[0]))
        records = [AllocationRecord.of(raw) for slot, raw in enumerate(log.records) if raw and slot not in dropped]
        sizes = [(str(record.site), record.nbytes) for record in records]
        blocks, live = Counter(site for site, _ in sizes), Counter[str]()
        for site, nbytes in sizes:
            live[site] += nbytes
        return {
            "backend": log.backend.name,
            "device": str(log.device),
            "group": log.group.name,
            "rank": log.group.rank,
            "world": log.group.size,
            "stats": stats,
            "segments": [
                {
                    "index": segment.index,
                    "address": segment.pointer,
                    "nbytes": segment.nbytes,
                    "blocks": list(_blocks(log, segment, agreed, dropped)) if held else [],
                }
                for segment in log.segments
            ],
            "meeting": not held,
            "sites": [
                {"site": site, "live_bytes": nbytes, "live_blocks": blocks[site]} for site, nbytes in live.most_common()
            ],
            "events": _events(log),
        }


def _blocks(log: AllocationLog, segment: Segment, agreed: set[int], dropped: set[int]) -> Iterator[dict[str, Any]]:
    for offset, nbytes, in_use in segment.space.blocks():
        slot = segment.slots.get(offset)
        if not in_use or slot in agreed:
            yield {"offset": offset, "nbytes": nbytes, "state": "free"}
        elif slot is None:
            yield {"offset": offset, "nbytes": nbytes, "state": "live", "site": "signal pads", "name": "signal pads"}
        else:
            raw, known = log.records[slot], log.blocks[slot]
            assert raw is not None
            record, block = AllocationRecord.of(raw), known() if known else None
            yield {
                "offset": offset,
                "nbytes": nbytes,
                "state": "quarantined" if slot in dropped else "live",
                **layout_of(record.layout),
                "site": str(record.site),
                "name": record.name,
                "groups": [group.name for group in block.groups] if block else [],
            }
    if (tail := segment.nbytes - segment.space.capacity) > 0:
        site = "signal pads of further groups"
        yield {"offset": segment.space.capacity, "nbytes": tail, "state": "live", "site": site, "name": site}


def _events(log: AllocationLog) -> list[dict[str, Any]]:
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
        for record in log.recent()
        if record.nbytes
    ]
    others = [
        {"time": when, "event": kind, "segment": raw[3], "offset": raw[4], "nbytes": raw[5]}
        for kind, events in (("drop", log.drops), ("reclaim", log.reclaims))
        for when, raw, *_ in events
    ]
    changes = [
        {"time": when, "event": kind, "segment": segment, "nbytes": nbytes, "address": address}
        for when, kind, segment, nbytes, address in log.changes
    ]
    return sorted(allocations + others + changes, key=lambda event: event["time"])


def outside_of_arenas() -> list[dict[str, Any]]:
    """The tensors of this process that are not in an arena, as plain data."""
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
