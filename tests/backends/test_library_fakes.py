"""The backends over NVSHMEM and torch, on fakes of both: the whole path, in real processes."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_libraries import FakeNvshmem, FakeTorch, install

import symmem
from symmem.arena.arena import Arenas
from symmem.backends import get_backend, nvshmem_job, nvshmem_library
from symmem.errors import (
    BackendUnavailableError,
    GroupError,
    MismatchError,
    MulticastUnavailableError,
    OutOfMemoryError,
    PeerTimeoutError,
    RendezvousError,
    ResourceLimitError,
    SymmemError,
    UnsupportedError,
)
from symmem.tensor.request import Requests
from symmem.tools.conformance import CASES, run_case
from symmem.tools.conformance.case import _warm
from symmem.tools.ranks import rank_store

FAKED = ("nvshmem", "pytorch_cuda", "pytorch_nccl", "pytorch_nvshmem")


def forget_arenas() -> None:
    """Drop the default group's arenas, because their memory belongs to an earlier fake."""
    os.environ["SYMMEM_ENABLE"] = "arena_size(1MiB)"  # the memory of the fakes is host memory, and zeroed
    group = symmem.resolve_group()
    group.settings = dataclasses.replace(group.settings, arena_size=1 << 20)
    group.extension(Arenas).clear()
    group.extension(Requests).clear()
    _warm.clear()


def fresh() -> tuple[FakeNvshmem, FakeTorch]:
    """New fakes on this rank, after a collection of the objects of earlier tasks."""
    forget_arenas()
    gc.collect()
    return install()


def install_only() -> None:
    fresh()


def allocate(backend: str, *sizes: int, **options: Any) -> symmem.SymmetricTensor:
    return symmem.allocate(sizes, torch.int32, backend=backend, **{"arena": False, **options})


def caught(kind: type[SymmemError], function: Any, *args: Any, **options: Any) -> SymmemError:
    with pytest.raises(kind) as info:
        function(*args, **options)
    return info.value


def collective(group: symmem.Group, name: str = "meet") -> None:
    with group.collective(name):
        pass


@pytest.fixture
def pool(pools: Any) -> Any:
    return pools.get(4, "libraries")


@pytest.mark.parametrize("backend", FAKED)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.breaks])
def test_conformance(backend: str, name: str, pools: Any) -> None:
    pool = pools.get(2, "libraries")
    pool.run(install_only)
    if reason := set(pool.run(run_case, name, backend)) - {None}:
        pytest.skip(str(reason))


# Collective allocation and freeing.


def freed_once_all_let_go(backend: str) -> None:
    library, _symm = fresh()
    rank = dist.get_rank()
    tensors = [allocate(backend, 8) for _ in range(4)]
    before = library.calls.count("free")
    # Every rank drops others, in another order: 1 and 2 on all ranks, 0 and 3 on some.
    order = ([2, 1, 0], [1, 2, 3], [1, 0, 2], [2, 1])[rank]
    for index in order:
        tensors[index] = None  # type: ignore[call-overload]
        gc.collect()
    assert library.calls.count("free") == before  # the garbage collector frees nothing
    tensors.append(allocate(backend, 8))
    assert library.calls.count("free") == before + 2
    tensors[0] = tensors[3] = None  # type: ignore[call-overload]
    tensors.append(allocate(backend, 8))
    assert library.calls.count("free") == before + 4
    for st in tensors[4:]:
        assert not st.tensor.any()  # zeroed, even if it was used before
        st.rendezvous().tensor.fill_(rank + 1)
        st.barrier()
        assert [int(st.remote_tensor(peer)[0]) for peer in range(4)] == [1, 2, 3, 4]
        st.barrier()


@pytest.mark.parametrize("backend", ["nvshmem", "pytorch_nvshmem"])
def test_freed_once_all_let_go(backend: str, pool: Any) -> None:
    pool.run(freed_once_all_let_go, backend)


def a_bad_allocation_is_told_before_the_library_is_called(backend: str) -> None:
    library, _symm = fresh()
    rank = dist.get_rank()
    allocate(backend, 8)
    calls = list(library.calls)
    error = caught(MismatchError, allocate, backend, 8000 if rank == 2 else 9000)
    assert error.peers == (2,)
    assert "bytes" in error.what
    group = symmem.resolve_group()
    group.settings = dataclasses.replace(group.settings, rendezvous_timeout=0.5)
    try:
        if rank != 1:
            assert caught(PeerTimeoutError, allocate, backend, 8).peers == (1,)
    finally:
        group.settings = dataclasses.replace(group.settings, rendezvous_timeout=300.0)
    dist.barrier()
    caught(PeerTimeoutError, allocate, backend, 8)  # rank 1 may have skipped a call
    assert library.calls == calls
    st = allocate(backend, 8).rendezvous()
    st.barrier()


@pytest.mark.parametrize("backend", ["nvshmem", "pytorch_nvshmem"])
def test_a_bad_allocation_is_told_before_the_library_is_called(backend: str, pool: Any) -> None:
    pool.run(a_bad_allocation_is_told_before_the_library_is_called, backend)


def full(backend: str) -> None:
    library, _symm = fresh()
    st = allocate(backend, 8)
    library.limit = 1 << 23
    error = caught(OutOfMemoryError, allocate, backend, 1 << 22)
    assert "allocate" in str(error)
    from symmem.backends import gpu

    vars(gpu)["free_memory"] = lambda device: 100 if dist.get_rank() == 3 else 1 << 40
    calls = list(library.calls)
    error = caught(OutOfMemoryError, allocate, backend, 1 << 20)
    assert error.peers == (3,)
    assert library.calls == calls
    del st


@pytest.mark.parametrize("backend", ["nvshmem", "pytorch_nvshmem"])
def test_full(backend: str, pool: Any) -> None:
    pool.run(full, backend)


def a_failure_on_one_rank_frees_nothing_alone() -> None:
    library, symm = fresh()
    allocate("pytorch_nvshmem", 8)
    gc.collect()
    frees = library.calls.count("free")
    symm.fault = RuntimeError("torn") if dist.get_rank() == 1 else None
    real, symm.heap.malloc = symm.heap.malloc, lambda nbytes: 0 if nbytes == 9216 else real(nbytes)  # type: ignore[method-assign]
    assert "torn" in str(caught(RendezvousError, allocate, "pytorch_nvshmem", 8))
    gc.collect()
    assert library.calls.count("free") == frees + 1  # the first allocation, which all ranks had dropped
    symm.fault = None
    del symm.heap.malloc
    for _ in range(3):
        allocate("pytorch_nvshmem", 8).rendezvous().barrier()
        gc.collect()


def test_a_failure_on_one_rank_frees_nothing_alone(pool: Any) -> None:
    pool.run(a_failure_on_one_rank_frees_nothing_alone)


def groups_that_are_not_the_job(backend: str) -> None:
    fresh()
    rank = dist.get_rank()
    odd = dist.new_group([1, 3])
    even = dist.new_group([0, 2])
    mine = odd if rank % 2 else even
    error = caught(GroupError, get_backend(backend).allocate, 8, torch.device("cpu"), symmem.resolve_group(mine))
    assert "only a part" in error.what
    dist.barrier()
    st = allocate(backend, 8)
    del st
    st = allocate(backend, 8, group=mine)  # now the job is known: all ranks allocate, with any group
    if rank % 2:
        st.rendezvous(odd)  # without the others
        st.tensor.fill_(rank)
        st.barrier()
        assert [int(st.remote_tensor(peer)[0]) for peer in range(2)] == [1, 3]
        assert int(st.get(1)[0]) == 3
        st.barrier()
    backwards = symmem.Group.from_store(3 - rank, 4, rank_store(), f"backwards {backend}")
    st.tensor.fill_(rank)
    st.rendezvous(backwards)
    st.barrier(group=backwards)
    assert [int(st.remote_tensor(peer, group=backwards)[0]) for peer in range(4)] == [3, 2, 1, 0]
    st.barrier(group=backwards)
    backwards.close()
    del st
    collective(symmem.resolve_group())
    dist.destroy_process_group(mine)


@pytest.mark.parametrize("backend", ["nvshmem", "pytorch_nvshmem"])
def test_groups_that_are_not_the_job(backend: str, pool: Any) -> None:
    pool.run(groups_that_are_not_the_job, backend)


def eight_groups_and_no_more(backend: str) -> None:
    fresh()
    st = allocate(backend, 8)
    groups = [symmem.Group.from_store(dist.get_rank(), 4, rank_store(), f"{backend} {number}") for number in range(9)]
    if backend == "pytorch_cuda":
        groups = [symmem.resolve_group(dist.new_group([0, 1, 2, 3])) for _ in groups]
    for group in groups[:8]:
        st.rendezvous(group)
    for group in groups[:8]:
        st.put_signal((group.rank + 1) % 4, group=group)
    for group in reversed(groups[:8]):
        st.wait_signal((group.rank - 1) % 4, group=group)
    assert "signal pads" in str(caught(ResourceLimitError, st.rendezvous, groups[8]))
    collective(symmem.resolve_group())


@pytest.mark.parametrize("backend", ["nvshmem", "pytorch_cuda"])
def test_eight_groups_and_no_more(backend: str, pool: Any) -> None:
    pool.run(eight_groups_and_no_more, backend)


# NVSHMEM.


def unreachable_peers() -> None:
    library, _symm = fresh()
    vars(nvshmem_library)["STAGING_NBYTES"] = 1000  # so that a copy needs several pieces
    rank = dist.get_rank()
    library.unreachable = {other for other in range(4) if other % 2 != rank % 2}
    st = allocate("nvshmem", 700, 3).rendezvous()
    assert [bool(p) for p in st.remote_pointers] == [other % 2 == rank % 2 for other in range(4)]
    assert "reachable" in str(caught(UnsupportedError, st.remote_tensor, (rank + 1) % 4))
    st.put(torch.arange(2100, dtype=torch.int32).view(700, 3) + rank, (rank + 1) % 4)
    collective(symmem.resolve_group())
    assert torch.equal(st.tensor.flatten(), torch.arange(2100, dtype=torch.int32) + (rank - 1) % 4)
    assert torch.equal(st.get((rank + 3) % 4).flatten(), torch.arange(2100, dtype=torch.int32) + (rank - 2) % 4)
    part = symmem.SymmetricTensor.wrap(st.tensor[600:])
    assert torch.equal(part.get((rank + 1) % 4), st.tensor[600:] + (1 if rank != 0 else -3))
    collective(symmem.resolve_group())


def test_unreachable_peers(pool: Any) -> None:
    pool.run(unreachable_peers)


def multicast_of_nvshmem() -> None:
    library, _symm = fresh()
    st = allocate("nvshmem", 4).rendezvous()
    group = st.groups[0]
    before = group.settings
    for multicast, pointer, text in (("off", 4096, "switched off by here"), ("auto", 0, "no address")):
        group.settings = dataclasses.replace(before, multicast=multicast, origins={"multicast": "here"})
        library.multicast = pointer
        assert text in str(caught(MulticastUnavailableError, lambda: st.multicast_ptr))
    library.multicast = 4096
    assert st.multicast_ptr == 4096
    pair = symmem.Group.from_store(dist.get_rank() % 2, 2, rank_store(), f"pair {dist.get_rank() // 2}")
    pair.settings = group.settings
    st = allocate("nvshmem", 4).rendezvous(pair)
    assert "not for this group" in str(caught(MulticastUnavailableError, lambda: st.multicast_ptr))
    group.settings = before
    collective(symmem.resolve_group())
    pair.close()


def test_multicast_of_nvshmem(pool: Any) -> None:
    pool.run(multicast_of_nvshmem)


def one_initialisation(first: str, second: str) -> None:
    library, _symm = fresh()
    one = allocate(first, 4).rendezvous()
    two = allocate(second, 4).rendezvous()
    assert library.calls.count("initialize") == 1
    for st in (one, two):
        st.tensor.fill_(dist.get_rank())
        st.barrier()
        assert int(st.remote_tensor(3)[0]) == 3
        st.barrier()


@pytest.mark.parametrize(("first", "second"), [("nvshmem", "pytorch_nvshmem"), ("pytorch_nvshmem", "nvshmem")])
def test_one_initialisation(first: str, second: str, pool: Any) -> None:
    pool.run(one_initialisation, first, second)


def initialised_by_others() -> None:
    library, _symm = fresh()
    library.initialized, library.bases = dist.get_rank() < 2, [0] * 4
    error = caught(MismatchError, allocate, "nvshmem", 4)
    assert error.peers == (0, 1)
    assert "[0, 1] of 4" in error.what
    library.initialized, library.bases = True, [0, 0]
    assert "over 2 ranks" in str(caught(BackendUnavailableError, allocate, "nvshmem", 4))
    assert library.calls == []


def test_initialised_by_others(pool: Any) -> None:
    pool.run(initialised_by_others)


def the_end(how: str) -> list[str]:
    library, symm = fresh()
    allocate("nvshmem", 4)
    job = symmem.resolve_group()
    vars(nvshmem_job)["EXIT_TIMEOUT"] = 0.5
    vars(nvshmem_job)["_torch_uses_nvshmem"] = lambda: symm.active == "NVSHMEM"
    vars(sys).pop("last_value", None)
    if how == "torch uses it on one rank" and dist.get_rank() == 2:
        symm.active = "NVSHMEM"
    if how == "one rank raised" and dist.get_rank() == 2:
        sys.last_value = ValueError()
    nvshmem_job.leave(library, job, torch.device("cpu"))  # type: ignore[arg-type]
    dist.barrier()
    if how == "one rank raised" and dist.get_rank() == 2:
        del sys.last_value
        caught(PeerTimeoutError, collective, job)  # the others' withdrawal
    return library.calls[-1:]


@pytest.mark.parametrize(
    ("how", "last"),
    [("in good order", "finalize"), ("torch uses it on one rank", "malloc"), ("one rank raised", "malloc")],
)
def test_the_end(how: str, last: str, new_pool: Any) -> None:
    assert new_pool(4).run(the_end, how) == [[last]] * 4


def test_the_size_of_the_heap_follows_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVSHMEM_SYMMETRIC_SIZE", "NVSHMEM_DISABLE_NVLS", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "kept")
    settings = symmem.Group.from_store(0, 1, dist.HashStore()).settings
    nvshmem_job._prepare_environment(dataclasses.replace(settings, multicast="auto"))
    assert "NVSHMEM_SYMMETRIC_SIZE" not in os.environ  # NVSHMEM's own default is more than enough
    assert "NVSHMEM_DISABLE_NVLS" not in os.environ
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    nvshmem_job._prepare_environment(dataclasses.replace(settings, multicast="off", arena_size=2**31))
    assert os.environ.pop("NVSHMEM_SYMMETRIC_SIZE") == str(2**32)
    assert os.environ.pop("NVSHMEM_DISABLE_NVLS") == "1"
    assert os.environ["NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"] == "kept"
