"""Programs for torch's own symmetric memory, its import unchanged, on host memory."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory
from programs import Program, run_program, run_python, run_to_the_end

import symmem
from symmem import torch_backend
from symmem.backends import signal_kernels
from symmem.errors import (
    InvalidArgumentError,
    MismatchError,
    OutOfMemoryError,
    PeerLostError,
    PeerTimeoutError,
    UnsupportedError,
)
from symmem.torch_backend import bridge

symm_mem: Any = torch.distributed._symmetric_memory

# Programs of the ranks.


def world() -> Any:
    torch_backend.enable()
    return dist.group.WORLD


def handle_program() -> None:
    group = world()
    t = symm_mem.empty(64, dtype=torch.float32, device="cpu")
    assert not t.any()
    assert symm_mem.get_backend(torch.device("cpu")) == "SYMMEM"
    hdl = symm_mem.rendezvous(t, group)
    rank, size = dist.get_rank(), dist.get_world_size()
    assert (hdl.rank, hdl.world_size, hdl.buffer_size, hdl.offset) == (rank, size, 256, 0)
    assert hdl.buffer_ptrs[rank] == t.data_ptr()
    assert hdl.multicast_ptr == 0
    assert symm_mem.rendezvous(t, group) is not None
    right, left = (rank + 1) % size, (rank - 1) % size
    t.fill_(rank)
    hdl.barrier(channel=3)
    assert (hdl.get_buffer(right, (64,), torch.float32) == right).all()
    assert (hdl.get_remote_tensor(left, (8, 8), torch.float32) == left).all()
    hdl.barrier()
    hdl.get_buffer(right, (4,), torch.float32, storage_offset=60).fill_(100 + rank)
    hdl.put_signal(right, channel=1)
    hdl.wait_signal(left, channel=1, timeout_ms=60000)
    assert t[60:].tolist() == [100.0 + left] * 4
    mine = hdl.get_signal_pad(rank)
    assert mine.numel() * mine.itemsize == hdl.signal_pad_size == symm_mem.get_signal_pad_size()
    assert not mine.view(torch.uint8).any()
    hdl.barrier()
    hdl.get_signal_pad(right, (1,), torch.int32, storage_offset=rank).fill_(7)
    hdl.barrier()
    assert hdl.get_signal_pad(rank, (1,), torch.int32, storage_offset=left).item() == 7
    assert (t[:60] == rank).all()
    hdl.barrier()


def views_program() -> None:
    group = world()
    t = symm_mem.empty((8, 4), dtype=torch.int64, device="cpu")
    view = t[3:5]
    hdl = symm_mem.rendezvous(view, group)
    assert hdl.buffer_ptrs[hdl.rank] == t.data_ptr()
    assert hdl.offset == 0  # torch passes the address of the storage
    found = symmem.find(view)
    assert found is not None
    assert found.tensor.data_ptr() == t.data_ptr()
    if hasattr(symm_mem, "is_symm_mem_tensor"):  # since torch 2.13
        assert symm_mem.is_symm_mem_tensor(view)
        assert not symm_mem.is_symm_mem_tensor(torch.empty(4))
    empty = symm_mem.empty(0, device="cpu")
    assert symm_mem.rendezvous(empty, group).buffer_size == 0


def two_doors_program() -> None:
    group = world()
    rank, size = dist.get_rank(), dist.get_world_size()
    with symmem.use_symmetric_memory(group):
        redirected = torch.zeros(10)
    for t in (symmem.allocate(10).tensor, symmem.allocate(10, arena=False).tensor, redirected):
        if hasattr(symm_mem, "is_symm_mem_tensor"):
            assert symm_mem.is_symm_mem_tensor(t)
        hdl = symm_mem.rendezvous(t, group)
        assert symm_mem.rendezvous(t, group) is hdl
        t.fill_(rank)
        hdl.barrier()
        peer = (rank + 1) % size
        offset = hdl.offset // 4
        assert (hdl.get_buffer(peer, (10,), torch.float32, storage_offset=offset) == peer).all()
        hdl.barrier()
        with pytest.raises(RuntimeError, match="signal pad of 0 bytes"):
            hdl.get_signal_pad(rank)
    assert symm_mem.rendezvous(torch.empty(4), group) is None  # plain memory


def mismatch_program() -> None:
    group = world()
    t = symm_mem.empty(100 + dist.get_rank() % 2, device="cpu")
    with pytest.raises(RuntimeError, match="400"):
        symm_mem.rendezvous(t, group)
    assert isinstance(symmem.last_error(), MismatchError)
    symm_mem.rendezvous(symm_mem.empty(100, device="cpu"), group)


def pads_program() -> None:
    group = world()
    usual = symm_mem.get_signal_pad_size()
    t = symm_mem.empty(4, device="cpu")
    hdl = symm_mem.rendezvous(t, group)
    symm_mem.set_signal_pad_size(2 * usual)
    try:
        with pytest.raises(RuntimeError, match="torch now expects"):
            hdl.get_signal_pad(0)
        larger = symm_mem.rendezvous(symm_mem.empty(4, device="cpu"), group)
        assert larger.get_signal_pad(0).numel() * 4 == 2 * usual
        symm_mem.set_signal_pad_size(usual * (1 + dist.get_rank() % 2))
        with pytest.raises(RuntimeError, match="bytes of the signal pad"):
            symm_mem.rendezvous(symm_mem.empty(4, device="cpu"), group)
    finally:
        symm_mem.set_signal_pad_size(usual)


def timeout_program() -> None:
    group = world()
    hdl = symm_mem.rendezvous(symm_mem.empty(4, device="cpu"), group)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="PeerTimeoutError"):
            hdl.wait_signal(1, channel=5, timeout_ms=50)
        assert isinstance(symmem.last_error(), PeerTimeoutError)
    with pytest.raises(RuntimeError, match="channel"):
        hdl.barrier(channel=64)
    hdl.barrier()


def last_error_program() -> None:
    """Every thread has its own, from Python or from C++, whichever was last."""
    group = world()
    hdl = symm_mem.rendezvous(symm_mem.empty(4, device="cpu"), group)
    with pytest.raises(RuntimeError, match="channel"):
        hdl.barrier(channel=64)
    first = symmem.last_error()
    assert isinstance(first, InvalidArgumentError)
    assert first.step == "barrier"
    others: list[object] = []
    thread = threading.Thread(target=lambda: others.append(symmem.last_error()))
    thread.start()
    thread.join()
    assert others == [None]
    with pytest.raises(RuntimeError, match="OutOfMemoryError") as caught:
        symm_mem.empty(2**50, device="cpu")
    second = symmem.last_error()
    assert isinstance(second, OutOfMemoryError)
    assert second.what in str(caught.value)
    assert symmem.last_error() is second
    with pytest.raises(RuntimeError, match="channel"):
        hdl.barrier(channel=64)
    third = symmem.last_error()
    assert isinstance(third, InvalidArgumentError)
    assert third is not first
    hdl.barrier()


def counts() -> tuple[int, int, int]:
    gc.collect()
    maps = sum("memfd:symmem" in line for line in Path("/proc/self/maps").read_text().splitlines())
    return len(os.listdir("/proc/self/fd")), maps, len(bridge._handles)


def memory_program() -> None:
    group = world()
    symm_mem.rendezvous(symm_mem.empty(4, device="cpu"), group).barrier()
    ours = symmem.allocate(1000).tensor  # makes the arena, if no other test has
    before = counts()
    for _ in range(5):
        t = symm_mem.empty(1000, device="cpu")
        hdl = symm_mem.rendezvous(t, group)
        hdl.barrier()
        del t, hdl
    assert counts() == before
    for _ in range(3):
        hdl = symm_mem.rendezvous(ours, group)
        hdl.barrier()
        assert counts() != before
        del hdl
        assert counts() == before
    hdl = symm_mem.rendezvous(symm_mem.empty(16, device="cpu").fill_(dist.get_rank()), group)
    hdl.barrier()  # the handle keeps the memory of all ranks
    assert [hdl.get_buffer(r, (1,), torch.float32).item() for r in range(hdl.world_size)] == [*range(hdl.world_size)]
    hdl.barrier()
    del hdl
    assert counts() == before


def local_program() -> None:
    """Ranks may allocate different things, and threads may allocate while others hold the GIL."""
    group = world()
    kept = [symm_mem.empty(10 + i, device="cpu") for i in range(3 * dist.get_rank())]
    failures: list[BaseException] = []

    def allocate() -> None:
        try:
            for i in range(100):
                symm_mem.empty(i, device="cpu")
                symm_mem._SymmetricMemory.empty_strided_p2p(
                    (4,), (1,), torch.float32, torch.device("cpu"), "0", alloc_id=threading.get_ident() + i
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        t = symm_mem.empty(32, device="cpu")
        symm_mem.rendezvous(t, group).barrier()
    for thread in threads:
        thread.join()
    assert not failures
    del kept


def groups_program() -> None:
    """A name that refers to another group later does not give the old group's handle."""
    world()
    t = symm_mem.empty(4, device="cpu")
    handles = []
    for _ in range(2):
        group = dist.new_group(backend="gloo")
        handles.append(symm_mem.rendezvous(t, group))
        handles[-1].barrier()
        dist.destroy_process_group(group)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "program",
    [
        handle_program,
        views_program,
        two_doors_program,
        mismatch_program,
        pads_program,
        timeout_program,
        last_error_program,
        memory_program,
        local_program,
        groups_program,
    ],
)
def test_program(pools: Any, size: int, program: Any) -> None:
    pools.get(size, "torch_backend").run(program)


def dying_program() -> None:
    group = world()
    t = symm_mem.empty(4, device="cpu")
    symm_mem.rendezvous(t, group).barrier()
    if dist.get_rank() == 1:
        os._exit(1)
    with pytest.raises(RuntimeError, match="PeerLostError"):
        symm_mem.rendezvous(symm_mem.empty(4, device="cpu"), group)
    assert isinstance(symmem.last_error(), PeerLostError)


def test_a_rank_that_dies(new_pool: Any) -> None:
    outcome = new_pool(2).outcomes(dying_program)[0]
    assert outcome.error is None, outcome.error


# Programs of one process.

START = """
import os, torch, torch.distributed as dist, torch.distributed._symmetric_memory as symm_mem, symmem.torch_backend
symmem.torch_backend.enable()
symmem.torch_backend.enable()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
t = symm_mem.empty(8, device="cpu")
hdl = symm_mem.rendezvous(t, dist.group.WORLD)
hdl.barrier()
"""

ENDS = {
    "live tensors": "",
    "a destroyed group": "dist.destroy_process_group()",
    "persistent memory": "u = symm_mem._SymmetricMemory.empty_strided_p2p((4,), (1,), torch.float32, "
    "torch.device('cpu'), '0', alloc_id=5)",
    "a fork": """
if (child := os.fork()) == 0:
    for use in (lambda: symm_mem.empty(4, device="cpu"), hdl.barrier, lambda: symm_mem.rendezvous(t, dist.group.WORLD)):
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
}


@pytest.mark.parametrize("end", ENDS)
def test_end_of_a_process(end: str) -> None:
    done = run_to_the_end(START + ENDS[end])
    assert (done.returncode, done.stderr) == (0, "")


ON_CUDA = """
import torch, torch.distributed._symmetric_memory as symm_mem, symmem, symmem.torch_backend
symmem.torch_backend.enable()
symm_mem.set_backend("SYMMEM")
symm_mem.set_backend("SYMMEM")
print(symm_mem.get_backend(torch.device("cuda")))
try:
    symm_mem._SymmetricMemory.empty_strided_p2p((4,), (1,), torch.float32, torch.device("cuda", 0))
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu() -> None:
    """It can be put in force anywhere; the first allocation says what is missing."""
    done = run_program(ON_CUDA)
    name, error = done.stdout.splitlines()
    assert name == "SYMMEM"
    assert "BackendUnavailableError: the NVIDIA driver library cannot be loaded" in error


def test_nothing_of_cuda_is_loaded_before_its_use() -> None:
    program = START + "import sys; assert not {'symmem.torch_backend.gpu', 'symmem.backends.native'} & set(sys.modules)"
    done = run_program(program)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_error_before_it_is_enabled() -> None:
    program = "import symmem; assert symmem.last_error() is None"
    done = run_program(program)
    assert (done.returncode, done.stderr) == (0, "")


LIMITED = """
import pathlib, sys, torch, torch.distributed as dist, torch.distributed._symmetric_memory as symm_mem
from symmem.backends import libc
libc.memory_limits = lambda: [pathlib.Path(folder) / "memory.max" for folder in sys.argv[1:]]
import symmem, symmem.torch_backend
symmem.torch_backend.enable()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
doors = {
    "torch's": lambda count: symm_mem.empty(count, dtype=torch.uint8, device="cpu"),
    "ours": lambda count: symmem.allocate(count, dtype=torch.uint8, arena=False),
}
for door, allocate in doors.items():
    assert allocate(2000) is not None
    try:
        allocate(1 << 20)
    except (RuntimeError, symmem.errors.OutOfMemoryError) as error:
        assert "1048576 bytes of shared memory were asked for, 5000 are available" in str(error), (door, error)
    else:
        raise AssertionError(door)
"""


def test_both_doors_know_the_limits_of_control_groups(tmp_path: Path) -> None:
    for name, most, used in (("a", "max", 0), ("b", "9000", 4000), ("c", "90000", 4000)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    folders = [str(tmp_path / name) for name in "abc"]
    done = Program(LIMITED, *folders).wait()
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_compiler_nothing_is_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr(bridge, "_enabled", None)
    monkeypatch.setattr(signal_kernels, "for_torch", False)
    with pytest.raises(UnsupportedError, match="compile"):
        torch_backend.enable()
    assert not signal_kernels.for_torch  # this rank goes on without it, and its pads have no room for it


# The setting.


@pytest.mark.parametrize("source", ["variable", "file", "off"])
@pytest.mark.parametrize("first", ["symmem", "torch.distributed._symmetric_memory"])
def test_the_setting(source: str, first: str, tmp_path: Path) -> None:
    """It acts when both are imported, in either order, and changes nothing if it is off."""
    (tmp_path / "cluster.yaml").write_text("version: 1\ndefaults: {torch_backend: on}\n")
    env = {
        "variable": {"SYMMEM_ENABLE": "torch_backend(on), signal_timeout(9s)"},
        "file": {"SYMMEM_CONFIG": str(tmp_path / "cluster.yaml")},
        "off": {"SYMMEM_ENABLE": "torch_backend(off)"},
    }[source]
    program = f"""
import {first}
import symmem, torch, torch.distributed._symmetric_memory as symm_mem
print(symm_mem.get_backend(torch.device("cpu")))
"""
    # A new interpreter for the usual program: the variable is set, and symmem is imported before torch.
    start = run_python if (source, first) == ("variable", "symmem") else run_program
    done = start(program, env=os.environ | env)
    assert (done.returncode, done.stdout.strip()) == (0, "None" if source == "off" else "SYMMEM"), done.stderr
