"""Conformance cases: access to peers' memory."""

from __future__ import annotations

import copy
import gc
import pickle

import torch
import torch.distributed as dist

import symmem
from symmem.backends.base import Capability
from symmem.errors import (
    InvalidArgumentError,
    MulticastUnavailableError,
    NotRendezvousedError,
    RankError,
    UnsupportedError,
)
from symmem.tools.conformance.case import Context, case, expect


@case(requires=Capability.REMOTE_TENSOR, both=True)
def remote_tensor_reads_and_writes(ctx: Context) -> None:
    st = ctx.shared((ctx.world, 33), torch.int32)
    st.tensor.fill_(ctx.rank)
    ctx.meet()
    for peer in range(ctx.world):
        remote = st.remote_tensor(peer)
        assert (remote.shape, remote.dtype, remote.device) == (st.shape, st.dtype, ctx.device)
        assert (remote == peer).all().item()
    ctx.meet()
    for peer in range(ctx.world):
        st.remote_tensor(peer)[ctx.rank] = 1000 * ctx.rank + peer
    ctx.meet()
    expected = torch.tensor([[1000 * source + ctx.rank] * 33 for source in range(ctx.world)], dtype=torch.int32)
    assert torch.equal(st.tensor.cpu(), expected)
    assert st.remote_tensor(ctx.rank) is st.tensor
    ctx.meet()


@case()
def ranks_are_checked(ctx: Context) -> None:
    st = ctx.shared(4)
    for bad in (-1, ctx.world, 2**40, 1.0, "0", None):
        for use in (st.remote_tensor, st.get, lambda rank: st.put(st.tensor, rank), st.put_signal, st.wait_signal):
            with expect(RankError, f"range({ctx.world})"):
                use(bad)  # type: ignore[arg-type]
    ctx.meet()


@case(requires=Capability.REMOTE_TENSOR, world=2, both=True)
def a_remote_tensor_keeps_its_memory(ctx: Context) -> None:
    st = ctx.shared(1 << 16)
    st.tensor.fill_(ctx.rank + 1)
    view = st.remote_tensor(ctx.next)[7:9]
    ctx.meet()
    del st
    gc.collect()
    ctx.meet()  # the peer has dropped its handle, too
    assert (view == ctx.next + 1).all().item()
    ctx.meet()


@case(both=True)
def pointers_are_those_of_the_tensors(ctx: Context) -> None:
    st = ctx.shared((4, 8), torch.float16)
    pointers = st.remote_pointers
    assert (pointers.shape, pointers.dtype, pointers.device) == ((ctx.world,), torch.int64, ctx.device)
    assert pointers[ctx.rank].item() == st.tensor.data_ptr()
    for peer, pointer in enumerate(pointers.tolist()):
        if pointer:
            assert st.remote_tensor(peer).data_ptr() == pointer
        else:
            with expect(UnsupportedError, f"rank {peer}"):
                st.remote_tensor(peer)
    part = symmem.SymmetricTensor.wrap(st.tensor[1:])
    assert part.remote_pointers.tolist() == [pointer and pointer + 16 for pointer in pointers.tolist()]
    ctx.meet()


@case(both=True)
def kernels_are_told_where_memory_is(ctx: Context) -> None:
    st, own = ctx.shared((4, 8), torch.float16), ctx.shared((3, ctx.world), torch.int32)
    if all(st.remote_pointers.tolist()):
        view = st.device_view(own)
        assert view.pointers.tolist() == st.remote_pointers.tolist()
        assert view.signals[: ctx.world].tolist() == own.remote_pointers.tolist()
        assert (view.rank, view.world_size, view.channels) == (ctx.rank, ctx.world, 3)
        assert bytes(view.struct_tensor.tolist()) == bytes(view)
    else:
        with expect(UnsupportedError, "load/store reachable"):
            st.device_view(own)
    ctx.meet()


_WITH_PADS = ("nvshmem", "pytorch_cuda", "pytorch_nccl", "pytorch_nvshmem")
"""Backends that place signal pads behind each allocation, so that tensors are not side by side without a gap."""


@case(requires=Capability.CONTIGUOUS_VIEW, both=True)
def contiguous_view_holds_all_ranks(ctx: Context) -> None:
    for sizes, dtype in (((3, 5), torch.int64), ((), torch.float32), ((0, 4), torch.float32), (2**19, torch.int32)):
        st = ctx.shared(sizes, dtype)
        st.tensor.fill_(ctx.rank + 1)
        ctx.meet()
        view = st.contiguous_view()
        assert view.shape == (ctx.world, *st.shape)
        assert (view.dtype, view.device) == (dtype, ctx.device)
        for peer in range(ctx.world):
            assert (view[peer] == peer + 1).all().item()
        ctx.meet()
        if view.numel():
            view[ctx.next].fill_(-ctx.rank)
        ctx.meet()
        assert (st.tensor == -ctx.previous).all().item()  # the same memory, not a copy
        ctx.meet()
    if not ctx.arena and ctx.backend.name not in _WITH_PADS:
        assert st.contiguous_view().is_contiguous()  # 2 MiB per rank, a multiple of any granularity


@case(requires=Capability.CONTIGUOUS_VIEW, both=True)
def contiguous_view_of_a_part(ctx: Context) -> None:
    st = ctx.shared((6, 4), torch.int16)
    st.tensor.copy_(torch.arange(24, dtype=torch.int16).view(6, 4) + 100 * ctx.rank)
    ctx.meet()
    view = symmem.SymmetricTensor.wrap(st.tensor[2:4, 1:]).contiguous_view()
    whole = torch.stack([torch.arange(24).view(6, 4)[2:4, 1:] + 100 * peer for peer in range(ctx.world)])
    assert torch.equal(view.cpu().long(), whole)
    ctx.meet()


@case(requires=Capability.CONTIGUOUS_VIEW | Capability.REMOTE_TENSOR, both=True)
def copies_within_a_rank_are_refused_if_they_overlap(ctx: Context) -> None:
    """Also if the source is in a contiguous view, which may be a second mapping of the same memory."""
    st = ctx.shared(65, torch.int32)
    st.tensor.copy_(torch.arange(65))
    ctx.meet()
    part = symmem.SymmetricTensor.wrap(st.tensor[1:33])
    view = st.contiguous_view()
    for rank in (ctx.rank, ctx.next):
        with expect(InvalidArgumentError, "share memory"):
            part.put(view[rank, :32], rank)
        with expect(InvalidArgumentError, "share memory"):
            part.get(rank, view[rank, 2:34])
    ctx.meet()
    part.put(view[ctx.rank, 33:], ctx.rank)  # other elements
    assert st.tensor[1:33].tolist() == list(range(33, 65))
    ctx.meet()


@case(requires=Capability.ONE_SIDED, both=True)
def put_and_get_copy(ctx: Context) -> None:
    st = ctx.shared((5, 3), torch.bfloat16)
    st.put(torch.full((5, 3), ctx.rank + 1.0, dtype=torch.bfloat16, device=ctx.device), ctx.next)
    ctx.meet()
    assert (st.tensor == ctx.previous + 1).all().item()
    assert (st.get(ctx.next) == ctx.rank + 1).all().item()
    out = torch.empty(3, 5, dtype=torch.bfloat16, device=ctx.device).t()  # not contiguous
    assert st.get(ctx.next, out) is out
    assert (out == ctx.rank + 1).all().item()
    ctx.meet()
    st.put(out, ctx.rank)
    ctx.meet()
    assert (st.tensor == ctx.rank + 1).all().item()
    for bad in (torch.empty(5, 4), torch.empty(5, 3), torch.empty(5, 3, device="meta", dtype=torch.bfloat16)):
        with expect(InvalidArgumentError, "needs shape"):
            st.put(bad, ctx.next)
        with expect(InvalidArgumentError, "needs shape"):
            st.get(ctx.next, bad)
    empty = ctx.shared((0, 2))
    empty.put(torch.empty(0, 2, device=ctx.device), ctx.next)
    assert empty.get(ctx.next).shape == (0, 2)
    ctx.meet()


@case(requires=Capability.ONE_SIDED, both=True)
def put_and_get_a_part(ctx: Context) -> None:
    st = ctx.shared(1000, torch.int64)
    st.tensor.zero_()
    ctx.meet()
    part = symmem.SymmetricTensor.wrap(st.tensor[100:103])
    part.put(torch.full((3,), 7 + ctx.rank, device=ctx.device), ctx.next)
    ctx.meet()
    assert st.tensor.nonzero().flatten().tolist() == [100, 101, 102]
    assert part.get(ctx.rank).tolist() == [7 + ctx.previous] * 3
    ctx.meet()


@case(both=True)
def multicast_is_a_pointer_or_an_error(ctx: Context) -> None:
    st = ctx.shared(1024)
    try:
        pointer = st.multicast_ptr
    except MulticastUnavailableError as error:
        assert len(error.what) > 20, error
        assert error.hint, error
    else:
        assert pointer != 0
    ctx.meet()


@case()
def nothing_of_peers_before_the_rendezvous(ctx: Context) -> None:
    st = ctx.allocate(16)
    for use in (
        lambda: st.remote_tensor(0),
        lambda: st.remote_pointers,
        lambda: st.contiguous_view(),
        lambda: st.multicast_ptr,
        lambda: st.barrier(),
        lambda: st.signal_pad(0),
        lambda: st.put(st.tensor, 0),
    ):
        with expect(NotRendezvousedError, "rendezvous"):
            use()
    ctx.meet()


@case()
def a_handle_cannot_be_sent(ctx: Context) -> None:
    st = ctx.allocate(4)
    for use in (lambda: pickle.dumps(st), lambda: copy.copy(st), lambda: copy.deepcopy(st)):
        with expect(UnsupportedError, "pickled"):
            use()
    ctx.meet()


@case(both=True)
def many_tensors_live_at_once(ctx: Context) -> None:
    tensors = [ctx.shared(257 * (index + 1), torch.uint8) for index in range(16)]
    for index, st in enumerate(tensors):
        st.tensor.fill_(16 * ctx.rank + index)
    ctx.meet()
    for index, st in reversed(list(enumerate(tensors))):
        assert (st.get(ctx.next) == 16 * ctx.next + index).all().item()
    del tensors[::2]
    ctx.meet()
    assert all((st.tensor == 16 * ctx.rank + 2 * i + 1).all().item() for i, st in enumerate(tensors))
    ctx.meet()


@case(requires=Capability.SECOND_GROUP, world=2, both=True)
def two_groups_share_a_tensor(ctx: Context) -> None:
    pairs = [dist.new_group([rank, rank + 1]) for rank in range(0, ctx.world - 1, 2)]
    mine = ctx.rank // 2
    st = ctx.shared((ctx.world, 4))

    def order_stores(pair: dist.ProcessGroup | None) -> None:
        if Capability.SIGNALS in ctx.backend.capabilities:
            st.barrier(group=pair)
        else:
            with symmem.resolve_group(pair).collective("meet", timeout=30):
                pass

    if mine < len(pairs):
        st.rendezvous(pairs[mine])
        assert [group.size for group in st.groups] == [ctx.world, 2]
        partner = ctx.rank ^ 1
        st.tensor.fill_(ctx.rank)
        order_stores(pairs[mine])
        assert (st.remote_tensor(partner % 2, group=pairs[mine]) == partner).all().item()
        with expect(RankError, "range(2)"):
            st.remote_tensor(2, group=pairs[mine])
        order_stores(pairs[mine])
    ctx.meet()
    order_stores(None)  # the signals of the first group are separate
    assert st.remote_pointers.numel() == ctx.world
    ctx.meet()
    for pair in pairs[mine : mine + 1]:
        dist.destroy_process_group(pair)
