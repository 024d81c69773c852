"""A rank is killed while the others wait for it on their GPUs. They are told at once, and work on without it.

Three ranks; two share a GPU if there are only two.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import LONG, SETTINGS, SOON, TASK

import symmem
from symmem import ops
from symmem.errors import PeerLostError
from symmem.tools.commands.doctor import examine
from symmem.tools.ranks import RankPool, rank_store

WORLD, LOST = 3, 2
FOUND = examine("native")

pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.why_not)


@pytest.fixture
def pool() -> Iterator[RankPool]:
    with RankPool(WORLD, env={"SYMMEM_ENABLE": SETTINGS}, timeout=TASK, process_group=None) as made:
        yield made


class Shared:
    """What the waits need: a group, and tensors in symmetric memory and outside."""

    def __init__(self, group: symmem.Group) -> None:
        self.group = group
        self.st = symmem.allocate(1 << 10, torch.float32, backend="native", group=group).rendezvous(group)
        large = symmem.allocate((group.size, 1 << 20), torch.float32, backend="native", group=group).rendezvous(group)
        self.large, self._large = large.tensor, large
        self.small = torch.full((1000,), 1.0 + group.rank, device="cuda")
        self.part = torch.full((1 << 20,), 1.0 + group.rank, device="cuda")
        self.out = torch.empty(1 << 20, device="cuda")
        self.st.tensor.fill_(group.rank)


def barrier(at: Shared) -> None:
    at.st.barrier(group=at.group)


def signals(at: Shared) -> None:
    if at.group.rank == LOST:
        for peer in range(LOST):
            at.st.put_signal(peer, group=at.group)
    else:
        at.st.wait_signal(LOST, group=at.group)


def small_all_reduce(at: Shared) -> torch.Tensor:
    return ops.all_reduce(at.small, group=at.group)


def large_all_reduce(at: Shared) -> torch.Tensor:
    return ops.all_reduce(at.part, group=at.group, out=at.out)


def small_all_gather(at: Shared) -> torch.Tensor:
    return ops.all_gather(at.small, group=at.group)


def large_all_gather(at: Shared) -> torch.Tensor:
    return ops.all_gather(at.part, group=at.group, out=at.large)


OPERATIONS = (barrier, signals, small_all_reduce, large_all_reduce, small_all_gather, large_all_gather)


def survive(operation: Callable[[Shared], Any], graph: bool) -> float | None:
    """Returns the seconds between the death and the end of the wait, on the ranks that survive."""
    rank = int(os.environ["RANK"])
    at = Shared(symmem.Group.from_store(rank, WORLD, rank_store()))
    for _ in range(3):
        operation(at)
    at.st.synchronize(group=at.group)
    if graph:
        replayed = torch.cuda.CUDAGraph()
        with torch.cuda.graph(replayed):
            done = operation(at)
        run = replayed.replay
        run()
        at.st.synchronize(group=at.group)
    with at.group.collective("begin together"):
        pass
    if rank == LOST:
        time.sleep(0.5)
        rank_store().set("died", repr(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    if not graph:
        done = operation(at)
    else:
        run()
    began = time.monotonic()
    torch.cuda.current_stream().synchronize()
    ended = time.monotonic()
    assert ended - began < SOON
    with pytest.raises(PeerLostError, match=f"rank {LOST}'s process ended") as caught:
        at.st.synchronize(group=at.group)
    assert caught.value.peers == (LOST,)
    if done is not None:
        right = torch.full((1,), 6.0, device="cuda")
        if operation in (small_all_gather, large_all_gather):
            done, right = done.view(WORLD, -1), torch.arange(1.0, WORLD + 1, device="cuda").view(-1, 1)
        assert torch.isnan(done).any()
        assert torch.all(torch.isnan(done) | (done == right))
    if graph:  # later waits end too
        for _ in range(100):
            run()
        torch.cuda.current_stream().synchronize()
    for call in (barrier, small_all_reduce):
        with pytest.raises(PeerLostError, match=f"rank {LOST}"):
            call(at)
    with pytest.raises(PeerLostError):
        at.group.check()
    # The CUDA context and this rank's memory live, so the ranks that are left work on.
    assert at.st.tensor.eq(rank).all()
    again = Shared(symmem.Group.from_store(rank, LOST, dist.PrefixStore("again", rank_store())))
    assert small_all_reduce(again).eq(3).all()
    assert large_all_reduce(again).eq(3).all()
    barrier(again)
    again.st.synchronize(group=again.group)
    return ended - float(rank_store().get("died"))


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_waits_end_at_once(operation: Callable[[Shared], Any], graph: bool, pool: RankPool) -> None:
    outcomes = pool.outcomes(survive, operation, graph, timeout=LONG)
    assert "died" in str(outcomes[LOST].error)
    for outcome in outcomes[:LOST]:
        assert outcome.error is None, f"{outcome.error}\n{outcome.trace}"
    print(f"{operation.__name__} {'graph' if graph else 'eager'}: seconds {[each.value for each in outcomes[:LOST]]}")
