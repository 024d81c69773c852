"""The user's kernels on GPUs, with symmem.triton and symmem.cuh, over backends with load/store reachable peers.

One rank per GPU, or two ranks on the only GPU.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import OPTIONS

import symmem
from symmem.backends.driver import load_driver
from symmem.tensor.device_view import View
from symmem.tools.commands.doctor import examine
from symmem.tools.ranks import RankPool

KERNELS = '#include "symmem.cuh"\n' + Path(__file__).with_name("header_kernels.cu").read_text()
BACKENDS = ("native", "pytorch_cuda", "nvshmem", "pytorch_nvshmem", "pytorch_nccl")
WORLD = max(torch.cuda.device_count(), 2)
THREADS, ROUNDS = 128, 20

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class Call(ctypes.Structure):
    """``Call`` of header_kernels.cu."""

    _fields_ = (("view", View), ("x", ctypes.c_void_p), ("out", ctypes.c_void_p), ("n", ctypes.c_void_p))


def triton_kernels() -> Any:
    import triton_kernels

    return triton_kernels


def shared(backend: str, elements: int) -> symmem.SymmetricTensor:
    st = symmem.allocate(elements, torch.int32, backend=backend).rendezvous()
    st.tensor.zero_()
    st.barrier()
    return st


def by_triton(backend: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    right, left, block, blocks = (rank + 1) % world, (rank - 1) % world, 256, 32
    kernels, st = triton_kernels(), shared(backend, block * blocks)
    out, view = torch.empty_like(st.tensor), st.device_view()
    each = torch.arange(block * blocks, device=out.device, dtype=torch.int32)

    def sum_of_all(turn: int) -> None:
        pointers = view.pointers, view.signals
        kernels.sum_of_all[(blocks,)](st.tensor, out, *pointers, rank, turn, 0, world, block, num_warps=8)

    for turn in range(20):
        sum_of_all(turn)
        assert torch.equal(out, sum(each * (peer + 1) + turn for peer in range(world)))  # type: ignore[arg-type]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sum_of_all(7)
    for _ in range(50):
        out.zero_()
        graph.replay()
        assert torch.equal(out, sum(each * (peer + 1) + 7 for peer in range(world)))  # type: ignore[arg-type]
    for step in range(50):
        value = 100 * step + rank
        args = st.tensor, out, view.pointers, view.signals, rank, right, left, value, world, block
        kernels.pass_on[(1,)](*args)
        assert (out[:block] == 100 * step + left).all()
    st.put_signal(right, 6)  # put by the host's kernels, taken by this kernel
    kernels.take[(1,)](view.signals, left, 6, 1, rank, world)
    kernels.put[(1,)](view.signals, right, 7, 1, rank, world)  # and the other way round
    st.wait_signal(left, 7)
    st.tensor.zero_()
    st.barrier()
    kernels.count[(500,)](st.tensor, view.pointers, rank, 500)
    st.barrier()
    assert st.get(0)[0].item() == 500 * world
    st.barrier()
    st.synchronize()
    assert not st.signal_pad(rank).view(torch.int32).any()  # at rest


def compile_header() -> dict[str, Any]:
    from cuda.core import Device, Program, ProgramOptions

    device = Device(torch.cuda.current_device())
    device.set_current()
    options = ProgramOptions(arch=f"sm_{device.arch}", include_path=symmem.include_path())
    code = Program(KERNELS, "c++", options).compile("cubin")
    names = ("meet", "ring", "tally", "late", "bad_channel")
    return {"code": code} | {name: load_driver().function(int(code.get_kernel(name).handle)) for name in names}


def launch(function: Any, view: Any, x: torch.Tensor, out: torch.Tensor, blocks: int = 1) -> None:
    """The view is passed by value, within a struct."""
    call = Call(view.struct, x.data_ptr(), out.data_ptr(), x.data_ptr() + 4096)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(call))
    stream = torch.cuda.current_stream().cuda_stream
    shape = blocks, 1, 1, THREADS, 1, 1
    (code,) = load_driver().bindings.cuLaunchKernel(function, *shape, 0, stream, ctypes.addressof(arguments), 0)
    assert code == 0, code


def by_header(backend: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    left, blocks = (rank - 1) % world, 16
    functions, st = compile_header(), shared(backend, 4096)
    out = torch.zeros(THREADS * blocks * ROUNDS, dtype=torch.int32, device=st.device)
    view = st.device_view()
    launch(functions["meet"], view, st.tensor, out, blocks)
    at = torch.arange(THREADS * blocks, device=st.device, dtype=torch.int32)
    turns = torch.arange(ROUNDS, device=st.device, dtype=torch.int32)
    assert torch.equal(out, ((turns[:, None] + at) * (world * (world + 1) // 2)).flatten().int())
    launch(functions["ring"], view, st.tensor, out)
    got = out[THREADS : THREADS * (ROUNDS + 1)].view(ROUNDS, THREADS)
    assert torch.equal(got, (100 * turns + left)[:, None].expand(-1, THREADS).int())
    st.tensor.zero_()
    st.barrier()
    launch(functions["tally"], view, st.tensor, out, blocks)
    st.barrier()
    assert st.get(0)[0].item() == blocks * THREADS * world
    assert st.get(0)[4 : 4 + world].tolist() == [9] * world
    st.synchronize()
    assert not st.signal_pad(rank).view(torch.int32).any()


def late(backend: str, how: str) -> str:
    """Rank 0 waits for rank 1 in vain."""
    rank, world = dist.get_rank(), dist.get_world_size()
    st = shared(backend, 4096)
    view = st.device_view(timeout=0.3)
    functions = compile_header() if how in ("late", "bad_channel") else {}
    st.synchronize()
    if rank == 0 and how == "triton":
        triton_kernels().meet[(1,)](view.signals, 5, rank, world)
    elif rank == 0:
        launch(functions[how], view, st.tensor, st.tensor)
    try:
        st.synchronize()
    except symmem.SymmemError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def pool() -> Any:
    with RankPool(WORLD, **OPTIONS) as pool:
        yield pool


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", [by_triton, by_header])
def test_kernels(task: Any, backend: str, pool: RankPool) -> None:
    if not (found := examine(backend)).available:
        pytest.skip(found.why_not)
    if backend in ("pytorch_nvshmem", "pytorch_nccl"):  # a process has only one of torch's transports
        with RankPool(WORLD, **OPTIONS) as own:
            own.run(task, backend)
    else:
        pool.run(task, backend)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("triton", "PeerTimeoutError.*barrier on channel 5.*rank 1 did not come in time"),
        ("late", "PeerTimeoutError.*barrier on channel 2.*rank 1 did not come in time"),
        ("bad_channel", "InvalidArgumentError.*signal channel 64, but its device view has 64 channels"),
    ],
)
def test_who_is_late_is_named(how: str, said: str) -> None:
    if not (found := examine("native")).available:
        pytest.skip(found.why_not)
    with RankPool(2, **OPTIONS) as pool:
        first, second = pool.run(late, "native", how)
    assert re.search(said, first, re.DOTALL)
    assert second == "nothing"
