"""Snapshots in the format of torch, as torch's own tools and its viewer read them."""

from __future__ import annotations

import pickle
import pickletools
import random
import re
from bisect import bisect_right
from typing import Any

import pytest
import torch
from arena_rank import MIB, Make, Rank
from torch.cuda import _memory_viz as viz

import symmem
from symmem.arena import allocation_log
from symmem.arena.torch_snapshot import to_torch
from symmem.errors import InvalidArgumentError

OPCODES = {  # the ones that MemoryViz.js of torch 2.13 knows
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"),
}


def lines(text: str) -> dict[str, int]:
    """The input of a flame graph: bytes by stack."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        stack, _, nbytes = line.rpartition(" ")
        found[stack] = found.get(stack, 0) + int(nbytes)
    return found


def arena_of(rank: Rank) -> dict[str, Any]:
    """The plain snapshot, but with no arenas except this one."""
    snapshot = symmem.memory_snapshot()
    starts = [segment.pointer for segment in rank.log.segments]
    snapshot["arenas"] = [
        arena for arena in snapshot["arenas"] if [segment["address"] for segment in arena["segments"]] == starts
    ]
    return snapshot


def rewind(snapshot: dict[str, Any]) -> list[int]:
    """Undo the events as the viewer does; returns the bytes of all segments after every event, the latest first."""
    reserved = []
    for device, entries in enumerate(snapshot["device_traces"]):
        segments = {each["address"]: each["total_size"] for each in snapshot["segments"] if each["device"] == device}
        blocks = {
            block["address"]: block["state"] == "active_pending_free"
            for segment in snapshot["segments"]
            for block in segment["blocks"]
            if block["state"] != "inactive" and segment["device"] == device
        }
        for entry in reversed(entries):
            starts = sorted(segments)
            for address in blocks:
                start = starts[bisect_right(starts, address) - 1]
                assert start <= address < start + segments[start], "a block is outside of all segments"
            reserved.append(sum(segments.values()))
            match entry["action"]:
                case "alloc":
                    assert blocks.pop(entry["addr"]) is False
                case "free_requested":
                    assert blocks[entry["addr"]] is True
                    blocks[entry["addr"]] = False
                case "free_completed":
                    assert entry["addr"] not in blocks
                    blocks[entry["addr"]] = True
                case "segment_alloc":
                    assert segments.pop(entry["addr"]) == entry["size"]
                case "segment_free":
                    segments[entry["addr"]] = entry["size"]
        assert [entry["time_us"] for entry in entries] == sorted(entry["time_us"] for entry in entries)
    return reserved


def test_torchs_tools_show_the_sizes(rank: Rank, capsys: pytest.CaptureFixture[str]) -> None:
    kept = rank.allocate(1000)
    freed, dropped = rank.allocate(256 * 1024), rank.allocate(3 * MIB)  # the last one makes a second segment
    del freed
    rank.collect()
    del dropped
    snapshot = to_torch(arena_of(rank))
    stats = symmem.memory_stats(rank.group)
    assert (stats["segments"], stats["quarantined_bytes"]) == (2, 3 * MIB)
    shown = lines(viz.memory(snapshot, format_flamegraph=str))
    sites = {stack for stack in shown if "test_torch_snapshot.py" in stack or "arena_rank.py" in stack}
    by_state = {
        state: {stack: shown[stack] for stack in sites if f";{state};" in stack}
        for state in ("active_allocated", "active_pending_free")
    }
    assert list(by_state["active_allocated"].values()) == [1024]
    assert list(by_state["active_pending_free"].values()) == [3 * MIB]
    assert all(re.search(r"arena_rank\.py:\d+:allocate$", stack) for stack in sites)
    assert sum(shown.values()) == stats["reserved_bytes"]
    assert sum(size for stack, size in shown.items() if ";inactive;" in stack) == stats["free_bytes"]
    by_segment = lines(viz.segments(snapshot, format_flamegraph=str))
    for segment in snapshot["segments"]:
        prefix = f"stream_0;seg_{segment['address']};"
        own = {stack: size for stack, size in by_segment.items() if stack.startswith(prefix)}
        assert sum(own.values()) == segment["total_size"]
        active = sum(size for stack, size in own.items() if ";inactive;" not in stack)
        assert segment["active_size"] == active
    assert sum(each["active_size"] - each["allocated_size"] for each in snapshot["segments"]) == 3 * MIB
    assert f"total_reserved: {viz.Bytes(stats['reserved_bytes'])}" in viz.segsum(snapshot)
    # Not with the process as it was before: an arena of another test may have ended, and its address be used again.
    compared = lines(viz.compare([], snapshot["segments"], format_flamegraph=str))
    assert sum(size for stack, size in compared.items() if stack.startswith("only_after")) == stats["reserved_bytes"]
    assert str(snapshot["segments"][1]["address"]) in capsys.readouterr().out
    del kept


def test_torchs_tools_show_the_events(rank: Rank) -> None:
    freed, dropped = rank.allocate(1000), rank.allocate(100)
    first, second = (st.tensor.data_ptr() for st in (freed, dropped))
    start = rank.log.segments[0].pointer
    del freed
    rank.collect()
    del dropped
    snapshot = to_torch(arena_of(rank))
    (entries,) = snapshot["device_traces"]
    reserved = rank.segments[0]
    pads = [entry for entry in entries if entry["frames"] and entry["frames"][0]["name"].startswith("signal pads")]
    assert [pad["action"] for pad in pads] == ["alloc", "alloc"]
    assert entries[1:3] == pads
    entries = [entry for entry in entries if entry not in pads]
    assert [(entry["action"], entry["addr"], entry["size"]) for entry in entries] == [
        ("segment_alloc", start, reserved),
        ("alloc", first, 1024),
        ("alloc", second, 256),
        ("free_requested", first, 1024),
        ("free_completed", first, 1024),
        ("free_requested", second, 256),
    ]
    assert [bool(entry["frames"]) for entry in entries] == [False, *[True] * 5]
    assert abs(entries[-1]["time_us"] / 1e6 - symmem.memory_snapshot()["time"]) < 60
    text = viz.trace(snapshot)
    assert f"cudaMalloc({start}, {viz.Bytes(reserved)})" in text
    assert f"[{second - start}:256.0B]" in text
    assert "# free completed for" in text
    for page in (viz.trace_plot(snapshot), viz.trace_plot(snapshot, plot_segments=True), viz.segment_plot(snapshot)):
        assert "snapshot.pickle" in page
    rewind(snapshot)


@pytest.mark.parametrize(("history", "shown"), [(16384, 4096), (16384, 3), (50, 4096), (7, 2), (1, 1)])
def test_any_program_can_be_rewound(history: int, shown: int, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The viewer stops at an event that does not follow from the others, and the log has only the recent ones."""
    monkeypatch.setattr(allocation_log, "_HISTORY", history)
    monkeypatch.setattr(allocation_log, "_SHOWN", shown)
    rank, chance = make(arena_size="1MiB"), random.Random(history + shown)
    kept: list[Any] = []
    for step in range(400):
        kept.append(rank.allocate(chance.choice([0, 5, 4096, 60_000, 900_000])))
        if chance.random() < 0.4:
            start = chance.randrange(len(kept))
            del kept[start : start + 3]
        if chance.random() < 0.1:
            rank.collect(trim=chance.random() < 0.5)
        if step % 20 == 0:
            snapshot = to_torch(arena_of(rank))
            stats = symmem.memory_stats(rank.group)
            sums = [sum(each[key] for each in snapshot["segments"]) for key in ("total_size", "allocated_size")]
            assert sums[0] == stats["reserved_bytes"]
            assert sums[1] >= stats["live_bytes"], "signal pads are also live"
            active = sum(each["active_size"] for each in snapshot["segments"])
            assert active - sums[1] == stats["quarantined_bytes"]
            reserved = rewind(snapshot)
            if history > 10_000:
                assert len(reserved) > step
                assert reserved[-1] > 0
            viz.trace(snapshot)


def test_the_viewer_can_read_the_pickle(rank: Rank) -> None:
    kept = [rank.allocate(number) for number in range(300)]
    del kept[::2]
    data = pickle.dumps(symmem.memory_snapshot("torch"), protocol=4)
    assert {opcode.name for opcode, *_ in pickletools.genops(data)} <= OPCODES


def test_devices_and_streams(rank: Rank) -> None:
    kept = rank.allocate(1000)
    snapshot = arena_of(rank)
    (arena,) = snapshot["arenas"]
    snapshot["arenas"] = [arena, {**arena, "device": "cuda:2"}]
    converted = to_torch(snapshot)
    assert [(each["device"], each["stream"]) for each in converted["segments"]] == [(3, 0), (2, 1)]
    assert [len(entries) for entries in converted["device_traces"]] == [0, 0, 4, 4]
    assert {entry["stream"] for entry in converted["device_traces"][2]} == {1}
    snapshot["arenas"] = []
    assert to_torch(snapshot) == {"segments": [], "device_traces": [[]]}
    del kept


def test_during_a_reclaim_round_a_segment_is_one_block(rank: Rank) -> None:
    kept = rank.allocate(1000)
    snapshot = arena_of(rank)
    (arena,) = snapshot["arenas"]
    arena["meeting"] = True
    arena["segments"][0]["blocks"] = []
    converted = to_torch(snapshot)
    shown = lines(viz.memory(converted, format_flamegraph=str))
    assert shown == {
        "stream_0;active_allocated;symmem:0:unknown: a reclaim round was running": arena["segments"][0]["nbytes"]
    }
    assert [entry["action"] for entry in converted["device_traces"][0]] == ["segment_alloc"]
    rewind(converted)
    del kept


def test_formats(rank: Rank) -> None:
    assert set(symmem.memory_snapshot("symmem")) == set(symmem.memory_snapshot())
    with pytest.raises(InvalidArgumentError, match="format must be 'symmem' or 'torch', not 'json'"):
        symmem.memory_snapshot("json")  # type: ignore[arg-type]


def test_torch_itself_has_these_keys() -> None:
    """The keys that torch documents."""
    documented = torch.cuda.memory._snapshot.__doc__ or ""
    segments = {"address", "total_size", "stream", "segment_type", "segment_pool_id", "allocated_size", "active_size"}
    for key in (*segments, "blocks", "size", "requested_size", "state", "frames", "action", "addr", "filename", "line"):
        assert f"{key}:" in documented, key
