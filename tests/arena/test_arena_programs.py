"""Arenas in programs that do several things at once. Every case here has failed before."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from patience import LONG, SOON

import symmem
from symmem.arena.arena import arenas_of
from symmem.errors import NotSymmetricError
from symmem.group.resolve import resolve_group


def two_threads_meet() -> list[str]:
    groups = [dist.new_group([0, 1]) for _ in range(3)]
    errors: list[str] = []

    def allocate(group: Any) -> None:
        try:
            symmem.allocate(4, torch.float32, group=group, backend="host")
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=allocate, args=(group,)) for group in groups[:: 1 - 2 * dist.get_rank()]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for group in groups:
        dist.destroy_process_group(group)
    gc.collect()
    return errors


def test_groups_that_meet_on_several_threads_at_once(pools: Any) -> None:
    """The threads of a rank share one client of the store, and every thread waits on it for its group."""
    assert pools.get(2).run(two_threads_meet) == [[], []]


def collectives_inside() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for _ in range(10):
        x = torch.full((1 << 14,), float(rank + 1))
        with symmem.use_symmetric_memory(backend="host"):
            total = functional.all_reduce(x, "sum", dist.group.WORLD) + 0  # type: ignore[arg-type]
            everything = functional.all_gather_tensor(x, 0, dist.group.WORLD) + 0  # type: ignore[arg-type]
        assert (total == sum(range(1, world + 1))).all()
        assert everything.view(world, -1)[:, 0].tolist() == [float(r + 1) for r in range(world)]
        assert symmem.find(total) is not None


def test_functional_collectives_inside_the_context(pools: Any) -> None:
    """They return before the result is complete."""
    pools.get(2).run(collectives_inside)


@pytest.fixture
def one_rank() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    gc.collect()


def test_what_has_no_storage_of_its_own_is_left_alone_inside(one_rank: Any) -> None:
    with symmem.use_symmetric_memory(backend="host"):
        sparse = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (3,), check_invariants=True).coalesce()  # type: ignore[arg-type]
        sparse.values().mul_(10)
        assert sparse.to_dense().tolist() == [10, 20, 0]


def test_a_handle_whose_tensor_was_given_other_memory_says_so(one_rank: Any) -> None:
    st = symmem.allocate(4, torch.float32, backend="host")
    st.tensor.data = torch.zeros(4)
    with pytest.raises(NotSymmetricError, match="other memory"):
        _ = st.tensor


def test_statistics_do_not_wait_for_a_meeting(one_rank: Any) -> None:
    symmem.allocate(4, torch.float32, backend="host")
    (arena,) = arenas_of(resolve_group())
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with arena.log.lock:
            held.set()
            done.wait(LONG)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    begin = time.monotonic()
    snapshot = symmem.memory_snapshot()
    assert symmem.memory_stats()["segments"] == 1
    assert time.monotonic() - begin < SOON
    # Only one arena: a process group that torch still holds may have another arena.
    assert [each["meeting"] for each in snapshot["arenas"]].count(True) == 1
    done.set()
    thread.join()
    assert not any(each["meeting"] for each in symmem.memory_snapshot()["arenas"])


def test_a_processor_by_its_number_is_the_same_device(one_rank: Any) -> None:
    first, second = (symmem.allocate(4, torch.float32, device, backend="host") for device in ("cpu", "cpu:0"))
    assert len(arenas_of(resolve_group())) == 1
    del first, second


@pytest.mark.parametrize("mebibytes", [1, 56, 63, 64, 65, 127, 128, 300])
def test_a_first_tensor_of_any_size_fits(one_rank: Any, mebibytes: int) -> None:
    """The first segment also holds signal pads."""
    st = symmem.allocate(mebibytes << 20, torch.uint8, backend="host")
    st.tensor[-1] = 1
    st.barrier()
    assert symmem.memory_stats()["segments"] == 1


def test_pads_grow_when_they_run_out_often(one_rank: Any) -> None:
    symmem.allocate(4, torch.float32, backend="host")
    (arena,) = arenas_of(resolve_group())
    for _ in range(40_000):
        symmem.allocate(4, torch.float32, backend="host")
    assert arena.log.collections <= 12
