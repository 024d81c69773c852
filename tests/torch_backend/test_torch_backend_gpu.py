"""Programs for torch's own symmetric memory on GPUs, its import unchanged, with symmem as its backend."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory
from patience import LONG
from torch._C._autograd import DeviceType

import symmem
from symmem import torch_backend
from symmem.backends.base import tensor_at
from symmem.errors import BackendUnavailableError, MismatchError, PeerLostError
from symmem.tools.commands.doctor import examine
from symmem.torch_backend import bridge

symm_mem: Any = torch.distributed._symmetric_memory
ops: Any = torch.ops.symm_mem

FOUND = examine("native")
WORLD = 2

pytestmark = pytest.mark.skipif(
    not FOUND.available or torch.cuda.device_count() < WORLD,
    reason=FOUND.why_not or f"PyTorch's fused operators need {WORLD} GPUs",
)

# Programs of the ranks.


def world() -> Any:
    torch_backend.enable()
    symm_mem.set_backend("SYMMEM")
    return dist.group.WORLD


def ring() -> tuple[int, int]:
    rank, size = dist.get_rank(), dist.get_world_size()
    return rank, (rank + 1) % size


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made: torch.Tensor = symm_mem.empty(*sizes, dtype=dtype, device="cuda")
    return made


def fresh(count: int) -> torch.Tensor:
    """Memory without torch's memory pool around the call, which a capture has already."""
    device = torch.device("cuda", torch.cuda.current_device())
    made: torch.Tensor = symm_mem._SymmetricMemory.empty_strided_p2p((count,), (1,), torch.float32, device)
    return made


def words_at(address: int, count: int, dtype: torch.dtype = torch.int64) -> list[int]:
    device = torch.device("cuda", torch.cuda.current_device())
    return [int(word) for word in tensor_at(address, count * dtype.itemsize, device, None).view(dtype).tolist()]


def meet() -> None:
    torch.cuda.synchronize()
    with symmem.resolve_group().collective("meet"):
        pass


def handle_program() -> None:
    group = world()
    rank, peer = ring()
    t = empty(64)
    assert not t.any()
    assert symm_mem.get_backend(torch.device("cuda")) == "SYMMEM"
    assert symm_mem.rendezvous(torch.empty(4, device="cuda"), group) is None  # plain memory
    hdl = symm_mem.rendezvous(t, group)
    assert (hdl.rank, hdl.world_size, hdl.buffer_size, hdl.offset) == (rank, WORLD, 256, 0)
    assert hdl.buffer_ptrs[rank] == t.data_ptr()
    assert hdl.multicast_ptr == 0
    assert not symm_mem._SymmetricMemory.has_multicast_support(DeviceType.CUDA, t.get_device())
    t.fill_(rank)
    hdl.barrier(channel=3)
    assert (hdl.get_buffer(peer, (64,), torch.float32) == peer).all()
    assert (hdl.get_remote_tensor(peer, (8, 8), torch.float32) == peer).all()
    assert hdl.get_buffer(peer, (64,), torch.float32).device == t.device
    hdl.barrier()
    hdl.get_buffer(peer, (4,), torch.float32, storage_offset=60).fill_(100 + rank)
    hdl.put_signal(peer, channel=1)
    hdl.wait_signal(peer, channel=1, timeout_ms=600000)
    assert t[60:].tolist() == [100.0 + peer] * 4
    meet()
    pad = hdl.get_signal_pad(rank)
    assert pad.numel() * pad.itemsize == hdl.signal_pad_size == symm_mem.get_signal_pad_size()
    assert not pad.view(torch.uint8).any()
    meet()
    hdl.put_signal(peer, channel=1000)  # PyTorch's pads have 1152 channels for 2 ranks
    meet()
    assert hdl.get_signal_pad(rank, (WORLD,), torch.int32, storage_offset=1000 * WORLD).tolist()[peer] == 1
    hdl.wait_signal(peer, channel=1000)
    meet()
    assert not pad.view(torch.uint8).any()
    assert (t[:60] == rank).all()
    assert words_at(hdl.buffer_ptrs_dev, WORLD) == hdl.buffer_ptrs
    assert words_at(hdl.signal_pad_ptrs_dev, WORLD) == hdl.signal_pad_ptrs
    again = symm_mem.rendezvous(t[3:5], group)
    assert again.buffer_ptrs_dev == hdl.buffer_ptrs_dev
    hdl.barrier()
    with pytest.raises(RuntimeError, match="channel 1152 is not within 0 to 1151"):
        hdl.barrier(channel=1152)
    with pytest.raises(RuntimeError, match="rank 2 is not within 0 to 1"):
        hdl.put_signal(2)
    meet()


def operators_program() -> None:
    group = world()
    rank, peer = ring()
    name = group.group_name
    for count in (128, 5008, 1 << 18):
        t = empty(count, dtype=torch.bfloat16)
        symm_mem.rendezvous(t, group)
        numbers = (torch.arange(count, device="cuda") % 13 + rank).to(torch.bfloat16)
        total = numbers.clone()
        dist.all_reduce(total)
        out = torch.empty_like(numbers)
        t.copy_(numbers)
        assert torch.equal(ops.one_shot_all_reduce(t, "sum", name), total)
        ops.one_shot_all_reduce_out(t, "sum", name, out)
        assert torch.equal(out, total)
        t.zero_()
        assert torch.equal(ops.one_shot_all_reduce_copy(t, numbers, "sum", name), total)
        ops.one_shot_all_reduce_copy_out(t, numbers, "sum", name, out.zero_())
        assert torch.equal(out, total)
        t.copy_(numbers)
        ops.two_shot_all_reduce_out(t, "sum", name, out.zero_())
        assert torch.equal(out, total)
        t.copy_(numbers)
        ops.two_shot_all_reduce_(t, "sum", name)
        assert torch.equal(t, total)
        t.copy_(numbers)
        part = torch.empty(count // WORLD, dtype=torch.bfloat16, device="cuda")
        ops.reduce_scatter_out(t, name, False, part)
        assert torch.equal(part, total.chunk(WORLD)[rank])
        meet()
    words = empty(64, dtype=torch.int32)
    hdl = symm_mem.rendezvous(words, group)
    words.zero_()
    hdl.barrier()
    remote = hdl.get_buffer(peer, (64,), torch.uint32)
    ops.stream_write_value32_(remote, 7, 42)
    ops.memset32_(remote, offset=10, val=9, count=4)
    meet()
    assert words.nonzero().flatten().tolist() == [7, 10, 11, 12, 13]
    assert (words[7].item(), words[10].item()) == (42, 9)
    meet()


def fused_program() -> None:
    group = world()
    rank, _peer = ring()
    name = group.group_name
    torch.manual_seed(rank)
    a = torch.randn(256, 128, dtype=torch.bfloat16, device="cuda")
    torch.manual_seed(5)
    b = torch.randn(128, 64, dtype=torch.bfloat16, device="cuda")
    gathered = torch.empty(WORLD * 256, 128, dtype=torch.bfloat16, device="cuda")
    dist.all_gather_into_tensor(gathered, a)
    got, (product,) = ops.fused_all_gather_matmul(a, [b], 0, name)
    assert torch.equal(got, gathered)
    torch.testing.assert_close(product, gathered @ b, rtol=2e-2, atol=2e-1)
    partial = a @ b
    part = torch.empty(256 // WORLD, 64, dtype=torch.bfloat16, device="cuda")
    dist.reduce_scatter_tensor(part, partial)
    torch.testing.assert_close(ops.fused_matmul_reduce_scatter(a, b, "sum", 0, name), part, rtol=2e-2, atol=4e-1)
    wait = torch.ops._c10d_functional.wait_tensor
    symmetric = empty(256, 128, dtype=torch.bfloat16)
    symm_mem.rendezvous(symmetric, group)
    for source in (a, symmetric.copy_(a)):
        assert torch.equal(wait(ops._low_contention_all_gather(source, name)), gathered)
        meet()
        scattered = wait(ops._low_contention_reduce_scatter(source, "sum", name))
        reference = torch.empty(256 // WORLD, 128, dtype=torch.bfloat16, device="cuda")
        dist.reduce_scatter_tensor(reference, a)
        torch.testing.assert_close(scattered, reference, rtol=2e-2, atol=1e-1)
        meet()


def graph_program() -> None:
    """The first use of a handle may be in a capture. What is freed and allocated there does no harm."""
    group = world()
    rank, peer = ring()
    t, out, value = empty(4096), torch.zeros(4096, device="cuda"), torch.zeros(1, device="cuda")
    hdl = symm_mem.rendezvous(t, group)
    dropped = [fresh(1000)]
    total = torch.empty(4096, device="cuda")
    meet()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        value += 1
        t.copy_(value * 1000 + rank)
        hdl.barrier()
        out.copy_(hdl.get_buffer(peer, (4096,), torch.float32))
        hdl.put_signal(peer, channel=3)
        hdl.wait_signal(peer, channel=3)
        ops.one_shot_all_reduce_out(t, "sum", group.group_name, total)
        hdl.barrier(channel=1)
        dropped.clear()
        dropped.append(fresh(2000))
    for turn in range(1, 51):
        graph.replay()
        assert (out == turn * 1000 + peer).all()
        assert (total == 2 * turn * 1000 + 1).all()
    dropped[0].fill_(3)
    meet()


def pool_program() -> None:
    group = world()
    rank, peer = ring()
    name = group.group_name
    pool = torch.cuda.MemPool(symm_mem.get_mempool_allocator(torch.device("cuda")))
    with torch.cuda.use_mem_pool(pool):
        first = torch.full((1000,), float(rank), device="cuda")
        second = torch.full((3000,), float(rank + 10), device="cuda")
    for tensor, base in ((first, 0), (second, 10)):
        hdl = symm_mem.rendezvous(tensor, group)
        assert hdl.buffer_ptrs[rank] + hdl.offset == tensor.data_ptr()
        assert symm_mem.rendezvous(tensor, group).buffer_ptrs_dev == hdl.buffer_ptrs_dev
        hdl.barrier()
        assert (hdl.get_remote_tensor(peer, tensor.shape, tensor.dtype) == peer + base).all()
        hdl.barrier()
    assert hdl.offset > 0  # in the segment of the first
    del first, second, hdl, tensor
    gc.collect()
    with torch.cuda.use_mem_pool(symm_mem.get_mem_pool("cuda")):
        third = torch.full((5000,), float(rank + 1), device="cuda")
    assert (ops.one_shot_all_reduce(third, "sum", name) == 3).all()
    meet()


def threads_program() -> None:
    group = world()
    failures: list[BaseException] = []
    kept: list[list[torch.Tensor]] = [[], [], []]

    device = torch.cuda.current_device()

    def allocate(mine: list[torch.Tensor]) -> None:
        try:
            torch.cuda.set_device(device)  # a new thread begins with the first GPU
            for i in range(20):
                mine.append(empty(1000 + i).fill_(i))
                if i % 2:
                    mine.pop(0)
                assert all((t == t[0]).all() for t in mine)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=allocate, args=(mine,)) for mine in kept]
    for thread in threads:
        thread.start()
    for _ in range(5):
        hdl = symm_mem.rendezvous(empty(32), group)
        hdl.barrier()
    for thread in threads:
        thread.join(LONG)
    assert not failures
    meet()


def mismatch_program() -> None:
    group = world()
    with pytest.raises(RuntimeError, match="404"):
        symm_mem.rendezvous(empty(100 + dist.get_rank() % 2), group)
    assert isinstance(symmem.last_error(), MismatchError)
    symm_mem.rendezvous(empty(100), group).barrier()
    with pytest.raises(RuntimeError, match=r"OutOfMemoryError: cannot allocate \d+ bytes on cuda:\d"):
        empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(BackendUnavailableError, match="is symmem itself"):
        symmem.allocate(4, backend="pytorch_cuda", arena=False)
    meet()


def doors_program() -> None:
    """Tensors of symmem and torch's functions, and the other way round."""
    group = world()
    rank, peer = ring()
    with symmem.use_symmetric_memory(group):
        redirected = torch.zeros(1000, device="cuda")
    made = [symmem.allocate(1000, backend="native", arena=arena).tensor for arena in (True, False)]
    for t in (*made, redirected):
        hdl = symm_mem.rendezvous(t, group)
        assert symm_mem.rendezvous(t, group).buffer_ptrs_dev == hdl.buffer_ptrs_dev
        t.fill_(rank + 1)
        hdl.barrier()
        assert (hdl.get_buffer(peer, (1000,), torch.float32) == peer + 1).all()
        hdl.barrier()
        assert (ops.one_shot_all_reduce(t, "sum", group.group_name) == 3).all()
        hdl.put_signal(peer, channel=1000)
        hdl.wait_signal(peer, channel=1000)
        meet()
        assert not hdl.get_signal_pad(rank).view(torch.int32).any()
        st = symmem.SymmetricTensor.wrap(t)
        st.rendezvous().barrier()
        meet()
    t = empty(1000).fill_(rank + 1)
    assert symmem.find(t) is None  # before its rendezvous
    symm_mem.rendezvous(t, group)
    st = symmem.SymmetricTensor.wrap(t)
    st.barrier()
    assert (st.remote_tensor(peer).view(torch.uint8)[:4000].view(torch.float32) == peer + 1).all()
    assert (symmem.ops.all_reduce(t) == 3).all()
    meet()


def live() -> tuple[int, int]:
    gc.collect()
    for _ in range(3):  # pending calls of the interpreter run between instructions
        torch.cuda.synchronize()
    return len(bridge._handles), torch.cuda.mem_get_info()[0] >> 20


def memory_program() -> None:
    group = world()
    symm_mem.rendezvous(empty(4), group).barrier()
    arena = symmem.allocate(1000, backend="native").tensor
    symm_mem.rendezvous(arena, group).barrier()
    meet()
    handles, room = live()
    for _ in range(5):
        t = empty(64 << 20, dtype=torch.uint8)
        hdl = symm_mem.rendezvous(t, group)
        hdl.barrier()
        symm_mem.rendezvous(arena, group).barrier()
        meet()
        del t, hdl
        meet()
    assert live()[0] == handles
    assert abs(live()[1] - room) < 64
    rank, peer = ring()
    hdl = symm_mem.rendezvous(empty(16).fill_(rank), group)
    hdl.barrier()  # the handle keeps the memory of all ranks
    assert (hdl.get_buffer(peer, (16,), torch.float32) == peer).all()
    meet()


def one_gpu_program() -> None:
    """All ranks rendezvous memory on GPU 0, then each on its own."""
    group = world()
    rank, peer = ring()
    for device in ("cuda:0", "cuda"):
        with torch.cuda.device(torch.device(device)):
            t = symm_mem.empty(16, device=device).fill_(rank)
            hdl = symm_mem.rendezvous(t, group)
            hdl.barrier()
            assert (hdl.get_buffer(peer, (16,), torch.float32) == peer).all()
            hdl.barrier()
            meet()


PROGRAMS: list[Callable[[], None]] = [
    *(handle_program, operators_program, fused_program, graph_program, pool_program),
    *(threads_program, mismatch_program, doors_program, memory_program, one_gpu_program),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_program(pools: Any, program: Callable[[], None]) -> None:
    pool = pools.get(WORLD, "torch_backend_gpu")
    try:
        pool.run(program)
    except BaseException:
        pool.close()  # the next test gets new ranks: this GPU may have failed
        raise


def dying_program() -> None:
    group = world()
    symm_mem.rendezvous(empty(4), group).barrier()
    torch.cuda.synchronize()
    if dist.get_rank() == 1:
        os._exit(1)
    with pytest.raises(RuntimeError, match="PeerLostError"):
        symm_mem.rendezvous(empty(4), group)
    assert isinstance(symmem.last_error(), PeerLostError)


def waited_for_program() -> None:
    group = world()
    hdl = symm_mem.rendezvous(empty(4), group)
    hdl.barrier()
    torch.cuda.synchronize()
    if dist.get_rank() == 1:
        os._exit(1)
    hdl.barrier()
    torch.cuda.synchronize()  # the kernel gives up
    with pytest.raises(RuntimeError, match="PeerLostError"):
        hdl.put_signal(1)
    assert isinstance(symmem.last_error(), PeerLostError)
    assert (torch.ones(4, device="cuda") == 1).all()


def waited_for_with_a_timeout_program() -> None:
    group = world()
    hdl = symm_mem.rendezvous(empty(4), group)
    hdl.barrier()
    torch.cuda.synchronize()
    if dist.get_rank() == 1:
        os._exit(1)
    hdl.barrier(timeout_ms=int(LONG * 1000))
    with pytest.raises(RuntimeError):
        torch.cuda.synchronize()  # as with PyTorch's backend
    with pytest.raises(RuntimeError, match="PeerLostError"):
        hdl.barrier()


@pytest.mark.parametrize("program", [dying_program, waited_for_program, waited_for_with_a_timeout_program])
def test_a_rank_that_dies(new_pool: Any, program: Callable[[], None]) -> None:
    outcome = new_pool(WORLD).outcomes(program)[0]
    assert outcome.error is None, outcome.error


# Programs of one process.

START = """
import os, threading, torch, torch.distributed as dist, torch.distributed._symmetric_memory as symm_mem
import symmem.torch_backend
symmem.torch_backend.enable()
symm_mem.set_backend("SYMMEM")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
t = symm_mem.empty(8, device="cuda")
hdl = symm_mem.rendezvous(t, dist.group.WORLD)
hdl.barrier()
"""

ENDS = {
    "live tensors": "",
    "a destroyed group": "dist.destroy_process_group()",
    "persistent memory": "u = symm_mem._SymmetricMemory.empty_strided_p2p((4,), (1,), torch.float32, "
    "torch.device('cuda', 0), '0', alloc_id=5)",
    "a tensor freed in a thread": """
held = [symm_mem.empty(1000, device="cuda").fill_(1)]
thread = threading.Thread(target=held.clear)
thread.start()
thread.join()
""",
    "a pool": """
with torch.cuda.use_mem_pool(symm_mem.get_mem_pool("cuda")):
    u = torch.ones(1000, device="cuda")
symm_mem.rendezvous(u, dist.group.WORLD).barrier()
""",
    "a fork": """
if (child := os.fork()) == 0:
    for use in (lambda: symm_mem._SymmetricMemory.empty_strided_p2p((4,), (1,), torch.float32, t.device), hdl.barrier):
        try:
            use()
        except RuntimeError as error:
            if "ForkedError" not in str(error):
                os._exit(1)
        else:
            os._exit(2)
    del t
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""",
    "another backend": """
try:
    symm_mem.set_backend("NVSHMEM")
except RuntimeError as error:
    assert "can not be changed after use" in str(error) or "does not find" in str(error), error
else:
    raise AssertionError("the backend was changed")
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_end_of_a_process(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", START + ENDS[end]], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
