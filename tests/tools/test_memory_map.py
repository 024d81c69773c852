"""``symmem memory-map``: the page of snapshots, and the conversion for PyTorch's viewer."""

from __future__ import annotations

import gc
import json
import math
import pickle
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.cuda import _memory_viz as viz

import symmem
from symmem.tools import cli, display
from symmem.tools.commands.memory_map import render

MIB = 1 << 20
EVIL = "<script>alert('1')</script>&amp;\"]]>\x00\x1b[31m\ud800\uffff\n-->"


def snapshot_of_rank() -> tuple[dict[str, Any], dict[str, int | float]]:
    """Rank 1 drops a block, rank 0 keeps it; both have a second segment."""
    group = dist.new_group([0, 1])
    kept = [symmem.allocate(MIB, torch.uint8, group=group, backend="host") for _ in range(3)]
    large = symmem.allocate(100 * MIB, torch.uint8, group=group, backend="host")
    if dist.get_rank() == 1:
        del kept[1]
    stats = symmem.memory_stats(group)
    snapshot = symmem.memory_snapshot()
    snapshot["arenas"] = [each for each in snapshot["arenas"] if each["stats"]["reserved_bytes"] > 100 * MIB]
    snapshot["tensors"] = []
    del kept, large
    dist.destroy_process_group(group)
    gc.collect()
    return json.loads(json.dumps(snapshot)), stats


@pytest.fixture(scope="module")
def snapshots(pools: Any) -> list[tuple[dict[str, Any], dict[str, int | float]]]:
    found: list[tuple[dict[str, Any], dict[str, int | float]]] = pools.get(2).run(snapshot_of_rank)
    return found


def small() -> dict[str, Any]:
    """Two segments, a block in quarantine, and a site with markup."""
    blocks = [
        {"offset": 0, "nbytes": MIB, "state": "live", "site": "train.py:12 in step"},
        {"offset": MIB, "nbytes": 2 * MIB, "state": "quarantined", "site": "moe.py:3 in <lambda>"},
        {"offset": 3 * MIB, "nbytes": MIB, "state": "free"},
    ]
    segments = [
        {"index": 0, "address": 1 << 20, "nbytes": 4 * MIB, "blocks": blocks},
        {"index": 2, "address": 1 << 30, "nbytes": 8 * MIB, "blocks": []},
    ]
    stats = {"live_bytes": MIB, "quarantined_bytes": 2 * MIB, "free_bytes": MIB, "peak_live_bytes": 3 * MIB}
    stats |= {"live_blocks": 1234, "quarantined_blocks": 1}
    events = [
        {"time": 5.0, "event": "grow", "segment": 0, "nbytes": 4 * MIB, "address": 1 << 20},
        {"time": 6.0, "event": "allocate", "segment": 0, "offset": 0, "nbytes": MIB, "site": "train.py:12 in step"},
    ]
    place = {"backend": "host", "device": "cpu", "group": "moe", "rank": 3, "world": 4, "meeting": False}
    sites = [{"site": "train.py:12 in step", "live_bytes": MIB, "live_blocks": 1234}]
    arena = {**place, "stats": stats, "segments": segments, "sites": sites, "events": events}
    process = {"symmem": "0.1.0", "time": 1.77e9, "clock": 10.0, "host": "node1", "pid": 123}
    return {**process, "arenas": [arena], "tensors": []}


def parsed(page: str) -> ET.Element:
    return ET.fromstring(page.removeprefix("<!DOCTYPE html>"))


def tables(page: str) -> list[list[list[str]]]:
    return [[["".join(cell.itertext()) for cell in row] for row in table] for table in parsed(page).iter("table")]


def widths(bar: ET.Element) -> dict[str, float]:
    """Percent of a bar by state."""
    found = {}
    for part in bar:
        (value,) = re.findall(r"^width:([\d.]+)%$", part.get("style", ""))
        found[part.get("class", "")] = float(value)
    return found


def bars(page: str) -> list[ET.Element]:
    return [element for element in parsed(page).iter("div") if element.get("class") == "bar"]


def test_the_page_shows_every_rank(snapshots: Sequence[tuple[dict[str, Any], dict[str, int | float]]]) -> None:
    page = render(*[snapshot for snapshot, _ in reversed(snapshots)])
    assert "2 snapshots, 1 arena; 0 tensors outside of arenas" in page
    ranks, sites = tables(page)
    assert ranks[0] == ["rank", "process", "live", "quarantined", "free", "peak", "blocks", "segments"]
    for row, (snapshot, stats), blocks in zip(
        ranks[1:], snapshots, ("4 live, 0 quarantined", "3 live, 1 quarantined"), strict=True
    ):
        assert row[0] == f"{snapshot['arenas'][0]['rank']} of 2"
        assert row[1] == f"{snapshot['host']}, {snapshot['pid']}, cpu"
        keys = ("live_bytes", "quarantined_bytes", "free_bytes", "peak_live_bytes")
        assert row[2:6] == [display.nbytes(stats[key]) for key in keys]
        assert row[6] == blocks
    assert [row[3] for row in ranks[1:]] == ["0 B", "1 MiB"]
    assert sites[0] == ["live", "blocks", "quarantined", "allocated at"]
    assert [row[:3] for row in sites[1:]] == [["200 MiB", "2", "0 B"], ["5 MiB", "5", "1 MiB"]]
    assert all(re.search(r"test_memory_map\.py:\d+ in ", row[3]) for row in sites[1:])
    segments = [segment for snapshot, _ in snapshots for segment in snapshot["arenas"][0]["segments"]]
    for bar, segment in zip(bars(page), segments, strict=True):
        shown = widths(bar)
        for state in ("live", "quarantined", "free"):
            nbytes = sum(block["nbytes"] for block in segment["blocks"] if block["state"] == state)
            assert shown[state] == pytest.approx(100 * nbytes / segment["nbytes"], abs=0.01)
    assert sum(widths(bar)["quarantined"] > 0 for bar in bars(page)) == 1


def test_the_figures_of_a_small_page() -> None:
    page = render(small())
    assert tables(page) == [
        [
            ["rank", "process", "live", "quarantined", "free", "peak", "blocks", "segments"],
            ["3 of 4", "node1, 123, cpu", "1 MiB", "2 MiB", "1 MiB", "3 MiB", "1,234 live, 1 quarantined", ""],
        ],
        [
            ["live", "blocks", "quarantined", "allocated at"],
            ["0 B", "0", "2 MiB", "moe.py:3 in <lambda>"],
            ["1 MiB", "1,234", "0 B", "train.py:12 in step"],
        ],
    ]
    first, second = bars(page)
    assert (first.get("title"), second.get("title")) == (
        "segment 0, 4 MiB: 1 MiB live, 2 MiB quarantined, 1 MiB free",
        "segment 2, 8 MiB: 8 MiB unknown",
    )
    assert widths(first) == {"live": 25, "quarantined": 50, "free": 25, "unknown": 0}
    assert widths(second) == {"live": 0, "quarantined": 0, "free": 0, "unknown": 100}
    assert (first.get("style"), second.get("style")) == ("width:130.0px", "width:260.0px")
    assert [heading.text for heading in parsed(page).iter("h2")] == ["host on cpu, group moe"]


def test_ranks_and_arenas_are_in_order() -> None:
    found = []
    for rank in (11, 2, 0):
        snapshot = small()
        snapshot["arenas"][0].update(rank=rank, device=f"cuda:{rank}")
        snapshot["arenas"].append({**small()["arenas"][0], "group": "other", "rank": rank})
        found.append(snapshot)
    page = render(*found)
    first, _, second, _ = tables(page)
    assert [row[0] for row in first[1:]] == [row[0] for row in second[1:]] == ["0 of 4", "2 of 4", "11 of 4"]
    assert first[1][1] == "node1, 123, cuda:0"
    assert [heading.text for heading in parsed(page).iter("h2")] == [
        "host on cuda, group moe",
        "host on cpu, group other",
    ]


def test_many_sites_and_blocks_stay_small() -> None:
    snapshot = small()
    (arena,) = snapshot["arenas"]
    arena["sites"] = [{"site": f"f{n}.py:1 in f", "live_bytes": 1024, "live_blocks": 2} for n in range(1000)]
    block = {"nbytes": 256, "state": "live", "site": "a.py:1 in f"}
    arena["segments"][0]["blocks"] = [{"offset": 256 * n, **block} for n in range(100_000)]
    page = render(snapshot)
    assert len(page) < 20_000
    assert tables(page)[1][-1] == ["950 KiB", "1,900", "0 B", "950 more call sites"]


def test_all_texts_are_escaped() -> None:
    snapshot = small()
    snapshot.update(host=EVIL, pid=EVIL)
    (arena,) = snapshot["arenas"]
    arena.update(backend=EVIL, device=EVIL, group=EVIL, world=EVIL)
    arena["sites"][0]["site"] = arena["segments"][0]["blocks"][1]["site"] = EVIL
    arena["segments"][0]["index"] = EVIL
    page = render(snapshot, snapshot)
    page.encode()
    root = parsed(page)
    shown = "<script>alert('1')</script>&amp;\"]]>\ufffd\ufffd[31m\ufffd\ufffd\ufffd-->"
    assert any("".join(cell.itertext()) == shown for cell in root.iter("td"))
    assert any(shown in bar.get("title", "") for bar in bars(page))
    assert not [*root.iter("script")]
    assert "<script" not in page


def test_nothing_is_fetched() -> None:
    assert not re.search(r"https?:|//[a-z]|@import|src=|href=|<link|url\(", render(small()))


def test_an_empty_snapshot() -> None:
    page = render({**small(), "arenas": [], "tensors": [{"nbytes": 1024}]})
    assert "1 snapshot, 0 arenas; 1 tensor outside of arenas, 1 KiB." in page
    assert tables(page) == []


def write(path: Path, snapshot: object) -> str:
    path.write_text(json.dumps(snapshot))
    return str(path)


def test_the_command_writes_one_page_of_all_ranks(
    snapshots: Sequence[tuple[dict[str, Any], Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write(tmp_path / f"{rank}.json", snapshot) for rank, (snapshot, _) in enumerate(snapshots)]
    page = tmp_path / "map.html"
    assert cli.main(["memory-map", *files, "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: the map of 2 snapshots\n"
    assert [row[0] for row in tables(page.read_text(encoding="utf-8"))[0][1:]] == ["0 of 2", "1 of 2"]


def test_the_command_converts_a_snapshot_for_torch(
    snapshots: Sequence[tuple[dict[str, Any], Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "1.json", snapshots[1][0])
    assert cli.main(["memory-map", "--torch", file]) == 0
    converted = pickle.loads((tmp_path / "memory-map.pickle").read_bytes())
    shown = viz.memory(converted, format_flamegraph=str)
    assert re.search(rf";active_pending_free;test_memory_map\.py:\d+:\S+ {MIB}\n", shown)
    assert f"total_reserved: {viz.Bytes(snapshots[1][1]['reserved_bytes'])}" in viz.segsum(converted)
    capsys.readouterr()
    assert cli.main(["memory-map", "--torch", file, file]) == 1
    assert "--torch converts one snapshot, not 2" in capsys.readouterr().err


def broken(path: Sequence[str | int], value: object) -> dict[str, Any]:
    snapshot: Any = small()
    at = snapshot
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return dict(snapshot)


BAD = [
    [],
    {"arenas": []},
    broken(["arenas", 0], 3),
    broken(["arenas", 0, "device"], None),
    broken(["arenas", 0, "rank"], "first"),
    broken(["arenas", 0, "stats"], None),
    broken(["arenas", 0, "stats", "live_bytes"], "1"),
    broken(["arenas", 0, "segments", 0, "nbytes"], "1"),
    broken(["arenas", 0, "segments", 0, "blocks", 1, "nbytes"], "1"),
    broken(["arenas", 0, "sites"], [{"site": "a"}]),
    broken(["arenas", 0, "sites", 0, "live_bytes"], 10**400),
    broken(["tensors"], [{"nbytes": None}]),
]


@pytest.mark.parametrize("snapshot", BAD)
def test_bad_data_is_an_error_that_names_the_file(
    snapshot: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path / "good.json", small()), write(tmp_path / "bad.json", snapshot)
    page = tmp_path / "map.html"
    assert cli.main(["memory-map", good, bad, "-o", str(page)]) == 1
    assert f"symmem: InvalidArgumentError: {bad}: no snapshot of symmem: " in capsys.readouterr().err
    assert not page.exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["clock"], None),
        (["arenas", 0, "device"], "cuda:x"),
        (["arenas", 0, "segments", 0, "address"], "0"),
        (["arenas", 0, "segments", 0, "blocks", 0, "state"], "gone"),
        (["arenas", 0, "events", 1, "time"], math.nan),
        (["arenas", 0, "events"], [{}]),
    ],
)
def test_bad_data_is_not_converted(
    path: list[str | int], value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path / "bad.json", broken(path, value))
    assert cli.main(["memory-map", "--torch", bad, "-o", str(tmp_path / "out")]) == 1
    assert f"InvalidArgumentError: {bad}: no snapshot of symmem: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\xfa", b"[" * 100_000])
def test_a_file_that_is_not_json_is_named(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    assert cli.main(["memory-map", str(file), "-o", str(tmp_path / "map.html")]) == 1
    assert f"InvalidArgumentError: {file}: no snapshot of symmem: " in capsys.readouterr().err


def test_files_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory-map", str(tmp_path / "none.json")]) == 1
    assert f"{tmp_path / 'none.json'}: cannot be read: No such file or directory" in capsys.readouterr().err
    good = write(tmp_path / "good.json", small())
    assert cli.main(["memory-map", good, "-o", str(tmp_path / "no" / "map.html")]) == 1
    assert f"{tmp_path / 'no' / 'map.html'}: cannot be written: No such file" in capsys.readouterr().err


def pixels(png: Path) -> tuple[int, set[tuple[int, ...]]]:
    """Width, and the colours of a PNG of 8 bits per channel."""
    import zlib

    data, at, packed = png.read_bytes(), 8, b""
    width, height, _, kind = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), data[24], data[25]
    size = {2: 3, 6: 4}[kind]
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += length + 12
    raw, above, found = zlib.decompress(packed), bytearray(width * size), set()
    for row in range(height):
        start = row * (width * size + 1)
        method, line = raw[start], bytearray(raw[start + 1 : start + 1 + width * size])
        for i, value in enumerate(line):
            left, up = line[i - size] if i >= size else 0, above[i]
            corner = above[i - size] if i >= size else 0
            paeth = min((left, up, corner), key=lambda each: abs(left + up - corner - each))
            line[i] = value + (0, left, up, (left + up) // 2, paeth)[method] & 255
        found |= {tuple(line[i : i + 3]) for i in range(0, len(line), size)}
        above = line
    return width, found


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
def test_a_browser_shows_the_colours(tmp_path: Path) -> None:
    page, image = tmp_path / "map.html", tmp_path / "map.png"
    page.write_text(render(small()), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=900,400"]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={image}", page.as_uri()]
    subprocess.run(command, check=True, timeout=100, capture_output=True)
    width, colours = pixels(image)
    assert width == 900
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colours, "live and quarantined"
