"""``symmem.torch_compat`` on host memory: programs that were written for torch's module."""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmem
import symmem.torch_compat as symm_mem
from symmem.backends.base import Capability, tensor_at
from symmem.errors import (
    ClosedError,
    ConfigError,
    GroupError,
    InvalidArgumentError,
    MismatchError,
    PeerTimeoutError,
    RankError,
    UnsupportedError,
)
from symmem.tensor import torch_memory


@pytest.fixture
def pool(pools: Any) -> Any:
    return pools.get(4)


@pytest.fixture
def group() -> symmem.Group:
    """A group of this process alone."""
    return symmem.Group.from_store(0, 1, dist.HashStore(), "compat")


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
    assert hdl.buffer_size == t.nbytes
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
    for sizes, offset in (((9,), 0), ((1,), 8), ((1,), -1), ((0,), 9)):
        with pytest.raises(InvalidArgumentError, match="not within 32 bytes"):
            hdl.get_buffer(0, sizes, torch.float32, offset)
    with pytest.raises(InvalidArgumentError, match="get_signal_pad"):
        hdl.get_signal_pad(0, (hdl.signal_pad_size // 4 + 1,))
    for channel in (-1, 64):
        with pytest.raises(InvalidArgumentError, match="channel"):
            hdl.put_signal(0, channel)
    if hdl.rank == 0:
        with pytest.raises(PeerTimeoutError):
            hdl.wait_signal(1, timeout_ms=50)
    dist.barrier()


def test_errors_by_name(pool: Any) -> None:
    pool.run(errors_by_name)


@pytest.fixture
def pad_size() -> Iterator[None]:
    """Restores the size of signal pads."""
    before = symm_mem.get_signal_pad_size()
    yield
    symm_mem.set_signal_pad_size(before)


def sizes_of_pads() -> None:
    before = symm_mem.get_signal_pad_size()
    earlier = rendezvoused(5)
    try:
        symm_mem.set_signal_pad_size(1 << 20)
        assert symm_mem.get_signal_pad_size() == 1 << 20
        t = symm_mem.empty(5, dtype=torch.uint8)
        hdl = symm_mem.rendezvous(t, dist.group.WORLD)
        # A handle does not claim more than its own pad has.
        assert earlier.signal_pad_size == earlier.get_signal_pad(0).nbytes == before
        with pytest.raises(InvalidArgumentError, match="get_signal_pad"):
            earlier.get_signal_pad(0, (before // 4 + 1,))
    finally:
        symm_mem.set_signal_pad_size(before)
    assert hdl.signal_pad_size == hdl.get_signal_pad(0).nbytes == 1 << 20
    hdl.get_signal_pad((hdl.rank + 1) % 4, dtype=torch.uint8).fill_(hdl.rank + 1)
    hdl.barrier()  # it uses no word of the pad
    assert (hdl.get_signal_pad(hdl.rank, dtype=torch.uint8) == (hdl.rank - 1) % 4 + 1).all()
    assert not t.any()
    hdl.barrier()
    # A tensor from another function has the backend's pad.
    st = symmem.allocate(5)
    other = symm_mem.rendezvous(st.tensor[1:3], dist.group.WORLD)
    assert other.signal_pad_ptrs[other.rank] == st.signal_pad(other.rank).data_ptr()
    assert other.signal_pad_size == st.signal_pad(other.rank).nbytes
    assert other.buffer_ptrs[other.rank] == st.tensor.data_ptr()  # counted from the allocation, as in torch
    assert (other.buffer_size, other.offset) == (20, 0)
    signals_in_a_ring(other)
    # Ranks compare the sizes of pads.
    try:
        symm_mem.set_signal_pad_size(before + 4 * (hdl.rank == 2))
        with pytest.raises(MismatchError, match="signal pad"):
            rendezvoused(5)
    finally:
        symm_mem.set_signal_pad_size(before)


def rendezvoused(*sizes: int) -> symm_mem.Handle:
    return symm_mem.rendezvous(symm_mem.empty(*sizes, device="cpu"), dist.group.WORLD)


def signals_in_a_ring(handle: symm_mem.Handle) -> None:
    size, rank = handle.world_size, handle.rank
    for channel in (0, 63):
        handle.put_signal((rank + 1) % size, channel)
        handle.wait_signal((rank - 1) % size, channel, 20000)


def test_sizes_of_pads(pool: Any) -> None:
    pool.run(sizes_of_pads)


def test_the_size_of_pads_is_an_attribute_of_the_class(pad_size: None, group: symmem.Group) -> None:
    theirs: Any = importlib.import_module("torch._C._distributed_c10d")._SymmetricMemory
    ours: Any = symm_mem.Handle
    ours.signal_pad_size = 16 << 20
    assert ours.signal_pad_size == symm_mem.get_signal_pad_size() == 16 << 20
    handle = symm_mem.rendezvous(symm_mem.empty(8, device="cpu"), group)
    assert handle.get_signal_pad(0).nbytes == handle.signal_pad_size == 16 << 20
    theirs.signal_pad_size = 1 << 10  # a library of kernels does this
    assert ours.signal_pad_size == 1 << 10
    assert handle.signal_pad_size == 16 << 20
    for wrong in (0, -1, 2.5, "9216"):
        with pytest.raises(InvalidArgumentError, match="signal pad"):
            symm_mem.set_signal_pad_size(wrong)  # type: ignore[arg-type]
    assert theirs.signal_pad_size == 1 << 10


def one_pad() -> None:
    """Kernels and the methods of the handle use the same words: [channel, source]."""
    hdl = rendezvoused(8)
    rank, size = hdl.rank, hdl.world_size
    right, left = (rank + 1) % size, (rank - 1) % size
    words = [hdl.get_signal_pad(r, (64, size), torch.int32) for r in range(size)]
    assert not any(each.any() for each in words)
    hdl.barrier()
    words[right][5, rank] = 1  # as a kernel puts a signal
    hdl.wait_signal(left, 5, 20000)
    assert words[rank][5, left] == 0
    hdl.barrier()
    hdl.put_signal(right, 7)
    hdl.barrier()
    assert words[rank].nonzero().tolist() == [[7, left]]  # a kernel finds it
    assert words[rank][7, left] == 1
    hdl.barrier()
    words[rank][7, left] = 0  # as a kernel takes it, which lets the next put go on
    hdl.put_signal(right, 7, 20000)
    hdl.wait_signal(left, 7, 20000)
    hdl.barrier()
    assert not words[rank].any()
    hdl.barrier(63)
    assert not words[rank].any()


def test_kernels_and_the_handle_use_one_pad(pool: Any) -> None:
    pool.run(one_pad)


def test_a_pad_has_room_for_the_channels_that_are_used(pad_size: None, group: symmem.Group) -> None:
    symm_mem.set_signal_pad_size(9)  # two channels of one rank
    tensor = symm_mem.empty(8, device="cpu")
    handle = symm_mem.rendezvous(tensor, group)
    handle.put_signal(0, 1)
    handle.wait_signal(0, 1)
    for call in (handle.put_signal, handle.wait_signal):
        with pytest.raises(InvalidArgumentError, match="room for 2 channels"):
            call(0, 2)
    handle.barrier(63)  # has words of its own
    assert not handle.get_signal_pad(0, (9,), torch.uint8).any()


def workspace() -> None:
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    first = symm_mem.get_symm_mem_workspace(name, 100)
    again = symm_mem.get_symm_mem_workspace(name, 50)
    assert again.buffer_ptrs == first.buffer_ptrs
    larger = symm_mem.get_symm_mem_workspace(name, 5000)
    assert larger.buffer_size == 5000
    larger.get_buffer((larger.rank + 1) % 4, (5000,), torch.uint8).fill_(larger.rank)
    larger.barrier()
    assert (larger.get_buffer(larger.rank, (5000,), torch.uint8) == (larger.rank - 1) % 4).all()
    larger.barrier()


def test_workspace(pool: Any) -> None:
    pool.run(workspace)


def test_workspace_of_a_group_that_is_made_again() -> None:
    blocks = []
    for size in (200, 100):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # it has the same name again
        try:
            workspace = symm_mem.get_symm_mem_workspace(dist.group.WORLD.group_name, size)  # type: ignore[union-attr]
            assert workspace.buffer_size == size
            workspace.barrier()
            blocks.append(weakref.ref(workspace._block))
            del workspace
        finally:
            dist.destroy_process_group()
    gc.collect()
    assert blocks[0]() is None
    assert not symm_mem.is_symm_mem_enabled_for_group("0")


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
    assert symm_mem.empty(()).shape == ()
    assert symm_mem.is_symm_mem_tensor(t)
    assert symm_mem.is_symm_mem_tensor(t[1:])
    assert not symm_mem.is_symm_mem_tensor(torch.ones(2))
    assert not symm_mem.is_symm_mem_tensor(torch.empty(0))
    assert not symm_mem.is_symm_mem_tensor(torch.empty(2, device="meta"))
    assert symm_mem.is_symm_mem_enabled_for_group("no such group") is False
    with symm_mem._test_mode({"made up"}):
        assert symm_mem.is_symm_mem_enabled_for_group("made up")
        assert not symm_mem.is_symm_mem_enabled_for_group("another")
    found = symmem.find(t)
    assert found is not None
    with pytest.raises(InvalidArgumentError, match=r"pass its \.tensor"):
        symm_mem.rendezvous(found)  # type: ignore[arg-type]
    found.close()
    assert not symm_mem.is_symm_mem_tensor(t)


def test_memory_that_is_not_symmetric_has_no_handle(group: symmem.Group) -> None:
    for plain in (torch.ones(8), torch.empty(0), torch.empty(2, device="meta"), torch.eye(2).to_sparse()):
        assert symm_mem.rendezvous(plain, group) is None
    t = symm_mem.empty(8, device="cpu")
    assert symm_mem.rendezvous(t, group) is not None
    symmem.SymmetricTensor.wrap(t).close()
    with pytest.raises(ClosedError):
        symm_mem.rendezvous(t, group)


def views() -> None:
    """A view has the rendezvous of its allocation, so that no rank waits for another."""
    t = symm_mem.empty(8, 4, device="cpu")
    whole = symm_mem.rendezvous(t, dist.group.WORLD)
    if whole.rank == 0:
        for view in (t[3:], t[:, 1], t.t(), t[:0], t[8:], t.view(torch.int32)):
            handle = symm_mem.rendezvous(view, dist.group.WORLD)
            assert (handle.buffer_ptrs, handle.buffer_size, handle.offset) == (whole.buffer_ptrs, 128, 0)
    dist.barrier()


def test_views_share_the_rendezvous(pool: Any) -> None:
    pool.run(views)


def test_a_storage_within_an_allocation_has_an_offset(group: symmem.Group) -> None:
    """As tensors of a memory pool have."""
    t = symm_mem.empty(16, device="cpu")
    t.copy_(torch.arange(16))
    handle = symm_mem.rendezvous(t, group)
    part = tensor_at(t.data_ptr() + 16, 12, t.device, t.untyped_storage()).view(torch.float32)
    of_part = symm_mem.rendezvous(part, group)
    assert (handle.offset, of_part.offset) == (0, 16)
    assert of_part.buffer_ptrs == handle.buffer_ptrs
    assert of_part.get_remote_tensor(0, (3,), torch.float32).tolist() == [4, 5, 6]
    assert of_part.get_buffer(0, (3,), torch.float32).tolist() == [0, 1, 2]
    with pytest.raises(InvalidArgumentError, match="byte 16"):
        of_part.get_remote_tensor(0, (13,), torch.float32)


def empty_tensors() -> None:
    for sizes in ((0,), (0, 4)):
        t = symm_mem.empty(sizes, device="cpu")
        assert t.shape == sizes
        assert symm_mem.is_symm_mem_tensor(t)
        handle = symm_mem.rendezvous(t, dist.group.WORLD)
        handle.barrier()
        signals_in_a_ring(handle)
        assert handle.get_buffer(1, sizes, t.dtype).shape == sizes
        assert handle.signal_pad_size == symm_mem.get_signal_pad_size()
    st = symmem.allocate((8, 4), torch.float32)
    tokens = st.tensor[: 3 * dist.get_rank()]  # rank 0 has none
    found = symmem.find(tokens)
    assert found is not None
    assert found.tensor.data_ptr() == st.tensor.data_ptr()
    assert symmem.SymmetricTensor.wrap(tokens).shape == tokens.shape
    for arena in (True, False):
        nothing = symmem.allocate((0, 4), device="cpu", arena=arena)
        neighbour = symmem.allocate((2, 4), device="cpu", arena=arena)
        found = symmem.find(nothing.tensor)
        assert found is not None
        assert found.shape == (0, 4)
        found = symmem.find(neighbour.tensor[2:])  # not what follows in memory
        assert found is not None
        assert found.shape == (2, 4)


def test_empty_tensors_are_symmetric_memory(pool: Any) -> None:
    pool.run(empty_tensors)


def test_tensors_of_a_handle_keep_the_memory(group: symmem.Group) -> None:
    t = symm_mem.empty(64, 64, device="cpu").fill_(3)
    handle = symm_mem.rendezvous(t, group)
    block = weakref.ref(handle._block)
    buffers = [handle.get_buffer(0, (64, 64), torch.float32), handle.get_remote_tensor(0, (64,), torch.float32)]
    part = handle.get_buffer(0, (2, 3), torch.float32, storage_offset=4090)
    for buffer in (*buffers, part):
        assert buffer.untyped_storage().nbytes() == handle.buffer_size == 64 * 64 * 4
        assert buffer.is_contiguous()
    assert part.data_ptr() == t.data_ptr() + 4 * 4090
    with pytest.raises(InvalidArgumentError):
        handle.get_buffer(0, (2, 3), torch.float32, storage_offset=4091)
    pad = handle.get_signal_pad(0)
    del t, handle, buffer
    gc.collect()
    assert (buffers.pop() == 3).all()
    assert (buffers.pop() == 3).all()
    assert (part == 3).all()
    del part
    assert not pad.view(torch.int32).any()
    assert block() is not None
    del pad
    assert block() is None  # at once: nothing refers to it in a circle


WRONG_WORDS = {
    "a large value": {"val": 2**32},
    "a negative value": {"val": -1},
    "a broken value": {"val": 1.5},
    "a negative offset": {"offset": -1},
    "an offset behind the end": {"offset": 8},
    "float32": {"input": torch.zeros(8)},
    "int64": {"input": torch.zeros(8, dtype=torch.int64)},
    "two dimensions": {"input": torch.zeros(2, 4, dtype=torch.int32)},
    "a stride": {"input": torch.zeros(16, dtype=torch.int32)[::2]},
}
WRONG_COUNTS = {
    "no words": {"count": 0},
    "a negative count": {"count": -3},
    "words behind the end": {"offset": 7, "count": 2},
}


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        *(("memset32", wrong) for wrong in (WRONG_WORDS | WRONG_COUNTS).values()),
        *(("stream_write_value32", wrong) for wrong in WRONG_WORDS.values()),
    ],
)
def test_words_are_checked_before_they_are_written(operation: str, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"input": torch.zeros(8, dtype=torch.uint32), "offset": 0, "val": 1, **wrong}
    with pytest.raises(InvalidArgumentError, match=operation):
        getattr(symm_mem.Handle, operation)(**arguments)
    assert not any(arguments["input"].flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.uint32, torch.int32])
def test_words_are_written(dtype: torch.dtype) -> None:
    words = torch.zeros(8, dtype=dtype)
    assert symm_mem.Handle.memset32(words, 2, 2**32 - 1, 3) is words
    assert symm_mem.Handle.stream_write_value32(words, offset=7, val=5) is words
    assert words.view(torch.int32).tolist() == [0, 0, -1, -1, -1, 0, 0, 5]


def test_memory_of_an_alloc_id_is_kept(group: symmem.Group) -> None:
    def make(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        where = torch.device("cpu")
        return symm_mem.Handle.empty_strided_p2p(size, stride, dtype, where, group_name=None, alloc_id=2**63 + 7)

    first = make((4, 8), (1, 4)).fill_(5)
    handle = symm_mem.rendezvous(first, group)
    address, view = first.data_ptr(), first[1:, 1]
    del first
    with pytest.raises(InvalidArgumentError, match="still alive"):
        make((32,), (1,))
    del view
    second = make((32,), (1,))
    assert second.data_ptr() == address
    assert (second == 5).all()
    assert symm_mem.is_symm_mem_tensor(second)
    again = symm_mem.rendezvous(second, group)
    assert again.buffer_ptrs == handle.buffer_ptrs
    del second
    with pytest.raises(InvalidArgumentError, match=r"128 bytes .* 132"):
        make((33,), (1,))
    assert make((64,), (1,), torch.bfloat16).data_ptr() == address


def test_strides_of_an_allocation() -> None:
    where = torch.device("cpu")
    tensor = symm_mem.Handle.empty_strided_p2p((4, 8), (1, 4), torch.float32, where)
    assert (tensor.shape, tensor.stride()) == ((4, 8), (1, 4))
    assert not tensor.any()
    with pytest.raises(InvalidArgumentError, match="share memory"):
        symm_mem.Handle.empty_strided_p2p((4, 8), (0, 1), torch.float32, where)


def group_of_the_allocation() -> None:
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    where = torch.device("cpu")
    t = symm_mem.Handle.empty_strided_p2p((4,), (1,), torch.float32, where, pair.group_name)
    handle = symm_mem.Handle.rendezvous(t)
    assert handle.world_size == 2
    everybody = symm_mem.Handle.rendezvous(t, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    assert everybody.world_size == 4
    everybody.barrier()
    dist.destroy_process_group(pair)


def test_a_rendezvous_without_a_group_uses_that_of_the_allocation(pool: Any) -> None:
    pool.run(group_of_the_allocation)


def group_by_a_store() -> None:
    rank = dist.get_rank()
    store = dist.PrefixStore("compat", dist.distributed_c10d._get_default_store())
    symm_mem.Handle.set_group_info("reversed", 3 - rank, 4, store)
    handle = symm_mem.rendezvous(symm_mem.empty(4, device="cpu"), "reversed")
    assert (handle.rank, handle.world_size) == (3 - rank, 4)
    handle.barrier()
    symm_mem.Handle.set_group_info("reversed", 3 - rank, 4, store)
    with pytest.raises(GroupError, match="reversed"):
        symm_mem.Handle.set_group_info("reversed", rank, 4, store)
    world = dist.group.WORLD.group_name  # type: ignore[union-attr]
    symm_mem.Handle.set_group_info(world, rank, 4, store)  # a process group has its own store
    with pytest.raises(GroupError, match="not 0 of 5"):
        symm_mem.Handle.set_group_info(world, 0, 5, store)
    handle.barrier()


def test_a_group_can_be_set_from_a_store(pool: Any) -> None:
    pool.run(group_by_a_store)


def test_choosing_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_memory, "_backend", None)
    assert symm_mem.get_backend("cpu") == symm_mem.Handle.get_backend(torch.device("cpu")) == "host"
    with pytest.raises(ConfigError, match="nosuch"):
        symm_mem.set_backend("nosuch")
    symm_mem.set_backend("NVSHMEM")
    assert torch_memory._backend == "pytorch_nvshmem"
    if not torch.cuda.is_available():
        assert symm_mem.get_backend("cuda") is None
        assert not symm_mem.is_nvshmem_available()
    symm_mem.Handle.set_backend("host")
    assert symm_mem.get_backend("cpu") == "host"
    assert symm_mem.empty(3).device.type == "cpu"


def test_multicast_support_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device_type: Any = torch._C._autograd.DeviceType
    assert symm_mem.Handle.has_multicast_support(device_type.CPU, 0) is False

    class Multicast:
        capabilities = Capability.MULTICAST

    asked = []
    monkeypatch.setattr(torch_memory, "_chosen", lambda device: asked.append(device) or Multicast)
    monkeypatch.setattr("symmem.backends.driver.load_driver", lambda: "a driver")
    for why in ("", "the GPU has none"):
        monkeypatch.setattr("symmem.backends.multicast.why_not", lambda driver, ordinal, settings, why=why: why)
        assert symm_mem.Handle.has_multicast_support(device_type.CUDA, 1) is not bool(why)
    assert asked == [torch.device("cuda", 1)] * 2


def test_what_has_no_meaning_is_a_named_error(group: symmem.Group) -> None:
    handle = symm_mem.rendezvous(symm_mem.empty(4, device="cpu"), group)
    calls: list[Callable[[], Any]] = [
        handle.boxed,
        lambda: symm_mem.get_mem_pool("cpu"),
        lambda: symm_mem.get_mempool_allocator("cpu"),
        lambda: symm_mem.Handle.get_mempool_allocator(torch.device("cpu")),
        lambda: symm_mem.reduce_scatter_offset(torch.zeros(2, 2), [], "0", dim=0),
        lambda: symm_mem._pipelined_all_gather_and_consume(),
        lambda: symm_mem._low_contention_all_gather(torch.ones(2), "0"),
    ]
    if not torch.cuda.is_available():
        calls.append(symm_mem._get_backend_stream)
    for call in calls:
        with pytest.raises(UnsupportedError):
            call()


def test_torchs_names_are_here() -> None:
    theirs: Any = importlib.import_module("torch.distributed._symmetric_memory")
    assert set(theirs.__all__) <= set(symm_mem.__all__)
    # Those that it defines, and not the modules and variables that it uses.
    defined = [name for name, value in vars(theirs).items() if getattr(value, "__module__", None) == theirs.__name__]
    unknown = {name for name in [*defined, "_SymmetricMemory"] if not hasattr(symm_mem, name)}
    assert unknown == set()
    theirs = importlib.import_module("torch._C._distributed_c10d")._SymmetricMemory
    assert {name for name in dir(theirs) if not name.startswith("_")} <= set(dir(symm_mem.Handle))
    for name in ("restride_A_shard_for_fused_all_gather_matmul", "_fused_matmul_reduce_scatter_fallback"):
        assert getattr(symm_mem, name) is getattr(importlib.import_module(symm_mem._THEIRS), name)
    for name in ("no_such_name", "uuid", "__wrapped__"):
        assert not hasattr(symm_mem, name)


def test_look_ups_do_not_communicate_and_make_little(group: symmem.Group) -> None:
    """A rendezvous again, and a buffer, are a bounded number of calls of Python functions: no speed is measured."""
    t = symm_mem.empty(64, device="cpu")
    handle = symm_mem.rendezvous(t, group)
    handle.get_buffer(0, (64,), torch.float32)
    calls: list[str] = []
    for call in (lambda: symm_mem.rendezvous(t, group), lambda: handle.get_buffer(0, (64,), torch.float32)):
        calls.clear()
        sys.setprofile(lambda frame, event, _argument: calls.append(frame.f_code.co_name) if event == "call" else None)
        try:
            call()
        finally:
            sys.setprofile(None)
        assert len(calls) < 25, calls
