"""Reads a memory snapshot: when every block and segment of its arenas was made and freed. Draws nothing."""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from symmem.errors import InvalidArgumentError

__all__ = ["SnapshotArena", "SnapshotBlock", "SnapshotSegment", "SnapshotState", "outside", "read", "states"]

_STATS = (
    *("segments", "reserved_bytes", "live_bytes", "peak_live_bytes", "quarantined_bytes", "free_bytes"),
    *("largest_free_bytes", "fragmentation", "live_blocks", "quarantined_blocks", "allocations", "growths"),
)


@dataclass
class SnapshotBlock:
    """One block, from its allocation to its reclaim.

    Attributes:
        segment: Index of its segment.
        offset: Bytes from the start of the segment.
        nbytes: Bytes.
        site: The line that allocated it; empty if not recorded.
        start: Seconds from the first recorded event to the allocation; None if the allocation is older.
        dropped: Start of its quarantine; None if it was never in quarantine.
        end: Time of its reclaim; None if it still exists.
        name: Name of the tensor; empty if it has none, or if the block no longer exists.
        what: Dtype and shape, likewise.
    """

    segment: int
    offset: int
    nbytes: int
    site: str = ""
    start: float | None = None
    dropped: float | None = None
    end: float | None = None
    name: str = ""
    what: str = ""


@dataclass
class SnapshotSegment:
    """One segment, from its growth to its trim. Times are as in :class:`SnapshotBlock`."""

    index: int
    nbytes: int
    start: float | None = None
    end: float | None = None


@dataclass
class SnapshotArena:
    """One arena of one rank.

    Attributes:
        place: ``backend``, ``device``, ``group``, ``rank``, ``world``, ``host`` and ``pid`` of the arena.
        stats: The statistics in the snapshot.
        now: Segments at the time of the snapshot.
        blocks_now: Live and quarantined blocks at that time.
        segments: All segments of the record.
        blocks: All blocks of the record.
        events: Number of recorded events.
        seconds: Seconds from the first event to the last.
    """

    place: dict[str, str]
    stats: dict[str, float]
    now: list[SnapshotSegment] = field(default_factory=list)
    blocks_now: list[SnapshotBlock] = field(default_factory=list)
    segments: list[SnapshotSegment] = field(default_factory=list)
    blocks: list[SnapshotBlock] = field(default_factory=list)
    events: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class SnapshotState:
    """Bytes of an arena from ``time`` on; ``time`` is in seconds since the first event."""

    time: float
    live: int
    quarantined: int
    reserved: int


def read(snapshot: Mapping[str, Any]) -> list[SnapshotArena]:
    """Read the arenas of a result of ``symmem.memory_snapshot()``.

    Raises:
        InvalidArgumentError: The data is no snapshot; the text names the wrong place.
    """
    if not isinstance(snapshot, Mapping) or "symmem" not in snapshot:
        raise InvalidArgumentError(
            "no snapshot of symmem: expected an object with the key 'symmem'",
            hint="write the result of symmem.memory_snapshot() as JSON",
        )
    return [_arena(arena, snapshot, place) for place, arena in _each(snapshot, "arenas", "")]


def outside(snapshot: Mapping[str, Any]) -> list[int]:
    """Bytes of every tensor outside of arenas.

    Raises:
        InvalidArgumentError: As for :func:`read`.
    """
    return [_bytes(tensor, "nbytes", place) for place, tensor in _each(snapshot, "tensors", "")]


def states(arena: SnapshotArena) -> list[SnapshotState]:
    """Bytes of an arena after every change, by time."""
    changes: dict[float, list[int]] = defaultdict(lambda: [0, 0, 0])
    for block in arena.blocks:
        changes[block.start or 0.0][0] += block.nbytes
        if block.dropped is not None:
            changes[block.dropped][0] -= block.nbytes
            changes[block.dropped][1] += block.nbytes
        if block.end is not None:
            changes[block.end][0 if block.dropped is None else 1] -= block.nbytes
    for segment in arena.segments:
        changes[segment.start or 0.0][2] += segment.nbytes
        if segment.end is not None:
            changes[segment.end][2] -= segment.nbytes
    found = [SnapshotState(0.0, 0, 0, 0)]
    for time, (live, quarantined, reserved) in sorted(changes.items()):
        last = found[-1]
        found.append(SnapshotState(time, last.live + live, last.quarantined + quarantined, last.reserved + reserved))
    return found[1:] or found


def _arena(item: Mapping[str, Any], snapshot: Mapping[str, Any], place: str) -> SnapshotArena:
    where = {key: _text(item, key) for key in ("backend", "device", "group", "rank", "world")}
    stats = item.get("stats")
    if not isinstance(stats, Mapping):
        raise _wrong(f"{place}.stats", "an object", stats)
    figures = {key: _number(stats, key, f"{place}.stats") for key in _STATS}
    arena = SnapshotArena({**where, "host": _text(snapshot, "host"), "pid": _text(snapshot, "pid")}, figures)
    events = [(_number(event, "time", spot), event, spot) for spot, event in _each(item, "events", place)]
    events.sort(key=lambda found: found[0])
    record = _Record(arena)
    for time, event, spot in events:
        record.add(time - events[0][0], event, spot)
    arena.events, arena.seconds = len(events), events[-1][0] - events[0][0] if events else 0.0
    for spot, segment in _each(item, "segments", place):
        arena.now.append(SnapshotSegment(_bytes(segment, "index", spot), _bytes(segment, "nbytes", spot)))
        for there, block in _each(segment, "blocks", spot):
            record.find(arena.now[-1].index, block, there)
    arena.segments += [
        SnapshotSegment(found.index, found.nbytes) for found in arena.now if found.index not in record.segments
    ]
    return arena


class _Record:
    """Follows blocks and segments from event to event.

    Attributes:
        blocks: Those that are there after the events so far, by segment and offset.
        segments: Likewise, by index.
    """

    def __init__(self, arena: SnapshotArena) -> None:
        self.arena = arena
        self.blocks: dict[tuple[int, int], SnapshotBlock] = {}
        self.segments: dict[int, SnapshotSegment] = {}

    def add(self, time: float, event: Mapping[str, Any], place: str) -> None:
        """Apply an event. Kinds that change neither blocks nor segments are ignored."""
        kind = event.get("event")
        if kind in ("grow", "trim"):
            segment = SnapshotSegment(_bytes(event, "segment", place), _bytes(event, "nbytes", place))
            (self._grow if kind == "grow" else self._trim)(segment, time)
        elif kind in ("allocate", "drop", "reclaim"):
            index, offset, nbytes = (_bytes(event, key, place) for key in ("segment", "offset", "nbytes"))
            block = SnapshotBlock(index, offset, nbytes, _text(event, "site"))
            {"allocate": self._allocate, "drop": self._drop, "reclaim": self._reclaim}[kind](block, time)

    def find(self, index: int, item: Mapping[str, Any], place: str) -> None:
        """Apply a block of the snapshot itself, after all events. If they differ, the block is right."""
        offset, nbytes, state = _bytes(item, "offset", place), _bytes(item, "nbytes", place), item.get("state")
        if state == "free":
            return
        if state not in ("live", "quarantined"):
            raise _wrong(f"{place}.state", "live, quarantined or free", state)
        block = self._known(SnapshotBlock(index, offset, nbytes))
        if state == "live":
            block.dropped = None
        elif block.dropped is None:
            block.dropped = block.start or 0.0
        block.nbytes, block.site = nbytes, _text(item, "site") or block.site
        block.name, block.what = _text(item, "name"), _what(item)
        self.arena.blocks_now.append(block)

    def _grow(self, segment: SnapshotSegment, time: float) -> None:
        if segment.index in self.segments:
            self.segments[segment.index].end = time
        segment.start = time
        self.segments[segment.index] = segment
        self.arena.segments.append(segment)

    def _trim(self, segment: SnapshotSegment, time: float) -> None:
        if segment.index not in self.segments:  # the growth is older than the record
            self.arena.segments.append(segment)
        self.segments.pop(segment.index, segment).end = time
        for key in [key for key in self.blocks if key[0] == segment.index]:
            self.blocks.pop(key).end = time

    def _allocate(self, block: SnapshotBlock, time: float) -> None:
        key = (block.segment, block.offset)
        if key in self.blocks:
            self.blocks[key].end = time
        block.start = time
        self.blocks[key] = block
        self.arena.blocks.append(block)

    def _drop(self, block: SnapshotBlock, time: float) -> None:
        self._known(block).dropped = time

    def _reclaim(self, block: SnapshotBlock, time: float) -> None:
        known = self._known(block)
        if known is block:  # the drop is older than the record, too
            known.dropped = 0.0
        known.end = time
        del self.blocks[block.segment, block.offset]

    def _known(self, block: SnapshotBlock) -> SnapshotBlock:
        """The block at this place; ``block`` itself if its allocation is older than the record."""
        key = (block.segment, block.offset)
        if key not in self.blocks:
            self.blocks[key] = block
            self.arena.blocks.append(block)
        return self.blocks[key]


def _what(item: Mapping[str, Any]) -> str:
    shape = item.get("shape")
    return _text(item, "dtype") + ("" if shape is None else str(shape))


def _each(item: Mapping[str, Any], key: str, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and value of every object in a list."""
    place = f"{place}.{key}" if place else key
    found = item.get(key)
    if not isinstance(found, list):
        raise _wrong(place, "a list", found)
    for number, each in enumerate(found):
        if not isinstance(each, Mapping):
            raise _wrong(f"{place}[{number}]", "an object", each)
        yield f"{place}[{number}]", each


def _number(item: Mapping[str, Any], key: str, place: str) -> float:
    found = item.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 2**63:
        raise _wrong(f"{place}.{key}", "a number from 0", found)
    return found


def _bytes(item: Mapping[str, Any], key: str, place: str) -> int:
    found = _number(item, key, place)
    if not isinstance(found, int):
        raise _wrong(f"{place}.{key}", "a whole number", found)
    return found


def _text(item: Mapping[str, Any], key: str) -> str:
    found = item.get(key)
    return "" if found is None else str(found)


def _wrong(place: str, expected: str, found: object) -> InvalidArgumentError:
    return InvalidArgumentError(f"{place}: expected {expected}, got {reprlib.repr(found)}")
