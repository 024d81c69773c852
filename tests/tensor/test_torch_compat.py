"""``symmem.torch_compat`` on host memory: programs that were written for torch's module."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmem
import symmem.torch_compat as symm_mem
from symmem.errors import (
    ConfigError,
    InvalidArgumentError,
    NotSymmetricError,
    PeerTimeoutError,
    RankError,
)


@pytest.fixture
def pool(pools: Any) -> Any:
    return pools.get(4)


# Programs, with torch's names only.


def one_shot_all_reduce(inp: torch.Tensor, hdl: Any) -> torch.Tensor:
    hdl.barrier(channel=0)
    out = torch.zeros_like(inp)
    for rank in range(hdl.world_size):
        out += hdl.get_buffer(rank, inp.shape, inp.dtype)
    hdl.barrier(channel=1)
    return out


def all_reduce_program() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    symm_mem.enable_symm_mem_for_group(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    for shape, dtype in (((8, 5), torch.float32), ((3,), torch.bfloat16), ((), torch.int64)):
        inp = symm_mem.empty(shape, dtype=dtype, device="cpu")
        hdl = symm_mem.rendezvous(inp, group=dist.group.WORLD)
        assert (hdl.rank, hdl.world_size, hdl.device) == (rank, world, inp.device)
        inp.fill_(rank + 1)
        out = one_shot_all_reduce(inp, hdl)
        assert (out == world * (world + 1) // 2).all()


def test_all_reduce_program(pool: Any) -> None:
    pool.run(all_reduce_program)


def ring_program() -> None:
    """A pipelined ring with put_signal, wait_signal, and flags in the signal pads."""
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    t = symm_mem.empty(1024, dtype=torch.int32)
    hdl = symm_mem.rendezvous(t, name)
    right, left = (hdl.rank + 1) % hdl.world_size, (hdl.rank - 1) % hdl.world_size
    for step in range(5):
        hdl.get_buffer(right, (512,), torch.int32, storage_offset=512).fill_(100 * hdl.rank + step)
        hdl.put_signal(dst_rank=right, channel=step % 2)
        hdl.wait_signal(src_rank=left, channel=step % 2, timeout_ms=20000)
        assert (t[512:] == 100 * left + step).all()
        hdl.barrier()
    pad = hdl.get_signal_pad(right)
    assert pad.dtype == torch.uint32
    assert pad.numel() * 4 == hdl.signal_pad_size >= symm_mem.get_signal_pad_size()
    symm_mem.Handle.stream_write_value32(pad, offset=pad.numel() - 1, val=2**32 - 1)
    hdl.barrier()
    mine = hdl.get_signal_pad(hdl.rank, (2,), torch.int32, storage_offset=pad.numel() - 2)
    assert mine.tolist() == [0, -1]
    hdl.barrier()
    symm_mem.Handle.memset32(mine, 0, 0, count=2)
    symm_mem.put_signal(torch.full((1024,), 7, dtype=torch.int32), hdl, right)
    symm_mem.wait_signal(hdl, left)
    assert (t == 7).all()
    hdl.barrier()


def test_ring_program(pool: Any) -> None:
    pool.run(ring_program)


def pointer_program() -> None:
    """Use the arrays of pointers as a kernel does."""
    t = symm_mem.empty((4, 16), dtype=torch.float64)
    hdl = symm_mem.rendezvous(t, dist.group.WORLD)
    t.fill_(hdl.rank)
    buffers, pads, size = hdl.buffer_ptrs_dev, hdl.signal_pad_ptrs_dev, hdl.world_size
    assert (buffers, pads) == (hdl.buffer_ptrs_dev, hdl.signal_pad_ptrs_dev)
    expected = hdl.buffer_ptrs, hdl.signal_pad_ptrs
    assert hdl.buffer_ptrs[hdl.rank] == t.data_ptr()
    assert hdl.offset == 0
    assert hdl.multicast_ptr == 0  # torch's value for a missing pointer
    assert not hdl.has_multicast_support()
    assert t.nbytes <= hdl.buffer_size < t.nbytes + 256
    hdl.barrier()
    peer = (hdl.rank + 1) % size
    remote = hdl.get_remote_tensor(peer, t.shape, t.dtype)
    rank = hdl.rank
    del hdl
    gc.collect()
    arrays = [list((ctypes.c_int64 * size).from_address(address)) for address in (buffers, pads)]
    assert arrays == [*expected]  # outlive the handle
    assert (remote == peer).all()
    assert ctypes.c_double.from_address(arrays[0][peer]).value == peer
    ctypes.c_uint32.from_address(arrays[1][peer] + 4 * rank).value = 1  # word [0, rank] of the peer's pad
    dist.barrier()
    hdl = symm_mem.rendezvous(t, dist.group.WORLD)
    assert hdl.get_signal_pad(hdl.rank).view(torch.int32).nonzero().flatten().tolist() == [(hdl.rank - 1) % size]
    dist.barrier()


def test_pointer_program(pool: Any) -> None:
    pool.run(pointer_program)


# The parts.


def errors_by_name() -> None:
    t = symm_mem.empty(8)
    hdl = symm_mem.rendezvous(t, dist.group.WORLD)
    for rank in (-1, 4, "0"):
        with pytest.raises(RankError):
            hdl.get_buffer(rank, (1,), torch.float32)  # type: ignore[arg-type]
        with pytest.raises(RankError):
            hdl.get_signal_pad(rank)  # type: ignore[arg-type]
    for sizes, offset in (((65,), 0), ((1,), 64), ((1,), -1)):  # there are 64 elements up to the pad
        with pytest.raises(InvalidArgumentError, match="not within 256 bytes"):
            hdl.get_buffer(0, sizes, torch.float32, offset)
    with pytest.raises(InvalidArgumentError, match="get_signal_pad"):
        hdl.get_signal_pad(0, (hdl.signal_pad_size // 4 + 1,))
    with pytest.raises(InvalidArgumentError, match="memset32"):
        symm_mem.Handle.memset32(torch.zeros(4, dtype=torch.int64), 0, 1)
    with pytest.raises(NotSymmetricError):
        symm_mem.rendezvous(torch.ones(3), dist.group.WORLD)
    if hdl.rank == 0:
        with pytest.raises(PeerTimeoutError):
            hdl.wait_signal(1, timeout_ms=50)
    dist.barrier()


def test_errors_by_name(pool: Any) -> None:
    pool.run(errors_by_name)


def sizes_of_pads() -> None:
    before = symm_mem.get_signal_pad_size()
    try:
        symm_mem.set_signal_pad_size(1 << 20)
        assert symm_mem.get_signal_pad_size() == 1 << 20
        t = symm_mem.empty(5, dtype=torch.uint8)
    finally:
        symm_mem.set_signal_pad_size(before)
    hdl = symm_mem.rendezvous(t, dist.group.WORLD)
    assert hdl.signal_pad_size == 1 << 20
    hdl.get_signal_pad((hdl.rank + 1) % 4, dtype=torch.uint8).fill_(hdl.rank + 1)
    hdl.barrier()  # it uses no word of the pad
    assert (hdl.get_signal_pad(hdl.rank, dtype=torch.uint8) == (hdl.rank - 1) % 4 + 1).all()
    assert not t.any()
    hdl.barrier()
    # A tensor from another function has the backend's pad.
    st = symmem.allocate(5)
    other = symm_mem.rendezvous(st.tensor[1:3], dist.group.WORLD)
    assert other.signal_pad_ptrs[other.rank] == st.signal_pad(other.rank).data_ptr()
    assert other.buffer_ptrs[other.rank] == st.tensor.data_ptr()  # counted from the allocation, as in torch
    assert other.buffer_size == 20
    other.barrier()


def test_sizes_of_pads(pool: Any) -> None:
    pool.run(sizes_of_pads)


def workspace() -> None:
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    first = symm_mem.get_symm_mem_workspace(name, 100)
    again = symm_mem.get_symm_mem_workspace(name, 50)
    assert again.buffer_ptrs == first.buffer_ptrs
    larger = symm_mem.get_symm_mem_workspace(name, 5000)
    assert larger.buffer_size >= 5000
    larger.get_buffer((larger.rank + 1) % 4, (5000,), torch.uint8).fill_(larger.rank)
    larger.barrier()
    assert (larger.get_buffer(larger.rank, (5000,), torch.uint8) == (larger.rank - 1) % 4).all()
    larger.barrier()
    symm_mem._workspaces.clear()


def test_workspace(pool: Any) -> None:
    pool.run(workspace)


def test_subgroups(pool: Any) -> None:
    pool.run(subgroups)


def subgroups() -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[dist.get_rank() // 2]
    t = symm_mem.empty(4)
    everybody, pair = symm_mem.rendezvous(t, dist.group.WORLD), symm_mem.rendezvous(t, mine.group_name)
    assert (everybody.world_size, pair.world_size, pair.rank) == (4, 2, dist.get_rank() % 2)
    t.fill_(dist.get_rank())
    pair.barrier()
    assert (pair.get_buffer(1 - pair.rank, (4,), torch.float32) == dist.get_rank() ^ 1).all()
    everybody.barrier()
    del pair, t, everybody
    dist.destroy_process_group(mine)


def test_what_is_local() -> None:
    t = symm_mem.empty(2, 3, dtype=torch.float8_e4m3fn, device="cpu")
    assert (t.shape, t.dtype, t.is_contiguous()) == ((2, 3), torch.float8_e4m3fn, True)
    assert symm_mem.empty([2, 3]).shape == symm_mem.empty(torch.Size([2, 3])).shape == (2, 3)
    assert symm_mem.empty(4).dtype == torch.get_default_dtype()
    assert symm_mem.empty(0).shape == (0,)
    assert symm_mem.is_symm_mem_tensor(t)
    assert symm_mem.is_symm_mem_tensor(t[1:])
    assert not symm_mem.is_symm_mem_tensor(torch.ones(2))
    assert symm_mem.is_symm_mem_enabled_for_group("no such group") is False
    with pytest.raises(InvalidArgumentError):
        symm_mem.set_signal_pad_size(0)


def test_choosing_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symm_mem, "_backend", None)
    assert symm_mem.get_backend("cpu") == "host"
    with pytest.raises(ConfigError, match="nosuch"):
        symm_mem.set_backend("nosuch")
    symm_mem.set_backend("NVSHMEM")
    assert symm_mem._backend == "pytorch_nvshmem"
    if not torch.cuda.is_available():
        assert symm_mem.get_backend("cuda") is None
        assert not symm_mem.is_nvshmem_available()
    symm_mem.set_backend("host")
    assert symm_mem.get_backend("cpu") == "host"
    assert symm_mem.empty(3).device.type == "cpu"


def test_torchs_public_names_are_here() -> None:
    import torch.distributed._symmetric_memory as theirs

    # This module leaves out pools and the operators of one transport.
    assert set(theirs.__all__) - {"get_mem_pool", "reduce_scatter_offset"} <= set(symm_mem.__all__)
    from torch._C._distributed_c10d import _SymmetricMemory

    missing = {name for name in dir(_SymmetricMemory) if not name.startswith("_")} - set(dir(symm_mem.Handle))
    assert missing == {
        *("boxed", "empty_strided_p2p", "get_backend", "get_mempool_allocator", "is_symm_mem_tensor"),
        *("rendezvous", "set_backend", "set_group_info"),
    }
