"""Process groups over several hosts, which SYMMEM_HOST_ID or network namespaces simulate."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from arena_rank import mapped
from patience import SOON, TASK

from symmem.distributed import hosts, report
from symmem.errors import (
    ForkedError,
    InvalidArgumentError,
    MismatchError,
    PeerLostError,
    PeerTimeoutError,
    SymmemError,
)
from symmem.ops.engines.base import Engines
from symmem.tools.ranks import RankPool, rank_store

pytestmark = pytest.mark.ranks

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LIMITS = hosts._LEAST_RANKS, hosts._MOST_BYTES
UNEVEN, ALONE = "hosts with different numbers of ranks", "one rank on every host"


def begin(names: str, timeout: float) -> None:
    os.environ["SYMMEM_HOST_ID"] = names[int(os.environ["RANK"])]
    init("pg", timeout)


def init(name: str, timeout: float) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.PrefixStore(name, rank_store())
    dist.init_process_group("symmem", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))


@pytest.fixture(scope="module")
def pool_on() -> Iterator[Callable[[str], RankPool]]:
    """Gives a pool, from the host of every rank: "aabb"."""
    made: dict[str, RankPool] = {}

    def get(names: str) -> RankPool:
        if names not in made or not made[names].alive:
            made[names] = RankPool(len(names), process_group=None, timeout=TASK)
            made[names].run(begin, names, TASK)
        return made[names]

    yield get
    for pool in made.values():
        pool.close()


def served() -> dict[str, str]:
    """Why symmem did not serve the last calls, by operation."""
    return {each.operation: each.why for each in report()}


def every_operation(is_served: bool) -> dict[str, str]:
    """Compare every operation with the result of one process. Small and large tensors take different steps."""
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames some functions
    hosts._LEAST_RANKS, hosts._MOST_BYTES = {}, {}
    rank, size = dist.get_rank(), dist.get_world_size()
    group: Any = dist.group.WORLD
    group.counts.clear()
    total = size * (size - 1) // 2
    # gloo cannot reduce all dtypes.
    for dtype in (*FLOATS, *INTEGERS) if is_served else (torch.float32, torch.int64):
        for count in (0 if is_served else 2, 1, 7, 20_000 // dtype.itemsize, 150_001 // dtype.itemsize):
            pattern = (torch.arange(count) % 5).to(dtype)
            x = pattern + rank
            dist.all_reduce(x)
            assert torch.equal(x, pattern * size + total)
            dist.all_reduce(x.copy_(pattern + rank), op=dist.ReduceOp.MAX)
            assert torch.equal(x, pattern + (size - 1))
            dist.all_reduce(x.copy_(pattern + rank), op=dist.ReduceOp.MIN)
            assert torch.equal(x, pattern)
            for root in range(size):
                dist.broadcast(x.copy_(pattern + rank), src=root)
                assert torch.equal(x, pattern + root)
            own, out = pattern + rank, torch.empty((size, count), dtype=dtype)
            dist.all_gather_into_tensor(out.view(-1), own)
            ranks = torch.arange(size).view(size, 1)
            assert torch.equal(out, (pattern + ranks).to(dtype))
            parts = [torch.empty_like(own) for _ in range(size)]
            dist.all_gather(parts, own)
            assert torch.equal(torch.stack(parts), out)
            rows = (pattern + ranks + rank).to(dtype)
            dist.reduce_scatter_tensor(own, rows.view(-1))
            assert torch.equal(own, (pattern + rank) * size + total)
            dist.all_to_all_single(out, (pattern + ranks + 10 * rank).to(dtype))
            assert torch.equal(out, (pattern + rank + 10 * ranks).to(dtype))
    if is_served:
        x = torch.tensor([3.0 * rank])
        dist.all_reduce(x, op=dist.ReduceOp.AVG)
        assert x.item() == 3 * total / size
        z = torch.full((40_000,), complex(rank, 1))
        dist.all_reduce(z)
        assert torch.equal(z, torch.full((40_000,), complex(total, size)))
        dist.broadcast(z.copy_(z * rank), src=1)
        assert z[0] == complex(total, size)
    dist.barrier()
    return served()


OPERATIONS = ("all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "reduce_scatter")


@pytest.mark.parametrize("names", ["aabb", "abab", "abba"])
def test_symmem_serves_hosts_of_equal_numbers_of_ranks(names: str, pool_on: Any) -> None:
    assert pool_on(names).run(every_operation, True) == [dict.fromkeys(OPERATIONS, "")] * 4


@pytest.mark.parametrize(("names", "why"), [("aab", UNEVEN), ("abc", ALONE)])
def test_the_inner_group_serves_other_hosts(names: str, why: str, pool_on: Any) -> None:
    assert pool_on(names).run(every_operation, False) == [dict.fromkeys(OPERATIONS, why)] * 3


def where_the_inner_group_is_quicker(limits: Any) -> dict[str, str]:
    warnings.simplefilter("ignore", FutureWarning)
    hosts._LEAST_RANKS, hosts._MOST_BYTES = limits
    group: Any = dist.group.WORLD
    group.counts.clear()
    x, device = torch.ones(4), torch.device("cpu")
    dist.all_to_all_single(x, torch.ones(4))
    dist.barrier()
    dist.broadcast(x, src=0)
    dist.all_reduce(torch.ones((1 << 18) + 1))
    dist.all_gather_into_tensor(torch.ones(4 << 16), torch.ones(1 << 16))
    assert not group._get_backend(device).supports_tensor_alloc(device)
    return served()


def test_the_inner_group_serves_what_it_does_quicker(pool_on: Any) -> None:
    served_by_inner = [each for each in OPERATIONS if each != "reduce_scatter"]
    expected = dict.fromkeys(served_by_inner, "calls that the inner group makes quicker over several hosts")
    assert pool_on("aabb").run(where_the_inner_group_is_quicker, LIMITS) == [expected] * 4


def in_other_forms() -> None:
    """In place, strided, of parameters, asynchronous, and in a group of its own."""
    warnings.simplefilter("ignore", FutureWarning)
    hosts._LEAST_RANKS, hosts._MOST_BYTES = {}, {}
    rank, size = dist.get_rank(), dist.get_world_size()
    for count in (3, 40_001):
        out = torch.zeros(size * count)
        own = out[rank * count : (rank + 1) * count]
        own.fill_(rank + 1)
        dist.all_gather_into_tensor(out.view(-1), own)
        assert out.view(size, count)[:, -1].tolist() == [1.0, 2.0, 3.0, 4.0]
        strided = torch.full((count, 2), float(rank))[:, 0]
        dist.all_reduce(strided)
        assert (strided == 6).all()
        parameter = torch.nn.Parameter(torch.full((count,), float(rank)))
        dist.all_reduce(parameter)
        dist.broadcast(parameter, src=2)
        assert (parameter == 6).all()
    world: Any = dist.group.WORLD
    x, out = torch.full((5,), rank), torch.empty(5, dtype=torch.int64)
    world._hosts.run("broadcast", lambda: world._hosts.broadcast(x, world.group, 1, out))  # as compiled code does
    assert (x.tolist(), out.tolist()) == ([rank] * 5, [1] * 5)
    group: Any = dist.new_group()
    tensors = [torch.full((count,), float(rank)) for count in (1, 1000, 100_000)]
    works = [dist.all_reduce(x, group=each, async_op=True) for x in tensors for each in (None, group)]
    works[2].get_future().wait()
    for work in works:
        work.wait()
    assert [x.unique().tolist() for x in tensors] == [[24.0]] * 3
    results = [torch.randn(50_000, generator=torch.Generator().manual_seed(rank)).bfloat16() for _ in range(2)]
    for x in results:
        dist.all_reduce(x)
    assert torch.equal(*results)
    dist.destroy_process_group(group)


def test_other_forms(pool_on: Any) -> None:
    pool_on("aabb").run(in_other_forms)


# Faults.


def told(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(SymmemError) as caught:
        call()
    return caught.type, caught.value.what


def disagreeing() -> list[Any]:
    """All ranks of all hosts get a named error, and the next call works."""
    warnings.simplefilter("ignore", FutureWarning)
    rank, size = dist.get_rank(), dist.get_world_size()
    errors = []
    for odd in range(size):
        for count in (2, 30_000):
            errors += [
                told(lambda odd=odd, count=count: dist.all_reduce(torch.ones(count + (rank == odd)))),  # type: ignore[misc]
                told(lambda odd=odd: dist.all_gather_into_tensor(torch.ones(8 + (rank == odd)), torch.ones(2))),  # type: ignore[misc]
            ]
            x = torch.ones(3)
            dist.all_reduce(x)
            assert x.tolist() == [size] * 3
    return errors


def test_ranks_that_disagree(pool_on: Any) -> None:
    for errors in pool_on("aabb").run(disagreeing):
        assert [kind for kind, _ in errors] == [MismatchError, InvalidArgumentError] * 8
        first = errors[8][1]  # of rank 2
        assert "(counted within the host: 0 is rank 2, 1 is rank 3)" in first
        assert "2 torch.float32 on rank 1" in first


def late(latecomers: tuple[int, ...]) -> list[Any]:
    """The other ranks give up. All ranks get an error, now and in later calls."""
    rank, store = dist.get_rank(), rank_store()
    init_again(f"late {latecomers}", TASK)
    dist.all_reduce(torch.ones(2))
    group: Any = dist.group.WORLD
    if rank in latecomers:
        store.wait([f"the others gave up {latecomers}"])
    else:  # torch's timeout would be that of the first calls too
        hosts._LEARN = 0.5
        (engine,) = group._hosts._local.extension(Engines).values()
        engine._timeout = 0.1 if rank == 2 else TASK
        group._hosts._rail._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=0.1))
    errors = [told(lambda: dist.all_reduce(torch.ones(2))) for _ in range(3)]
    if rank not in latecomers and store.add(f"gave up {latecomers}", 1) == 4 - len(latecomers):
        store.set(f"the others gave up {latecomers}", "")
    hosts._LEARN = TASK
    init_again(f"after {latecomers}", TASK)
    x = torch.ones(2)
    dist.all_reduce(x)
    assert x.tolist() == [4, 4]
    return errors


def init_again(name: str, timeout: float) -> None:
    dist.destroy_process_group()
    init(name, timeout)


@pytest.mark.parametrize("latecomers", [(3,), (2, 3)])
def test_ranks_that_are_late(latecomers: tuple[int, ...], pool_on: Any) -> None:
    for rank, errors in enumerate(pool_on("aabb").run(late, latecomers)):
        assert [kind for kind, _ in errors] == [PeerTimeoutError] * 3, errors
        if rank < 2 and len(latecomers) == 2:
            assert "did not come in time" in errors[0][1] or "waited for each other" in errors[0][1]


def forked() -> None:
    dist.all_reduce(torch.ones(1))
    child = os.fork()
    if child == 0:
        try:
            dist.all_reduce(torch.ones(1))
        except ForkedError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    dist.all_reduce(torch.ones(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_no_rank(pool_on: Any) -> None:
    pool_on("aabb").run(forked)


def kept() -> dict[str, int]:
    mapped()  # collects the groups that are gone, so that their threads end
    for thread in threading.enumerate():
        if thread.name == "symmem work":
            thread.join(SOON)
    maps, files = mapped()
    return {"files": files, "mapped": maps, "tasks": len(os.listdir("/proc/self/task"))}


def again(times: int) -> tuple[dict[str, int], dict[str, int]]:
    before: dict[str, int] = {}
    dist.destroy_process_group()
    for number in range(times + 1):
        init(f"again {number}", TASK)
        dist.all_reduce(torch.ones(10))
        dist.all_reduce(torch.ones(100_000), async_op=True).wait()
        told(lambda: dist.all_reduce(torch.ones(3 + dist.get_rank() % 2)))
        dist.all_reduce(torch.ones(10))
        dist.destroy_process_group()
        before = before or kept()
    after = kept()
    init("after again", TASK)
    return before, after


def test_destroying_and_making_groups_leaves_nothing(pool_on: Any) -> None:
    for before, after in pool_on("aabb").run(again, 10):
        assert before == after


def dying(victims: tuple[int, ...]) -> list[Any]:
    dist.all_reduce(torch.ones(2))
    if dist.get_rank() in victims:
        os._exit(3)
    before = time.monotonic()
    errors = [told(lambda: dist.all_reduce(torch.ones(2))) for _ in range(2)]
    assert time.monotonic() - before < SOON
    return errors


@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_dies(victim: int, new_pool: Any) -> None:
    pool = new_pool(4, process_group=None)
    pool.run(begin, "aabb", TASK)
    for rank, outcome in enumerate(pool.outcomes(dying, (victim,))):
        if rank == victim:
            continue
        assert outcome.error is None, outcome.trace
        for kind, what in outcome.value:
            assert kind is PeerLostError
            assert f"{victim % 2} is rank {victim}" in what


# Network namespaces.


def leave_network() -> int:
    """Give ranks 0 and 1 a network namespace, and ranks 2 and 3 another one; a virtual link joins them."""
    rank, store = int(os.environ["RANK"]), rank_store()
    libc, host, new_network = ctypes.CDLL(None, use_errno=True), rank // 2, 0x40000000
    if rank % 2 == 0:
        error = ctypes.get_errno() if libc.unshare(new_network) else 0
        store.set(f"error {host}", str(error))
        store.set(f"process {host}", str(os.getpid()))
    if error := max(int(store.get(f"error {each}")) for each in range(2)):
        return error
    processes = [int(store.get(f"process {each}")) for each in range(2)]
    if rank % 2:
        with open(f"/proc/{processes[host]}/ns/net") as network:
            assert libc.setns(network.fileno(), new_network) == 0
    if rank == 0:
        ip("link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", str(processes[1]))
        store.set("linked", "")
    store.wait(["linked"])
    if rank % 2 == 0:
        ip("link", "set", "lo", "up")
        ip("address", "add", f"10.83.0.{host + 1}/24", "dev", "link0")
        ip("link", "set", "link0", "up")
        store.set(f"up {host}", "")
    store.wait(["up 0", "up 1"])
    os.environ["GLOO_SOCKET_IFNAME"] = "link0"
    init("networks", TASK)
    return 0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


def test_hosts_in_network_namespaces(new_pool: Any) -> None:
    """The ranks tell them apart without SYMMEM_HOST_ID, and gloo's connections go over the virtual link."""
    if subprocess.run(["sh", "-c", "command -v ip"], capture_output=True, check=False).returncode:
        pytest.skip("the program ip is missing")
    pool = new_pool(4, process_group=None)
    if error := max(pool.run(leave_network)):
        pytest.skip(f"this process may make no network namespace: {os.strerror(error)}")
    assert pool.run(every_operation, True) == [dict.fromkeys(OPERATIONS, "")] * 4
