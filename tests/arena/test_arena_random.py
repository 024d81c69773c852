"""Arenas under random use.

Every rank makes the same allocations in the same order. But it drops tensors at random moments, keeps some for long,
and lets the collector run at random. Common steps synchronize all ranks, or some of them.

After every step, every rank checks that its live blocks do not overlap, that its own blocks hold the values that it
stored, and that the blocks of a peer hold the peer's values. Set SYMMEM_ARENA_SEED to the seed of a run to replay it.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import sys
from typing import Any, NamedTuple

import patience
import pytest
import torch

import symmem
from symmem.arena.arena import arenas_of
from symmem.tools.ranks import RankPool, rank_store

SETTINGS = f"arena_size(2MiB),arena_growth(1.5),arena_limit(256MiB),{patience.SETTINGS}"
SEEDS = [int(os.environ["SYMMEM_ARENA_SEED"])] if "SYMMEM_ARENA_SEED" in os.environ else [1, 2, 3, 4, 5, 6]
STEPS = 120
DTYPES = [torch.int16, torch.int32, torch.int64, torch.float32, torch.float64]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_use(seed: int, pools_of: dict[int, RankPool]) -> None:
    world = 3 + seed % 2
    if world not in pools_of:
        pools_of[world] = RankPool(world, process_group=None, timeout=patience.TASK, env={"SYMMEM_ENABLE": SETTINGS})
    try:
        told = pools_of[world].run(run, seed, STEPS)
    except Exception:
        print(f"replay with SYMMEM_ARENA_SEED={seed}")
        raise
    books = [book for book, _ in told]
    assert all(book == books[0] for book in books), f"SYMMEM_ARENA_SEED={seed}"
    used = {what: sum(each[what] for _, each in told) for what in told[0][1]}
    assert all(used.values()), used  # otherwise the test has become too tame


@pytest.fixture(scope="module")
def pools_of() -> Any:
    made: dict[int, RankPool] = {}
    yield made
    for pool in made.values():
        pool.close()


class Live(NamedTuple):
    """A block that this rank has not dropped."""

    serial: int
    st: symmem.SymmetricTensor

    def value(self, rank: int) -> int:
        """The value of all elements of a rank."""
        return 1 + (self.serial * 4 + rank) % 32749


class Program:
    """One rank's run. ``common`` chooses the steps of all ranks, ``own`` the choices of this rank alone."""

    def __init__(self, seed: int) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.common, self.own = random.Random(seed), random.Random(seed * 100 + self.rank)
        self.all = self.group(f"all of {seed}", range(self.world))
        assert self.all is not None
        some = itertools.combinations(range(self.world), 2)
        self.parts = {ranks: self.group(f"{ranks} of {seed}", ranks) for ranks in some}
        self.live: dict[int, Live] = {}
        self.kept: list[torch.Tensor] = []  # views; their blocks stay
        self.serial = 0
        self.used = dict.fromkeys(("dropped", "kept", "freed", "subgroups", "signals", "grown", "circles"), 0)

    def group(self, name: str, ranks: Any) -> symmem.Group | None:
        ranks = list(ranks)
        if self.rank not in ranks:
            return None
        return symmem.Group.from_store(ranks.index(self.rank), len(ranks), rank_store(), name)

    # Steps. All ranks take the same ones.

    def allocate(self) -> int:
        count = self.common.randint(1, 8)
        for _ in range(count):
            dtype = self.common.choice(DTYPES)
            elements = self.common.choice([0, 1, 31, 32, 33, 500, 3000, self.common.randrange(40000)])
            shape: tuple[int, ...] = (elements,)
            strides = None
            if elements > 100 and self.common.random() < 0.3:
                shape, strides = (elements // 4, 2), (3, 1)
            st = symmem.allocate(shape, dtype, strides=strides, group=self.all, backend="host")
            self.serial += 1
            entry = self.live[self.serial] = Live(self.serial, st)
            st.tensor.fill_(entry.value(self.rank))
        return count

    def drop(self) -> None:
        """Drop blocks: other ones on every rank, in another order, directly, in a cycle, or all but a view."""
        for serial in self.own.sample(sorted(self.live), int(len(self.live) * self.own.uniform(0, 0.5))):
            entry = self.live[serial]
            if serial % 17 == self.rank:
                continue  # only this rank keeps it to the end
            chance = self.own.random()
            if chance < 0.1 and entry.st.tensor.numel():
                self.kept.append(entry.st.tensor[-1:])
                self.used["kept"] += 1
            elif chance < 0.3:
                circle: list[object] = [entry.st]
                circle.append(circle)
                self.used["circles"] += 1
            del self.live[serial], entry
            self.used["dropped"] += 1
        if self.own.random() < 0.3:
            gc.collect(self.own.randrange(3))
        if len(self.kept) > 20:
            del self.kept[self.own.randrange(10) :: 2]

    def collect(self) -> None:
        trim = self.common.random() < 0.3
        self.used["freed"] += symmem.collect(self.all, trim=trim) > 0

    def drop_all_of_some(self) -> None:
        """Drop the same blocks on all ranks at the same time, so that much is freed."""
        for serial in sorted(self.live):
            if serial % 3 == 0 and serial % 17 >= self.world:
                del self.live[serial]
        gc.collect()
        self.collect()

    def barrier(self) -> None:
        """A barrier on a new tensor, because all ranks surely have it."""
        self.allocate()
        st = self.live[self.serial].st
        for channel in (self.serial % 64, 0):
            st.barrier(channel, group=self.all)
        assert not st.signal_pad(self.rank, group=self.all).view(torch.int32).any()
        self.used["signals"] += 1

    def subgroup(self) -> None:
        new = self.allocate()  # all ranks surely have these
        entries = [self.live[self.serial - n] for n in range(min(new, 2))]
        ranks = self.common.choice(sorted(self.parts))
        channel = self.common.randrange(64)
        part = self.parts[ranks]
        if part is None:
            return
        for entry in entries:
            st, peer = entry.st.rendezvous(part), 1 - part.rank
            st.put_signal(peer, channel, group=part)
            st.wait_signal(peer, channel, group=part)
            st.barrier(channel, group=part)
            assert (st.remote_tensor(peer, group=part) == entry.value(ranks[peer])).all(), entry
            st.barrier(group=part)
            assert not st.signal_pad(part.rank, group=part).view(torch.int32).any()
        self.used["subgroups"] += 1

    # Checks after every step.

    def check(self) -> None:
        self.meet()  # all have stored
        held = [(entry.st._block.pointer, entry.st._block.nbytes) for entry in self.live.values()]
        held += {(block.pointer, block.nbytes) for block in map(self.block_of, self.kept)}
        spans = sorted({(pointer, pointer + max(nbytes, 1)) for pointer, nbytes in held})
        for (_, end), (begin, _) in itertools.pairwise(spans):
            assert end <= begin, "live blocks overlap"
        for entry in self.live.values():
            st = entry.st
            assert (st.tensor == entry.value(self.rank)).all(), f"own block {entry.serial} was overwritten"
            found = symmem.find(st.tensor[1:])
            assert st.tensor.numel() < 2 or (found and found._block is st._block)
        # A block that this rank has not dropped must not be reused on any rank, even if the peer has dropped it.
        peers = [peer for peer in range(self.world) if peer != self.rank]
        for entry in self.live.values():
            peer = self.own.choice(peers)
            remote = entry.st.remote_tensor(peer, group=self.all)
            assert (remote == entry.value(peer)).all(), f"block {entry.serial} of rank {peer} was overwritten"
        self.meet()  # all have looked

    def block_of(self, view: torch.Tensor) -> Any:
        found = symmem.find(view)
        assert found is not None
        return found._block

    def meet(self) -> None:
        with self.all.collective("meet"):  # type: ignore[union-attr]
            pass

    def book(self) -> list[Any]:
        """State that must be the same on all ranks."""
        (arena,) = arenas_of(self.all)  # type: ignore[arg-type]
        log = arena.log
        log.count_drops()
        self.used["grown"] += log.growths > 1
        total = sum(entry[5] for entry in log.records if entry)
        assert log.live_bytes + log.quarantined_bytes == total
        for segment in log.segments:
            assert {offset for offset, _, live in segment.space.blocks() if live} >= set(segment.slots)
        spaces = [(s.index, list(s.space.blocks()), sorted(s.slots.items())) for s in log.segments]
        return [log.count, log.digest, total, spaces, log.free_slots, log.reclaimed_blocks]


def run(seed: int, steps: int) -> tuple[list[Any], dict[str, int]]:
    program = Program(seed)
    gc.freeze()
    threshold = gc.get_threshold()
    gc.set_threshold(*([1, 5, 100] if seed % 3 == 0 else [50, 5, 100]))
    try:
        kinds = ["allocate", "drop", "collect", "drop_all_of_some", "barrier", "subgroup"]
        for step in range(steps):
            kind = program.common.choices(kinds, [4, 5, 2, 1, 2, 2])[0] if step else "allocate"
            try:
                getattr(program, kind)()
                program.check()
            except BaseException as error:
                text = f"seed {seed}, step {step} ({kind}), rank {program.rank}: {error!r}"
                program.all.fail(text, AssertionError(text))  # type: ignore[union-attr]
                print(text, file=sys.stderr, flush=True)
                raise
        book = program.book()
        program.live.clear()
        program.kept.clear()
        gc.collect()
        symmem.collect(program.all)
        (arena,) = arenas_of(program.all)  # type: ignore[arg-type]
        log = arena.log
        assert (log.live_bytes, log.quarantined_bytes) == (0, 0)
        assert not any(log.records)
        program.meet()
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
    return book, program.used
