"""Programs for torch.distributed over the backend symmem, on the CPU."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import types
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import symmem
from symmem.distributed import SymmemProcessGroup, methods, report
from symmem.errors import BackendUnavailableError, GroupError, UnsupportedError
from symmem.ops import functions

pytestmark = pytest.mark.ranks

_dist: Any = dist

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class OnCuda:
    """What a plan asks of a tensor on CUDA."""

    layout, is_quantized, is_nested, requires_grad = torch.strided, False, False, False
    device, dtype = torch.device("cuda"), torch.bfloat16

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def is_inference(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("method", "nbytes", "why"),
    [
        ("all_gather_single", 32 << 20, ""),
        ("all_gather_single", (32 << 20) + 2, "tensors of more than 32 MiB on cuda"),
        ("all_to_all_single", 1 << 30, ""),
    ],
)
def test_nccl_gathers_large_tensors(method: str, nbytes: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_CLASSES", (OnCuda,))
    sizes: list[Any] = [[], []] if method == "all_to_all_single" else []
    options = types.SimpleNamespace(asyncOp=False)
    group: Any = None
    plan = methods.METHODS[method].plan(functions, group, [OnCuda(nbytes), OnCuda(nbytes // 2), *sizes, options])
    assert plan == why if why else callable(plan)


def world() -> tuple[int, int]:
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames some functions
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def counted(operation: str, by: str, calls: int = 1, group: Any = None) -> Any:
    """Within the block, an operation is called so often, and served by symmem or by the inner group alone."""

    def counts() -> dict[str, int]:
        found = {"symmem": 0, "inner": 0}
        for each in report(group):
            found[each.by] += each.calls if each.operation == operation else 0
        return found

    before = counts()
    yield
    after = counts()
    assert {each: after[each] - before[each] for each in after} == {"symmem": 0, "inner": 0, by: calls}


def every_operation() -> None:
    rank, size = world()
    assert dist.get_backend() == "symmem"
    assert isinstance(dist.group.WORLD, SymmemProcessGroup)
    total = sum(range(size))
    for dtype in (*FLOATS, *INTEGERS):
        x = torch.full((3, 5), rank, dtype=dtype)
        with counted("all_reduce", "symmem", 3):
            dist.all_reduce(x)
            assert (x == total).all()
            dist.all_reduce(x.fill_(rank), op=dist.ReduceOp.MAX)
            assert (x == size - 1).all()
            dist.all_reduce(x.fill_(rank + 1), op=dist.ReduceOp.MIN)
            assert (x == 1).all()
        own = torch.full((2,), rank, dtype=dtype)
        with counted("all_gather", "symmem", 3):
            for shape in ((size * 2,), (size, 2)):
                out = torch.empty(shape, dtype=dtype)
                dist.all_gather_into_tensor(out, own)
                assert out.view(size, 2)[:, 0].tolist() == list(range(size))
            parts = [torch.empty(2, dtype=dtype) for _ in range(size)]
            dist.all_gather(parts, own)
            assert [part[1].item() for part in parts] == list(range(size))
        rows = torch.arange(size * 2, dtype=dtype)
        with counted("reduce_scatter", "symmem", 2):
            dist.reduce_scatter_tensor(own, rows)
            assert own.tolist() == [size * 2 * rank, size * (2 * rank + 1)]
            dist.reduce_scatter(own, list(rows.view(size, 2)))
            assert own.tolist() == [size * 2 * rank, size * (2 * rank + 1)]
        with counted("all_to_all", "symmem"):
            out = torch.empty(size * 2, dtype=dtype)
            dist.all_to_all_single(out, torch.arange(size * 2, dtype=dtype) + 10 * rank)
            assert out.view(size, 2)[:, 0].tolist() == [10 * each + 2 * rank for each in range(size)]
        with counted("broadcast", "symmem"):
            dist.broadcast(x.fill_(rank), src=size - 1)
            assert (x == size - 1).all()
    x = torch.tensor([3.0 * rank])
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    assert x.item() == 3 * total / size
    z = torch.tensor([complex(rank, 1)])
    dist.all_reduce(z)
    assert z.item() == complex(total, size)
    with counted("barrier", "symmem"):
        dist.barrier()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_symmem_serves_its_operations(pool_of: Any, size: int) -> None:
    pool_of(size).run(every_operation)


def in_place_of_rows() -> None:
    """As FSDP2 gathers: the input is this rank's part of the output."""
    rank, size = world()
    for count in (3, 700_001):
        out = torch.zeros(size * count)
        out[rank * count : (rank + 1) * count] = rank + 1
        dist.all_gather_into_tensor(out, out[rank * count : (rank + 1) * count])
        assert out.view(size, count).sum(1).tolist() == [(each + 1) * count for each in range(size)]
        x = torch.full((size * count,), 1.0 + rank)
        own = x[rank * count : (rank + 1) * count]
        dist.reduce_scatter_tensor(own, x)
        assert (own == size * (size + 1) / 2).all()


def test_all_gather_and_reduce_scatter_in_place(pool_of: Any) -> None:
    pool_of(2).run(in_place_of_rows)
    pool_of(3).run(in_place_of_rows)


def left_to_the_inner_group() -> None:
    rank, size = world()
    x = torch.full((2,), rank + 1)
    with counted("all_reduce", "inner"):
        dist.all_reduce(x, op=dist.ReduceOp.PRODUCT)
        assert x.tolist() == [2, 2]
    with counted("all_reduce", "inner"):
        dist.all_reduce(x, op=dist.ReduceOp.BOR)
    sparse = torch.eye(2).to_sparse()
    with counted("all_reduce", "inner"):
        dist.all_reduce(sparse)
        assert sparse.to_dense()[0, 0] == 2
    with counted("all_to_all", "inner"):  # rank r gets r + 1 elements from every rank
        out, sizes = torch.empty(size * (rank + 1)), [each + 1 for each in range(size)]
        dist.all_to_all_single(out, torch.full((3,), float(rank)), [rank + 1] * size, sizes)
        assert out.view(size, -1)[:, 0].tolist() == [0, 1]
    with counted("all_reduce", "inner"):
        dist.group.WORLD.allreduce(x).wait()  # type: ignore[union-attr]
    if rank == 0:
        dist.send(torch.full((2,), 7.0), 1)
    else:
        got = torch.empty(2)
        dist.recv(got, 0)
        assert got.tolist() == [7, 7]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": each} for each in range(size)]
    given = [rank, "root"]
    dist.broadcast_object_list(given, src=1)
    assert given == [1, "root"]
    total = torch.ones(1)
    dist.reduce(total, dst=1)
    assert rank == 0 or total.item() == 2
    parts = [torch.empty(1) for _ in range(size)] if rank == 0 else None
    dist.gather(torch.full((1,), float(rank)), parts, dst=0)
    assert parts is None or [part.item() for part in parts] == [0, 1]
    got = torch.empty(1)
    dist.scatter(got, [torch.full((1,), 5.0 + each) for each in range(size)] if rank == 0 else None, src=0)
    assert got.item() == 5 + rank
    x = torch.ones(2)
    works = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, torch.empty(2), 1 - rank)]
    for work in dist.batch_isend_irecv(works):
        work.wait()


def test_the_inner_group_serves_the_rest(pool_of: Any) -> None:
    pool_of(2).run(left_to_the_inner_group)


def asynchronous() -> None:
    rank, size = world()
    x, y = torch.ones(4), torch.ones(4)
    first = dist.all_reduce(x, async_op=True)
    dist.all_reduce(y)  # behind the first
    assert first.is_completed()
    assert first.is_success()
    assert first.exception() is None
    assert first.wait()
    assert first.wait(timedelta(seconds=9))
    assert first.result()[0] is x
    assert x.tolist() == y.tolist() == [size] * 4
    doubled = dist.all_reduce(x, async_op=True).get_future().then(lambda future: future.value()[0] * 2)
    assert doubled.wait().tolist() == [2 * size * size] * 4
    out = torch.empty(size)
    future = dist.all_gather_into_tensor(out, torch.full((1,), float(rank)), async_op=True).get_future()
    assert future.wait()[0] is out
    dist.barrier(async_op=True).wait()
    # A rank goes on before the others have come: this order ends only if nobody waits in all_reduce.
    message = torch.zeros(1)
    if rank == 0:
        work = dist.all_reduce(x.fill_(1), async_op=True)
        dist.send(message, 1)
    else:
        dist.recv(message, 0)
        work = dist.all_reduce(x.fill_(1), async_op=True)
    work.wait()
    assert x.tolist() == [size] * 4
    # An operation goes on if nobody waits for it.
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        dist.recv(message, 1)
        assert work.wait()
    else:
        dist.all_reduce(x)
        dist.send(message, 0)
    # Who waits for one does not wait for a later one, even if the thread has begun with it.
    if rank == 0:
        first, second = (dist.all_reduce(x, async_op=True) for _ in range(2))
        second.get_future()
        first.wait()
        dist.send(message, 1)
        second.wait()
    else:
        dist.all_reduce(x)
        dist.recv(message, 0)
        dist.all_reduce(x)
    assert x.tolist() == [size**4] * 4


def test_asynchronous_operations(pool_of: Any) -> None:
    pool_of(2).run(asynchronous)


def coalesced() -> None:
    rank, size = world()
    tensors = [torch.full((count,), float(rank)) for count in (1, 5, 70_000)]
    with counted("all_reduce", "symmem"), _dist._coalescing_manager():
        for x in tensors:
            dist.all_reduce(x)
    assert [x.sum().item() for x in tensors] == [1, 5, 70_000]
    outs = [torch.empty(size, count) for count in (1, 3)]
    with counted("all_gather", "symmem"), _dist._coalescing_manager(async_ops=True) as manager:
        for out in outs:
            dist.all_gather_into_tensor(out, torch.full((out.shape[1],), float(rank)))
    manager.wait()
    assert [out[:, 0].tolist() for out in outs] == [[0, 1]] * 2
    with counted("all_gather", "symmem"):  # as torch 2.11 calls it
        _dist.group.WORLD.allgather_into_tensor_coalesced(outs, [torch.ones(1), torch.ones(3)]).wait()
    assert [out[:, 0].tolist() for out in outs] == [[1, 1]] * 2
    results = [torch.empty(count) for count in (1, 3)]
    with counted("reduce_scatter", "symmem"), _dist._coalescing_manager():
        for each in results:
            dist.reduce_scatter_tensor(each, torch.ones(size, *each.shape))
    assert [each[0].item() for each in results] == [2, 2]


def test_coalesced_operations(pool_of: Any) -> None:
    pool_of(2).run(coalesced)


def any_tensor() -> None:
    """Layouts, parameters and modes that torch's backends accept."""
    _, size = world()
    transposed = torch.arange(6.0).view(2, 3).t()
    dist.all_reduce(transposed)
    assert transposed.tolist() == [[0, 6], [2, 8], [4, 10]]
    parameter = torch.nn.Parameter(torch.ones(3))
    dist.all_reduce(parameter)
    dist.broadcast(parameter, 0)
    assert parameter.tolist() == [size] * 3
    assert parameter.requires_grad
    with torch.inference_mode():
        made = torch.ones(2)
        dist.all_reduce(made)
    dist.all_reduce(made)
    dist.all_reduce(made, async_op=True).wait()
    assert made.tolist() == [size**3] * 2
    st = symmem.allocate(8, torch.float32, group=dist.group.WORLD)
    dist.all_reduce(st.tensor.fill_(1))
    assert (st.tensor == size).all()
    empty = torch.empty(0)
    dist.all_reduce(empty)
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        dist.all_reduce(torch.ones(4))
        dist.all_reduce(torch.ones(5), async_op=True).wait()
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        return  # it drops events that end in another thread
    events = [event for event in profile.function_events if event.name == "symmem:all_reduce"]
    assert [event.input_shapes for event in events] == [[[4]], [[5]]]
    assert all(event.is_async for event in events)


def test_any_tensor(pool_of: Any) -> None:
    pool_of(2).run(any_tensor)


def groups_and_meshes() -> None:
    rank, _ = world()
    pair: Any = dist.new_group([0, 1])
    if rank < 2:
        x = torch.ones(2)
        with counted("all_reduce", "symmem", group=pair):
            dist.all_reduce(x, group=pair)
        assert x.tolist() == [2, 2]
        assert symmem.resolve_group(pair) is pair.group
    meshes = [init_device_mesh("cpu", (2, 2), mesh_dim_names=names) for names in (("a", "b"), ("c", "d"))]
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    for mesh in meshes:
        for dimension, wanted in enumerate((2 * (rank % 2) + 2, 4 * (rank // 2) + 1)):
            x = torch.tensor([float(rank)])
            dist.all_reduce(x, group=mesh.get_group(dimension))
            assert x.item() == wanted
    x = torch.ones(1)
    dist.all_reduce(x, group=line.get_group())
    assert x.item() == 4
    other = dist.new_group(backend="gloo")
    with pytest.raises(GroupError, match="not of the backend symmem"):
        report(other)
    own = dist.new_group([rank], backend="symmem", use_local_synchronization=True)
    dist.all_reduce(x, group=own)
    assert x.item() == 4


def test_groups_and_meshes(pool_of: Any) -> None:
    pool_of(4).run(groups_and_meshes)


def threads() -> None:
    """Threads with a group each."""
    _, size = world()
    groups = [dist.new_group() for _ in range(4)]
    wrong: list[object] = []

    def work(group: Any, value: int) -> None:
        for count in range(30):
            x = torch.full((value + 1,), float(value))
            handle = dist.all_reduce(x, group=group, async_op=bool(count % 2))
            if handle is not None:
                handle.wait()
            if not (x == value * size).all():
                wrong.append(x)
        dist.barrier(group=group)

    running = [threading.Thread(target=work, args=(group, value)) for value, group in enumerate(groups)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    assert not wrong
    for group in groups:
        dist.destroy_process_group(group)


def test_threads(pool_of: Any) -> None:
    pool_of(2).run(threads)


def settings() -> None:
    group: Any = dist.new_group(timeout=timedelta(seconds=77))
    assert group.group.settings.signal_timeout == 77
    assert group.group.settings.rendezvous_timeout == 77
    assert group.group.settings.origins["signal_timeout"] == "timeout of the process group"
    with pytest.raises(UnsupportedError, match="takes no options"):
        dist.new_group(backend="symmem", pg_options=object())


def test_the_timeout_of_torch_is_the_groups(pool_of: Any) -> None:
    pool_of(2).run(settings)


def set_in_the_environment() -> float:
    group: Any = dist.group.WORLD
    timeout: float = group.group.settings.signal_timeout
    return timeout


def test_a_timeout_in_the_settings_counts_more(new_pool: Any) -> None:
    pool = new_pool(2, process_group="symmem", env={"SYMMEM_ENABLE": "signal_timeout(50s)"})
    assert pool.run(set_in_the_environment) == [50, 50]


IMPORTS = ("import symmem, torch", "import torch, symmem", "import torch.distributed, symmem")


@pytest.mark.parametrize("imports", IMPORTS)
def test_the_backend_is_there_in_every_order_of_imports(imports: str) -> None:
    program = f"""
{imports}
import json, sys
import torch.distributed as dist
early = "symmem.distributed" in sys.modules
dist.init_process_group("symmem", store=dist.HashStore(), rank=0, world_size=1)
x = torch.ones(2)
dist.all_reduce(x)
print(json.dumps([early, dist.is_backend_available("symmem"), dist.get_backend(), x.tolist()]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, True, "symmem", [1, 1]]


def test_gloo_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="needs gloo"):
        SymmemProcessGroup(dist.HashStore(), 0, 1, timedelta(seconds=9))
