"""``symmem.torch_compat`` on GPUs: one rank per GPU, or two ranks on the only GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmem.torch_compat as symm_mem
from symmem.tensor import torch_memory
from symmem.tools.commands.doctor import examine

WORLD = max(torch.cuda.device_count(), 2)
FOUND = examine("native")

pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.why_not)


def program() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    right, left = (rank + 1) % world, (rank - 1) % world
    t = symm_mem.empty(64, 64, dtype=torch.float32, device="cuda")
    hdl = symm_mem.rendezvous(t, dist.group.WORLD)
    peer = hdl.get_buffer(right, (64, 64), torch.float32)
    assert peer.device == t.device == hdl.device
    assert peer.untyped_storage().nbytes() == hdl.buffer_size == t.nbytes
    words = [hdl.get_signal_pad(each, (64, world), torch.int32) for each in (rank, right)]
    assert hdl.signal_pad_size == symm_mem.get_signal_pad_size()
    assert not words[0].any()
    for step in range(5):
        peer.fill_(100 * rank + step)
        hdl.put_signal(right, step)
        hdl.wait_signal(left, step)
        assert (t == 100 * left + step).all()
        hdl.barrier()
    peer.fill_(rank)
    torch.cuda.synchronize()
    symm_mem.Handle.stream_write_value32(words[1].flatten(), 5 * world + rank, 1)  # as a kernel puts a signal
    hdl.wait_signal(left, 5)
    assert (t == left).all()
    assert not words[0].any()  # and as one finds it taken
    hdl.barrier()
    hdl.put_signal(right, 6)
    hdl.barrier()
    assert words[0].nonzero().tolist() == [[6, left]]
    hdl.barrier()
    hdl.wait_signal(left, 6)
    again = symm_mem.rendezvous(t[3:], dist.group.WORLD)
    assert again.buffer_ptrs_dev == hdl.buffer_ptrs_dev
    assert (again.get_remote_tensor(left, (64, 64), torch.float32) == (rank - 2) % world).all()
    hdl.barrier()


def test_programs_on_native(pools: Any) -> None:
    pools.get(WORLD, "native").run(program)


def test_multicast_support_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_memory, "_backend", "native")
    device_type: Any = torch._C._autograd.DeviceType
    assert symm_mem.Handle.has_multicast_support(device_type.CUDA, 0) in (True, False)
