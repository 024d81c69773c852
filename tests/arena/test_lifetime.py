"""What keeps a block of an arena alive, and when its memory is reused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from arena_rank import Make, Rank, mapped
from programs import run_to_the_end

import symmem
from symmem.arena.segment import GRANULE
from symmem.errors import (
    ClosedError,
)

KEEPERS: dict[str, Callable[[symmem.SymmetricTensor], object]] = {
    "handle": lambda st: st,
    "tensor": lambda st: st.tensor,
    "view": lambda st: st.tensor[3:5].view(-1, 1),
    "alias": lambda st: st.tensor.detach(),
    "storage": lambda st: st.tensor.untyped_storage(),
    "remote view": lambda st: st.remote_tensor(0)[1:],
    "contiguous view": lambda st: st.contiguous_view()[0],
    "signal pad": lambda st: st.signal_pad(0),
    "second handle": lambda st: symmem.find(st.tensor),
    "wrapped view": lambda st: symmem.SymmetricTensor.wrap(st.tensor[2:]),
    "numpy-like": lambda st: (
        memoryview(st.tensor.untyped_storage()) if False else torch.utils.dlpack.to_dlpack(st.tensor)  # type: ignore[attr-defined]
    ),
    "closed, its tensor": lambda st: (st.tensor, st.close())[0],
}


@pytest.mark.parametrize("shape", [(1000,), (10, 100)])
@pytest.mark.parametrize("what", KEEPERS)
def test_whatever_reaches_the_memory_keeps_it(what: str, shape: tuple[int, ...], rank: Rank) -> None:
    st = rank.allocate(shape)
    st.tensor.fill_(5)
    pointer = st.tensor.data_ptr()
    kept = KEEPERS[what](st)
    assert kept is not None
    live, _ = rank.book
    del st
    gc.collect()
    assert rank.book == (live, 0)
    assert rank.collect() == 0
    other = rank.allocate(1000)
    other.tensor.fill_(6)
    assert other.tensor.data_ptr() != pointer
    del kept, other
    gc.collect()
    assert rank.book == (0, 2 * live)
    assert rank.collect() == 2 * live
    assert rank.book == (0, 0)
    assert rank.allocate(1000).tensor.data_ptr() == pointer or len(rank.log.segments) == 1


def test_what_was_dropped_is_not_reused_before_a_meeting(rank: Rank) -> None:
    seen = set()
    for _ in range(30):  # at most as many as there are signal pads
        st = rank.allocate(64)
        assert st._block.pointer not in seen
        seen.add(st._block.pointer)
        del st
    assert rank.collect() == 30 * GRANULE
    assert rank.allocate(64)._block.pointer in seen


def test_a_circle_is_in_use_until_the_collector_comes(rank: Rank) -> None:
    circle: list[object] = [rank.allocate()]
    circle.append(circle)
    gc.disable()
    try:
        del circle
        assert rank.collect() == 0
        gc.collect()
        assert rank.collect() == GRANULE
    finally:
        gc.enable()


def test_what_a_finalizer_brings_back_to_life_is_not_in_quarantine(rank: Rank) -> None:
    saved: list[Any] = []

    class Phoenix:
        def __init__(self, st: symmem.SymmetricTensor) -> None:
            self.st, self.me = st, self

        def __del__(self) -> None:
            saved.append(self.st)

    phoenix = Phoenix(rank.allocate(name="phoenix"))
    pointer = phoenix.st._block.pointer
    del phoenix
    gc.collect()
    assert len(saved) == 1
    assert rank.collect() == 0
    assert rank.allocate()._block.pointer != pointer
    saved[0].tensor.fill_(3)
    saved.clear()
    assert rank.collect() == 2 * GRANULE


def test_close(rank: Rank) -> None:
    st = rank.allocate()
    tensor, second = st.tensor, symmem.find(st.tensor)
    assert second is not None
    with st:
        pass
    st.close()
    for use in (
        lambda: st.tensor,
        lambda: second.tensor,
        lambda: second.barrier(),
        lambda: st.remote_tensor(0),
        lambda: st.rendezvous(rank.group),
        lambda: symmem.SymmetricTensor.wrap(tensor),
    ):
        with pytest.raises(ClosedError):
            use()
    assert symmem.find(tensor) is None
    assert rank.collect() == 0
    tensor.fill_(1)
    use = tensor = second = st = None  # type: ignore[assignment]
    assert rank.collect() == GRANULE


def test_an_arena_goes_with_its_group_and_its_last_tensor(make: Make) -> None:
    rank = make(arena_size="2MiB")
    before = mapped()
    st = rank.allocate()
    tensor = st.tensor
    del rank, st
    tensor.fill_(1)
    assert mapped() > before
    del tensor
    assert mapped() == before


PROGRAM = """
import atexit, gc, sys, weakref
import torch, torch.distributed as dist
import symmem

group = symmem.Group.from_store(0, 1, dist.HashStore(), "ends")
allocate = lambda n=8: symmem.allocate(n, torch.uint8, group=group, backend="host")
collect = symmem.collect  # imports its module before others are deleted

class Late:
    def __init__(self):
        self.st, self.me = allocate(), self
    def __del__(self):
        self.st.tensor.fill_(1)

def at_exit():
    global last
    print(collect(group))
    last = allocate()

atexit.register(at_exit)
left, late, torch.left, sys.left = allocate(), Late(), allocate().tensor, allocate().contiguous_view()
circle = [allocate()]; circle.append(circle)
leaf = torch.ones(8, requires_grad=True)
graph = (leaf * allocate().tensor.float()).sum()  # C++ owns the tensor that autograd saved
weakref.finalize(left, print, "gone")
gc.set_threshold(1)
del sys.modules["symmem.arena.arena"], sys.modules["symmem.memory.registry"]
allocate()
"""


@pytest.mark.slow
def test_tensors_that_live_until_the_interpreter_ends() -> None:
    done = run_to_the_end(PROGRAM)
    assert (done.returncode, done.stderr) == (0, "")
    # Two tensors were dropped by then: the source of the float copy, and the tensor of the last line.
    assert done.stdout.split() == ["512", "gone"]
