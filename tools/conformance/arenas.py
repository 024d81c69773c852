"""Conformance cases: arenas."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
import torch.distributed as dist

import symmem
from symmem.backends.base import Capability
from symmem.errors import DivergenceError, ResourceLimitError
from symmem.tools.conformance.case import Context, case, expect


@contextlib.contextmanager
def _another_group(ctx: Context) -> Iterator[dist.ProcessGroup]:
    """A second group of all ranks, with separate arenas that a case may break."""
    group = dist.new_group(list(range(ctx.world)))
    try:
        yield group
    finally:
        dist.destroy_process_group(group)
        gc.collect()


@case(arena=True)
def a_warm_arena_needs_no_communication(ctx: Context) -> None:
    first = ctx.allocate(1000)
    rounds = ctx.group.status()["rounds"]
    second = ctx.allocate((3, 5), torch.float16)
    assert second.rendezvous() is second
    assert second.remote_pointers.shape == (ctx.world,)
    assert first.groups == second.groups == (ctx.group,)
    assert ctx.group.status()["rounds"] == rounds
    assert second.tensor.data_ptr() % 256 == 0


@case(arena=True)
def what_one_rank_keeps_is_not_reused(ctx: Context) -> None:
    kept = ctx.allocate(1 << 12, torch.uint8)
    kept.tensor.fill_(ctx.rank + 1)
    address = kept.tensor.data_ptr()
    held = kept if ctx.rank == 0 else None
    del kept
    symmem.collect()
    others = [ctx.allocate(1 << 12, torch.uint8) for _ in range(3)]
    assert all(other.tensor.data_ptr() != address for other in others)
    for other in others:
        other.tensor.fill_(99)
    ctx.meet()
    if held is not None:
        for peer in range(ctx.world):
            assert (held.get(peer) == peer + 1).all().item()
    ctx.meet()
    del held, others
    symmem.collect()


@case(arena=True)
def what_all_have_dropped_is_reused(ctx: Context) -> None:
    nbytes = 1 << 18
    stats = ctx.allocate(1)._block.log  # type: ignore[attr-defined]
    symmem.collect()
    segments, live = len(stats.segments), stats.live_bytes
    for turn in range(1250):  # many more than fit into a segment
        st = ctx.allocate(nbytes, torch.uint8)
        assert st.groups
        if turn % 250 == ctx.rank:
            gc.collect()
    del st
    gc.collect()
    symmem.collect()
    assert len(stats.segments) == segments
    assert stats.live_bytes == live


@case(arena=True, world=2)
def ranks_that_diverge_are_told(ctx: Context) -> None:
    with _another_group(ctx) as group:
        keep = [ctx.allocate(8, group=group)]
        ctx.meet()  # so that no rank is told at its first allocation
        with expect(DivergenceError, "allocation 2", "[100]", "[101]", "tools/conformance"):
            keep.append(ctx.allocate(100 + (ctx.rank == 1), group=group))
            symmem.collect(group)
        st = ctx.allocate(8, group=group)  # the arena begins again
        for each in (st, keep[0]):
            each.tensor.fill_(ctx.rank)
            ctx.meet()
            for rank in range(ctx.world):
                assert (each.get(rank, group=group) == rank).all().item()
        if len(keep) > 1:  # this rank allocated first, and was told later
            with expect(DivergenceError, "diverged"):
                keep[1].get(0, group=group)
        del keep, st, each


@case(arena=True)
def what_is_too_large_for_the_arena_is_refused(ctx: Context) -> None:
    nbytes = 2 * ctx.group.settings.arena_limit
    with expect(ResourceLimitError, "arena_limit", str(ctx.group.settings.arena_limit)):
        ctx.allocate(nbytes, torch.uint8)
    assert ctx.allocate(7).tensor.shape == (7,)


@case(arena=True, requires=Capability.SECOND_GROUP, world=2)
def a_subgroup_uses_a_tensor_of_the_arena(ctx: Context) -> None:
    members = list(range(1, ctx.world))
    some = dist.new_group(members)
    first, second = ctx.allocate(8), ctx.allocate(8)
    if ctx.rank in members:
        for st in (first, second):
            st.rendezvous(some)
            assert [group.size for group in st.groups] == [len(members), ctx.world]
            st.tensor.fill_(ctx.rank)
        for st in (second, first):
            with symmem.resolve_group(some).collective("meet", timeout=30):
                pass
            if Capability.SIGNALS in ctx.backend.capabilities:
                st.barrier()
            for index, rank in enumerate(members):
                assert (st.get(index) == rank).all().item()
                assert (st.get(rank, group=ctx.group) == rank).all().item()
    ctx.meet()
    del first, second
    if ctx.rank in members:
        dist.destroy_process_group(some)


@case(arena=True)
def an_arena_grows(ctx: Context) -> None:
    with _another_group(ctx) as group:
        size = symmem.resolve_group(group).settings.arena_size
        tensors = [ctx.allocate(size // 3, torch.uint8, group=group) for _ in range(5)]
        for index, st in enumerate(tensors):
            st.tensor[:9] = index + ctx.rank
        ctx.meet()
        for index, st in enumerate(tensors):
            part = symmem.SymmetricTensor.wrap(st.tensor[:9]).rendezvous(group)
            assert (part.get(ctx.next) == index + ctx.next).all().item()
        ctx.meet()
        del tensors, st, part
