"""The signal pads of the tensors of an arena."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from arena_rank import Make, Rank, span
from thread_ranks import make_groups, succeed

import symmem
from symmem.arena.segment import GRANULE
from symmem.backends import get_backend
from symmem.errors import (
    ResourceLimitError,
)


def pad_of(st: symmem.SymmetricTensor, group: symmem.Group | None = None) -> int:
    return st.signal_pad(0, group=group).data_ptr()


def test_each_tensor_has_its_own_pad(rank: Rank) -> None:
    live = [rank.allocate(100) for _ in range(100)]  # more than the initial number of pads
    pads = sorted(pad_of(st) for st in live)
    nbytes = get_backend("host").pad_nbytes(1)
    assert all(b - a >= nbytes for a, b in itertools.pairwise(pads))
    spans = [span(st) for st in live]
    for pad in pads:
        assert not any(begin - nbytes < pad < end for begin, end in spans)


def test_a_rendezvous_of_a_view_leaves_the_pads(rank: Rank) -> None:
    """The view's handle signals over the pad of the tensor, and the tensor keeps its pad."""
    one, two = rank.allocate(100), rank.allocate(100)
    pads = pad_of(one), pad_of(two)
    for st in (one, two):
        view = symmem.SymmetricTensor.wrap(st.tensor[10:20]).rendezvous(rank.group)
        assert pad_of(view) == pad_of(st)
    assert (pad_of(one), pad_of(two)) == pads
    assert pads[0] != pads[1]


def test_what_comes_free_when_pads_run_out_is_one_piece(rank: Rank) -> None:
    """The tensor that lacked a pad is placed at the beginning of the free memory, and does not split it."""
    first = rank.allocate(8)._block.offset
    while not rank.log.collections:
        rank.allocate(8)
    assert len(rank.log.segments) == 1
    space = rank.log.segments[0].space
    live = [(offset, offset + nbytes) for offset, nbytes, in_use in space.blocks() if in_use]
    assert live == [(0, first), (first, first + GRANULE)]  # the pads and the tensor; all free memory is behind them


def test_a_pad_is_zero_when_it_is_used_again(rank: Rank) -> None:
    for _ in range(3):
        st = rank.allocate(40000)
        st.tensor.fill_(255)
        assert not st.signal_pad(0).view(torch.int32).any()
        st.barrier(63)
        st.put_signal(0, 5)
        assert st.signal_pad(0).view(torch.int32).any()
        del st
        rank.collect()
        many = [rank.allocate(8) for _ in range(150)]  # in the memory of the tensor, or near it
        for each in many:
            assert not each.signal_pad(0).view(torch.int32).any()
            each.barrier()
        del many, each
        rank.collect()


def test_pads_of_two_groups_are_apart(make: Make) -> None:
    rank = make(arena_size="2MiB")
    second = symmem.Group.from_store(0, 1, dist.HashStore(), "second")
    one, two = (rank.allocate(64).rendezvous(second) for _ in range(2))
    assert one.groups[0] in (rank.group, second)
    pads = [pad_of(st, group) for st in (one, two) for group in (rank.group, second)]
    assert len(set(pads)) == 4
    one.put_signal(0, 3, group=second)
    assert [int(st.signal_pad(0, group=group).sum()) for st in (one, two) for group in (rank.group, second)] == [
        *(0, 1),
        *(0, 0),
    ]
    view = symmem.SymmetricTensor.wrap(one.tensor[8:]).rendezvous(second)
    assert pad_of(view, second) == pads[1]


def test_the_group_that_meets_first_is_the_one_that_is_meant(make: Make) -> None:
    rank = make(arena_size="2MiB")
    second = symmem.Group.from_store(0, 1, dist.HashStore(), "second")
    for order in ([second], [rank.group, second], [second, rank.group], [second, second]):
        st = rank.allocate(64)
        assert st.groups == (rank.group,)
        for group in order:
            st.rendezvous(group)
        assert st.groups == (order[0], *({rank.group, second} - {order[0]}))
        st.put_signal(0, 3)
        assert [int(st.signal_pad(0, group=group).sum()) for group in st.groups] == [1, 0]


def fill(rank: Rank, further: symmem.Group, live: list[symmem.SymmetricTensor]) -> None:
    for _ in range(100):
        live.append(rank.allocate(64))
        live[-1].rendezvous(further)


def test_pads_of_further_groups_come_back(make: Make) -> None:
    rank = make(arena_size="2MiB")
    second = symmem.Group.from_store(0, 1, dist.HashStore(), "second")
    live: list[symmem.SymmetricTensor] = []
    with pytest.raises(ResourceLimitError, match="another signal pad"):
        fill(rank, second, live)
    room = len(live) - 1
    assert room >= 16
    assert live[-1].groups == (rank.group,)
    del live[-2]
    assert live[-1].rendezvous(second).groups == (second, rank.group)
    live.clear()
    with second.collective("meet"):
        pass
    for _ in range(3 * room):  # one at a time
        st = rank.allocate(64).rendezvous(second)
        assert not st.signal_pad(0, group=second).view(torch.int32).any()
        st.put_signal(0, 1, group=second)
        del st


def test_a_pad_of_a_further_group_waits_for_the_peer_that_keeps_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank drops a tensor and rendezvouses others, while its peer may still signal with it."""
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_size(2MiB)")
    all_ranks, pairs = make_groups(2, name="all"), make_groups(2, name="pair")

    def work(me: int) -> tuple[int, list[int]]:
        kept: list[symmem.SymmetricTensor] = []
        pads = []
        for turn in range(40):
            st = symmem.allocate(64, torch.uint8, group=all_ranks[me], backend="host").rendezvous(pairs[me])
            pads.append(st.signal_pad(me, group=pairs[me]).data_ptr())
            if turn == 0 and me == 1:
                kept.append(st)
            st.barrier(group=pairs[me], timeout=5.0)
            del st
        if kept:
            kept[0].put_signal(0, group=pairs[me])
        with pairs[me].collective("meet"):
            pass
        st = symmem.allocate(64, torch.uint8, group=all_ranks[me], backend="host").rendezvous(pairs[me])
        assert not st.signal_pad(me, group=pairs[me]).view(torch.int32).any()
        return pads[0], pads[1:]

    for first, others in succeed(2, work):
        assert first not in others  # the peer still has it
        assert len(set(others)) < len(others)  # some were used again
