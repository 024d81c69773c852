"""Conformance cases: barrier and signals."""

from __future__ import annotations

import random
import time

import torch

from symmem.backends.base import SIGNAL_CHANNELS, Capability
from symmem.errors import InvalidArgumentError, PeerTimeoutError
from symmem.tools.conformance.case import Context, case, expect

SIGNALS = Capability.SIGNALS


@case(requires=SIGNALS | Capability.REMOTE_TENSOR, both=True)
def a_barrier_orders_stores(ctx: Context) -> None:
    st = ctx.shared(4099, torch.int64)
    chance = random.Random(ctx.rank)
    for turn in range(40):
        if chance.random() < 0.2:
            time.sleep(chance.random() * 0.003)
        st.tensor.fill_(turn * ctx.world + ctx.rank)
        st.barrier()
        for peer in range(ctx.world):
            seen = st.remote_tensor(peer)
            assert (seen == turn * ctx.world + peer).all().item(), f"turn {turn}, peer {peer}: {seen[:9]}"
        st.barrier()


@case(requires=SIGNALS, both=True)
def channels_are_independent(ctx: Context) -> None:
    st = ctx.shared(1)
    for channel in (0, 1, SIGNAL_CHANNELS - 1):
        for _ in range(3):
            st.barrier(channel)
    # A signal on one channel does not count on another.
    st.put_signal(ctx.next, channel=5)
    st.put_signal(ctx.next, channel=6)
    st.wait_signal(ctx.previous, channel=6)
    st.wait_signal(ctx.previous, channel=5)
    st.barrier()
    ctx.meet()


@case(requires=SIGNALS | Capability.REMOTE_TENSOR, both=True)
def signals_carry_stores_around_a_ring(ctx: Context) -> None:
    st = ctx.shared(ctx.world, torch.int64)
    for turn in range(20):
        st.remote_tensor(ctx.next)[ctx.rank] = turn
        st.put_signal(ctx.next, channel=turn % 3)
        st.wait_signal(ctx.previous, channel=turn % 3)
        assert st.tensor[ctx.previous].item() == turn
        st.barrier(channel=3)


@case(requires=SIGNALS, both=True)
def two_tensors_have_signals_of_their_own(ctx: Context) -> None:
    first, second = ctx.shared(1), ctx.shared(1)
    first.put_signal(ctx.next)
    second.put_signal(ctx.next)
    second.wait_signal(ctx.previous)
    first.wait_signal(ctx.previous)
    second.barrier()
    ctx.meet()


@case(requires=SIGNALS, both=True)
def the_signal_pad_is_shared_and_zero(ctx: Context) -> None:
    st = ctx.shared(16)
    for rank in range(ctx.world):
        pad = st.signal_pad(rank)
        assert (pad.shape, pad.dtype) == ((SIGNAL_CHANNELS, ctx.world), torch.uint32)
        assert not pad.view(torch.int32).any().item()
    ctx.meet()
    st.put_signal(ctx.next, channel=9)
    ctx.meet()
    assert st.signal_pad(ctx.rank).view(torch.int32).nonzero().tolist() == [[9, ctx.previous]]
    ctx.meet()
    st.wait_signal(ctx.previous, channel=9)
    ctx.meet()
    assert not st.signal_pad(ctx.next).view(torch.int32).any().item()
    ctx.meet()


@case(requires=SIGNALS)
def bad_channels_and_timeouts_are_refused(ctx: Context) -> None:
    st = ctx.shared(1)
    for channel in (-1, SIGNAL_CHANNELS, 1.0, "0", None):
        for use in (st.barrier, lambda channel: st.put_signal(0, channel), lambda channel: st.wait_signal(0, channel)):
            with expect(InvalidArgumentError, f"range({SIGNAL_CHANNELS})"):
                use(channel)  # type: ignore[arg-type]
    for timeout in (0, -1.0, float("nan"), float("inf")):
        with expect(InvalidArgumentError, "positive"):
            st.barrier(timeout=timeout)
    ctx.meet()


@case(requires=SIGNALS, world=2, breaks=True)
def a_barrier_that_nobody_joins_names_the_rank(ctx: Context) -> None:
    st = ctx.shared(1)
    if ctx.rank != 1:
        begin = time.monotonic()
        with expect(PeerTimeoutError, "rank 1", peers=(1,)):
            st.barrier(channel=2, timeout=0.5)
            st.synchronize()
        assert time.monotonic() - begin < 10
    with ctx.group.collective("all timed out", timeout=30):
        pass


@case(requires=SIGNALS, world=2, breaks=True)
def a_signal_that_never_comes_names_the_rank(ctx: Context) -> None:
    st = ctx.shared(1)
    with expect(PeerTimeoutError, f"rank {ctx.previous}", peers=(ctx.previous,)):
        st.wait_signal(ctx.previous, channel=1, timeout=0.3)
        st.synchronize()
    with ctx.group.collective("all timed out", timeout=30):
        pass


@case(requires=SIGNALS, world=2, breaks=True)
def a_signal_that_is_not_taken_names_the_rank(ctx: Context) -> None:
    st = ctx.shared(1)
    st.put_signal(ctx.next, channel=1)
    with expect(PeerTimeoutError, f"rank {ctx.next}", peers=(ctx.next,)):
        st.put_signal(ctx.next, channel=1, timeout=0.3)
        st.synchronize()
    with ctx.group.collective("all timed out", timeout=30):
        pass
