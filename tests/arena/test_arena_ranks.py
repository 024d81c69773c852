"""Faults of arenas, with ranks as processes: they allocate differently, die, run out of memory, or are interrupted.

Every rank gets the documented error in time. Nothing is left over, and nothing is reused too early.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import patience
import pytest
import torch
from patience import LONG, SOON
from told import Told, told

import symmem
from symmem.arena.allocation_log import AllocationLog
from symmem.arena.arena import arena_for, arenas_of
from symmem.arena.arena_block import ArenaBlock
from symmem.arena.segment import SignalPads
from symmem.backends import get_backend
from symmem.backends.host import HostBackend
from symmem.errors import OutOfMemoryError
from symmem.memory.layout import Layout
from symmem.tools.conformance.case import Resources
from symmem.tools.ranks import RankPool, rank_store

WORLD = 3
MIB = 1 << 20
SETTINGS = f"arena_size(2MiB),arena_growth(1),arena_limit(64MiB),{patience.SETTINGS}"
NewPool = Callable[..., RankPool]


@pytest.fixture
def pool(living_pool: NewPool) -> RankPool:
    """Ranks that survive the test."""
    return living_pool(WORLD, process_group=None, env={"SYMMEM_ENABLE": SETTINGS})


@pytest.fixture
def mortals(new_pool: NewPool) -> RankPool:
    """Ranks for a test that kills some of them."""
    return new_pool(WORLD, process_group=None, env={"SYMMEM_ENABLE": SETTINGS})


# Functions that ranks run.

groups: dict[str, symmem.Group] = {}


def group_of(name: str, **settings: object) -> symmem.Group:
    """A group of all ranks that has joined, with settings of this rank."""
    if name not in groups:
        if not groups:
            gc.freeze()  # spares the collector torch's own objects
        added = "".join(f",{key}({value})" for key, value in settings.items())
        known = dict(part.rstrip(")").split("(") for part in (SETTINGS + added).split(","))
        os.environ["SYMMEM_ENABLE"] = ",".join(f"{key}({value})" for key, value in known.items())
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        groups[name] = symmem.Group.from_store(rank, size, rank_store(), name)
        os.environ["SYMMEM_ENABLE"] = SETTINGS
        meet(groups[name])
    return groups[name]


def meet(group: symmem.Group) -> None:
    with group.collective("meet"):
        pass


def held() -> tuple[Resources, list[str]]:
    while gc.collect():
        pass
    files = sorted(path.name for path in Path("/dev/shm").glob("*symmem*") if "fake" not in path.name)
    return Resources.now(), files


def allocate(group: symmem.Group, sizes: Any = 8, dtype: Any = torch.uint8, **options: Any) -> symmem.SymmetricTensor:
    return symmem.allocate(sizes, dtype, group=group, backend="host", **options)


def log_of(group: symmem.Group) -> AllocationLog:
    return arenas_of(group)[0].log


def works(group: symmem.Group) -> None:
    """Check that all ranks' memory is reached at the same offset, and that signals work."""
    st = allocate(group, 1000, torch.int32)
    st.tensor.fill_(group.rank + 1)
    st.barrier()
    assert [st.remote_tensor(rank)[-1].item() for rank in range(group.size)] == list(range(1, group.size + 1))
    st.barrier()


def ended(group: symmem.Group) -> None:
    """Close a group that may be damaged."""
    groups.pop(group.name)
    group.close()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def survivors(pool: RankPool, victim: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    outcomes = pool.outcomes(function, *args)
    assert "died with exit code -9" in str(outcomes.pop(victim).error), outcomes
    for outcome in outcomes:
        assert outcome.error is None, outcome.trace
    return [outcome.value for outcome in outcomes]


class Interrupt(BaseException):
    """The exception of a signal handler."""


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    def handler(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Ranks that allocate differently.


def allocate_with_another_backend(group: symmem.Group) -> Any:
    """Allocate with a copy of `host` that has another name."""
    import sys

    arena = arena_for(group, HostBackend("toy"), torch.device("cpu"))
    return arena.sub_allocate(Layout.make((8,), torch.uint8, None), None, sys._getframe(0))


# The calls of the odd rank and of the others, and the part of the message about them.
DIVERGENCES: dict[str, tuple[Callable[[symmem.Group], object], Callable[[symmem.Group], object], str, str]] = {
    "size": (lambda g: allocate(g, 10), lambda g: allocate(g, 9), "[10] of torch.uint8", "[9] of torch.uint8"),
    "a size that takes more": (lambda g: allocate(g, 9000), lambda g: allocate(g, 9), "[9000]", "[9]"),
    "dtype": (
        lambda g: allocate(g, 8, torch.int32),
        lambda g: allocate(g, 8, torch.float32),
        "[8] of torch.int32",
        "[8] of torch.float32",
    ),
    "shape": (lambda g: allocate(g, (2, 3)), lambda g: allocate(g, (3, 2)), "[2, 3]", "[3, 2]"),
    "strides": (
        lambda g: allocate(g, (2, 3), strides=(3, 1)),
        lambda g: allocate(g, (2, 3), strides=(1, 2)),
        "[2, 3]",
        "[2, 3]",
    ),
    "order": (
        lambda g: (allocate(g, 300), allocate(g, 30)),
        lambda g: (allocate(g, 30), allocate(g, 300)),
        "[300]",
        "[30]",
    ),
    "name": (lambda g: allocate(g, name="b"), lambda g: allocate(g, name="a"), "named 'b'", "named 'a'"),
    "no name": (lambda g: allocate(g), lambda g: allocate(g, name="a"), "[8] of torch.uint8, 256", "named 'a'"),
    "one more": (lambda g: (allocate(g, 5), allocate(g, 6))[0], lambda g: allocate(g, 5), "[6]", "nothing"),
    "one fewer": (lambda g: None, lambda g: allocate(g, 5), "nothing", "[5]"),
    "one of which nothing is left": (lambda g: allocate(g, 5) and None, lambda g: None, "[5]", "nothing"),
    "backend": (allocate_with_another_backend, lambda g: allocate(g), "nothing", "[8] of torch.uint8"),
}
MEETINGS: dict[str, Callable[[symmem.Group], object]] = {
    "collect": lambda g: symmem.collect(g),
    "rendezvous": lambda g: allocate(g, arena=False).rendezvous(g),
    "growth": lambda g: allocate(g, 5 * MIB),
}


def diverge(kind: str, meeting: str) -> tuple[list[Told], bool]:
    group = group_of(f"{kind} {meeting}")
    common = [allocate(group, 100), allocate(group, (3, 3), torch.int16)]
    if kind == "backend":
        common.append(allocate_with_another_backend(group))
    odd, usual, _, _ = DIVERGENCES[kind]
    with group.collective("begin together"):
        pass
    different: list[object] = []
    if group.rank == 1:  # the last one, so that it is told, and by an error that names all others
        rank_store().wait([f"{group.name} {rank}" for rank in range(group.size) if rank != 1])
    first = told(lambda: different.append((odd if group.rank == 1 else usual)(group)))
    rank_store().set(f"{group.name} {group.rank}", "")
    if not first.kind:  # this rank was the first one, or its allocations are the beginning of the others'
        first = told(lambda: MEETINGS[meeting](group))
    later = told(lambda: allocate(group).barrier())
    last = told(lambda: symmem.collect(group))
    assert common[0].tensor.fill_(1).sum() == 100  # live tensors can be used
    different.clear()
    ended(group)
    return [first, later, last], True


@pytest.mark.parametrize(
    ("kind", "meeting"),
    [(kind, "collect") for kind in DIVERGENCES] + [("size", "rendezvous"), ("order", "growth"), ("one more", "growth")],
)
def test_ranks_that_diverge_are_told_at_the_next_meeting(kind: str, meeting: str, pool: RankPool) -> None:
    _, _, odd, usual = DIVERGENCES[kind]
    outcomes = pool.run(diverge, kind, meeting)
    for (first, later, last), _ in outcomes:
        assert (first.kind, first.peers) == ("DivergenceError", (1,)), first
        assert odd in first.text
        assert usual in first.text
        assert "rank 1" in first.text
        assert Path(__file__).name + ":" in first.text
        assert first.text.split("]", 1)[1] == outcomes[0][0][0].text.split("]", 1)[1]
        assert "allocation 4" in first.text if kind == "one more" else "allocation 3" in first.text
        assert not later.kind, later  # the arena has begun again
        assert not last.kind, last
        assert max(first.took, later.took, last.took) < SOON


def diverge_while_growing(kind: str) -> Told:
    """Diverge in the allocation that makes the arena grow, as the first one or later."""
    group = group_of(f"growing {kind}")
    live = [] if kind == "first" else [allocate(group)]
    result = told(lambda: live.append(allocate(group, (5 if group.rank == 1 else 7) * MIB)))
    ended(group)
    return result


@pytest.mark.parametrize("kind", ["first", "later"])
def test_the_allocation_that_makes_an_arena_grow_is_named(kind: str, pool: RankPool) -> None:
    for result in pool.run(diverge_while_growing, kind):
        assert (result.kind, result.peers) == ("DivergenceError", (1,)), result
        number = 1 if kind == "first" else 2
        assert f"allocation {number}: [{7 * MIB}] of torch.uint8" in result.text
        assert f"[{5 * MIB}] of torch.uint8" in result.text
        assert Path(__file__).name + ":" in result.text


def here(group: symmem.Group) -> object:
    return symmem.allocate(8, torch.uint8, group=group, backend="host")


def there(group: symmem.Group) -> object:
    return symmem.allocate(8, torch.uint8, group=group, backend="host")


def diverge_checked(kind: str) -> tuple[Told, Told]:
    group = group_of(f"checked {kind}", allocation_check="each")
    keep = [allocate(group, 100)]
    if kind == "site":
        result = told(lambda: (here if group.rank == 1 else there)(group))
    else:
        odd, usual, _, _ = DIVERGENCES[kind]
        result = told(lambda: (odd if group.rank == 1 else usual)(group))
    del keep
    later = told(lambda: allocate(group))
    ended(group)
    return result, later


@pytest.mark.parametrize("kind", ["size", "dtype", "order", "name", "strides", "site"])
def test_in_the_checked_mode_at_once(kind: str, pool: RankPool) -> None:
    odd, usual = DIVERGENCES[kind][2:] if kind != "site" else ("in here", "in there")
    for result, later in pool.run(diverge_checked, kind):
        assert (result.kind, result.peers) == ("DivergenceError", (1,)), result
        assert odd in result.text
        assert usual in result.text
        assert "allocation 2" in result.text
        assert not later.kind, later


# Calls of some ranks only.


def alone(kind: str) -> tuple[Told, bool]:
    group = group_of(f"alone {kind}")
    keep, odd = [allocate(group, 100)], group.rank == 1
    begin = symmem.collect(group)
    assert begin == 0
    operations: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "trim": (lambda: symmem.collect(group, trim=True), lambda: symmem.collect(group)),
        "rendezvous": (lambda: allocate(group, arena=False).rendezvous(group), lambda: symmem.collect(group)),
        "growth": (lambda: allocate(group, 5 * MIB), lambda: symmem.collect(group)),
        "backend": (lambda: allocate_with_another_backend(group), lambda: symmem.collect(group)),
        "refused": (lambda: allocate(group, -1), lambda: symmem.collect(group)),
    }
    result = told(operations[kind][not odd])
    usable = kind in ("growth", "backend") or told(lambda: (works(group), symmem.collect(group))).kind == ""
    del keep
    ended(group)
    return result, usable


@pytest.mark.parametrize("kind", ["trim", "rendezvous", "growth", "backend", "refused"])
def test_what_only_one_rank_does(kind: str, pool: RankPool) -> None:
    expected = "InvalidArgumentError" if kind == "refused" else "MismatchError"
    for rank, (result, usable) in enumerate(pool.run(alone, kind)):
        assert result.kind == expected, result
        assert result.took < SOON
        assert usable
        if rank == 1 and kind in ("growth", "backend"):
            assert f"for allocation {2 if kind == 'growth' else 1}: [" in result.text
            assert Path(__file__).name + ":" in result.text


def memory_of_its_own_on_one_rank() -> None:
    group = group_of("own")
    own = allocate(group, arena=False) if group.rank == 1 else None
    if group.rank == 2:
        assert told(lambda: symmem.allocate(8, "no dtype", backend="host")).kind == "InvalidArgumentError"  # type: ignore[arg-type]
    meet(group)
    assert symmem.collect(group) == 0
    works(group)
    del own


def test_what_only_some_ranks_need_they_allocate_outside(pool: RankPool) -> None:
    """The error for a divergence advises this; it also works before any rank has used the arena."""
    pool.run(memory_of_its_own_on_one_rank)


def settings_that_differ(name: str) -> Told:
    rank = int(os.environ["RANK"])
    group = group_of(f"settings {name}", **{name: "8MiB" if rank == 1 else "4MiB"})
    result = told(lambda: [allocate(group, 3 * MIB), allocate(group, 3 * MIB)])
    ended(group)
    return result


@pytest.mark.parametrize(("name", "kind"), [("arena_size", "MismatchError"), ("arena_limit", "ResourceLimitError")])
def test_settings_that_differ(name: str, kind: str, pool: RankPool) -> None:
    for result in pool.run(settings_that_differ, name):
        assert result.kind == kind, result
        assert name in result.text
        assert result.took < SOON


# Memory.


def run_out(where: str) -> tuple[list[Told], Any, Any]:
    group = group_of(f"memory {where}")
    keep = allocate(group)
    works(group)
    symmem.collect(group)
    before = held(), log_of(group).count, log_of(group).digest
    results = []
    if where == "limit":
        results = [told(lambda: allocate(group, 65 * MIB)) for _ in range(3)]
    else:
        backend = get_backend("host")
        original = backend.allocate

        def short(nbytes: int, *args: Any) -> Any:
            raise OutOfMemoryError("planted")

        def failing(*args: Any) -> Any:
            original(*args)
            raise OutOfMemoryError("planted")

        if group.rank == 1:
            backend.allocate = short if where == "allocate" else failing  # type: ignore[assignment, method-assign]
        results = [told(lambda: allocate(group, 5 * MIB)) for _ in range(3)]
        if group.rank == 1:
            backend.allocate = original  # type: ignore[method-assign]
    after = held(), log_of(group).count, None
    works(group)
    assert allocate(group, 5 * MIB).tensor.numel() == 5 * MIB
    symmem.collect(group, trim=True)
    assert held()[0] == before[0][0]
    del keep
    return results, before[:2], after[:2]


@pytest.mark.parametrize("where", ["limit", "allocate", "after allocate"])
def test_an_arena_that_cannot_grow(where: str, pool: RankPool) -> None:
    """On one rank or on all: all ranks get the same error, nothing is left over, and the arena still works."""
    for results, before, after in pool.run(run_out, where):
        for result in results:
            assert result.kind == ("ResourceLimitError" if where == "limit" else "OutOfMemoryError"), result
            assert result.took < SOON
        assert before == after


# Dropping.


def drop_in_another_order(turns: int) -> tuple[list[int], list[int]]:
    group = group_of("orders")
    live = {n: allocate(group, 100 + 37 * n) for n in range(turns)}
    order = sorted(live, key=lambda n: (n * 7 + group.rank * 13) % turns)
    kept, freed = [], []
    for count, n in enumerate(order):
        circle: list[Any] = [live.pop(n)]
        if n % 5 == group.rank:
            kept.append(circle[0])  # only this rank keeps it
        circle.append(circle)
        del circle
        if count % 3 == group.rank:
            gc.collect()
        if count % 10 == 9:
            freed.append(symmem.collect(group))
    gc.collect()
    freed.append(symmem.collect(group))
    log = log_of(group)
    for st in kept:
        st.tensor.fill_(group.rank + 1)
    more = [allocate(group, 4000) for _ in range(50)]
    for st in more:
        st.tensor.fill_(99)
    meet(group)
    for st in kept:
        assert (st.tensor == group.rank + 1).all()
        for peer in range(group.size):
            assert not (st.remote_tensor(peer) == 99).any()
    meet(group)
    log.count_drops()
    stats = [log.live_bytes, log.quarantined_bytes, sum(segment.space.used for segment in log.segments)]
    return freed, stats


def test_ranks_that_drop_in_another_order(pool: RankPool) -> None:
    """Every rank also keeps some tensors that the others have dropped; the statistics show it."""
    outcomes = pool.run(drop_in_another_order, 40)
    assert all(freed == outcomes[0][0] for freed, _ in outcomes)
    assert len({sum(stats[:2]) for _, stats in outcomes}) == 1
    assert all(stats[1] > 0 for _, stats in outcomes)


def reuse_pads(turns: int) -> None:
    group, values = group_of("pads"), []
    for turn in range(turns):
        st = allocate(group, 64 + 1000 * (turn % 5))
        st.tensor.fill_(255)
        if group.rank == turn % 3:
            time.sleep(0.001)
        st.put_signal((group.rank + 1) % 3, 2)  # no rank waits for this signal
        st.barrier()
        values.append(int(st.signal_pad(group.rank).view(torch.int32).sum()))
        del st
        symmem.collect(group)
        values.append(int(sum(each.view(torch.int32).sum() for each in fresh_pads(group))))
    assert values == [1, 0] * turns, values


def fresh_pads(group: symmem.Group) -> list[torch.Tensor]:
    return [allocate(group, 8).signal_pad(group.rank) for _ in range(5)]


def test_a_pad_is_zero_on_all_ranks_when_it_is_used_again(pool: RankPool) -> None:
    pool.run(reuse_pads, 20)


def signal_one_way() -> int:
    """The signalled rank has never used the tensor's signals itself, so only its peer knows about the signal."""
    group = group_of("one way")
    st = allocate(group)
    if group.rank == 0:
        st.put_signal(1)
    meet(group)
    slot = st._block.slot  # type: ignore[attr-defined]
    del st
    symmem.collect(group)
    again = allocate(group)
    assert again._block.slot == slot  # type: ignore[attr-defined]
    return int(again.signal_pad(group.rank).view(torch.int32).sum())


def test_a_pad_that_only_a_peer_has_used_is_zeroed(pool: RankPool) -> None:
    assert pool.run(signal_one_way) == [0, 0, 0]


def keep_a_view_of_a_peer(kind: str) -> int:
    group = group_of(f"views {kind}")
    st = allocate(group, 1000)
    st.tensor.fill_(group.rank + 1)
    meet(group)
    peer = (group.rank + 1) % group.size
    view = None
    if group.rank == 0:
        view = st.remote_tensor(peer)[3:] if kind == "remote" else st.contiguous_view()[peer]
    del st
    freed = symmem.collect(group)
    for _ in range(3):
        allocate(group, 1000).tensor.fill_(99)
    meet(group)
    assert view is None or (view == peer + 1).all()
    meet(group)
    return freed


@pytest.mark.parametrize("kind", ["remote", "contiguous"])
def test_a_view_of_a_peers_memory_keeps_it(kind: str, pool: RankPool) -> None:
    assert pool.run(keep_a_view_of_a_peer, kind) == [0, 0, 0]


# Subgroups.

pairs: dict[str, symmem.Group] = {}


def pair_of(ranks: tuple[int, ...]) -> symmem.Group | None:
    rank, name = int(os.environ["RANK"]), f"ranks {ranks}"
    if rank in ranks and name not in pairs:
        pairs[name] = symmem.Group.from_store(ranks.index(rank), len(ranks), rank_store(), name)
    return pairs.get(name)


def use_subgroups() -> list[int]:
    group = group_of("subgroups")
    one, two = (allocate(group, 16, torch.int32) for _ in range(2))
    for ranks in ((0, 1), (1, 2), (2, 0)):
        pair = pair_of(ranks)
        if pair is None:
            continue
        one.rendezvous(pair)
        two.rendezvous(pair)
        peer = 1 - pair.rank
        for st in (one, two):
            st.tensor.fill_(10 * group.rank + ranks[0])
            st.barrier(group=pair)
            assert st.remote_tensor(peer, group=pair)[3] == 10 * ranks[peer] + ranks[0]
            st.barrier(group=pair)
        # Four independent signals on one channel: two tensors in two groups.
        one.put_signal(peer, 4, group=pair)
        assert told(partial(two.wait_signal, peer, 4, 0.02, group=pair)).kind == "PeerTimeoutError"
        assert told(partial(one.wait_signal, ranks[peer], 4, 0.02, group=group)).kind == "PeerTimeoutError"
        one.wait_signal(peer, 4, group=pair)
    meet(group)
    one.barrier(group=group)
    before = log_of(group).quarantined_bytes
    one.close()
    del one, two, st
    gc.collect()
    return [before, symmem.collect(group)]


def test_subgroups_have_signals_of_their_own(pool: RankPool) -> None:
    assert pool.run(use_subgroups) == [[0, 512]] * 3


def reuse_subgroup_pads(turns: int) -> int:
    """Small segments reuse pads soon. A pad must not be zeroed while the peer still reads it."""
    group, pair = group_of("subgroup pads"), pair_of((0, 1))
    pads = set()
    for turn in range(turns):
        st = allocate(group, 64)
        if pair is not None:
            st.rendezvous(pair)
            pads.add(st.signal_pad(pair.rank, group=pair).data_ptr())
            for _ in range(3):
                st.barrier(turn % 64, timeout=10.0, group=pair)
        del st
    return len(pads)


def test_a_pad_of_a_subgroup_that_is_used_again(pool: RankPool) -> None:
    turns = 150
    assert all(0 <= pads < turns for pads in pool.run(reuse_subgroup_pads, turns))


def another_arena_at_the_same_offset() -> Told:
    """Every rank has a separate group. Their arenas are equal, but the large group does not know their freed blocks."""
    rank, group = int(os.environ["RANK"]), group_of("large")
    solo = symmem.Group.from_store(0, 1, rank_store(), f"solo {rank}")
    st = allocate(solo)
    result = told(lambda: st.rendezvous(group))
    ended(group)
    return result


def test_a_group_with_ranks_from_outside_of_the_arenas(pool: RankPool) -> None:
    for result in pool.run(another_arena_at_the_same_offset):
        assert result.kind == "MismatchError", result


# A rank dies, or is interrupted.


def die_with_quarantine(moment: str, victim: int) -> tuple[Told, Told, bool]:
    group = group_of("mortal " + moment)
    kept, dropped = allocate(group, 1000), [allocate(group, 1000) for _ in range(5)]
    kept.tensor.fill_(7)
    view = kept.remote_tensor(victim)
    meet(group)
    before = held()
    del dropped
    if group.rank == victim:
        if moment == "while cleaning":
            AllocationLog.reclaim = SignalPads.clear = lambda *_: die()  # type: ignore[assignment,method-assign]
            symmem.collect(group)
        time.sleep(0.1)
        die()
    first = told(lambda: allocate(group, 5 * MIB) if moment == "growth" else symmem.collect(group))
    second = told(lambda: symmem.collect(group))
    assert (view == 7).all()
    more = [allocate(group, 1000) for _ in range(5)]  # needs no other rank
    for st in more:
        st.tensor.fill_(8)
    same = held() == before
    return first, second, same and bool((kept.tensor == 7).all())


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("moment", ["collect", "growth", "while cleaning"])
def test_a_rank_that_dies_with_blocks_in_quarantine(moment: str, victim: int, mortals: RankPool) -> None:
    for first, second, whole in survivors(mortals, victim, die_with_quarantine, moment, victim):
        assert (first.kind, first.peers) == ("PeerLostError", (victim,)), first
        assert second.kind in ("PeerLostError", "GroupError"), second
        assert max(first.took, second.took) < SOON
        assert whole


def interrupt_a_collection(victim: int) -> tuple[str, Told, int]:
    group = group_of(f"interrupted {victim}")
    kept = [allocate(group, 1000) for _ in range(10)]
    kept[0].tensor.fill_(group.rank)
    del kept[1:]
    raised = ""
    if group.rank == victim:
        try:
            with interrupted_after(0.2):
                symmem.collect(group)  # the others come later
        except Interrupt:
            raised = "Interrupt"
        rank_store().set(f"interrupted {victim}", "")
        result = told(lambda: None)
    else:
        rank_store().wait([f"interrupted {victim}"])
        result = told(lambda: symmem.collect(group))
    freed = symmem.collect(group)
    works(group)
    kept[0].barrier()
    assert [int(kept[0].remote_tensor(peer)[5]) for peer in range(group.size)] == [0, 1, 2]
    kept[0].barrier()
    return raised, result, freed


@pytest.mark.parametrize("victim", [0, 1])
def test_an_interrupt_while_waiting_for_the_others(victim: int, pool: RankPool) -> None:
    """No rank freed anything; the next collection does."""
    for rank, (raised, result, freed) in enumerate(pool.run(interrupt_a_collection, victim)):
        assert raised == ("Interrupt" if rank == victim else "")
        assert result.kind == ("" if rank == victim else "RendezvousError"), result
        assert freed == 9 * 1024


def interrupt_half_way(where: str) -> list[Told]:
    group = group_of(f"half-way {where}")
    kept = [allocate(group, 1000) for _ in range(10)]
    del kept[5:]
    with group.collective("all have allocated"):
        pass
    results: list[Told] = []
    if group.rank == 1:
        owner: Any = AllocationLog if where == "reclaim" else ArenaBlock
        name = "reclaim" if where == "reclaim" else "__init__"
        original = getattr(owner, name)

        def interrupted(*_: Any) -> Any:
            setattr(owner, name, original)
            raise Interrupt

        setattr(owner, name, interrupted)
        try:
            if where == "reclaim":
                symmem.collect(group)
            else:
                allocate(group, 500, name="the next one")
        except Interrupt:
            pass
    elif where == "reclaim":
        symmem.collect(group)
    else:
        results.append(told(lambda: kept.append(allocate(group, 500, name="the next one"))))  # may be told already
    if group.rank != 1 and (where == "reclaim" or not results[0].kind):
        results.append(told(lambda: symmem.collect(group)))
    results.append(told(lambda: allocate(group).barrier()))
    ended(group)
    return results


@pytest.mark.parametrize("where", ["reclaim", "allocate"])
def test_an_interrupt_half_way_is_told_at_the_next_meeting(where: str, pool: RankPool) -> None:
    for rank, (*earlier, later) in enumerate(pool.run(interrupt_half_way, where)):
        errors = [each for each in earlier if each.kind]
        assert [each.kind for each in errors] == ([] if rank == 1 else ["DivergenceError"]), errors
        assert all("rank 1 stopped" in each.text and "half-way: Interrupt" in each.text for each in errors)
        assert not later.kind, later


def books_that_differ() -> list[Told]:
    """Make logs differ, as an interrupt between the last exchange and its effect would."""
    group = group_of("books")
    allocate(group, 1000)
    live = [allocate(group, 10)]
    if group.rank == 1:
        original = AllocationLog.reclaim
        AllocationLog.reclaim = lambda *_: 0  # type: ignore[method-assign]
        symmem.collect(group)
        AllocationLog.reclaim = original  # type: ignore[method-assign]
    else:
        symmem.collect(group)
    results = [told(lambda: symmem.collect(group)), told(lambda: live.append(allocate(group)))]
    ended(group)
    return results


def test_books_that_differ_though_the_allocations_do_not(pool: RankPool) -> None:
    for meeting, later in pool.run(books_that_differ):
        assert (meeting.kind, later.kind) == ("DivergenceError", ""), (meeting, later)
        assert "or the freed blocks differ" in meeting.text


def places_that_differ() -> Told:
    group = group_of("places")
    keep = [allocate(group, 1000)]
    with group.collective("begin together"):
        pass
    if group.rank == 1:  # as if an interrupt had left a block without a tensor
        log_of(group).segments[0].space.allocate(256)

    def go() -> None:  # told at once, or when the ranks meet
        keep.append(allocate(group))
        symmem.collect(group)

    result = told(go)
    keep.clear()
    ended(group)
    return result


def test_offsets_that_differ_though_the_allocations_do_not(pool: RankPool) -> None:
    """Otherwise this rank's tensor would be at the place of another tensor on its peers."""
    for result in pool.run(places_that_differ):
        assert result.kind == "DivergenceError", result


def collect_in_callbacks(kind: str) -> Told:
    """Collect in a finalizer on one rank, during a collective operation: an error at once; the others go on."""
    group = group_of("callbacks")
    kept, seen = [allocate(group)], list[Told]()

    class Collects:
        def __del__(self) -> None:
            seen.append(told(lambda: symmem.collect(group)))

    original = ArenaBlock.__init__

    def interrupted(*args: Any) -> None:
        ArenaBlock.__init__ = original  # type: ignore[method-assign]
        Collects()
        original(*args)

    if kind == "in an allocation":
        if group.rank == 1:
            ArenaBlock.__init__ = interrupted  # type: ignore[assignment, method-assign]
        # The other ranks collect here, outside of any operation.
        kept.append(allocate(group))
        if group.rank != 1:
            seen.append(told(lambda: symmem.collect(group)))
    else:
        with group.collective("something") as collective:
            if group.rank == 1:
                Collects()
            collective.exchange("more")
        if group.rank != 1:
            seen.append(told(lambda: None))
    works(group)
    symmem.collect(group)
    del kept
    return seen[0]


@pytest.mark.parametrize("kind", ["in an allocation", "in a collective"])
def test_a_finalizer_that_collects(kind: str, pool: RankPool) -> None:
    outcomes = pool.run(collect_in_callbacks, kind)
    assert outcomes[1].kind == "GroupError", outcomes
    assert ("during another" if kind == "in an allocation" else "was begun during") in outcomes[1].text
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.kind == ("GroupError" if kind == "in an allocation" else ""), outcome


# Threads, forks, and leaks.


def two_threads() -> list[str]:
    names, errors = ["threads 0", "threads 1"], []
    both = [group_of(name) for name in names]
    gc.set_threshold(1)

    def work(group: symmem.Group) -> None:
        try:
            live = []
            for turn in range(40):
                st = allocate(group, 500 * (turn % 6))
                st.tensor.fill_(group.rank + turn)
                if turn % 4 == 0:
                    live.append((turn, st))
                circle: list[Any] = [allocate(group)]
                circle.append(circle)
                if turn % 10 == 9:
                    symmem.collect(group)
            st.barrier()
            for turn, st in live:
                for peer in range(group.size):
                    assert (st.remote_tensor(peer) == peer + turn).all()
            st.barrier()
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=work, args=(group,)) for group in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    gc.set_threshold(700)
    return errors


def test_two_threads_of_each_rank(pool: RankPool) -> None:
    assert pool.run(two_threads) == [[]] * WORLD


def fork_during_use() -> tuple[int, Told]:
    group = group_of("forks")
    st = allocate(group, 100)
    child = os.fork()
    if child == 0:
        results = [told(lambda: allocate(group)).kind, told(lambda: symmem.collect(group)).kind, told(st.barrier).kind]
        del st
        os._exit(0 if results == ["ForkedError"] * 3 else 1)
    status = os.waitpid(child, 0)[1]
    return status, told(lambda: works(group))


def test_a_forked_child_leaves_the_arena_alone(pool: RankPool) -> None:
    for status, result in pool.run(fork_during_use):
        assert (status, result.kind) == (0, "")


def use_much() -> tuple[Any, Any, list[int]]:
    group = group_of("much")
    works(group)
    symmem.collect(group, trim=True)
    before = held()
    for _ in range(2):
        live = [allocate(group, MIB) for _ in range(12)]
        live[-1].barrier()
        views = [live[5].contiguous_view(), live[9].remote_tensor(0)]
        del live
        symmem.collect(group, trim=True)
        assert (views[1] == views[0].sum() * 0).numel() == MIB
        del views
        symmem.collect(group, trim=True)
    log = log_of(group)
    return before, held(), [len(log.segments), log.live_bytes, log.quarantined_bytes]


def test_what_is_trimmed_is_gone(pool: RankPool) -> None:
    for before, after, book in pool.run(use_much):
        assert before == after
        assert book == [1, 0, 0]


def groups_come_and_go(turns: int) -> tuple[Any, Any]:
    group = group_of("stays")
    for turn in range(turns + 2):
        outer = allocate(group)
        if turn == 2:
            before = held()
        inner = group_of(f"passing {turn}")
        st = allocate(inner, 1000)
        outer.rendezvous(inner)
        st.barrier()
        outer.barrier(group=inner)
        del st
        ended(inner)
        del inner, outer
        gc.collect()
        symmem.collect(group)
    return before, held()


def test_groups_that_come_and_go_leave_nothing(pool: RankPool) -> None:
    """Neither their arenas nor their mappings of other arenas' memory are left."""
    for before, after in pool.run(groups_come_and_go, 4):
        assert before == after
