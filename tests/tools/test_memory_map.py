"""``symmem memory-map``: the page of a snapshot."""

from __future__ import annotations

import json
import math
import random
import re
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symmem.errors import InvalidArgumentError
from symmem.tools import cli
from symmem.tools.commands.memory_map import render
from symmem.tools.memory_history import read, states

SVG = "{http://www.w3.org/2000/svg}"
MIB = 1 << 20
SITES = (
    "train.py:12 in step",
    "model.py:88 in forward",
    "moe.py:140 in dispatch",
    "kv.py:31 in grow",
    "opt.py:9 in sync",
)


class Simulator:
    """An arena that places first-fit, and keeps the last ``kept`` events."""

    def __init__(self, rank: int = 0, segment: int = MIB, kept: int = 4096) -> None:
        self.rank, self.segment, self.time, self.peak = rank, segment, 1000.0, 0
        self.number = self.growths = 0
        self.segments: dict[int, int] = {}
        self.blocks: dict[tuple[int, int], dict[str, Any]] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=kept)

    def log(self, event: str, **what: object) -> None:
        self.events.append({"time": self.time, "event": event, **what})

    def holes(self, index: int) -> list[tuple[int, int]]:
        found, at = [], 0
        for (_, offset), block in sorted(item for item in self.blocks.items() if item[0][0] == index):
            found.append((at, offset - at))
            at = offset + block["nbytes"]
        return [hole for hole in [*found, (at, self.segments[index] - at)] if hole[1]]

    def allocate(self, nbytes: int, site: str, name: str | None = None) -> tuple[int, int]:
        fits = [(index, offset) for index in self.segments for offset, room in self.holes(index) if room >= nbytes]
        if not fits:
            index, size = self.growths, max(nbytes, self.segment << self.growths)
            self.segments[index], self.growths = size, self.growths + 1
            self.log("grow", segment=index, nbytes=size)
            fits = [(index, 0)]
        index, offset = key = fits[0]
        self.number += 1
        shape = {"shape": [nbytes // 4], "dtype": "float32", "site": site, "name": name}
        self.blocks[key] = {"offset": offset, "nbytes": nbytes, "state": "live", **shape}
        self.log("allocate", number=self.number, segment=index, offset=offset, nbytes=nbytes, site=site)
        self.peak = max(self.peak, self.total("live"))
        return key

    def drop(self, key: tuple[int, int]) -> None:
        self.blocks[key]["state"] = "quarantined"
        self.log("drop", segment=key[0], offset=key[1], nbytes=self.blocks[key]["nbytes"])

    def reclaim(self) -> None:
        for key in [key for key, block in self.blocks.items() if block["state"] == "quarantined"]:
            self.log("reclaim", segment=key[0], offset=key[1], nbytes=self.blocks.pop(key)["nbytes"])

    def trim(self) -> None:
        for index in set(self.segments) - {index for index, _ in self.blocks}:
            self.log("trim", segment=index, nbytes=self.segments.pop(index))

    def total(self, state: str) -> int:
        return sum(block["nbytes"] for block in self.blocks.values() if block["state"] == state)

    def snapshot(self) -> dict[str, Any]:
        segments, free = [], []
        for index, size in self.segments.items():
            blocks = [block for (number, _), block in self.blocks.items() if number == index]
            free += (holes := self.holes(index))
            blocks += [{"offset": offset, "nbytes": room, "state": "free"} for offset, room in holes]
            segments.append({"index": index, "nbytes": size, "blocks": sorted(blocks, key=lambda b: b["offset"])})
        stats = {
            "segments": len(segments),
            "reserved_bytes": sum(self.segments.values()),
            "live_bytes": self.total("live"),
            "peak_live_bytes": self.peak,
            "quarantined_bytes": self.total("quarantined"),
            "free_bytes": sum(room for _, room in free),
            "largest_free_bytes": max((room for _, room in free), default=0),
            "fragmentation": 1 - max((room for _, room in free), default=0) / max(1, sum(room for _, room in free)),
            "live_blocks": sum(block["state"] == "live" for block in self.blocks.values()),
            "quarantined_blocks": sum(block["state"] == "quarantined" for block in self.blocks.values()),
            "allocations": self.number,
            "growths": self.growths,
        }
        place = {"backend": "host", "device": "cpu", "group": "default", "rank": self.rank, "world": 4}
        arena = {**place, "stats": stats, "segments": segments, "sites": [], "events": list(self.events)}
        return {"symmem": "0.1.0", "time": 1.77e9, "host": "node1", "pid": 123, "arenas": [arena], "tensors": []}


def small() -> Simulator:
    """Five blocks in two segments: at the end one is quarantined, one was reclaimed."""
    arena = Simulator()
    for size, site, name in zip(
        (MIB // 4, MIB // 2, MIB // 4, MIB, MIB // 2), SITES, (None, None, "kv", None, None), strict=True
    ):
        key = arena.allocate(size, site, name)
        arena.time += 1
        if site == SITES[1]:
            gone = key
        if site == SITES[3]:
            arena.drop(gone)
            arena.time += 1
            arena.reclaim()
            arena.time += 1
            arena.drop((0, 0))
            arena.time += 1
    return arena


def busy(rank: int = 0, steps: int = 3000, kept: int = 4096, seed: int = 1) -> Simulator:
    """Training steps: weights that stay, and short-lived activations of many sizes."""
    arena, chance = Simulator(rank, 16 * MIB, kept), random.Random(seed + rank)
    for index in range(6):
        arena.allocate((2 + index) * MIB, "model.py:20 in weights", f"layer{index}")
        arena.time += 0.01
    live: list[tuple[int, int]] = []
    for step in range(steps):
        arena.time += chance.expovariate(1000)
        wave = 10 + 8 * math.sin(step / 150)
        if len(live) < wave:
            site = f"layer.py:{chance.randrange(12)} in forward"
            live.append(arena.allocate(chance.choice((4096, 65536, 131072, 3 * MIB, 700 * 1024)), site))
        elif live:
            arena.drop(live.pop(chance.randrange(len(live))))
        if step % 40 == 39:
            arena.reclaim()
    return arena


def parsed(page: str) -> ET.Element:
    return ET.fromstring(page.removeprefix("<!DOCTYPE html>"))


def pictures(page: str) -> list[ET.Element]:
    """The large pictures with an axis, per arena: now, and over time."""
    return [svg for svg in parsed(page).iter(f"{SVG}svg") if svg.get("viewBox", "").startswith("0 0 1000 ")]


def titled(picture: ET.Element, words: str) -> list[ET.Element]:
    return [rect for rect in picture.iter(f"{SVG}rect") if words in rect.findtext(f"{SVG}title", "")]


def edges(rect: ET.Element) -> tuple[float, ...]:
    left, top, width, height = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
    return left, top, left + width, top + height


def check(page: str) -> None:
    """All elements of a large picture are finite and inside of it."""
    for picture in pictures(page):
        _, _, width, height = map(float, picture.get("viewBox", "").split())
        for rect in picture.iter(f"{SVG}rect"):
            left, top, right, bottom = edges(rect)
            assert 0 <= left <= right <= width + 0.11, rect.attrib
            assert 0 <= top <= bottom <= height + 0.11, rect.attrib
        for text in picture.iter(f"{SVG}text"):
            assert 0 <= float(text.get("x", "nan")) <= width
            assert 0 <= float(text.get("y", "nan")) <= height
        for path in picture.iter(f"{SVG}path"):
            across, down = path_values(path.get("d", ""))
            assert all(0 <= x <= width for x in across), path.attrib
            assert all(0 <= y <= height for y in down), path.attrib


def path_values(commands: str) -> tuple[list[float], list[float]]:
    """All x and all y of a path with moves and horizontal and vertical lines."""
    across, down = [], []
    for command, words in re.findall("([MHV])([^MHVZ]*)", commands):
        values = [float(word) for word in words.split()]
        across += values[:1] if command != "V" else []
        down += values[-1:] if command != "H" else []
    return across, down


def test_blocks_are_where_they_lie() -> None:
    now, _ = pictures(render(small().snapshot()))
    first, kv, large = (titled(now, words)[0] for words in ("train.py:12", "kv, float32[65536]", "kv.py:31"))
    assert edges(first) == pytest.approx((84, 0, 84 + 908 / 4, 28), abs=0.1)
    assert edges(kv) == pytest.approx((84 + 908 * 3 / 4, 0, 992, 28), abs=0.1)
    assert edges(large) == pytest.approx((84, 36, 84 + 908 / 2, 64), abs=0.1)
    assert "h" in first.get("class", "").split()[1], "the quarantined block is hatched"
    assert kv.get("class", "").split()[1].startswith("c")
    assert kv.findtext(f"{SVG}title") == (
        "kv, float32[65536], 256 KiB\nmoe.py:140 in dispatch\nsegment 0, offset 786,432\nsince 2 s"
    )


def test_blocks_last_from_allocation_to_reclaim() -> None:
    _, time = pictures(render(small().snapshot()))
    live, quarantined = titled(time, "model.py:88")
    second = 908 / (7 * 1.02)  # 7 seconds, and 2% after the last event
    assert edges(live)[::2] == pytest.approx((84 + second, 84 + 5 * second - second), abs=0.2)
    assert edges(quarantined)[::2] == pytest.approx((84 + 4 * second, 84 + 5 * second), abs=0.2)
    assert quarantined.get("class", "").replace("h", "c", 1) == live.get("class")
    assert edges(live)[1::2] == edges(quarantined)[1::2]
    assert quarantined.findtext(f"{SVG}title", "").endswith("since 1 s, quarantined from 4 s, reclaimed at 5 s")
    (segment_of_first,) = {edges(rect)[3] for rect in titled(time, "train.py:12")}
    assert segment_of_first > edges(live)[3] > edges(titled(time, "kv.py:31")[0])[3], "addresses go upwards"
    growths = [path for path in time.iter(f"{SVG}path") if path.get("class") == "grow"]
    assert [path.findtext(f"{SVG}title") for path in growths] == ["+1 MiB", "+2 MiB"]
    words = {text.text for text in time.iter(f"{SVG}text")}
    assert words >= {"+2 MiB", "segment 0", "0", "1 s", "7 s", "0 B", "3 MiB", "kv"}


def test_a_legend_lists_sites_by_live_bytes() -> None:
    page = parsed(render(small().snapshot()))
    rows = [["".join(cell.itertext()) for cell in row][2:] for row in page.iter("tr") if row.get("data-c")]
    assert rows == [
        ["1 MiB", "1", "kv.py:31 in grow"],
        ["512 KiB", "1", "opt.py:9 in sync"],
        ["256 KiB", "1", "moe.py:140 in dispatch"],
        ["0 B", "0", "model.py:88 in forward"],
        ["0 B", "0", "train.py:12 in step"],
    ]
    assert len({row.get("data-c") for row in page.iter("tr") if row.get("data-c")}) == 5


@pytest.mark.parametrize("kept", [4096, 60, 7, 1, 0])
def test_what_is_older_than_the_record_is_there_from_its_begin(kept: int) -> None:
    arena = busy(steps=300, kept=kept)
    snapshot = arena.snapshot()
    (found,) = read(snapshot)
    last = states(found)[-1]
    assert (last.live, last.quarantined) == (arena.total("live"), arena.total("quarantined"))
    assert last.reserved == sum(arena.segments.values())
    assert len(found.blocks_now) == len(arena.blocks)
    page = render(snapshot)
    check(page)
    older = sum(block.start is None for block in found.blocks)
    assert (older > 0) == (kept < 300)
    if kept:
        assert ("allocated before the first" in page) == (older > 0)
    else:
        assert "No events were recorded." in page


def test_the_curve_is_what_the_arena_held_at_each_time() -> None:
    arena, held = small(), {}
    for state in states(read(arena.snapshot())[0]):
        held[state.time] = (state.live * 4 // MIB, state.quarantined * 4 // MIB, state.reserved // MIB)
    assert held == {
        number: tuple(map(int, quarters))
        for number, quarters in enumerate(("101", "301", "401", "803", "623", "603", "513", "713"))
    }


def test_a_trimmed_segment_ends() -> None:
    arena = Simulator()
    keep = arena.allocate(MIB, "a.py:1 in f")
    arena.time += 1
    gone = arena.allocate(MIB, "b.py:2 in g")
    arena.drop(gone)
    arena.time += 1
    arena.reclaim()
    arena.trim()
    arena.time += 2
    arena.drop(keep)
    page = render(arena.snapshot())
    check(page)
    _, time = pictures(page)
    trimmed = [rect for rect in time.iter(f"{SVG}rect") if rect.get("class") == "empty"][1]
    assert edges(trimmed)[::2] == pytest.approx((84 + 908 / 4.08, 84 + 2 * 908 / 4.08), abs=0.2)
    assert "\N{MINUS SIGN}2 MiB" in page


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_thousands_of_events_stay_small(ranks: int) -> None:
    page = render(*[busy(rank).snapshot() for rank in range(ranks)])
    assert len(page.encode()) < 2_000_000
    check(page)
    assert len(pictures(page)) == 2 * ranks
    links = {link.get("href", "")[1:] for link in parsed(page).iter("a")}
    assert links == ({details.get("id") for details in parsed(page).iter("details")} if ranks > 1 else set())


def test_thousands_of_sites_stay_small() -> None:
    arena = Simulator(segment=64 * MIB)
    for number in range(1000):
        arena.allocate(4096, f"generated/{'deep/' * 40}file{number}.py:1 in <lambda>", "n" * 500)
        arena.time += 0.001
    page = render(arena.snapshot())
    assert len(page.encode()) < 2_000_000
    assert "980 more, 3.828 MiB live" in page
    check(page)


EVIL = "<script>alert('1')</script>&amp;\"]]>\x00\x1b[31m\ud800\uffff\n-->"


def test_all_texts_are_escaped() -> None:
    arena = Simulator()
    arena.drop(arena.allocate(4096, EVIL, EVIL))
    arena.allocate(MIB // 2, EVIL, EVIL)
    snapshot = arena.snapshot()
    snapshot.update(host=EVIL, pid=EVIL)
    snapshot["arenas"][0].update(backend=EVIL, device=EVIL, group=EVIL, rank=EVIL, world=EVIL)
    for block in snapshot["arenas"][0]["segments"][0]["blocks"]:
        block.update(dtype=EVIL, shape=EVIL)
    page = render(snapshot, snapshot)
    assert page.count("<script>") == 1
    page.encode()
    root = parsed(page)
    shown = "<script>alert('1')</script>&amp;\"]]>\ufffd\ufffd[31m\ufffd\ufffd\n-->"
    assert any(shown in "".join(cell.itertext()) for cell in root.iter("td"))
    assert len([*root.iter("script")]) == 1
    check(page)


def test_nothing_is_fetched() -> None:
    page = render(busy(steps=50).snapshot()).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|@import|src=|<link|url\((?!#)", page)


def test_an_empty_snapshot_says_so() -> None:
    page = render({"symmem": "0.1.0", "time": 1.77e9, "arenas": [], "tensors": [{"nbytes": 1024}]})
    assert "0 arenas of 1 snapshot, 2026-02-02 02:40 UTC" in page
    assert "No arenas: the snapshot was made before" in page
    assert "Outside of arenas: 1 tensor, 1 KiB." in page
    parsed(page)
    bare = Simulator().snapshot()
    page = render(bare)
    assert "No segments." in page
    assert "No events were recorded." in page


def write(path: Path, snapshot: object) -> str:
    path.write_text(json.dumps(snapshot))
    return str(path)


def test_the_command_writes_one_page_of_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{rank}.json", busy(rank, steps=20).snapshot()) for rank in range(2)]
    page = tmp_path / "map.html"
    assert cli.main(["memory-map", *files, "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: the map of 2 snapshots\n"
    assert [text in page.read_text(encoding="utf-8") for text in ("rank 0 of 4", "rank 1 of 4")] == [True, True]


def broken(path: Sequence[str | int], value: object) -> dict[str, Any]:
    snapshot: Any = small().snapshot()
    at = snapshot
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return dict(snapshot)


BAD = [
    ([], "no snapshot of symmem"),
    ({"arenas": []}, "no snapshot of symmem"),
    ({"symmem": "0.1.0"}, "arenas: expected a list, got None"),
    (broken(["arenas", 0], 3), "arenas[0]: expected an object, got 3"),
    (broken(["arenas", 0, "stats"], None), "arenas[0].stats: expected an object, got None"),
    (
        broken(["arenas", 0, "stats", "live_bytes"], "1"),
        "arenas[0].stats.live_bytes: expected a number from 0, got '1'",
    ),
    (
        broken(["arenas", 0, "segments", 1, "nbytes"], -1),
        "arenas[0].segments[1].nbytes: expected a number from 0, got -1",
    ),
    (broken(["arenas", 0, "segments", 0, "blocks", 1, "offset"], 0.5), "blocks[1].offset: expected a whole number"),
    (
        broken(["arenas", 0, "segments", 0, "blocks", 1, "state"], "gone"),
        "expected live, quarantined or free, got 'gone'",
    ),
    (
        broken(["arenas", 0, "events", 2, "time"], math.nan),
        "arenas[0].events[2].time: expected a number from 0, got nan",
    ),
    (broken(["arenas", 0, "events", 2, "segment"], True), "arenas[0].events[2].segment: expected a number from 0"),
    (broken(["tensors"], [{"nbytes": None}]), "tensors[0].nbytes: expected a number from 0, got None"),
]


@pytest.mark.parametrize(("snapshot", "text"), BAD)
def test_what_is_no_snapshot_is_an_error_that_names_file_and_place(
    snapshot: object, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path / "good.json", small().snapshot()), write(tmp_path / "bad.json", snapshot)
    page = tmp_path / "map.html"
    assert cli.main(["memory-map", good, bad, "-o", str(page)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"symmem: InvalidArgumentError: {bad}: ")
    assert text in err
    assert not page.exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "not JSON: "), (b"{", "not JSON: "), (b"\xff\xfe\xfa", "not JSON: "), (b"[" * 100_000, "not JSON: ")],
)
def test_what_is_not_json_is_a_named_error(
    content: bytes, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    assert cli.main(["memory-map", str(file), "-o", str(tmp_path / "map.html")]) == 1
    assert f"InvalidArgumentError: {file}: {text}" in capsys.readouterr().err


def test_files_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory-map", str(tmp_path / "none.json")]) == 1
    assert f"{tmp_path / 'none.json'}: cannot be read: No such file or directory" in capsys.readouterr().err
    good = write(tmp_path / "good.json", small().snapshot())
    assert cli.main(["memory-map", good, "-o", str(tmp_path / "no" / "map.html")]) == 1
    assert f"{tmp_path / 'no' / 'map.html'}: cannot be written: No such file" in capsys.readouterr().err


ACTS = st.tuples(
    st.sampled_from(["allocate", "allocate", "drop", "reclaim", "trim"]), st.integers(0, 10**6), st.floats(0, 10)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(ACTS, max_size=60), st.integers(0, 40), st.sampled_from([1, 4096, MIB]))
def test_any_history_can_be_drawn(acts: list[tuple[str, int, float]], kept: int, segment: int) -> None:
    arena = Simulator(segment=segment, kept=kept)
    for act, number, seconds in acts:
        live = [key for key, block in arena.blocks.items() if block["state"] == "live"]
        if act == "allocate":
            arena.allocate(number + 1, SITES[number % len(SITES)])
        elif act == "drop" and live:
            arena.drop(live[number % len(live)])
        elif act in ("reclaim", "trim"):
            getattr(arena, act)()
        arena.time += seconds
    snapshot = json.loads(json.dumps(arena.snapshot()))
    last = states(read(snapshot)[0])[-1]
    assert (last.live, last.quarantined) == (arena.total("live"), arena.total("quarantined"))
    assert last.reserved == sum(arena.segments.values())
    check(render(snapshot))


WHOLE = st.one_of(st.integers(0, 3), st.integers(0, 2**63 - 1))
EVENTS = st.fixed_dictionaries(
    {
        "time": st.one_of(st.floats(0, 9e18), st.floats(0, 1e-300), st.integers(0, 5)),
        "event": st.sampled_from(["grow", "allocate", "drop", "reclaim", "trim", "collect"]),
        **dict.fromkeys(("segment", "offset", "nbytes"), WHOLE),
    }
)


@settings(deadline=None, max_examples=100)
@given(st.lists(EVENTS, max_size=30))
def test_even_events_that_make_no_sense_can_be_drawn(events: list[dict[str, Any]]) -> None:
    snapshot = small().snapshot()
    snapshot["arenas"][0]["events"] = events
    check(render(snapshot))


def test_render_raises_what_the_command_reports() -> None:
    with pytest.raises(InvalidArgumentError, match=r"arenas\[0\]: expected an object"):
        render({"symmem": "0.1.0", "arenas": [None]})
