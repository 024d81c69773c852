"""``symmem.use_symmetric_memory``: the memory of tensors that ops make inside it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import itertools
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import LONG
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import symmem
from symmem.errors import DivergenceError, GroupError, ResourceLimitError, UnsupportedError
from symmem.group.group import Group
from symmem.group.resolve import resolve_group
from symmem.redirect import cuda_pool as cuda_pools
from symmem.redirect.context import _thread

inside = symmem.use_symmetric_memory


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
        assert not _thread.entries
        assert not torch._C._len_torch_dispatch_stack()
        assert not _python_dispatch._is_in_torch_dispatch_mode
    finally:
        dist.destroy_process_group()


def is_symmetric(tensor: torch.Tensor) -> bool:
    """Whether a tensor is inside one block of symmetric memory that the default group has rendezvoused."""
    found = symmem.find(tensor)
    if found is None:
        return False
    assert found.groups == (resolve_group(),)
    symmem.SymmetricTensor.wrap(tensor)  # checks that it ends within the block
    return True


def log_of(tensor: torch.Tensor) -> Any:
    found = symmem.find(tensor)
    return None if found is None else found._block.log  # type: ignore[attr-defined]


x = torch.arange(12, dtype=torch.float32).view(3, 4)

# Tensors made inside.

MAKERS: dict[str, tuple[Callable[[], torch.Tensor], Any]] = {
    "arithmetic": (lambda: x + 1, x + 1),
    "matmul": (lambda: x @ x.T, x @ x.T),
    "clone": (lambda: x.clone(), x),
    "to": (lambda: x.to(torch.float64), x.double()),
    "contiguous": (lambda: x.T.contiguous(), x.T),
    "cat": (lambda: torch.cat([x, x]), torch.cat([x, x])),
    "integers": (lambda: x.argmax(1), torch.tensor([3, 3, 3])),
    "truth": (lambda: x > 3, x > 3),
    "one element": (lambda: x.sum(), x.sum()),
    "zeros": (lambda: torch.zeros(3, 2), torch.zeros(3, 2)),
    "zeros_like": (lambda: torch.zeros_like(x.T), torch.zeros(4, 3)),
    "new_zeros": (lambda: x.new_zeros(5), torch.zeros(5)),
    "ones": (lambda: torch.ones(3, dtype=torch.int8), torch.tensor([1, 1, 1])),
    "ones_like": (lambda: torch.ones_like(x), torch.ones(3, 4)),
    "new_ones": (lambda: x.new_ones(2), torch.ones(2)),
    "full": (lambda: torch.full((2,), 7), torch.tensor([7, 7])),
    "full by name": (lambda: torch.full(size=(2,), fill_value=True), torch.tensor([True, True])),
    "full_like": (lambda: torch.full_like(x, 2.5), torch.full((3, 4), 2.5)),
    "new_full": (lambda: x.new_full((2,), -1), torch.tensor([-1.0, -1.0])),
    "arange": (lambda: torch.arange(4), torch.tensor([0, 1, 2, 3])),
    "eye": (lambda: torch.eye(2), torch.tensor([[1.0, 0], [0, 1]])),
    "tensor": (lambda: torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]])),
    "as_tensor": (lambda: torch.as_tensor([1.5]), torch.tensor([1.5])),
    "complex": (lambda: torch.complex(x, x), torch.complex(x, x)),
    "out": (lambda: torch.add(x, x, out=torch.empty(0)), x + x),
    "resize_": (lambda: torch.empty(0).resize_(2).fill_(3), torch.tensor([3.0, 3.0])),
    "Linear": (lambda: torch.nn.Linear(4, 2).requires_grad_(False).weight.fill_(2), torch.full((2, 4), 2.0)),
    "sparse to dense": (lambda: torch.eye(3).to_sparse().to_dense(), torch.eye(3)),
    "vmap": (lambda: torch.func.vmap(lambda row: row * 2)(x), x * 2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_made(name: str) -> None:
    make, expected = MAKERS[name]
    with inside():
        made = make()
    assert is_symmetric(made)
    assert torch.equal(made.to(expected.dtype), expected)
    outside = make()
    assert not is_symmetric(outside)
    assert (made.dtype, made.stride(), made.requires_grad) == (
        outside.dtype,
        outside.stride(),
        outside.requires_grad,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, 5),
        lambda: torch.empty_strided((3, 5), (1, 4)),
        lambda: torch.empty_like(x.T),
        lambda: x.new_empty((2, 2), dtype=torch.int16),
        lambda: x.new_empty_strided((2, 2), (5, 2)),
        lambda: torch.empty(2, 3, 4, 5, memory_format=torch.channels_last),
    ],
)
def test_empty(make: Callable[[], torch.Tensor]) -> None:
    outside = make()
    with inside():
        made = make()
    assert is_symmetric(made)
    assert (made.shape, made.dtype, made.stride()) == (outside.shape, outside.dtype, outside.stride())


def test_the_handle_is_of_the_tensor_alone() -> None:
    """The arena gets the bytes of the result; the op's storage may be larger."""

    @torch.library.custom_op("symmem_test_context::tail", mutates_args=())
    def tail(t: torch.Tensor) -> torch.Tensor:
        return torch.arange(100.0)[90:]

    with inside():
        made, strided = tail(x), torch.empty_strided((3, 2), (1, 4)).copy_(x[:, :2])
    for each in (made, strided):
        handle = symmem.find(each)
        assert handle is not None
        assert (handle.shape, handle.strides, handle.dtype) == (each.shape, each.stride(), each.dtype)
        assert torch.equal(handle.tensor, each)
    assert made.tolist() == list(range(90, 100))
    assert torch.equal(strided, x[:, :2])


def test_nothing_is_copied_that_only_allocates() -> None:
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    arena = resolve_group()
    with inside(), Log():  # the log runs first and then calls the context
        made = torch.zeros(1000)
    assert is_symmetric(made)
    assert seen == ["aten.zeros.default"]
    assert arena
    with Log(), inside():  # other modes do not see the context's own ops
        made = x + 1
    assert is_symmetric(made)
    assert seen == ["aten.zeros.default", "aten.add.Tensor"]


# Tensors that keep their memory.


def test_views_and_inputs() -> None:
    base, buffer = torch.randn(4, 4), torch.zeros(4, 4)
    with inside():
        views = [base[1:], base.T, base.view(16), base.detach(), *base.split(2), base.unbind()[0], base.expand(2, 4, 4)]
        views.append(base[:0].as_strided((3,), (2,)))
        same = [base.contiguous(), base.to(torch.float32), base.add_(1), torch.mul(base, 2, out=buffer)]
        parameter = torch.nn.Parameter(base)
    for each in (*views, *same, parameter, base, buffer):
        assert not is_symmetric(each)
        assert each.untyped_storage().data_ptr() in (base.data_ptr(), buffer.data_ptr())
    assert torch.equal(buffer, base * 2)


def test_memory_that_torch_has_not_allocated() -> None:
    """An op that returns a tensor over its own buffer may use the buffer again."""
    memory = bytearray(8)
    library = torch.library.Library("symmem_test_foreign", "DEF")
    library.define("foreign(Tensor t) -> Tensor")
    library.impl("foreign", lambda t: torch.frombuffer(memory, dtype=torch.uint8), "CPU")
    with inside():
        torch.ops.symmem_test_foreign.foreign(x).fill_(1)
    assert memory == b"\1" * 8


def test_views_of_what_is_symmetric() -> None:
    with inside():
        made = x + 1
        log = log_of(made)
        count = log.count
        views = [made[1:], made.T, *made.split(2), made.add_(1), made.contiguous()]
        assert log.count == count
    assert all(symmem.find(view)._block is symmem.find(made)._block for view in views)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_other_kinds_of_tensors() -> None:
    with inside():
        sparse = torch.eye(3).to_sparse()
        meta = torch.empty(3, device="meta") + 1
        nothing = torch.empty(0, 3) + torch.empty(0, 3)
        quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
        buffer = torch.frombuffer(bytearray(8), dtype=torch.float32)
    assert sparse.layout == torch.sparse_coo
    assert meta.device.type == "meta"
    assert nothing.shape == (0, 3)
    assert quantized.is_quantized
    assert not any(is_symmetric(each) for each in (sparse, meta, nothing, quantized, buffer))
    nothing.resize_(2)  # would fail if it used foreign memory


def test_numbers_and_nones() -> None:
    with inside():
        assert x.sum().item() == 66
        assert torch.equal(x, x)
        values, indices = x.max(1)
        assert is_symmetric(values)
        assert is_symmetric(indices)
        out = torch.ops.aten.native_layer_norm_backward(
            x, x, [4], torch.zeros(3, 1), torch.ones(3, 1), None, None, [True, False, False]
        )
    assert is_symmetric(out[0])
    assert out[1:] == (None, None)


def test_conjugate_and_negative_bits() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])

    @torch.library.custom_op("symmem_test_context::lazy", mutates_args=())
    def lazy(t: torch.Tensor) -> list[torch.Tensor]:
        return [t.clone().conj(), t.clone().conj().imag]

    with inside():
        assert is_symmetric(z.conj() + 0)
        conjugate, negative = lazy(z)
        view = (z + 0).conj()
    assert (conjugate.is_conj(), negative.is_neg(), view.is_conj()) == (True, True, True)
    assert all(symmem.find(each) for each in (conjugate, negative, view))
    assert conjugate.tolist() == view.tolist() == [1 - 2j, 3 + 1j]
    assert negative.tolist() == [-2, 1]


def test_results_that_share_memory_still_do() -> None:
    def two_views(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        base = t.clone()
        return base.view(-1)[1:9], base.T, t + 1

    library = torch.library.Library("symmem_test_views", "DEF")
    library.define("two_views(Tensor t) -> (Tensor, Tensor, Tensor)")
    library.impl("two_views", two_views, "CPU")
    with inside():
        one, two, other = torch.ops.symmem_test_views.two_views(x)
    assert is_symmetric(one)
    assert is_symmetric(two)
    assert torch.equal(two, x.T)
    assert one.tolist() == list(range(1, 9))
    one.fill_(-1)
    assert two.T.flatten().tolist() == [0, *[-1] * 8, 9, 10, 11]
    assert torch.equal(other, x + 1)
    assert symmem.find(other)._block is not symmem.find(one)._block  # type: ignore[union-attr]


def test_elements_that_share_memory() -> None:
    @torch.library.custom_op("symmem_test_context::expanded", mutates_args=())
    def expanded(t: torch.Tensor) -> torch.Tensor:
        return t.sum().expand(5)

    with inside():
        made, made_empty = expanded(x), torch.empty_strided((4,), (0,))
    for each in (made, made_empty):
        assert symmem.find(each) is not None
        assert each.stride() == (0,)
        assert symmem.find(each).dtype == torch.uint8  # type: ignore[union-attr]
    assert made.tolist() == [66] * 5


# Autograd, and other modes.


def test_gradients() -> None:
    linear = torch.nn.Linear(4, 2)
    data = torch.randn(5, 4, requires_grad=True)
    linear(data).square().sum().backward()
    expected = [linear.weight.grad, linear.bias.grad, data.grad]
    linear.zero_grad()
    data.grad = None
    with inside():
        hidden = linear(data)
        loss = hidden.square().sum()
        loss.backward()
        with torch.no_grad():
            quiet = linear(data)
        with torch.inference_mode():
            inference = linear(data)
    assert hidden.grad_fn is not None
    assert hidden._version == 0
    for each, wanted in zip((linear.weight.grad, linear.bias.grad, data.grad), expected, strict=True):
        assert each is not None
        assert is_symmetric(each)
        assert torch.equal(each, wanted)  # type: ignore[arg-type]
    for each in (hidden, loss, quiet, inference):
        assert is_symmetric(each)
    assert not quiet.requires_grad
    assert inference.is_inference()


def test_gradients_of_what_is_made_inside_and_used_outside() -> None:
    with inside():
        weight = torch.randn(4, 2, requires_grad=True)
        functional = torch.func.grad(lambda w: (x @ w).sum())(weight.detach())
    assert weight.is_leaf
    (x @ weight).sum().backward()
    assert is_symmetric(functional)
    assert torch.equal(weight.grad, functional)  # type: ignore[arg-type]
    checkpointed = torch.randn(4, 4, requires_grad=True)
    with inside():
        torch.utils.checkpoint.checkpoint(torch.sin, checkpointed, use_reentrant=False).sum().backward()
    assert torch.allclose(checkpointed.grad, checkpointed.cos())  # type: ignore[arg-type]


def test_custom_ops() -> None:
    @torch.library.custom_op("symmem_test_context::several", mutates_args=())
    def several(t: torch.Tensor, n: int) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        return t * n, [t + i for i in range(n)], n

    library = torch.library.Library("symmem_test_context", "FRAGMENT")
    library.define("returns_input(Tensor(a!) t) -> Tensor(a!)")
    library.impl("returns_input", lambda t: t.add_(1), "CPU")
    library.define("implicit(Tensor t) -> Tensor")
    library.impl("implicit", lambda t: t * 2 + 1, "CompositeImplicitAutograd")
    mine = torch.zeros(3)
    with inside():
        first, rest, n = several(x, 2)
        assert torch.ops.symmem_test_context.returns_input(mine) is mine
        implicit = torch.ops.symmem_test_context.implicit(x)
    assert not is_symmetric(mine)
    assert mine.tolist() == [1, 1, 1]
    assert all(is_symmetric(each) for each in (first, *rest, implicit))
    assert torch.equal(first, x * 2)
    assert torch.equal(rest[1], x + 1)
    assert n == 2


class Wrapper(torch.Tensor):
    """A subclass without memory."""

    inner: torch.Tensor  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return cls(func(*(each.inner if isinstance(each, cls) else each for each in args), **(kwargs or {})))


def test_subclasses() -> None:
    with inside():
        made = Wrapper(x) + 1
    assert isinstance(made, Wrapper)
    assert is_symmetric(made.inner)
    assert torch.equal(made.inner, x + 1)


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with inside(), FakeTensorMode():
        made = torch.empty(3) + 1
    assert isinstance(made, FakeTensor)
    with FakeTensorMode(), inside():
        made = torch.empty(3) + torch.zeros(3)
    assert isinstance(made, FakeTensor)


def test_compiled_functions_run_uncompiled() -> None:
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(backend=backend)
    def compiled(t: torch.Tensor) -> torch.Tensor:
        return t.sin() + 1

    with inside():
        assert is_symmetric(compiled(x))  # first seen inside
    assert graphs == 0
    assert not is_symmetric(compiled(x))
    before = graphs
    with inside():
        assert is_symmetric(compiled(x))  # compiled already
    assert graphs == before


# Copies.


def test_copies_and_pickles() -> None:
    with inside():
        made = x + 1
        copied = copy.deepcopy(made)
    plain = copy.deepcopy(made)
    stored = io.BytesIO()
    torch.save(made, stored)
    stored.seek(0)
    for each in (copied, plain, pickle.loads(pickle.dumps(made)), torch.load(stored)):
        assert torch.equal(each, x + 1)
        assert not is_symmetric(each)
        each.zero_()
    assert torch.equal(made, x + 1)


# The context.


def test_what_is_over_is_freed() -> None:
    with inside():
        made = x + 1
    log = log_of(made)
    symmem.collect()
    before = log.live_bytes
    with inside():
        for _ in range(1000):
            made = torch.ones(20_000) * 2
    assert sum(segment.nbytes for segment in log.segments) < 1000 * 2 * 80_000  # the bytes of all requests
    del made
    symmem.collect()
    assert log.live_bytes < before


def test_nested() -> None:
    other = Group.from_store(0, 1, dist.HashStore(), "other")
    context = inside()
    with context:
        one = x + 1
        with context, inside(other):
            two = x + 1
            made = torch.empty(3)
            with inside():
                three = x + 1
            four = x + 1
        five = x + 1
    logs = [log_of(each) for each in (one, two, made, three, four, five)]
    assert [log.group for log in logs] == [resolve_group(), other, other, resolve_group(), other, resolve_group()]
    assert log_of(x + 1) is None
    counts = [(log.count - log.entries, log.entries) for log in (logs[0], logs[1])]
    assert counts == [(3, 2), (3, 1)]  # every tensor was allocated once, from one of the arenas


def test_an_error_inside() -> None:
    other = Group.from_store(0, 1, dist.HashStore(), "other")
    with inside():
        with pytest.raises(ZeroDivisionError), inside(other):
            raise ZeroDivisionError
        assert log_of(x + 1).group is resolve_group()
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            x @ x
        assert is_symmetric(x + 1)
    assert not is_symmetric(x + 1)


class Interrupt(KeyboardInterrupt):
    pass


def interrupted(at: int) -> bool:
    """Enter and leave a block; a signal comes at one of the lines that run meanwhile. Returns whether it came."""
    lines = itertools.count()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        # The first lines of __exit__ cannot be protected.
        is_first = frame.f_code.co_name in ("__exit__", "to_the_end") and "/contextlib" not in frame.f_code.co_filename
        if event == "line" and not (is_first and "symmem" in frame.f_globals["__name__"]) and next(lines) == at:
            signal.raise_signal(signal.SIGALRM)
        return trace

    try:
        sys.settrace(trace)
        with inside():
            pass
        sys.settrace(None)
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_an_interrupt_leaves_nothing_entered() -> None:
    def handler(number: int, frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with inside():
            pass
        at = 0
        while interrupted(at):
            assert not _thread.entries, at
            assert not torch._C._len_torch_dispatch_stack(), at
            assert not _python_dispatch._is_in_torch_dispatch_mode, at
            assert signal.getsignal(signal.SIGALRM) is handler, at
            at += 1
        assert at > 100
        with inside():
            made = x + 1
        assert is_symmetric(made)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_as_decorator() -> None:
    @inside()
    def double(t: torch.Tensor, depth: int = 2) -> torch.Tensor:
        return double(t, depth - 1) if depth else t * 2

    assert is_symmetric(double(x))
    assert not is_symmetric(x * 2)


def test_threads() -> None:
    """Threads have separate state; one object serves them all."""
    context, results, step = inside(), {}, threading.Barrier(3, timeout=LONG)
    groups = [Group.from_store(0, 1, dist.HashStore(), f"thread{index}") for index in range(2)]

    def work(index: int) -> None:
        with context, inside(groups[index]):
            step.wait()
            results[index] = [x + index for _ in range(50)]
            step.wait()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    step.wait()
    results[2] = [x + 2 for _ in range(50)]
    step.wait()
    for thread in threads:
        thread.join(LONG)
    for index, group in enumerate(groups):
        assert {log_of(each).group for each in results[index]} == {group}
    assert not any(is_symmetric(each) for each in results[2])


def test_overlapping_threads_leave_torch_as_it_was() -> None:
    """torch has process-wide flags for active modes; it does not compile while they are set."""
    first, second = threading.Event(), threading.Event()

    def outlasts() -> None:
        first.wait(LONG)
        with inside():
            second.set()
            first.clear()
            first.wait(LONG)
            assert _python_dispatch._is_in_torch_dispatch_mode

    thread = threading.Thread(target=outlasts)
    thread.start()
    with inside():
        first.set()
        assert second.wait(LONG)
    while first.is_set():
        pass
    first.set()
    thread.join(LONG)
    assert not _python_dispatch._is_in_torch_dispatch_mode
    assert not _python_dispatch._is_in_any_mode_without_ignore_compile_internals


def test_threads_started_inside_are_not_inside() -> None:
    made: list[torch.Tensor] = []
    with inside():
        thread = threading.Thread(target=lambda: made.append(x + 1))
        thread.start()
        thread.join(LONG)
    assert not is_symmetric(made[0])


def test_the_call_site_is_the_programs() -> None:
    with inside():
        made = torch.nn.functional.gelu(torch.nn.functional.linear(x, x))
    records = log_of(made).recent()
    assert [record.site.code.co_name for record in records] == ["test_the_call_site_is_the_programs"] * len(records)


def test_what_cannot_be() -> None:
    with pytest.raises(GroupError), inside("no such group"):
        pass
    with pytest.raises(symmem.SymmemError), inside(device="meta"):
        pass
    assert not _thread.entries
    with inside():
        made = torch.empty(3)
        with pytest.raises(RuntimeError, match="resiz"):
            made.resize_(1000)


def test_a_full_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMMEM_ENABLE", "arena_size(2MiB),arena_limit(4MiB)")
    small = Group.from_store(0, 1, dist.HashStore(), "small")
    with inside(small):
        made = torch.ones(1000)
        with pytest.raises(ResourceLimitError):
            torch.zeros(10_000_000)
        with pytest.raises(ResourceLimitError):
            made.expand(5000, 1000).contiguous()
        assert log_of(made + 1).group is small


# CUDA, with a fake of torch's allocator.

SEGMENT = 2 << 20


class FakeBlock:
    def __init__(self, pointer: int) -> None:
        self.pointer = pointer


class FakeArena:
    def __init__(self, base: int = 1 << 40, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self.blocks: list[weakref.ref[FakeBlock]] = []
        self.error: BaseException | None = None
        self._base = base

    def enter(self, block: str, frame: Any) -> None:
        pass

    def sub_allocate(self, layout: Any, name: str | None, frame: Any) -> FakeBlock:
        assert (layout.dtype, layout.strides) == (torch.uint8, (1,))
        assert cuda_pools._torch.pool_of_this_thread(self.device.index) is None  # type: ignore[union-attr]
        if self.error:
            raise self.error
        block = FakeBlock(self._base + len(self.blocks) * SEGMENT)
        self.blocks.append(weakref.ref(block))
        return block

    @property
    def live(self) -> int:
        return sum(block() is not None for block in self.blocks)


class FakePool:
    def __init__(self) -> None:
        self.segments: list[int] = []
        self.free: list[int] = []


class FakeTensor:
    def __init__(self, pool: FakePool | None, pointer: int) -> None:
        self.pool, self.pointer = pool, pointer

    def __del__(self) -> None:
        if self.pool:
            self.pool.free.append(self.pointer)


class FakeTorch:
    """A caching allocator: every tensor has a separate piece; a thread that has begun several pools uses the first."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int, FakePool]] = []
        self.pools: weakref.WeakSet[FakePool] = weakref.WeakSet()
        self._alloc = cuda_pools._ALLOC(cuda_pools._alloc)

    def pool(self, device: torch.device) -> FakePool:
        made = FakePool()
        self.pools.add(made)
        return made

    def begin(self, device: int, pool: FakePool) -> None:
        assert all(pool is not each for _, _, each in self.begun)
        self.begun.append((threading.get_ident(), device, pool))

    def end(self, device: int, pool: FakePool) -> None:
        self.begun.remove((threading.get_ident(), device, pool))

    def in_use(self, device: int, pool: FakePool) -> bool:
        return len(pool.free) < len(pool.segments)

    def pool_of_this_thread(self, device: int = 0) -> FakePool | None:
        mine = (threading.get_ident(), device)
        return next((pool for *owner, pool in self.begun if tuple(owner) == mine), None)

    def empty(self, device: int = 0) -> FakeTensor:
        pool = self.pool_of_this_thread(device)
        if pool is None:
            return FakeTensor(None, 0)
        if pool.free:
            return FakeTensor(pool, pool.free.pop())
        pointer = self._alloc(SEGMENT, device, None) or self._alloc(SEGMENT, device, None)
        if not pointer:
            raise torch.OutOfMemoryError("CUDA out of memory")
        pool.segments.append(pointer)
        return FakeTensor(pool, pointer)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTorch]:
    made = FakeTorch()
    monkeypatch.setattr(cuda_pools, "_torch", made)
    monkeypatch.setattr(cuda_pools.cuda_graphs, "is_capturing", lambda device: False)  # type: ignore[attr-defined]
    monkeypatch.setattr(inside, "_arena", lambda self: self._group)
    yield made
    assert not made.begun
    assert not cuda_pools._thread.active
    cuda_pools.sweep()
    assert not cuda_pools._left


def within(arena: FakeArena) -> Any:
    return inside(arena)  # type: ignore[arg-type]


def test_pool_comes_from_the_arena(fake: FakeTorch) -> None:
    arena = FakeArena()
    with within(arena):
        one, two = fake.empty(), fake.empty()
        pointer = two.pointer
        del two
        again = fake.empty()  # reused within the entry
        assert again.pointer == pointer
    assert (one.pointer, again.pointer) == (1 << 40, (1 << 40) + SEGMENT)
    assert fake.empty().pointer == 0
    assert arena.live == 2
    del one
    cuda_pools.sweep()
    assert arena.live == 2  # a pool ends as a whole
    del again
    symmem.collect()
    assert arena.live == 0
    assert not fake.pools


def test_each_entry_has_a_pool(fake: FakeTorch) -> None:
    arena = FakeArena()
    for _ in range(100):
        with within(arena):
            made = fake.empty()
        del made
    assert len(arena.blocks) == 100  # memory of another pool is not reused
    with within(arena):
        assert arena.live == 0


def test_a_pool_without_tensors_keeps_no_arena(fake: FakeTorch) -> None:
    arena = FakeArena()
    with within(arena):
        made = fake.empty()
    gone = weakref.ref(arena)
    del arena
    gc.collect()
    assert gone() is not None
    del made
    gc.collect()
    assert gone() is None


def test_a_forked_child_does_not_touch_the_pools_of_its_parent(fake: FakeTorch) -> None:
    arena = FakeArena()
    gc.disable()
    try:
        with within(arena):
            fake.empty()
        if (child := os.fork()) == 0:
            gc.collect()
            os._exit(0 if arena.live == 1 else 1)
    finally:
        gc.enable()
    assert os.waitpid(child, 0)[1] == 0
    gc.collect()
    assert arena.live == 0


def test_nested_pools(fake: FakeTorch) -> None:
    one, two, device1 = FakeArena(1 << 40), FakeArena(1 << 41), FakeArena(1 << 42, index=1)
    with within(one):
        first = fake.pool_of_this_thread()
        with within(one):
            assert fake.pool_of_this_thread() is first
            with within(two), within(device1):
                inner, other = fake.empty(), fake.empty(1)
            assert fake.pool_of_this_thread() is first
        outer = fake.empty()
    assert [each.pointer for each in (inner, other, outer)] == [1 << 41, 1 << 42, 1 << 40]
    del inner, other, outer, first


def test_pools_of_threads(fake: FakeTorch) -> None:
    arenas = [FakeArena(1 << 40), FakeArena(1 << 41)]
    step, made = threading.Barrier(3, timeout=LONG), {}

    def work(index: int) -> None:
        with within(arenas[index]):
            step.wait()
            made[index] = fake.empty().pointer
            step.wait()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    step.wait()
    assert fake.empty().pointer == 0
    step.wait()
    for thread in threads:
        thread.join(LONG)
    assert made == {0: 1 << 40, 1: 1 << 41}


def fails_once(fake: FakeTorch, arena: FakeArena) -> None:
    arena.error = ResourceLimitError("the arena is full")
    with pytest.raises(torch.OutOfMemoryError):
        fake.empty()
    arena.error = None


def test_why_there_is_no_memory(fake: FakeTorch) -> None:
    arena = FakeArena()
    arena.error = ResourceLimitError("the arena is full")
    with pytest.raises(ResourceLimitError) as caught, within(arena), within(arena):
        fake.empty()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    with within(arena):
        with pytest.raises(torch.OutOfMemoryError):
            fake.empty()
        arena.error = None
        made = fake.empty()
    assert made.pointer
    with pytest.raises(torch.OutOfMemoryError), within(arena):  # noqa: PT012
        fails_once(fake, arena)
        del made
        made = fake.empty()  # memory was available then
        raise torch.OutOfMemoryError("somewhere else")
    with pytest.raises(ZeroDivisionError), within(arena):  # noqa: PT012
        fails_once(fake, arena)
        raise ZeroDivisionError
    arena.error = ResourceLimitError("the arena is full")
    with pytest.raises(ResourceLimitError), within(arena):  # noqa: PT012
        try:
            fake.empty()
        finally:
            raise RuntimeError("another one on the way out")
    arena.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), within(arena):  # noqa: PT012
        with pytest.raises(torch.OutOfMemoryError):
            fake.empty()  # an exception in a callback from C does not reach C's caller
        arena.error = None
    del made


@contextlib.contextmanager
def during_capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(cuda_pools.cuda_graphs, "is_capturing", lambda device: True)  # type: ignore[attr-defined]
        yield


def test_captures(fake: FakeTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = FakeArena()
    with pytest.raises(UnsupportedError, match="captured within"), within(arena), during_capture(monkeypatch):
        fake.empty()


def test_entering_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    with during_capture(monkeypatch), pytest.raises(UnsupportedError, match="cannot be entered"), inside():
        pass


def test_backward_stays_on_the_thread(fake: FakeTorch) -> None:
    assert torch._C._is_multithreading_enabled()
    with within(FakeArena()):
        assert not torch._C._is_multithreading_enabled()
    assert torch._C._is_multithreading_enabled()


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("", "release_lock_on_cudamalloc:True"),
        ("max_split_size_mb:64", "max_split_size_mb:64,release_lock_on_cudamalloc:True"),
        (
            "roundup_power2_divisions:[256:1,512:2,>:4],release_lock_on_cudamalloc:False",
            "roundup_power2_divisions:[256:1,512:2,>:4],release_lock_on_cudamalloc:True",
        ),
    ],
)
def test_allocator_settings(known: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: known)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", put.append)
    cuda_pools._release_lock()
    assert put == [expected]


def test_what_torch_frees_with_is_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(cuda_pools, "_release_lock", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_customAllocator", lambda *pair: given.append(pair), raising=False)
    kept = cuda_pools._Torch(lambda nbytes, device, stream: nbytes + device)
    alloc, free = given[0]
    assert ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)(alloc)(40, 2, None) == 42
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)(free)(1, 2, 3, None)
    assert free == ctypes.cast(ctypes.CDLL(None).labs, ctypes.c_void_p).value
    del kept
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    with pytest.raises(UnsupportedError, match="cudaMallocAsync"):
        cuda_pools._Torch(lambda nbytes, device, stream: 0)


# Several ranks.


def reach_peers() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    with inside(dist.group.WORLD):
        base = torch.full((4, 3), float(rank))
        made = torch.nn.functional.relu(base @ base.T + rank)
        parts = made.split(2)
    handle = symmem.SymmetricTensor.wrap(made).rendezvous()
    handle.barrier()
    for peer in range(world):
        expected = 3.0 * peer**2 + peer
        assert (handle.remote_tensor(peer) == expected).all()
        part = symmem.SymmetricTensor.wrap(parts[1])
        assert (part.remote_tensor(peer) == expected).all()
        found = symmem.find(base)
        assert found is not None
        assert (found.remote_tensor(peer) == peer).all()
    handle.barrier()


def test_peers(pools: Any) -> None:
    pools.get(2).run(reach_peers)


def diverge() -> None:
    group = resolve_group()
    with inside(), pytest.raises(DivergenceError, match="diverge"):
        symmem.collect() if torch.ones(3 + dist.get_rank()).any() else None
    assert not _thread.entries
    group.close()


def test_divergence(new_pool: Any) -> None:
    new_pool(2).run(diverge)
