"""Arguments that handles accept, and arguments that they refuse with a named error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmem
from symmem.backends import get_backend
from symmem.backends.base import Capability, tensor_at
from symmem.errors import (
    BackendUnavailableError,
    GroupError,
    InvalidArgumentError,
    RankError,
    SymmemError,
    UnsupportedError,
)


class Number:
    """An integer of another library."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def alone(sizes: Any, dtype: torch.dtype = torch.float32, **options: Any) -> symmem.SymmetricTensor:
    """A tensor in a group of one rank."""
    return symmem.allocate(sizes, dtype, backend="host", **options).rendezvous(new_group())


def new_group(name: str = "alone") -> symmem.Group:
    return symmem.Group.from_store(0, 1, dist.HashStore(), name)


def cut_off(st: symmem.SymmetricTensor) -> symmem.SymmetricTensor:
    """Make the rank's memory reachable only by `put` and `get`."""
    mapping, allocation = st._mapping("test", None), st._block.allocation

    def memory(offset: int, like: torch.Tensor) -> torch.Tensor:
        assert (like.dtype, like.dim(), like.is_contiguous()) == (torch.uint8, 1, True)
        return tensor_at(allocation.pointer + offset, like.numel(), allocation.device, allocation)

    mapping.pointers = (0,)
    mapping.put = lambda rank, offset, source: memory(offset, source).copy_(source)  # type: ignore[assignment, method-assign]
    mapping.get = lambda rank, offset, out: out.copy_(memory(offset, out))  # type: ignore[assignment, method-assign]
    return st


@pytest.fixture(params=["reachable", "cut off"])
def reach(request: pytest.FixtureRequest) -> Callable[[symmem.SymmetricTensor], symmem.SymmetricTensor]:
    return cut_off if request.param == "cut off" else lambda st: st


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_lazy_conjugates_and_negatives_are_copied_by_value(dtype: torch.dtype, reach: Any) -> None:
    st = reach(alone(3, dtype))
    plain = torch.tensor([1 + 2j, 3 - 4j, 5j], dtype=dtype)
    assert plain.conj().is_conj()
    st.put(plain.conj(), 0)
    assert torch.equal(st.tensor, plain.conj().resolve_conj())
    memory = torch.zeros(3, dtype=dtype)
    out = memory.conj()
    assert st.get(0, out=out) is out
    assert torch.equal(out.resolve_conj(), st.tensor)
    assert torch.equal(memory, plain)


def test_lazy_negatives(reach: Any) -> None:
    st = reach(alone(2))
    negative = torch.tensor([1 + 2j, 3 + 4j]).conj().imag
    assert negative.is_neg()
    st.put(negative, 0)
    assert st.tensor.tolist() == [-2.0, -4.0]
    assert st.get(0, out=negative) is negative
    assert negative.tolist() == [-2.0, -4.0]


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (3,), ()])
def test_strides_of_single_elements_do_not_matter(sizes: tuple[int, ...], reach: Any) -> None:
    st = reach(alone(sizes))
    for strides in ((7, 5)[: len(sizes)], (2, 9)[: len(sizes)]):
        source = torch.rand(64).as_strided(sizes, strides)
        st.put(source, 0)
        assert torch.equal(st.tensor, source)
        out = torch.zeros(64).as_strided(sizes, strides)
        assert torch.equal(st.get(0, out=out), source)


def test_what_is_no_tensor_is_refused() -> None:
    st = alone(4)
    uses: list[Callable[[], object]] = [
        lambda: symmem.find(None),  # type: ignore[arg-type]
        lambda: symmem.find(3),  # type: ignore[arg-type]
        lambda: st.put(None, 0),  # type: ignore[arg-type]
        lambda: st.get(0, out="x"),  # type: ignore[arg-type]
    ]
    for use in uses:
        with pytest.raises(InvalidArgumentError, match=r"needs a torch\.Tensor, not a (NoneType|int|str)"):
            use()


def test_any_integer_is_a_rank_a_channel_or_a_size_but_no_truth_value() -> None:
    st = alone(Number(4))
    assert st.shape == (4,)
    assert st.remote_tensor(Number(0)) is st.tensor  # type: ignore[arg-type]
    st.barrier(Number(63))  # type: ignore[arg-type]
    st.put_signal(Number(0), Number(3))  # type: ignore[arg-type]
    st.wait_signal(0, 3)
    for rank in (False, 0.0, "0", None, Number(1)):
        with pytest.raises(RankError):
            st.remote_tensor(rank)  # type: ignore[arg-type]
    for channel in (True, 1.0, Number(64), -1):
        with pytest.raises(InvalidArgumentError, match="channel"):
            st.barrier(channel)  # type: ignore[arg-type]
    for sizes in (True, (2, False)):
        with pytest.raises(InvalidArgumentError, match="integers"):
            symmem.allocate(sizes)


def test_a_device_without_memory_lists_those_with() -> None:
    with pytest.raises(BackendUnavailableError, match=r"meta tensors\n.*use cuda or cpu tensors"):
        symmem.allocate(4, device="meta")


def test_put_and_get_refuse_tensors_that_are_not_dense() -> None:
    st = alone((2, 2))
    for use in (lambda: st.put(st, 0), lambda: st.get(0, st)):  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match=r"not a SymmetricTensor\n.*pass its \.tensor"):
            use()
    with pytest.raises(InvalidArgumentError, match="nested"):
        st.put(torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), 0)
    with pytest.raises(InvalidArgumentError, match="sparse"):
        st.put(torch.zeros(2, 2).to_sparse(), 0)


def test_copies_within_a_tensor_are_right_or_refused(reach: Any) -> None:
    st = reach(alone((4, 6)))
    st.tensor.copy_(torch.arange(24.0).view(4, 6))
    before = st.tensor.clone()
    st.put(st.tensor, 0)
    assert st.get(0, st.tensor) is st.tensor
    assert torch.equal(st.tensor, before)
    expanded = torch.zeros(6).expand(4, 6)
    with pytest.raises(InvalidArgumentError, match="elements of the target share memory"):
        st.get(0, expanded)


def test_copies_between_parts_of_a_tensor_are_right_or_refused() -> None:
    st = alone((4, 4))
    st.tensor.copy_(torch.arange(16.0).view(4, 4))
    before = st.tensor.clone()
    for use in (
        lambda: st.put(st.tensor.t(), 0),
        lambda: st.get(0, st.tensor.t()),
        lambda: symmem.SymmetricTensor.wrap(st.tensor[1:]).put(st.tensor[:3], 0),
        lambda: symmem.SymmetricTensor.wrap(st.tensor[:3]).get(0, st.tensor[1:]),
        lambda: symmem.SymmetricTensor.wrap(st.tensor[:, :3]).get(0, st.tensor[:, 1:]),
    ):
        with pytest.raises(InvalidArgumentError, match="source and target share memory"):
            use()
    assert torch.equal(st.tensor, before)
    symmem.SymmetricTensor.wrap(st.tensor[:, :2]).get(0, st.tensor[:, 2:])  # in the same rows, but shares nothing
    assert torch.equal(st.tensor, before[:, [0, 1, 0, 1]])


@pytest.mark.parametrize("arena", ["no", 5, 0, [], torch.tensor(True)])
def test_arena_is_a_truth_value(arena: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="arena must be True, False or None"):
        symmem.allocate(3, arena=arena, group=new_group())


def test_a_name_is_a_text() -> None:
    with pytest.raises(InvalidArgumentError, match="name must be a str, not 5"):
        symmem.allocate(3, name=5, group=new_group())  # type: ignore[arg-type]
    with pytest.raises(GroupError, match="the name of a group is a str, not 5"):
        symmem.Group.from_store(0, 1, dist.HashStore(), 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2**70, 10**9, 2**20 + 1])
def test_a_group_of_a_huge_size_is_refused(size: int) -> None:
    with pytest.raises(GroupError, match=f"rank 0 of {size}"):
        symmem.Group.from_store(0, size, dist.HashStore())


@pytest.mark.parametrize(("rank", "size"), [("0", 2), (0, "2"), (None, 1), (0.0, 1), (False, 1), (0, True)])
def test_a_group_of_no_integers_is_refused(rank: Any, size: Any) -> None:
    with pytest.raises(GroupError, match="are integers, not"):
        symmem.Group.from_store(rank, size, dist.HashStore())


def test_a_group_without_a_store_is_refused() -> None:
    with pytest.raises(GroupError, match="not a NoneType"):
        symmem.Group.from_store(0, 1, None)  # type: ignore[arg-type]


def test_a_second_group_is_refused_for_a_backend_that_knows_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handle refuses it, so the backend needs no code for it."""
    host = get_backend("host")
    monkeypatch.setattr(host, "capabilities", host.capabilities & ~Capability.SECOND_GROUP, raising=False)
    st, first = symmem.allocate(4, backend="host"), new_group()
    st.rendezvous(first)
    with pytest.raises(UnsupportedError, match="'host' belongs to one group; this tensor belongs to 'alone'") as caught:
        st.rendezvous(new_group("second"))
    assert isinstance(caught.value, SymmemError)
    assert caught.value.group == "second"
    st.rendezvous(first)
    symmem.SymmetricTensor.wrap(st.tensor[:2]).rendezvous(first)


def test_the_tensor_of_a_handle_that_was_found() -> None:
    """It is made once, at the first use, and is a normal tensor even in inference mode."""
    x = alone((2, 3)).tensor.fill_(4)
    handle = symmem.find(x[1:])
    assert handle is not None
    with torch.inference_mode():
        found = handle.tensor
    assert found is handle.tensor
    assert not found.is_inference()
    assert found.data_ptr() == x.data_ptr()
    assert torch.equal(found, x)
    handle.close()
    with pytest.raises(SymmemError, match="was closed"):
        _ = handle.tensor


@pytest.mark.parametrize("signals", [torch.zeros(64, 1, dtype=torch.int32), 5, "signals"])
def test_signals_of_a_kernel_that_are_no_handle(signals: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="signals must be a SymmetricTensor, not a"):
        alone(8).device_view(signals=signals)
