"""The backend ``native`` on a fake of the driver: the whole path, in real processes, with faults anywhere."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_driver import GRANULARITY, FakeDriver, descriptors, install
from patience import LONG

import symmem
from symmem.arena.arena import Arenas
from symmem.backends import get_backend, native
from symmem.errors import (
    BackendUnavailableError,
    MulticastUnavailableError,
    OutOfMemoryError,
    PeerLostError,
    RendezvousError,
    SymmemError,
    UnsupportedError,
    from_wire,
    to_wire,
)
from symmem.tensor.request import Requests
from symmem.tools.conformance import CASES, run_case
from symmem.tools.conformance.case import _warm
from symmem.tools.ranks import RankPool, rank_store

NOTHING = (0, 0, 0, 0)


def forget_arenas() -> None:
    """Drop the default group's arenas, because their memory belongs to an earlier fake."""
    group = symmem.resolve_group()
    group.extension(Arenas).clear()
    group.extension(Requests).clear()
    _warm.clear()


def fresh(**options: Any) -> FakeDriver:
    """New fakes on this rank, after a collection of the objects of earlier tasks."""
    forget_arenas()
    gc.collect()
    return install(dist.get_rank(), dist.get_world_size(), **options)


def allocate(*sizes: int, **options: Any) -> symmem.SymmetricTensor:
    return symmem.allocate(sizes, torch.int32, backend="native", **{"arena": False, **options})


def new_group(name: str, **settings: Any) -> symmem.Group:
    group = symmem.Group.from_store(dist.get_rank(), dist.get_world_size(), rank_store(), name)
    group.settings = dataclasses.replace(group.settings, rendezvous_timeout=20.0, **settings)
    return group


def meet() -> None:
    with symmem.resolve_group().collective("meet"):
        pass


def error_of(function: Callable[[], Any]) -> SymmemError:
    try:
        function()
    except SymmemError as error:
        return from_wire(to_wire(error))  # without its frames, because they keep memory alive
    raise AssertionError("nothing was raised")


def forget_pads() -> None:
    """Drop the groups' blocks of signal pads. All ranks must do this before the next rendezvous."""
    gc.collect()
    backend: Any = get_backend("native")
    backend.pads.clear()


def check_nothing_left(driver: FakeDriver, before: int) -> None:
    forget_pads()
    assert driver.live == NOTHING
    assert descriptors() == before


# Without faults.


def whole_path() -> None:
    driver = fresh()
    meet()
    before, rank, world = descriptors(), dist.get_rank(), dist.get_world_size()
    st = allocate(3, 5).rendezvous()
    assert not st.tensor.any()
    st.tensor.fill_(rank + 1)
    st.barrier()
    for peer in range(world):
        assert (st.remote_tensor(peer) == peer + 1).all()
    view = st.contiguous_view()
    assert view.shape == (world, 3, 5)
    assert view[:, 0, 0].tolist() == list(range(1, world + 1))
    assert view.stride(0) * 4 == GRANULARITY
    assert st.remote_pointers[rank].item() == st.tensor.data_ptr()
    assert not any(st.signal_pad(peer).view(torch.int32).any() for peer in range(world))
    meet()
    view[(rank + 1) % world].fill_(-rank)
    st.barrier()
    assert (st.tensor == -((rank - 1) % world)).all()
    st.put_signal((rank + 1) % world)
    st.wait_signal((rank - 1) % world)
    st.synchronize()
    # Handles for the memory and for the block of pads; ranges for both, for the memory of all ranks, and for the
    # peers' blocks.
    others = int(world > 1)
    assert driver.live == (2, 3 + others, 2 * world + 1, 0)
    # Blocks are made once per group, and dropped with it.
    second = symmem.Group.from_store(rank, world, rank_store(), "whole path")
    st.rendezvous(second)
    assert driver.live == (3, 5 + 2 * others, 4 * world, 0)
    st.barrier(group=second)
    meet()
    second.close()
    del view, st, second
    gc.collect()
    assert driver.live == (1, 1 + others, world, 0)
    check_nothing_left(driver, before)
    meet()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_whole_path(world: int, pools: Any) -> None:
    pools.get(world, "native").run(whole_path)


def sizes_round_up() -> None:
    driver = fresh()
    for count, granules in ((0, 1), (1, 1), (GRANULARITY // 4, 1), (GRANULARITY // 4 + 1, 2)):
        st = allocate(count)
        (nbytes,) = driver.mappings.values()
        assert nbytes == granules * GRANULARITY
        assert not st.tensor.any()
        del st
        check_nothing_left(driver, descriptors())


def test_sizes_are_rounded_up_to_the_granularity(pools: Any) -> None:
    pools.get(1, "native").run(sizes_round_up)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.breaks])
def test_conformance(name: str, pools: Any) -> None:
    pool = pools.get(2, "native")
    pool.run(install_only)
    if reason := set(pool.run(run_case, name, "native")) - {None}:
        pytest.skip(str(reason))


def install_only() -> None:
    fresh()
    allocate(1).rendezvous()  # the blocks of pads of the default group stay


# The cost of a rendezvous.

COUNTED = ("create", "export_descriptor", "import_descriptor", "reserve", "map", "allow", "zero")


def calls_of(driver: FakeDriver, function: Callable[..., object], *arguments: object) -> tuple[int, ...]:
    driver.calls.clear()
    function(*arguments)
    return tuple(driver.calls.count(name) for name in COUNTED)


def calls_of_rendezvous() -> None:
    driver = fresh()
    meet()
    before, rank, world = descriptors(), dist.get_rank(), dist.get_world_size()
    peers, inner = world - 1, int(0 < rank < world - 1)
    group, second = new_group("calls"), new_group("calls, second")
    kept = [allocate(100) for _ in range(3)]
    runs = min(peers, 1) + inner  # for adjacent memory of peers
    first = (1, 2, 2 * peers, 2 + min(peers, 1), 1 + 2 * peers, 1 + min(peers, 1) + runs, 1)
    later = (0, 1, peers, 1, peers, runs, 1)
    assert calls_of(driver, kept[0].rendezvous, group) == first
    assert calls_of(driver, kept[1].rendezvous, group) == later
    # An export is made once.
    assert calls_of(driver, kept[0].rendezvous, second) == (first[0], 1, *first[2:])
    assert calls_of(driver, kept[2].rendezvous, group) == later
    assert calls_of(driver, kept[1].rendezvous, second) == (0, 0, *later[2:])
    # The own memory is mapped into the row once, on request.
    assert calls_of(driver, functools.partial(kept[2].contiguous_view, group=group)) == (0, 0, 0, 0, 1, 1, 0)
    assert calls_of(driver, functools.partial(kept[2].contiguous_view, group=group)) == (0,) * len(COUNTED)
    for st in kept:
        st.barrier(group=group)
    meet()
    group.close()
    second.close()
    del kept, st, group, second
    gc.collect()
    assert driver.live == NOTHING, "blocks outlive their groups"
    assert descriptors() <= before
    meet()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_rendezvous_makes_the_fewest_calls(world: int, pools: Any) -> None:
    pools.get(world, "native").run(calls_of_rendezvous)


def order_of_mapping() -> list[int]:
    driver, order = fresh(), []
    rank, world = dist.get_rank(), dist.get_world_size()
    st = allocate(1)
    st.rendezvous()
    addresses = st.remote_pointers.tolist()
    for address in driver.mappings:  # in the order of mapping
        if address in addresses and addresses.index(address) != rank:
            order.append(addresses.index(address))
    assert order == [(rank + i) % world for i in range(1, world)]
    meet()
    return order


def test_each_rank_begins_with_the_next_one(pools: Any) -> None:
    pools.get(4, "native").run(order_of_mapping)


# Slots of signal pads.


def own_pad(st: symmem.SymmetricTensor) -> int:
    return st.signal_pad(dist.get_rank()).data_ptr()


def slots_are_reused() -> None:
    driver = fresh()
    meet()
    rank, world = dist.get_rank(), dist.get_world_size()
    slots = GRANULARITY // native_pad_nbytes(world)
    kept = allocate(1).rendezvous()
    first = own_pad(kept)
    seen = []
    for turn in range(slots + 2):
        st = allocate(1).rendezvous()
        seen.append(own_pad(st))
        assert not any(st.signal_pad(peer).view(torch.int32).any() for peer in range(world)), turn
        meet()
        st.signal_pad(rank).view(torch.int32).fill_(7)  # a signal that no rank took
        del st
    # In turn, except for the slot in use; the slot that became free last is used last.
    assert len(set(seen[: slots - 1])) == slots - 1
    assert seen[slots - 1 :] == seen[:3]
    assert first not in seen
    assert driver.calls.count("create") == slots + 4  # one per tensor, and one block
    kept.barrier()
    meet()


def test_slots_are_used_again_as_late_as_possible_and_zeroed(pools: Any) -> None:
    pools.get(2, "native").run(slots_are_reused)


def native_pad_nbytes(size: int) -> int:
    return native._pad_nbytes(size)


def blocks_run_out(extra: int) -> None:
    # A block with one slot: every live tensor needs a block.
    driver = fresh()
    meet()
    before, rank, world = descriptors(), dist.get_rank(), dist.get_world_size()
    group, other = new_group(f"run out {extra}"), new_group(f"run out, other {extra}")
    vars(native)["_pad_nbytes"], kept_function = lambda size: GRANULARITY, native._pad_nbytes
    try:
        kept = [allocate(1).rendezvous(group) for _ in range(3)]
        assert driver.live[0] == 2 * 3
        pads = [[st.signal_pad(peer, group=group).data_ptr() for peer in range(world)] for st in kept]
        assert len({address for row in pads for address in row}) == 3 * world
        meet()
        if rank == extra:
            del kept[0]  # this rank has a slot, the others need a block
            gc.collect()
        st = allocate(1)
        made = calls_of(driver, st.rendezvous, group)
        assert made[:3] == ((0, 1) if rank == extra else (1, 2)) + (world - 1 + world - 1 - (rank != extra),)
        for tensor in (*kept[-2:], st):
            tensor.put_signal((rank + 1) % world, group=group)
            tensor.wait_signal((rank - 1) % world, group=group)
            tensor.barrier(group=group)
    finally:
        vars(native)["_pad_nbytes"] = kept_function
    meet()
    del kept, st, tensor, group, other
    gc.collect()
    assert driver.live == NOTHING
    assert descriptors() <= before
    meet()


def test_a_rank_without_a_free_slot_makes_another_block(pools: Any) -> None:
    for extra in (0, 1):
        pools.get(3, "native").run(blocks_run_out, extra)


def fault_at_own_place(method: str) -> None:
    driver = fresh()
    meet()
    before = descriptors()
    st = allocate(100).rendezvous()
    rank = dist.get_rank()
    st.tensor.fill_(rank)
    st.barrier()
    driver.faults[method] = ("CUDA_ERROR_OUT_OF_MEMORY", 0)
    error = error_of(st.contiguous_view)
    assert type(error) is OutOfMemoryError
    assert (error.rank, error.step) == (rank, "contiguous_view")
    assert st.contiguous_view()[:, 0].tolist() == list(range(dist.get_world_size()))
    meet()
    del st
    check_nothing_left(driver, before)


@pytest.mark.parametrize("method", ["map", "allow"])
def test_a_fault_at_the_contiguous_view_is_local_and_may_be_retried(method: str, pools: Any) -> None:
    pools.get(3, "native").run(fault_at_own_place, method)


# Faults.


def fault_at_rendezvous(method: str, when: int, culprit: int, fault: str) -> SymmemError:
    driver = fresh()
    meet()
    before = descriptors()
    st = allocate(100)
    if dist.get_rank() == culprit:
        driver.faults[method] = (fault, when)
    error = error_of(st.rendezvous)
    gc.collect()
    # Blocks of pads may stay: this rank's, and after all are mapped, the peers'.
    blocks = len(driver.handles) - 1
    peers = len(driver.reservations) - 1 - blocks
    assert blocks <= 1
    assert peers <= blocks
    assert driver.live == (1 + blocks, 1 + blocks + peers, 1 + blocks + 2 * peers, 0), "something is left behind"
    st.rendezvous()
    assert driver.live == (2, 4, 6, 0)
    assert not any(st.signal_pad(peer).view(torch.int32).any() for peer in range(3))
    meet()
    st.tensor.fill_(dist.get_rank())
    st.barrier()
    assert [st.get(peer)[0].item() for peer in range(st.groups[0].size)] == list(range(st.groups[0].size))
    meet()
    del st
    check_nothing_left(driver, before)
    return error


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize(
    ("method", "when"),
    [
        ("create", 0),
        ("export_descriptor", 0),
        ("export_descriptor", 1),
        *(("import_descriptor", when) for when in range(4)),
        *(("reserve", when) for when in range(3)),
        *(("map", when) for when in range(5)),
        *(("allow", when) for when in range(3)),
        ("zero", 0),
    ],
)
def test_a_fault_in_any_call_is_raised_on_all_and_undone(method: str, when: int, culprit: int, pools: Any) -> None:
    fault = "CUDA_ERROR_OUT_OF_MEMORY"
    errors = pools.get(3, "native").run(fault_at_rendezvous, method, when, culprit, fault)
    for error in errors:
        assert type(error) is OutOfMemoryError
        assert error.rank == culprit
        assert fault in error.what


def test_memory_that_cannot_be_mapped_names_the_gpus(pools: Any) -> None:
    for method, when, whose in (("import_descriptor", 1, 2), ("map", 4, 2), ("import_descriptor", 2, 1)):
        (error, *_) = pools.get(3, "native").run(fault_at_rendezvous, method, when, 0, "CUDA_ERROR_INVALID_VALUE")
        assert type(error) is RendezvousError
        assert error.peers == (whose,)
        assert "rank 0's GPU (Fake 0" in error.what
        assert f"rank {whose}'s GPU (Fake {whose}" in error.what


def fault_at_allocation(method: str) -> SymmemError | None:
    driver = fresh()
    meet()
    before, group, error = descriptors(), symmem.resolve_group(), None
    allocate(1)  # these facts are cached
    if dist.get_rank() == 1:
        driver.faults[method] = ("CUDA_ERROR_OUT_OF_MEMORY", 0)
        error = error_of(lambda: allocate(100, group=group))
        assert "Fake 1" in error.what or method != "create"
    else:
        error = error_of(lambda: allocate(100, group=group).rendezvous())
    check_nothing_left(driver, before)
    meet()
    return error


@pytest.mark.parametrize("method", ["create", "reserve", "map", "allow", "zero"])
def test_a_rank_that_cannot_allocate_tells_all(method: str, pools: Any) -> None:
    for error in pools.get(3, "native").run(fault_at_allocation, method):
        assert type(error) is OutOfMemoryError
        assert error.rank == 1


def forbidden(method: str) -> tuple[SymmemError, SymmemError]:
    driver = fresh()
    meet()
    before = descriptors()
    backend = get_backend("native")
    driver.faults[method] = ("CUDA_ERROR_NOT_PERMITTED", 0)
    probe = error_of(backend.probe)
    backend.probe()
    check_nothing_left(driver, before)
    st = allocate(100)
    if dist.get_rank() == 0:
        driver.faults[method] = ("CUDA_ERROR_NOT_PERMITTED", 0)
    rendezvous = error_of(st.rendezvous)
    meet()
    return probe, rendezvous


def test_sharing_that_is_forbidden_is_named(pools: Any) -> None:
    for method in ("export_descriptor", "import_descriptor"):
        for probe, rendezvous in pools.get(2, "native").run(forbidden, method):
            assert type(probe) is BackendUnavailableError
            assert "CUDA_ERROR_NOT_PERMITTED" in probe.what
            assert type(rendezvous) in (UnsupportedError, RendezvousError)
            assert rendezvous.rank == 0
            assert "CUDA_ERROR_NOT_PERMITTED" in rendezvous.what


def die_at(method: str) -> SymmemError:
    driver = fresh()
    meet()
    before = descriptors()
    st = allocate(100)
    if dist.get_rank() == 1:
        driver.faults[method] = (lambda: os.kill(os.getpid(), signal.SIGKILL), 1)
    error = error_of(st.rendezvous)
    del st
    forget_pads()
    assert driver.live == NOTHING
    assert descriptors() <= before
    return error


@pytest.mark.parametrize("method", ["export_descriptor", "import_descriptor"])
def test_a_rank_that_is_killed_is_named(method: str, new_pool: Callable[..., RankPool]) -> None:
    outcomes = new_pool(3).outcomes(die_at, method)
    for rank in (0, 2):
        assert type(outcomes[rank].value) is PeerLostError, outcomes[rank].trace
        assert outcomes[rank].value.peers == (1,)


def without_p2p() -> SymmemError:
    driver = fresh(p2p=False)
    meet()
    before = descriptors()
    st = allocate(100)
    error = error_of(st.rendezvous)
    assert "map" not in driver.calls[driver.calls.index("export_descriptor") :]
    del st
    check_nothing_left(driver, before)
    return error


def test_gpus_that_cannot_access_each_other_are_named(pools: Any) -> None:
    for error in pools.get(2, "native").run(without_p2p):
        assert type(error) is RendezvousError
        assert "rank 0's GPU (Fake 0" in error.what
        assert "rank 1's GPU (Fake 1" in error.what
        assert "nvshmem" in str(error)


def on_one_gpu() -> None:
    driver = fresh(shared_gpu=True, p2p=False, multicast=True)
    group = new_group("one gpu", multicast="auto")
    st = allocate(100).rendezvous(group)
    st.tensor.fill_(group.rank)
    st.barrier()
    assert (st.get(1 - group.rank) == 1 - group.rank).all()
    assert "share a GPU" in str(error_of(lambda: st.multicast_ptr))
    assert "multicast_create" not in driver.calls
    st.barrier()
    group.close()


def test_two_ranks_on_one_gpu(pools: Any) -> None:
    pools.get(2, "native").run(on_one_gpu)


def another_gpu() -> None:
    """Rank 1 moves to GPU 0, while its memory on GPU 1 stays. Its peer does not send its block of pads again."""
    driver = fresh()
    group = new_group("another GPU")
    rank, peer = group.rank, 1 - group.rank
    first = allocate(100).rendezvous(group)
    driver.mine = 0
    for _ in range(2):
        st = allocate(100).rendezvous(group)
        assert driver.access_to(st.signal_pad(peer).data_ptr()) == {rank, 0}
        st.tensor.fill_(rank)
        st.barrier()
        assert (st.get(peer) == peer).all()
        st.barrier()
    first.barrier()
    del first, st
    group.close()


def test_a_rank_may_use_another_gpu(pools: Any) -> None:
    pools.get(2, "native").run(another_gpu)


# Several hosts.


def on_two_hosts(fabric: tuple[str, str]) -> SymmemError | None:
    rank = dist.get_rank()
    driver = fresh(fabric=fabric[rank])
    group = new_group(f"two hosts, fabric {fabric}")
    os.environ["SYMMEM_HOST_ID"] = f"id-{rank}"
    try:
        st = allocate(100)
        if fabric != ("works", "works"):
            error = error_of(functools.partial(st.rendezvous, group))
            assert error.rank is not None
            del st
            forget_pads()
            assert driver.live == NOTHING
            return error
        st.rendezvous(group)
        st.tensor.fill_(rank)
        st.barrier()
        assert (st.get(1 - rank) == 1 - rank).all()
        assert "export_descriptor" not in driver.calls
        st.barrier()
    finally:
        os.environ.pop("SYMMEM_HOST_ID")
        group.close()
    del st
    forget_pads()
    assert driver.live == NOTHING
    return None


@pytest.mark.parametrize(
    "fabric", [("absent", "absent"), ("refused", "refused"), ("works", "refused"), ("refused", "works")]
)
def test_hosts_without_fabric_are_named(fabric: tuple[str, str], pools: Any) -> None:
    for error in pools.get(2, "native").run(on_two_hosts, fabric):
        assert type(error) is RendezvousError
        assert "id-0" in error.what
        assert "id-1" in error.what
        assert "nvshmem" in (error.hint or "")


def test_hosts_with_fabric_exchange_fabric_handles(pools: Any) -> None:
    pools.get(2, "native").run(on_two_hosts, ("works", "works"))


# Multicast.


def multicast_works() -> None:
    driver = fresh(multicast=True)
    group = new_group("multicast", multicast="auto")
    st = allocate(1).rendezvous(group)
    assert "multicast_create" not in driver.calls
    before, made = descriptors(), driver.live
    rank0 = group.rank == 0
    for method in ("multicast_create", "multicast_add", "multicast_bind", "map", "allow"):
        if rank0:
            driver.faults[method] = ("CUDA_ERROR_SYSTEM_NOT_READY", 0)
        error = error_of(functools.partial(getattr, st, "multicast_ptr"))
        assert (error.rank, error.step) == (0, "multicast_ptr")
        assert driver.live == made, method
    driver.calls.clear()
    pointer = st.multicast_ptr
    assert pointer in driver.mappings
    order = ["multicast_add", "multicast_bind", "map", "allow"]
    called = [name for name in driver.calls if name in (*order, "multicast_create")]
    assert called == (["multicast_create", *order] if rank0 else order)
    assert st.multicast_ptr == pointer  # not collective any more
    handles, reservations, mappings, _ = made
    assert driver.live == (handles + 1, reservations + 1, mappings + 1, 1), (made, driver.live)
    assert symmem.SymmetricTensor.wrap(st.tensor.view(torch.uint8)[3:]).multicast_ptr == pointer + 3
    with group.collective("done"):
        pass
    group.close()
    del st, group
    gc.collect()
    assert driver.live == NOTHING
    del_order = [name for name in driver.calls if name in ("quiesce", "unmap", "multicast_unbind")]
    assert del_order.index("quiesce") < del_order.index("unmap") < del_order.index("multicast_unbind")
    # Descriptors of the handles of memory and pads, and of the closed group.
    assert descriptors() < before - 2


def test_multicast_is_set_up_once_and_undone(pools: Any) -> None:
    pools.get(2, "native").run(multicast_works)


def multicast_refused(policy: tuple[str, str], supported: bool, name: str) -> str:
    rank = dist.get_rank()
    driver = fresh(multicast=supported)
    group = new_group(name, multicast=policy[rank], origins={"multicast": f"TEST_{rank}=1"})
    st = allocate(GRANULARITY).rendezvous(group)
    # Local: only one rank asks.
    error = error_of(lambda: st.multicast_ptr) if rank == 0 else None
    with group.collective("done"):
        pass
    assert error is None or type(error) is MulticastUnavailableError
    assert not any(call in ("multicast_create", "multicast_add", "multicast_bind") for call in driver.calls)
    group.close()
    return str(error)


def test_multicast_that_is_switched_off_is_never_created(pools: Any) -> None:
    pool = pools.get(2, "native")
    assert "switched off (TEST_0=1)" in pool.run(multicast_refused, ("off", "off"), True, "off")[0]
    assert (
        "rank 1 multicast is switched off (TEST_1=1)" in pool.run(multicast_refused, ("auto", "off"), True, "half")[0]
    )
    assert "does not support multicast" in pool.run(multicast_refused, ("auto", "auto"), False, "none")[0]


# Freeing.


def native_pads() -> Any:
    backend: Any = get_backend("native")
    (pads,) = backend.pads.values()
    return pads


def freed_amid_a_capture() -> None:
    driver = fresh()
    st = allocate(100).rendezvous()
    slots = len(native_pads()._free[0])
    driver.capturing = True
    del st
    gc.collect()
    # The handle is released; mappings and the slot in the block of pads stay.
    assert driver.live == (1, 3, 2, 0)
    assert len(native_pads()._free[0]) == slots
    driver.capturing = False
    allocate(100)
    assert len(native_pads()._free[0]) == slots + 1
    forget_pads()
    assert driver.live == NOTHING


def test_what_is_freed_amid_a_capture_is_unmapped_later(pools: Any) -> None:
    pools.get(1, "native").run(freed_amid_a_capture)


def collected_on_a_thread() -> None:
    driver = fresh()
    meet()
    before = descriptors()
    circle: dict[str, Any] = {"st": allocate(100).rendezvous()}
    circle["self"] = circle
    del circle
    # The other ranks are idle now: a garbage collection that needed them would hang.
    if dist.get_rank() == 0:
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join(LONG)
        assert not thread.is_alive()
        assert driver.live == (1, 2, 2, 0)  # the blocks of pads
    meet()
    check_nothing_left(driver, before)


def test_a_collection_on_any_thread_frees_alone(pools: Any) -> None:
    pools.get(2, "native").run(collected_on_a_thread)


def a_failed_device_is_freed() -> None:
    driver = fresh()
    st = allocate(100)
    driver.faults["unmap"] = ("CUDA_ERROR_LAUNCH_FAILED", 0)
    driver.faults["unreserve"] = ("CUDA_ERROR_LAUNCH_FAILED", 0)
    del st
    gc.collect()
    assert driver.calls.count("unreserve") == 1


def test_freeing_on_a_failed_device_is_silent(pools: Any) -> None:
    pools.get(1, "native").run(a_failed_device_is_freed)


# Kernels.


@pytest.mark.parametrize("world", [1, 8, 72, 480])
def test_kernels_compile(world: int, tmp_path: Path) -> None:
    from symmem.backends.signal_kernels import SOURCE

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    source = tmp_path / "signals.cu"
    source.write_text(SOURCE)
    command = [nvcc, "-arch=sm_90", f"-DWORLD={world}", "-Werror", "all-warnings", "-cubin", source]
    done = subprocess.run([*command, "-o", tmp_path / "out"], capture_output=True, text=True)  # type: ignore[list-item]
    assert done.returncode == 0, done.stderr
