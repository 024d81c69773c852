"""What programs over the backend symmem get when ranks die, disagree, leave or are late; and that nothing is left."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from arena_rank import mapped
from patience import SOON

from symmem.errors import (
    ForkedError,
    GroupError,
    InvalidArgumentError,
    MismatchError,
    PeerLostError,
    PeerTimeoutError,
    SymmemError,
)
from symmem.ops.engines.base import Engines
from symmem.tools.ranks import rank_store

pytestmark = pytest.mark.ranks


def disagreeing() -> list[str]:
    """Every rank gets the same error for calls that differ, and the next call works."""
    warnings.simplefilter("ignore", FutureWarning)
    rank, size = dist.get_rank(), dist.get_world_size()
    calls: list[tuple[type[SymmemError], Callable[[], Any]]] = [
        (MismatchError, lambda: dist.all_reduce(torch.ones(2 + rank))),
        (MismatchError, lambda: dist.all_reduce(torch.ones(2 + rank), async_op=True).wait()),
        (MismatchError, lambda: dist.broadcast(torch.ones(2 + rank), 0)),
        (MismatchError, lambda: dist.all_reduce(torch.ones(2), dist.ReduceOp.MAX if rank else dist.ReduceOp.SUM)),
        (MismatchError, lambda: dist.barrier() if rank else dist.all_reduce(torch.ones(1))),
        (InvalidArgumentError, lambda: dist.all_gather_into_tensor(torch.ones(2 * size + rank), torch.ones(2))),
        (InvalidArgumentError, lambda: dist.reduce_scatter_tensor(torch.ones(2), torch.ones(2 * size + rank))),
        (InvalidArgumentError, lambda: dist.all_to_all_single(torch.ones(size + 1), torch.ones(size + 1))),
        (InvalidArgumentError, lambda: dist.all_to_all_single(torch.tensor(1.0), torch.tensor(1.0))),
    ]
    texts = []
    for kind, call in calls:
        with pytest.raises(kind) as caught:
            call()
        texts.append(caught.value.what)
        x = torch.ones(3)
        dist.all_reduce(x)
        assert x.tolist() == [size] * 3
    work = dist.all_reduce(torch.ones(2 + rank), async_op=True)
    with pytest.raises(RuntimeError, match=r"MismatchError.*ranks are at different operations"):
        work.get_future().wait()
    assert isinstance(work.exception(), MismatchError)
    assert f"{os.path.basename(__file__)}:" in str(work.exception())  # the line that began it, not that of the thread
    assert not work.is_success()
    return texts


def test_ranks_that_disagree_get_the_same_error(pool_of: Any) -> None:
    first, second = pool_of(2).run(disagreeing)
    assert first == second


def late() -> None:
    rank = dist.get_rank()
    group: Any = dist.new_group()
    dist.barrier(group=group)
    if rank == 0:
        (engine,) = group.group.extension(Engines).values()
        engine._timeout = 0.1  # torch's timeout would be that of the first barrier too
        with pytest.raises(PeerTimeoutError, match="rank 1"):
            dist.all_reduce(torch.ones(2), group=group)
    dist.barrier()
    with pytest.raises(PeerTimeoutError):
        dist.all_reduce(torch.ones(2), group=group)
    if rank == 0:
        work = dist.all_reduce(torch.ones(2), async_op=True)
        with pytest.raises(PeerTimeoutError, match=r"not complete after 0\.01 s"):
            work.wait(timedelta(seconds=0.01))
        dist.send(torch.ones(1), 1)
        work.wait()
    else:
        dist.recv(torch.ones(1), 0)
        dist.all_reduce(torch.ones(2))


def test_a_rank_that_is_late(pool_of: Any) -> None:
    pool_of(2).run(late)


class DiesInBackward(torch.autograd.Function):
    """Rank 1 dies when the gradient comes here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == 1:
            os._exit(3)
        return gradient


class Dying(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = DiesInBackward.apply(self.first(x))
        result: torch.Tensor = self.second(hidden)
        return result


def dies_in_ddp() -> None:
    model = torch.nn.parallel.DistributedDataParallel(Dying())
    with pytest.raises(RuntimeError, match=r"PeerLostError.*rank 1's process ended"):
        model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(PeerLostError, match="rank 1"):
        dist.all_reduce(torch.ones(2))


def dies_in_fsdp() -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = fully_shard(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4))
    if dist.get_rank() == 1:
        os._exit(3)
    model.reshard()
    with pytest.raises((PeerLostError, RuntimeError), match="rank 1"):
        model(torch.ones(2, 4))


@pytest.mark.parametrize("program", [dies_in_ddp, dies_in_fsdp])
def test_a_rank_dies_in_training(new_pool: Any, program: Callable[[], None]) -> None:
    pool = new_pool(2, process_group="symmem")
    outcomes = pool.outcomes(program, timeout=SOON)
    assert outcomes[0].error is None, outcomes[0].trace
    assert "died with exit code 3" in str(outcomes[1].error)


def aborted() -> None:
    """A thread that waits for other ranks stops if another thread destroys or aborts the group."""
    for end in (dist.destroy_process_group, dist.distributed_c10d._abort_process_group):
        group: Any = dist.new_group()
        dist.barrier(group=group)
        if dist.get_rank() == 0:
            work = dist.all_reduce(torch.ones(2), group=group, async_op=True)
            work.get_future()  # the thread begins
            while group._queue._waiting:
                time.sleep(0.001)
            end(group)
            with pytest.raises(GroupError, match=r"was closed while this rank waited|is closed"):
                work.wait()
        dist.barrier()
        if dist.get_rank() == 1:
            end(group)


def test_abort(pool_of: Any) -> None:
    pool_of(2).run(aborted)


def forked() -> None:
    """A forked child is no rank. It has no thread of the process group either."""
    dist.all_reduce(torch.ones(1), async_op=True).wait()
    child = os.fork()
    if child == 0:
        try:
            dist.all_reduce(torch.ones(1), async_op=True).wait()
        except ForkedError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    dist.all_reduce(torch.ones(1), async_op=True).wait()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_no_rank(pool_of: Any) -> None:
    pool_of(2).run(forked)


def kept() -> dict[str, int]:
    """What this process holds."""
    mapped()  # collects the groups that are gone, so that their threads end
    threads = [thread for thread in threading.enumerate() if thread.name == "symmem work"]
    for thread in threads:
        thread.join(SOON)
    maps, files = mapped()
    return {"files": files, "mapped": maps, "threads": sum(thread.is_alive() for thread in threads)}


def again(times: int) -> tuple[dict[str, int], dict[str, int]]:
    rank, size, store = dist.get_rank(), dist.get_world_size(), rank_store()
    dist.destroy_process_group()
    before: dict[str, int] = {}
    for number in range(times + 1):
        dist.init_process_group("symmem", store=dist.PrefixStore(str(number), store), rank=rank, world_size=size)
        x = torch.ones(10)
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        assert x[0] == size * size
        group: Any = dist.new_group([0, 1])
        st = group._get_backend(x.device).allocate_tensor(100, dtype=torch.float32, device=x.device)
        dist.all_reduce(st.fill_(1), group=group)
        dist.barrier()
        dist.destroy_process_group()
        with pytest.raises(GroupError, match="not initialised"):
            group.barrier()
        del group, st
        before = before or kept()
    after = kept()
    dist.init_process_group("symmem", store=dist.PrefixStore("last", store), rank=rank, world_size=size)
    return before, after


def test_destroying_and_making_groups_leaves_nothing(pool_of: Any) -> None:
    for before, after in pool_of(2).run(again, 40):
        assert before == after


def dropped() -> None:
    """A group that nobody destroys goes with its last reference, and its thread too."""
    rank, size, store = dist.get_rank(), dist.get_world_size(), rank_store()
    from symmem.distributed import SymmemProcessGroup

    before = kept()
    for number in range(3):
        group: Any = SymmemProcessGroup(dist.PrefixStore(f"dropped {number}", store), rank, size, timedelta(seconds=60))
        with pytest.raises(GroupError, match="does not know the process group"):
            group.barrier()
        store.set(f"made {number} on {rank}", "")
        store.wait([f"made {number} on {peer}" for peer in range(size)])  # gloo ends the connections of a dropped group
        del group
    assert kept() == before


def test_a_group_that_is_dropped(pool_of: Any) -> None:
    pool_of(2).run(dropped)
