"""Conformance cases: groups, and a rendezvous in which ranks differ, fail or do not come."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import symmem
from symmem.errors import (
    GroupError,
    InvalidArgumentError,
    MismatchError,
    NotRendezvousedError,
    PeerTimeoutError,
)
from symmem.tools.conformance.case import Context, case, expect


@case(both=True)
def rendezvous_happens_once(ctx: Context) -> None:
    st = ctx.shared(4)
    if ctx.rank == 0:
        for _ in range(3):
            assert st.rendezvous() is st  # rank 0 alone: the later calls are local
    assert len(st.groups) == 1
    ctx.meet()


@case()
def a_group_can_be_named_in_each_way(ctx: Context) -> None:
    world = dist.group.WORLD
    assert world is not None
    mesh = DeviceMesh.from_group(world, ctx.device.type, mesh_dim_names=("tp",))
    for group in (None, world, world.group_name, mesh, ctx.group):
        st = ctx.allocate(2).rendezvous(group)
        assert st.groups[0].size == ctx.world
        assert st.groups[0].rank == ctx.rank
        ctx.meet()
    square = init_device_mesh(ctx.device.type, (1, ctx.world), mesh_dim_names=("dp", "tp"))
    with expect(GroupError, "2 dimensions", "'dp'"):
        ctx.allocate(2).rendezvous(square)
    ctx.meet()
    for name in ("dp", "tp"):
        if (made := square.get_group(name)) is not world:
            dist.destroy_process_group(made)


@case()
def a_wrong_group_is_refused_by_name(ctx: Context) -> None:
    st = ctx.allocate(2)
    with expect(GroupError, "'nosuch'"):
        st.rendezvous("nosuch")
    for bad in (7, object(), torch.ones(2)):
        with expect(GroupError, "is not a group"):
            st.rendezvous(bad)  # type: ignore[arg-type]
    for timeout in (0, -1, float("nan")):
        with expect(InvalidArgumentError, "positive"):
            st.rendezvous(timeout=timeout)
    ctx.meet()


@case(world=2)
def a_subgroup_meets_alone(ctx: Context) -> None:
    members = list(range(1, ctx.world))
    pair = dist.new_group(members)
    st = ctx.allocate(8)
    if ctx.rank in members:
        st.rendezvous(pair)
        st.tensor.fill_(ctx.rank)
        _meet(pair)
        for index, rank in enumerate(members):
            assert (st.get(index) == rank).all().item()
        _meet(pair)
        with expect(NotRendezvousedError, "has not rendezvoused"):
            st.remote_tensor(0, group=ctx.group)
    else:
        with expect(GroupError, "not a member"):
            st.rendezvous(pair)
    ctx.meet()
    del st
    if ctx.rank in members:
        dist.destroy_process_group(pair)


def _meet(group: dist.ProcessGroup) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with symmem.resolve_group(group).collective("meet", timeout=30):
        pass


@case(world=2)
def what_differs_is_named_on_all_ranks(ctx: Context) -> None:
    last = ctx.rank == ctx.world - 1
    odd = (ctx.world - 1,)
    same_bytes = {"sizes": (2, 8) if last else (4, 4)}
    for what, options in (
        ("'shape'", same_bytes),
        ("'dtype'", {"sizes": 8, "dtype": torch.int32 if last else torch.float32}),
        ("'strides'", {"sizes": (4, 4), "strides": (1, 4) if last else (4, 1)}),
    ):
        st = ctx.allocate(**options)
        with expect(MismatchError, what, peers=odd):
            st.rendezvous()
        with expect(NotRendezvousedError):
            st.remote_tensor(0)
    ctx.meet()


@case(world=2)
def a_rank_that_does_not_come_is_named_and_retry_works(ctx: Context) -> None:
    st = ctx.allocate(8)
    st.tensor.fill_(ctx.rank)
    for absent in {0, 1, ctx.world - 1}:
        ctx.meet()
        if ctx.rank != absent:
            begin = time.monotonic()
            with expect(PeerTimeoutError, "timeout 0.5 s", peers=(absent,)):
                st.rendezvous(timeout=0.5)
            assert time.monotonic() - begin < 3
        else:
            time.sleep(1.5)
            # The others have timed out and published that, so this rank fails at once.
            begin = time.monotonic()
            with expect(PeerTimeoutError):
                st.rendezvous(timeout=20)
            assert time.monotonic() - begin < 3
    st.rendezvous()
    ctx.meet()
    assert (st.get(ctx.next) == ctx.next).all().item()
    ctx.meet()


@case(world=2)
def one_ranks_failure_is_raised_on_all(ctx: Context) -> None:
    culprit = ctx.world - 1
    begin = time.monotonic()
    if ctx.rank == culprit:
        with expect(InvalidArgumentError, "negative"):
            ctx.allocate(-1, group=ctx.group)
    else:
        with expect(InvalidArgumentError, "negative", f"rank {culprit}"):
            ctx.allocate(8).rendezvous()  # with some backends, allocate is collective too
    assert time.monotonic() - begin < 5
    ctx.meet()
    assert ctx.shared(8).groups  # the group works again
    ctx.meet()


@case(world=2)
def ranks_at_different_steps_are_told(ctx: Context) -> None:
    st = ctx.allocate(8)
    if ctx.rank == 0:
        with expect(MismatchError, "different steps", "other"), ctx.group.collective("other"):
            pass
    else:
        with expect(MismatchError, "different steps", "rendezvous"):
            st.rendezvous()
    st.rendezvous()
    ctx.meet()


@case()
def the_probe_can_be_repeated(ctx: Context) -> None:
    for _ in range(3):
        ctx.backend.probe()
