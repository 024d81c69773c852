"""The allocation log of one rank: counters, events and slots."""

from __future__ import annotations

from collections import Counter

from arena_rank import Rank

import symmem
from symmem.arena.segment import GRANULE


def test_counters(rank: Rank) -> None:
    st = rank.allocate(1000)
    assert rank.book == (1024, 0)
    other = rank.allocate(1)
    assert rank.book == (1280, 0)
    del st
    assert rank.book == (256, 1024)
    rank.allocate(5)
    assert rank.book == (256, 1280)
    log = rank.log
    assert (log.peak_bytes, log.reclaimed_blocks, log.collections, log.growths) == (1280, 0, 0, 1)
    assert rank.collect() == 1280
    assert rank.book == (256, 0)
    assert (log.peak_bytes, log.reclaimed_blocks, log.collections) == (1280, 2, 1)
    del other
    rank.collect()
    assert rank.book == (0, 0)
    assert [what for _, what, *_ in log.changes] == ["grow"]
    assert [[entry[5] for _, entry, *_ in events] for events in (log.drops, log.reclaims)] == [[1024, 256, 256]] * 2
    assert all(one[0] < other[0] for one, other in zip(log.drops, log.reclaims, strict=True))


def test_each_drop_is_noted(rank: Rank) -> None:
    """The next allocation notes a single drop; many drops are noted together."""
    sizes = [*range(0, 1000, 100)]  # at most as many as there are signal pads
    for size in sizes:
        rank.allocate(size)
    many = [rank.allocate(3000 + size) for size in sizes]
    del many
    assert rank.book == (0, sum(max(-(-size // 256), 1) * 256 for size in (*sizes, *(3000 + size for size in sizes))))
    rank.log.flush_events()
    assert sorted(entry[6].sizes[0] for _, entry, _ in rank.log.drops) == [*sizes, *(3000 + size for size in sizes)]
    assert rank.log.quarantined_blocks == len(rank.log.drops)


def test_many_blocks_at_once(rank: Rank) -> None:
    """The log absorbs them later, but the statistics show them as free at once."""
    kept = [rank.allocate(8) for _ in range(1000)]
    rank.collect()
    del kept[::2]
    assert rank.book == (500 * GRANULE, 500 * GRANULE)
    assert rank.collect() == 500 * GRANULE
    assert rank.log.agreed.bit_count() == 500
    assert rank.collect() == 0
    (told,) = (each for each in symmem.memory_snapshot()["arenas"] if each["stats"]["allocations"] == 1000)
    happened = Counter(each["event"] for each in told["events"])
    assert (happened["allocate"], happened["drop"], happened["reclaim"]) == (1000, 500, 500)
    states = Counter(each["state"] for each in told["segments"][0]["blocks"])
    assert states["quarantined"] == 0
    assert states["free"] >= 500
    assert symmem.memory_stats(rank.group)["live_blocks"] == 500
    del kept[::2]
    assert rank.collect() == 250 * GRANULE
    rank.log.absorb()
    assert rank.book == (250 * GRANULE, 0)
    assert len(rank.log.free_slots) == len(rank.log.records) - 250


def test_meetings_for_nothing_leave_nothing(rank: Rank) -> None:
    kept = [rank.allocate(8) for _ in range(1000)]
    del kept[::2]
    rank.collect()
    log = rank.log
    before, remembered = log.collections, (len(log.reclaims), len(log._pending))
    for _ in range(3):
        assert rank.collect() == 0
    assert log.agreed
    assert (len(log.reclaims), len(log._pending)) == remembered
    assert log.collections == before + 3
    log.absorb()
    remembered = len(log.reclaims), 0
    rank.collect()
    assert (len(log.reclaims), len(log._pending)) == remembered


def test_the_book_after_much_use(rank: Rank) -> None:
    kept = [rank.allocate(n) for n in range(0, 3000, 100)]
    for turn in range(20):
        some = [rank.allocate(turn * 37 + n) for n in range(20)]
        del some
        rank.collect()
    log = rank.log
    assert rank.book == (sum(max(-(-n // 256), 1) * 256 for n in range(0, 3000, 100)), 0)
    assert log.quarantine() == (0, 0)
    live = {slot for slot, entry in enumerate(log.records) if entry}
    assert live == {st._block.slot for st in kept}  # type: ignore[attr-defined]
    assert sorted(slot for segment in log.segments for slot in segment.slots.values()) == sorted(live)
    assert sorted(live | set(log.free_slots)) == list(range(len(log.records)))
