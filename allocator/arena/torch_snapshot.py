"""Converts a memory snapshot to the format of ``torch.cuda.memory._snapshot()``, for PyTorch's memory viewer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

__all__ = ["to_torch"]

_STATES = {"live": "active_allocated", "quarantined": "active_pending_free", "free": "inactive"}
_UNKNOWN = "unknown: a reclaim round was running"

_Frames: TypeAlias = list[dict[str, Any]]
_Entry: TypeAlias = tuple[float, int, str, int, int, _Frames]


def to_torch(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the plain data of :func:`symmem.memory_snapshot`.

    ``device_traces`` has one list per device. A GPU keeps its index; the CPU comes after the last GPU of the snapshot,
    so its index is 0 if there is none. ``stream`` and ``segment_pool_id`` hold the number of the arena.

    Quarantined blocks are ``active_pending_free``. An allocation is ``alloc``, a drop ``free_requested``, a reclaim
    ``free_completed``, and growing and trimming are ``segment_alloc`` and ``segment_free``. The viewer needs complete
    pairs, so the result also has events that the recorded ones imply. A segment without known blocks is one live block.
    """
    gpus = [int(arena["device"].partition("cuda:")[2] or -1) for arena in snapshot["arenas"]]
    epoch = snapshot["time"] - snapshot["clock"]
    segments: list[dict[str, Any]] = []
    traces: list[list[_Entry]] = [[] for _ in range(max(gpus, default=-1) + 2)]
    for stream, (arena, gpu) in enumerate(zip(snapshot["arenas"], gpus, strict=True)):
        device = gpu % len(traces)  # the last one for the CPU
        segments += [_segment(segment, device, stream) for segment in arena["segments"]]
        traces[device] += _Trace(arena, stream).entries
    return {"segments": segments, "device_traces": [_sorted(entries, epoch) for entries in traces]}


def _sorted(entries: Iterable[_Entry], epoch: float) -> list[dict[str, Any]]:
    return [
        {
            "action": action,
            "addr": address,
            "size": nbytes,
            "stream": stream,
            "pool_id": (0, stream),
            "time_us": int((epoch + time) * 1e6),
            "frames": frames,
        }
        for time, stream, action, address, nbytes, frames in sorted(entries, key=lambda entry: entry[0])
    ]


def _segment(segment: Mapping[str, Any], device: int, stream: int) -> dict[str, Any]:
    blocks = segment["blocks"] or [{"offset": 0, "nbytes": segment["nbytes"], "state": "live", "site": _UNKNOWN}]
    sizes = {state: sum(block["nbytes"] for block in blocks if block["state"] == state) for state in _STATES}
    return {
        "device": device,
        "address": segment["address"],
        "total_size": segment["nbytes"],
        "allocated_size": sizes["live"],
        "active_size": sizes["live"] + sizes["quarantined"],
        "requested_size": sizes["live"],
        "stream": stream,
        "segment_type": "large",
        "segment_pool_id": (0, stream),
        "is_expandable": False,
        "frames": [],
        "blocks": [
            {
                "address": segment["address"] + block["offset"],
                "size": block["nbytes"],
                "requested_size": block["nbytes"],
                "state": _STATES[block["state"]],
                "frames": _frames(block.get("site")),
            }
            for block in blocks
        ],
    }


class _Trace:
    """The events of an arena in the order in which they are found; sorted by time, they are complete.

    Attributes:
        entries: Time, stream, action, address, bytes and frames of every event so far.
        blocks: The blocks that exist after these events, by address: bytes, frames, and whether dropped.
    """

    def __init__(self, arena: Mapping[str, Any], stream: int) -> None:
        self.entries: list[_Entry] = []
        self.blocks: dict[int, tuple[int, _Frames, bool]] = {}
        self._stream, self._time = stream, 0.0
        self._since: dict[int, float] = {}  # when a segment or a free block began, by address
        changes = [event for event in arena["events"] if event["event"] in ("grow", "trim")]
        addresses = {event["segment"]: event["address"] for event in changes}
        addresses |= {segment["index"]: segment["address"] for segment in arena["segments"]}
        for event in changes if arena["meeting"] else arena["events"]:
            self._time = event["time"]
            if event["segment"] in addresses:
                self._add(event, addresses[event["segment"]])
        self._finish(arena["segments"])

    def _add(self, event: Mapping[str, Any], start: int) -> None:
        kind, nbytes = event["event"], event["nbytes"]
        address = start + event.get("offset", 0)
        if kind == "grow":
            self._since[start] = self._time
            self._note("segment_alloc", start, nbytes)
        elif kind == "trim":
            self._free(*[known for known in self.blocks if start <= known < start + nbytes])
            self._note("segment_free", start, nbytes)
        elif kind == "allocate":
            self._free(*{address} & self.blocks.keys())
            self._allocate(address, nbytes, _frames(event["site"]), self._time)
        else:
            self._find(start, address, nbytes, [], live=kind == "drop")
            (self._drop if kind == "drop" else self._free)(address)

    def _finish(self, segments: Iterable[Mapping[str, Any]]) -> None:
        """Add the events that lead to the blocks of the snapshot."""
        found = {
            segment["address"] + block["offset"]: (segment["address"], block)
            for segment in segments
            for block in segment["blocks"]
            if block["state"] != "free"
        }
        for address, (start, block) in found.items():
            self._find(start, address, block["nbytes"], _frames(block["site"]), live=block["state"] == "live")
        self._free(*self.blocks.keys() - found.keys())
        self._drop(*[address for address, (_, block) in found.items() if block["state"] == "quarantined"])

    def _find(self, start: int, address: int, nbytes: int, frames: _Frames, *, live: bool) -> None:
        """Add a block that exists, if it is not known. It is a signal pad, or its allocation is not in the record.

        The viewer fails if it goes back to a time when the block exists, but its segment does not. So the block is
        allocated as soon as its place exists and is free.
        """
        if live and self.blocks.get(address, (0, [], False))[2]:
            self._free(address)  # the known block was dropped, so this is a later one
        if address not in self.blocks:
            since = [self._since.get(key, -math.inf) for key in (start, address)]
            self._allocate(address, nbytes, frames, max(since))

    def _allocate(self, address: int, nbytes: int, frames: _Frames, time: float) -> None:
        self.blocks[address] = nbytes, frames, False
        if time > -math.inf:
            self.entries.append((time, self._stream, "alloc", address, nbytes, frames))

    def _drop(self, *addresses: int) -> None:
        for address in addresses:
            nbytes, frames, dropped = self.blocks[address]
            if not dropped:
                self._note("free_requested", address, nbytes, frames)
                self.blocks[address] = nbytes, frames, True

    def _free(self, *addresses: int) -> None:
        for address in addresses:
            self._drop(address)
            self._note("free_completed", address, *self.blocks.pop(address)[:2])
            self._since[address] = self._time

    def _note(self, action: str, address: int, nbytes: int, frames: _Frames | None = None) -> None:
        self.entries.append((self._time, self._stream, action, address, nbytes, frames or []))


def _frames(site: str | None) -> _Frames:
    """The frames of a call site in the form ``FILE:LINE in FUNCTION``, or of another text."""
    found = re.fullmatch(r"(?s)(.*):(\d+) in (.*)", site or "")
    filename, line, name = found.groups() if found else ("symmem", 0, site)
    return [{"filename": filename, "line": int(line), "name": name}] if site else []
