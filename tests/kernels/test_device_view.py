"""Device views: their contents, the backends that have them, and refused arguments."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmem
from symmem.errors import InvalidArgumentError, UnsupportedError
from symmem.tensor.device_view import View


def words_at(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


def what_it_holds() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    st = symmem.allocate((3, 5), torch.float64, backend="host").rendezvous()
    part = symmem.SymmetricTensor.wrap(st.tensor[1:]).rendezvous()
    view = part.device_view(timeout=2.5)
    struct = View.from_buffer_copy(bytes(view))
    assert len(bytes(view)) == view.struct_tensor.numel() == 56
    assert bytes(view.struct_tensor.tolist()) == bytes(view)
    assert (struct.rank, struct.world, struct.channels) == (rank, world, 64)
    assert (struct.nbytes, struct.limit, struct.status, struct.group) == (80, 2_500_000_000, 0, 0)
    pointers = words_at(struct.pointers, world)
    assert pointers == part.remote_pointers.tolist()
    assert pointers[rank] == st.tensor.data_ptr() + 40
    pads = [st.signal_pad(peer).data_ptr() for peer in range(world)]
    assert words_at(struct.signals, world + 4) == [*pads, 2_500_000_000, 0, 0, 64]
    assert part.device_view().struct.limit == st.groups[0].settings.signal_timeout * 10**9

    own = symmem.allocate((100, world), torch.int32, backend="host").rendezvous()
    view = st.device_view(own)
    assert view.channels == view.struct.channels == 100
    assert words_at(view.struct.signals, world) == own.remote_pointers.tolist()
    for shape, dtype in (((world, 100), torch.int32), ((100, world), torch.int64), ((world,), torch.int32)):
        wrong = symmem.allocate(shape, dtype, backend="host").rendezvous()
        with pytest.raises(InvalidArgumentError, match=rf"\[channels, {world}\]"):
            st.device_view(wrong)
    with pytest.raises(symmem.errors.NotRendezvousedError):
        st.device_view(symmem.allocate((100, world), torch.int32, backend="host", arena=False))
    with pytest.raises(InvalidArgumentError, match="timeout"):
        st.device_view(timeout=-1)
    st.barrier()


def it_keeps_memory_alive() -> None:
    rank = dist.get_rank()
    st = symmem.allocate(8, torch.int32, backend="host", arena=False).rendezvous()
    st.tensor.fill_(rank + 1)
    st.barrier()
    view = st.device_view()
    del st
    assert ctypes.c_int32.from_address(int(view.pointers[1 - rank])).value == 2 - rank


def unreachable() -> None:
    st = symmem.allocate(8, torch.int32, backend="host", arena=False).rendezvous()
    mapping = st._mapping("test", None)
    kept = mapping.pointers
    st.barrier()
    mapping.pointers = (kept[0], 0)
    with pytest.raises(UnsupportedError, match=r"ranks \[1\] are not load/store reachable"):
        st.device_view()
    mapping.pointers = (kept[0], kept[0] + 8)
    with pytest.raises(UnsupportedError, match="modulo 16"):
        st.device_view()
    mapping.pointers = kept
    st.barrier()


def task(name: str) -> Any:
    return globals()[name]


@pytest.mark.parametrize("name", ["what_it_holds", "it_keeps_memory_alive", "unreachable"])
def test_on_host(name: str, pools: Any) -> None:
    pools.get(2).run(task(name))
