"""Modes of the caller: inference mode, a default device, fake tensors, other dispatch modes, transforms."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import symmem
from symmem import torch_compat
from symmem.arena.arena_block import ArenaBlock
from symmem.backends.neutral import in_fake_mode, is_in_mode, neutral_mode
from symmem.errors import UnsupportedError

numbers = itertools.count()


@pytest.fixture
def group() -> symmem.Group:
    """A group of one rank that has made nothing yet."""
    return symmem.Group.from_store(0, 1, dist.HashStore(), f"modes {next(numbers)}")


class Recorder(TorchDispatchMode):
    """Records the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "meta": lambda: torch.device("meta"),
    "dispatch": Recorder,
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return MODES[request.param]


def write(tensor: torch.Tensor) -> None:
    """Write to a tensor, as only an ordinary one on the CPU can be."""
    assert (tensor.is_inference(), tensor.device.type) == (False, "cpu")
    tensor.fill_(1)
    assert bool((tensor == 1).all())


def test_tensors_that_were_made_in_a_mode_are_ordinary(mode: Callable[[], Any], group: symmem.Group) -> None:
    with mode():
        made = symmem.allocate(16, torch.float32, group=group)
        square = symmem.allocate((4, 4), torch.float16, group=group)
        own = symmem.allocate(16, torch.float32, device="cpu", arena=False).rendezvous(group)
        tensors = [
            made.tensor,
            square.tensor,
            own.tensor,
            symmem.SymmetricTensor.wrap(square.tensor[1:]).tensor,
            own.contiguous_view(),
            made.remote_tensor(0),
            own.remote_pointers,
            made.signal_pad(0),
        ]
    for tensor in [*tensors, symmem.allocate((2, 2), torch.float32, group=group).tensor]:
        write(tensor)


def test_torch_compat_makes_ordinary_tensors_in_inference_mode(group: symmem.Group) -> None:
    with torch.inference_mode():
        tensor = torch_compat.empty(8, dtype=torch.float32, device="cpu")
        handle = torch_compat.rendezvous(tensor, group)
        write_later = [tensor, handle.get_buffer(0, (8,), torch.float32), handle.get_signal_pad(0)]
    for made in write_later:
        write(made)


def test_allocations_in_a_mode_have_the_callers_site(group: symmem.Group) -> None:
    with torch.inference_mode():
        made = symmem.allocate(16, group=group)
    assert isinstance(made._block, ArenaBlock)
    with torch.inference_mode():
        other = symmem.allocate(16, device="cpu", arena=False, group=group)
    assert "test_allocations_in_a_mode" in str(other._block.site)
    assert "test_allocations_in_a_mode" in str(made._block.log.recent()[-1])


@pytest.mark.parametrize("first", [True, False])
def test_operators_work_in_and_after_a_mode(mode: Callable[[], Any], first: bool, group: symmem.Group) -> None:
    def all_of_them(kind: torch.dtype = torch.float32) -> list[Any]:
        x = torch.ones(1, 4, dtype=kind, device="cpu")
        made = [symmem.ops.all_reduce(x, group), symmem.ops.all_gather(x, group), symmem.ops.broadcast(x, group)]
        made += [symmem.ops.reduce_scatter(x, group), symmem.ops.all_to_all(x, group)]
        made += [symmem.ops.all_reduce(x, group, out=x)]
        symmem.ops.barrier(group=group)
        return [each.sum().item() for each in made]

    if not first:
        all_of_them()
    with mode():
        inside = all_of_them()
    assert inside == all_of_them() == all_of_them(torch.int32) == [4] * 6
    x = torch.ones(4, requires_grad=True)
    symmem.ops.all_reduce(x * 2, group).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 4


def test_a_mode_of_others_does_not_see_how_an_engine_is_made(group: symmem.Group) -> None:
    with Recorder() as recorder:
        symmem.ops.all_reduce(torch.ones(4), group)
    assert [name for name in recorder.seen if "symmem" in name] == ["symmem.all_reduce.default"]
    assert not {name for name in recorder.seen if "set_" in name}


def test_fake_mode_has_no_symmetric_memory_and_spoils_nothing(group: symmem.Group) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        for call in (
            lambda: symmem.allocate(4, group=group),
            lambda: symmem.allocate(4, device="cpu", arena=False),
            lambda: torch_compat.empty(4, device="cpu"),
        ):
            with pytest.raises(UnsupportedError, match="FakeTensorMode"):
                call()
        shape = symmem.ops.all_gather(torch.ones(4), group).shape
        symmem.ops.barrier(group=group)  # local
    assert shape == (1, 4)
    made = symmem.allocate(4, torch.float32, group=group)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(made.tensor) is torch.Tensor
        made.barrier()
    write(made.tensor)
    assert symmem.ops.all_reduce(torch.ones(4), group).tolist() == [1.0] * 4


def test_redirected_tensors_under_a_default_device(group: symmem.Group) -> None:
    with torch.device("meta"), symmem.use_symmetric_memory(group):
        y = torch.ones(3, device="cpu") + 1
        nothing = torch.ones(3)
    assert symmem.find(y) is not None
    assert y.tolist() == [2.0] * 3
    assert nothing.device.type == "meta"


def test_the_neutral_mode() -> None:
    def state() -> tuple[Any, ...]:
        return torch.is_inference_mode_enabled(), torch.empty(1).device.type, is_in_mode(), in_fake_mode()

    @contextlib.contextmanager
    def all_of_them() -> Iterator[None]:
        with torch.inference_mode(), torch.device("meta"), Recorder():
            yield

    with all_of_them():
        before = state()
        with neutral_mode():
            assert not torch.empty(1).is_inference()
            assert torch.empty(1).device.type == "cpu"
        assert state() == before == (True, "meta", True, False)
    assert state() == (False, "cpu", False, False)
    with FakeTensorMode():
        assert in_fake_mode()
