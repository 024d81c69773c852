"""Operator calls that C repeats: on the CPU, with a table of functions that reports a GPU.

Compares the launches with those from Python, argument by argument.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import random
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import LONG
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from symmem import native
from symmem.backends import cuda_signals, kernel_status, kernel_words
from symmem.distributed import SymmemProcessGroup, process_group
from symmem.distributed.methods import METHODS
from symmem.errors import GroupError, InvalidArgumentError, PeerTimeoutError, SymmemError, UnsupportedError
from symmem.group.group import Group
from symmem.memory import registry
from symmem.ops import collectives, eager
from symmem.ops import functions as ops
from symmem.ops.collectives import KINDS, REPEATED
from symmem.ops.engines import cuda
from symmem.ops.engines.base import Engines
from symmem.ops.engines.collective_kernels import KERNELS
from symmem.ops.engines.cuda import CudaEngine, call_type
from symmem.tools.commands import doctor

try:
    native.load_module()
except (ImportError, OSError) as error:
    pytest.skip(f"there is no module in C: {error}", allow_module_level=True)

WORLD, RANK = 4, 1
CPU = torch.device("cpu")
CUDA, CONTEXT, STREAM = 2, 0xC0, 0x57


class DLTensor(ctypes.Structure):
    _fields_ = (
        *(("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("ordinal", ctypes.c_int32), ("ndim", ctypes.c_int32)),
        *(("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)),
        *(("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64)),
    )


class Exchange(ctypes.Structure):
    _fields_ = (
        *(("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("allocate", "export", "take", "read", "stream")),
    )


Read = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
Stream = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype, _capsule_of.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_NAME = b"dlpack_exchange_api"
_TORCHS: Any = Exchange.from_address(_pointer_of(torch.Tensor.__dlpack_c_exchange_api__, _NAME))


_KEPT: list[object] = []  # the module keeps their addresses, until it gets others


class Launched(SimpleNamespace):
    """A launch: function, blocks, threads, stream, and the values of its arguments."""


class Gpu:
    """The driver for launches from C and from Python. ``by`` records the caller."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.stream = STREAM
        self.ordered: list[tuple[int, int, bool]] = []
        self.by: list[str] = []
        self.code, self.capturing, self.current = 0, 0, CONTEXT
        self.meanwhile: Callable[[], object] = lambda: None
        self.words = (ctypes.c_uint32 * (kernel_words.NBYTES // 4))()
        torchs_read = Read(_TORCHS.read)

        def read(tensor: Any, out: Any) -> int:
            try:
                code = int(torchs_read(tensor, out))
            except (RuntimeError, BufferError):
                return -1
            if out[0].type == 1:
                out[0].type = CUDA
            return code

        def stream(kind: int, ordinal: int, out: Any) -> int:
            assert (kind, ordinal) == (CUDA, 0)
            out[0] = self.stream
            return 0

        def launch(function: int, *rest: Any) -> int:
            blocks, threads, on, arguments = rest[0], rest[3], rest[7], rest[8]
            self._note("C", function, blocks, threads, on, arguments)
            self.meanwhile()
            return self.code

        def is_capturing(stream: int, out: Any) -> int:
            assert stream == self.stream
            out[0] = self.capturing
            return 0

        def context(out: Any) -> int:
            out[0] = self.current
            return 0

        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self._kept = (
            Read(read),
            Stream(stream),
            ctypes.CFUNCTYPE(integer, pointer, *[ctypes.c_uint] * 7, pointer, pointer, pointer)(launch),
            ctypes.CFUNCTYPE(integer, pointer, ctypes.POINTER(integer))(is_capturing),
            ctypes.CFUNCTYPE(integer, ctypes.POINTER(pointer))(context),
        )
        at = [ctypes.cast(each, pointer).value for each in self._kept]
        self.exchange = Exchange(major=1, minor=3, read=at[0], stream=at[1])
        self.capsule = _capsule_of(ctypes.addressof(self.exchange), _NAME, None)
        self.addresses = dict(zip(("launch", "is_capturing", "context"), at[2:], strict=True))

    def _note(self, by: str, function: int, blocks: int, threads: int, stream: int, arguments: int) -> None:
        call = call_type(WORLD).from_address(ctypes.c_void_p.from_address(arguments).value or 0)
        fields = {name: getattr(call, name) for name, _kind in call._fields_}  # type: ignore[misc]
        fields = {name: list(value) if isinstance(value, ctypes.Array) else value for name, value in fields.items()}
        self.by.append(by)
        self.launched.append(Launched(function=function, blocks=blocks, threads=threads, stream=stream, **fields))

    # The interface for launches from Python.

    def order(self, before: int, after: int, capturing: bool) -> None:
        self.ordered.append((before, after, capturing))

    @property
    def bindings(self) -> Gpu:
        return self

    def cuLaunchKernel(self, *arguments: Any) -> tuple[Any]:
        self._note("Python", arguments[0], arguments[1], arguments[4], arguments[8], arguments[9])
        return (SimpleNamespace(name="CUDA_ERROR_NOT_PERMITTED") if self.code else 0,)

    def fill(self, address: int, word: int, nbytes: int, stream: int) -> None:
        """There are no workspaces."""

    def read(self, address: int, nbytes: int, stream: int) -> bytes:
        return bytes(nbytes)  # there are no workspaces

    def on(self, ordinal: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def context(self, ordinal: int) -> int:
        return CONTEXT

    def pinned(self, nbytes: int) -> tuple[int, int]:
        return ctypes.addressof(self.words), ctypes.addressof(self.words)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    monkeypatch.setattr(cuda_signals, "load_driver", lambda: gpu)
    monkeypatch.setattr(eager, "_driver", lambda: gpu.addresses)
    monkeypatch.setattr(eager, "_module", None)
    monkeypatch.setattr(native, "module", native.module.__wrapped__)  # a new one
    monkeypatch.setattr(eager, "run", eager._nothing)
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", gpu.capsule)
    monkeypatch.setattr("torch._C._cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", lambda ordinal: gpu.stream, raising=False)
    monkeypatch.setattr("torch._C._cuda_isCurrentStreamCapturing", lambda: bool(gpu.capturing), raising=False)
    functions = {name: 1000 + number for number, name in enumerate(itertools.chain(*KERNELS.values()))}
    monkeypatch.setattr(cuda, "finish_stream", lambda device: None)
    monkeypatch.setattr(cuda, "program", lambda *_: SimpleNamespace(functions=functions))
    _KEPT.append(gpu)
    cuda_signals.device_of.cache_clear()
    yield gpu
    cuda_signals.device_of.cache_clear()
    kernel_status.devices.clear()


class StubGroup:
    """The part of a group that a call uses."""

    name, rank, size, closed = "g", RANK, WORLD, False
    settings = SimpleNamespace(signal_timeout=20.0, algorithms="built-in", collective_check="off")

    def __init__(self, process_group: Any = None) -> None:
        self.extensions = {Engines: Engines()}
        self.process_group = process_group

    def extension(self, owner: type) -> Any:
        return self.extensions[owner]  # type: ignore[index]

    def when_lost(self, function: Callable[[int], None]) -> None:
        self.lose = function

    def lost(self) -> tuple[int, ...]:
        return ()

    def fail(self, operation: str, error: BaseException) -> None:
        """There are no other ranks."""


def with_engine(group: Any) -> Any:
    engine: Any = CudaEngine(group, torch.device("cuda", 0))
    engine.resume = lambda: engine._given_up.__setitem__(0, 0)  # after a refusal; there are no other ranks
    engine._areas = tuple(range(4096, 4096 * (WORLD + 1), 4096))
    group.extension(Engines)[CPU] = engine
    return group


@pytest.fixture
def group(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = with_engine(StubGroup())

    def open_group(group: Any) -> Any:
        if group.closed:
            raise GroupError("closed")
        return group

    monkeypatch.setattr(ops, "open_group", open_group)
    return made


def call(name: str, x: torch.Tensor, group: Any, out: Any = None, **options: Any) -> torch.Tensor:
    result: torch.Tensor = getattr(ops, name)(x, group, out=out, **options)
    return result


def shape_of(name: str, *dims: int) -> tuple[int, ...]:
    return (WORLD, *dims) if name in ("reduce_scatter", "all_to_all") else dims


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "all_reduce": [{}, {"reduction": "max"}],
    "all_gather": [{}],
    "reduce_scatter": [{"reduction": "avg"}],
    "all_to_all": [{}],
    "broadcast": [{}, {"root": 3}],
}
CASES = [(name, options) for name, each in OPTIONS.items() for options in each]


FORMS = [
    (name, options, form)
    for name, options in CASES
    for form in ("new", "in place", "out")
    if form != "in place" or KINDS[name].in_place is None  # other forms need more than one launch
]


@pytest.mark.parametrize(("name", "options", "form"), FORMS)
def test_the_next_call_launches_the_same(name: str, options: dict[str, Any], form: str, group: Any, gpu: Gpu) -> None:
    for dims in ((5,), (3, 4), (2, 1, 7), ()):
        gpu.by.clear()
        gpu.launched.clear()
        addresses = []
        for _ in range(3):
            x = torch.zeros(shape_of(name, *dims), dtype=torch.bfloat16)
            shape = KINDS[name].shape(x.shape, WORLD)
            out = {"new": None, "in place": x, "out": x.new_empty(tuple(shape))}[form]
            result = call(name, x, group, out, **options)
            assert out is None or result is out
            assert (list(result.shape), result.dtype) == (list(shape), x.dtype)
            addresses.append((x.data_ptr(), result.data_ptr()))
        assert gpu.by == ["Python", "C", "C"]
        assert [(each.source, each.out) for each in gpu.launched] == addresses
        for each in gpu.launched:
            each.source = each.out = 0
        assert gpu.launched[0] == gpu.launched[1] == gpu.launched[2]


def test_each_kind_of_call_has_its_own(group: Any, gpu: Gpu) -> None:
    """More calls than the cache holds, in any order: C launches the same as Python would."""
    rng = random.Random(1)
    wanted: dict[Any, Launched] = {}
    for _turn in range(3000):
        name, options = rng.choice(CASES)
        dtype = rng.choice((torch.bfloat16, torch.float32))
        dims = tuple(rng.choice((1, 2, 3, 5, 8)) for _ in range(rng.randrange(5)))
        x = torch.empty(shape_of(name, *dims), dtype=dtype)
        like_x = KINDS[name].in_place is None
        out = rng.choice((None, x if like_x else None, x.new_empty(tuple(KINDS[name].shape(x.shape, WORLD)))))
        result = call(name, x, group, out, **options)
        found = gpu.launched.pop()
        assert (found.source, found.out) == (x.data_ptr(), result.data_ptr())
        found.source = found.out = 0
        key = name, str(options), x.shape, result.nbytes, dtype
        assert wanted.setdefault(key, found) == found
    assert gpu.by.count("C") > 800
    assert gpu.by.count("Python") > 1100


def test_calls_on_two_streams_are_ordered(group: Any, gpu: Gpu) -> None:
    x, out = torch.ones(8), torch.empty(8)
    streams = [STREAM, STREAM, STREAM + 8, STREAM + 8, STREAM]
    for gpu.stream in streams:
        call("all_reduce", x, group, out)
    assert [each.stream for each in gpu.launched] == streams
    assert gpu.ordered == [(STREAM, STREAM + 8, False), (STREAM + 8, STREAM, False)]
    assert gpu.by == ["Python", "C", "Python", "C", "Python"]
    gpu.ordered.clear()
    gpu.capturing = 1
    for gpu.stream in (STREAM + 16, STREAM + 24):
        call("all_reduce", x, group, out)
    gpu.capturing = 0
    for gpu.stream in (STREAM, STREAM + 8):
        call("all_reduce", x, group, out)
    assert gpu.ordered == [(STREAM + 16, STREAM + 24, True), (STREAM, STREAM + 8, False)]


def test_an_option_by_any_name(group: Any, gpu: Gpu) -> None:
    x = torch.ones(4)
    ops.all_reduce(x, group, "max")
    ops.all_reduce(x, group, "".join(["m", "ax"]))  # an equal string
    ops.all_reduce(x, group, "min")
    assert gpu.by == ["Python", "C", "Python"]
    with pytest.raises(InvalidArgumentError, match="reduction must be one of"):
        ops.all_reduce(x, group, "product")


def test_an_option_with_its_own_equality(group: Any, gpu: Gpu) -> None:
    """Its comparison is not called, because it might change the table during the search."""

    class Named(str):
        asked = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Named.asked += 1
            return str.__eq__(self, other)

    x, first = torch.ones(4), Named("sum")
    ops.all_reduce(x, group, first)
    Named.asked = 0
    assert eager.run(KINDS["all_reduce"], x, group, first, None) is not None
    assert eager.run(KINDS["all_reduce"], x, group, Named("sum"), None) is None
    assert Named.asked == 0


class Subclass(torch.Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_what_else_takes_part_is_left_to_python(group: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = torch.ones(4), torch.ones(4)

    def again(x: torch.Tensor = x, out: torch.Tensor | None = None) -> Any:
        return eager.run(KINDS["all_reduce"], x, group, "sum", out)

    for first in (None, out, x):
        ops.all_reduce(x, group, out=first)
    assert again() is not None
    assert again(out=out) is out
    assert again(out=x) is x
    gpu.launched.clear()
    forward_mode = torch.autograd.forward_ad.dual_level()
    for scope in (Functions(), Dispatches(), torch.autograd.profiler.profile(use_cpu=True), forward_mode):
        with scope:
            assert again() is None
    grad = torch.ones(4, requires_grad=True)
    others = {
        "a gradient": grad,
        "a parameter": torch.nn.Parameter(torch.ones(4)),
        "negative": torch._neg_view(torch.ones(4)),
        "strides": torch.ones(8)[::2],
        "a subclass": torch.ones(4).as_subclass(Subclass),
        "no memory": torch.ones(4, device="meta"),
        "zeros of no memory": torch._efficientzerotensor((4,)),
        "functional": torch._to_functional_tensor(torch.ones(4)),
        "sparse": torch.ones(4).to_sparse(),
        "another dtype": torch.ones(4, dtype=torch.float64),
        "another shape": torch.ones(2, 2),
        "empty": torch.ones(0),
        "no tensor": 4,
    }
    for what, other in others.items():
        assert again(other) is None, what  # type: ignore[arg-type]
        if what not in ("no tensor",):
            assert again(out=other) is None, what  # type: ignore[arg-type]
    assert torch.vmap(lambda x: torch.ones(()) if again(x) is None else x)(torch.zeros(4, 4)).sum() == 4
    assert gpu.launched == []
    with torch.no_grad():
        assert again(grad) is not None
        assert again(out=grad) is grad
        assert again(others["a parameter"]) is not None  # type: ignore[arg-type]
    with torch.inference_mode():
        inferred = torch.ones(4)
        assert again(inferred, out=inferred) is inferred
        assert again().is_inference()
    assert again(inferred, out=inferred) is inferred
    for what, value in (("capturing", 1), ("current", CONTEXT + 1)):
        monkeypatch.setattr(gpu, what, value)
        gpu.launched.clear()
        assert again() is None
        assert gpu.launched == []
        monkeypatch.undo()
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", gpu.capsule)


def test_what_is_conjugated_is_left_to_python(group: Any, gpu: Gpu) -> None:
    """Such a view has the memory of the tensor, but other values."""
    x, out = torch.ones(4, dtype=torch.complex64), torch.ones(4, dtype=torch.complex64)

    def again(x: torch.Tensor, out: torch.Tensor | None) -> Any:
        return eager.run(KINDS["broadcast"], x, group, 0, out)

    for given in (None, out, x):
        ops.broadcast(x, group, out=given)
        assert again(x, given) is not None
    gpu.launched.clear()
    conjugated = x.conj()
    for source, given in ((conjugated, None), (conjugated, out), (conjugated, conjugated), (x, out.conj())):
        assert again(source, given) is None
    assert gpu.launched == []


def test_a_kernel_that_failed_is_told_of(group: Any, gpu: Gpu) -> None:
    x = torch.ones(4)
    for _ in range(2):
        ops.all_reduce(x, group)
    gpu.words[0:4] = [1, 0, 2, 0]  # operation 1, channel 0, peer 2, group 0
    gpu.launched.clear()
    with pytest.raises(PeerTimeoutError):
        ops.all_reduce(x, group)
    assert gpu.launched == []


def test_a_launch_that_fails_is_tried_and_named_by_python(group: Any, gpu: Gpu) -> None:
    x = torch.ones(4)
    for _ in range(2):
        ops.all_reduce(x, group)
    gpu.code = 1
    with pytest.raises(SymmemError, match="collective kernel cannot be launched"):
        ops.all_reduce(x, group)
    assert gpu.by == ["Python", "C", "C", "Python"]


def test_results_are_not_written_over_what_is_read(group: Any, gpu: Gpu) -> None:
    room = torch.zeros(WORLD * 4 + 4)
    for _ in range(2):
        ops.all_gather(torch.ones(4), group, out=torch.zeros(WORLD, 4))
        ops.all_reduce(torch.ones(8), group, out=torch.ones(8))
    gpu.launched.clear()
    for x in (room[:4], room[5:9], room[WORLD * 4 - 1 :][:4]):
        with pytest.raises(InvalidArgumentError, match="x and out share memory"):
            ops.all_gather(x, group, out=room[: WORLD * 4].view(WORLD, 4))
    with pytest.raises(InvalidArgumentError, match="x and out share memory"):
        ops.all_reduce(room[:8], group, out=room[4:12])
    assert gpu.launched == []
    ops.all_reduce(torch.ones(8), group, out=torch.ones(8))  # brings the group back in step
    same = room[:8]
    ops.all_reduce(same, group, out=room[:8])  # two tensors over the same memory
    ops.all_gather(room[WORLD * 4 :], group, out=room[: WORLD * 4].view(WORLD, 4))
    assert gpu.by[-2:] == ["C", "C"]
    ops.all_gather(room[4:8], group, out=room[: WORLD * 4].view(WORLD, 4))  # this rank's row
    assert gpu.by[-1] == "Python"


def test_out_that_is_not_as_before(group: Any, gpu: Gpu) -> None:
    x = torch.ones(3)
    ops.all_gather(x, group, out=torch.zeros(WORLD, 3))
    for out in (torch.zeros(WORLD * 3), torch.zeros(WORLD, 3, dtype=torch.float64), torch.zeros(3, WORLD)):
        with pytest.raises(InvalidArgumentError, match="out must have"):
            ops.all_gather(x, group, out=out)
    strided = torch.zeros(3, WORLD).t()
    ops.all_gather(x, group, out=strided)
    assert gpu.by == ["Python", "Python"]


def test_autograd_learns_of_what_is_written(group: Any, gpu: Gpu) -> None:
    x, out = torch.ones(4), torch.ones(4)
    for written in (out, x):
        ops.all_reduce(x, group, out=written)
        before = written._version
        ops.all_reduce(x, group, out=written)
        assert written._version == before + 1
    assert gpu.by == ["Python", "C"] * 2


def test_another_table_is_another_launch(group: Any, gpu: Gpu) -> None:
    x = torch.ones(1 << 18)
    for _ in range(2):
        ops.all_reduce(x, group)
    engine = group.extension(Engines)[CPU]
    choice = engine.table.all_reduce[0]._replace(world=WORLD, nbytes=None, kernel="one_shot", blocks=3)
    engine.use(engine.table._replace(all_reduce=(choice,)))
    for _ in range(2):
        ops.all_reduce(x, group)
    assert gpu.by == ["Python", "C"] * 2
    assert gpu.launched[0].function != gpu.launched[2].function == gpu.launched[3].function


def test_a_call_whose_kernel_depends_on_symmetric_memory(group: Any, gpu: Gpu) -> None:
    """C repeats it for results in other memory."""

    class Range:
        def __init__(self, pointer: int, nbytes: int) -> None:
            self.pointer, self.nbytes = pointer, nbytes

        def at(self, address: int) -> Any:
            return SimpleNamespace(closed=True)

    x = torch.zeros(1 << 19)  # 2 MiB
    outs = [x.new_empty(WORLD, 1 << 19) for _ in range(3)]
    outs.sort(key=torch.Tensor.data_ptr)
    below, inside, above = outs
    for out in outs:
        ops.all_gather(x, group, out)
    assert gpu.by == ["Python", "C", "C"]
    made = Range(inside.data_ptr() - 64, inside.nbytes + 64)
    registry.register(made)
    gpu.by.clear()
    for out in (below, inside, above, inside[:2]):
        with contextlib.suppress(InvalidArgumentError):  # of the wrong shape
            ops.all_gather(x, group, out)
    assert gpu.by == ["C", "Python", "C"]
    del made
    ops.all_gather(x, group, inside)
    ops.all_gather(x, group, inside)
    assert gpu.by[-1] == "C"


def test_several_launches_are_made_by_python(group: Any, gpu: Gpu) -> None:
    y = torch.zeros(80 << 20, dtype=torch.uint8).view(torch.bfloat16)  # needs several launches
    ops.all_reduce(y, group, out=y)
    count = len(gpu.by)
    ops.all_reduce(y, group, out=y)
    assert gpu.by == ["Python"] * (2 * count)
    assert count > 1


# Groups.


def test_a_closed_group(group: Any, gpu: Gpu) -> None:
    x = torch.ones(4)
    for _ in range(2):
        ops.all_reduce(x, group)
    group.closed = True
    with pytest.raises(GroupError, match="closed"):
        ops.all_reduce(x, group)
    assert gpu.by == ["Python", "C"]


class Torchs:
    """A process group in torch's table."""


def test_who_means_a_process_group(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[Any, Any] = {}
    world = SimpleNamespace(default_pg=None, pg_map=table)
    monkeypatch.setattr(eager.dist.distributed_c10d, "_world", world)  # type: ignore[attr-defined]
    a, b = Torchs(), Torchs()
    groups = [with_engine(StubGroup(each)) for each in (a, b)]
    groups[1].name = "other"
    x = torch.ones(4)
    for group in groups:
        ops.functional(KINDS["all_reduce"], group, x, ("sum",))  # type: ignore[attr-defined]
        eager.learn(KINDS["all_reduce"], group, x, "sum", None, torch.ones(4))
        plan = group.extension(Engines)[CPU]._plans["all_reduce", x.shape, torch.float32, "sum"][0]
        plan.call.step = 90 + groups.index(group)
        eager.learn(KINDS["all_reduce"], group, x, "sum", None, torch.ones(4))

    def meant(by: Any) -> int | None:
        gpu.launched.clear()
        found = eager.run(KINDS["all_reduce"], x, by, "sum", None)
        assert (found is None) == (not gpu.launched)
        return gpu.launched[0].step - 90 if gpu.launched else None

    assert [meant(each) for each in (None, "g", "other", a, b)] == [None] * 5  # torch does not know them
    table.update({a: 1, b: 2})
    world.default_pg = b
    assert [meant(each) for each in (None, "g", "other", "no", a, b, *groups, 3)] == [1, 0, 1, None, 0, 1, 0, 1, None]
    world.default_pg = a
    del table[b]  # destroyed
    assert [meant(each) for each in (None, "other", b)] == [0, None, None]
    gone = weakref.ref(groups[0].extension(Engines)[CPU])
    del groups[0], group
    gc.collect()
    assert gone() is None
    assert [meant(each) for each in (None, "g", a)] == [None] * 3


def one_process_group(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, world: Any) -> tuple[Torchs, Any]:
    """A process group known to ``world``, and its group, after one operation."""
    monkeypatch.setattr(eager.dist.distributed_c10d, "_world", world)  # type: ignore[attr-defined]
    process_group, x = Torchs(), torch.ones(4)
    group = with_engine(StubGroup(process_group))
    world.pg_map[process_group] = 1
    ops.functional(KINDS["all_reduce"], group, x, ("sum",))  # type: ignore[attr-defined]
    eager.learn(KINDS["all_reduce"], group, x, "sum", None, torch.ones(4))
    return process_group, group


# Calls through the dispatcher.


def dispatched(name: str, x: torch.Tensor, *rest: Any, **out: torch.Tensor) -> Any:
    """Call an operator, as the dispatcher does for a CUDA tensor."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCUDA)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.symmem, name).default.redispatch(keys, x, *rest, **out)


@pytest.fixture(params=["Python", "C++"])
def by(request: pytest.FixtureRequest, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The language of the kernels that repeat calls through the dispatcher."""
    monkeypatch.setattr(collectives, "_may_be_repeated", lambda x: True)
    if request.param == "Python":
        monkeypatch.setattr(eager, "_library", False)
        yield "Python"
    else:
        eager.register(REPEATED)
        assert eager._library, "see the warning"
        yield "C++"
        eager._library.symmem_use(None)


@pytest.fixture
def named(by: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group that operators know by its name."""
    process_group, group = one_process_group(gpu, monkeypatch, SimpleNamespace(default_pg=None, pg_map={}))
    monkeypatch.setattr(collectives, "group_named", lambda name: group)
    monkeypatch.setattr("symmem.ops.refusals.resolve_group", lambda name: group)
    group.extension(Engines)[CPU].calls.clear()
    gpu.by.clear()
    return group, process_group


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.is_tree])  # which take more launches
def test_an_operator_is_repeated(name: str, named: Any, gpu: Gpu) -> None:
    kind = KINDS[name]
    rest = [*(["sum"] if kind.option.startswith("str") else [1] if kind.option else []), "g"]
    for turn in range(3):
        x = torch.ones(shape_of(name, 4))
        out = kind.result(x, WORLD)
        made = dispatched(name, x, *rest)
        assert (made.shape, made.data_ptr() == x.data_ptr()) == (out.shape, False)
        before = out._version
        assert dispatched(f"{name}_out", x, *rest, out=out) is None
        assert out._version == before + 1
        assert gpu.by == (["C"] if turn else ["Python"]) * 2
        gpu.by.clear()
        if kind.in_place is None:
            before = x._version
            assert dispatched(f"{name}_", x, *rest) is None
            assert x._version == before + 1
            assert gpu.by == ["C" if turn else "Python"]
        gpu.by.clear()


def test_an_operator_with_a_gradient(by: str, named: Any, gpu: Gpu) -> None:
    """Autograd needs Python. Below it, C++ repeats the launch."""
    for _ in range(3):
        x = torch.ones(4, requires_grad=True)
        assert dispatched("all_reduce", x, "sum", "g").requires_grad
        with torch.no_grad():
            assert not dispatched("all_reduce", x, "sum", "g").requires_grad
    assert gpu.by == (["Python", "C"] * 3 if by == "Python" else ["Python", *"CCCCC"])
    with pytest.raises(UnsupportedError, match="has no gradient"):
        dispatched("all_reduce_out", x, "sum", "g", out=torch.empty(4))


in_cpp = pytest.mark.parametrize("by", ["C++"], indirect=True)


def below_autograd(name: str, *arguments: Any, **out: torch.Tensor) -> Any:
    """Call an operator, as the dispatcher does for a CUDA tensor in inference mode."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.symmem, name).default.redispatch(keys, *arguments, **out)


@in_cpp
def test_inference_mode(named: Any, gpu: Gpu) -> None:
    with torch.inference_mode():
        x, out = torch.ones(4), torch.ones(4)
        for _ in range(2):
            assert below_autograd("all_reduce", x, "max", "g").shape == (4,)
            assert below_autograd("all_reduce_out", x, "max", "g", out=out) is None
    assert gpu.by == ["Python", "Python", "C", "C"]
    with pytest.raises(InvalidArgumentError, match="is a tensor of inference mode"):
        below_autograd("all_reduce_out", x, "max", "g", out=out)


@in_cpp
@pytest.mark.parametrize("calls", [dispatched, below_autograd])
def test_what_operators_leave_to_python(calls: Any, named: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, dtype=torch.complex64)
    for _ in range(2):
        calls("broadcast", x, 0, "g")
        calls("broadcast_out", x, 0, "g", out=torch.ones(4, dtype=torch.complex64))
    assert gpu.by == ["Python", "Python", "C", "C"]
    gpu.by.clear()
    others = {
        "negative": torch._neg_view(torch.ones(4, dtype=torch.complex64)),
        "conjugated": x.conj(),
        "strides": torch.ones(8, dtype=torch.complex64)[::2],
        "another dtype": torch.ones(4),
        "another shape": torch.ones(2, 2, dtype=torch.complex64),
        "empty": torch.ones(0),
    }
    for what, other in others.items():
        calls("broadcast", other, 0, "g")
        calls("broadcast_out", other, 0, "g", out=other.clone())
        assert "C" not in gpu.by, what
    for out in (x.conj(), others["strides"], x.clone()[:0].expand(0)):
        with contextlib.suppress(InvalidArgumentError):  # for the last
            calls("broadcast_out", x, 0, "g", out=out)
        assert "C" not in gpu.by
    room = torch.ones(8, dtype=torch.complex64)
    with pytest.raises(InvalidArgumentError, match="x and out share memory"):
        calls("broadcast_out", room[:4], 0, "g", out=room[2:6])
    calls("broadcast", x, 1, "g")  # another root
    calls("broadcast", x, 0, "g\0")  # another group, to torch
    for what, value in (("capturing", 1), ("current", CONTEXT + 1), ("stream", STREAM + 8)):
        with monkeypatch.context() as patch:
            patch.setattr(gpu, what, value)
            calls("broadcast", x, 0, "g")
    assert "C" not in gpu.by
    gpu.stream = STREAM
    calls("broadcast", x, 0, "g")  # back on the first stream
    calls("broadcast", x, 0, "g")
    assert gpu.by[-1] == "C"


@in_cpp
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # by torch's forward mode
def test_a_derivative_in_forward_mode_is_left_to_python(named: Any, gpu: Gpu) -> None:
    x = torch.ones(4)
    for _ in range(2):
        dispatched("all_reduce", x, "sum", "g")
    with torch.autograd.forward_ad.dual_level():
        dispatched("all_reduce", x, "sum", "g")
        with pytest.raises(UnsupportedError, match="forward mode"):
            dispatched("all_reduce", torch.autograd.forward_ad.make_dual(x, x), "sum", "g")
    assert gpu.by == ["Python", "C", "C"]


@in_cpp
def test_a_destroyed_group_is_left_to_python(named: Any, gpu: Gpu) -> None:
    x = torch.ones(4)
    for _ in range(2):
        dispatched("all_reduce", x, "sum", "g")
    assert gpu.by == ["Python", "C"]
    named[0].closed = True
    dispatched("all_reduce", x, "sum", "g")
    assert gpu.by == ["Python", "C", "Python"]


@in_cpp
def test_operators_leave_nothing_behind(named: Any, gpu: Gpu) -> None:
    x, out = torch.ones(4), torch.ones(4)
    values = [x, out, named[0], KINDS["all_reduce"], named[0].extension(Engines)[CPU]]

    def many() -> None:
        for _ in range(300):
            dispatched("all_reduce", x, "sum", "g")
            dispatched("all_reduce_out", x, "sum", "g", out=out)
        gpu.launched.clear()
        gpu.by.clear()
        gc.collect()

    many()
    counts = [sys.getrefcount(each) for each in values]
    many()
    assert [sys.getrefcount(each) for each in values] == pytest.approx(counts, abs=50)


@in_cpp
def test_operators_wait_for_no_thread_that_has_the_interpreter_lock(named: Any, gpu: Gpu) -> None:
    """Another thread runs Python during a launch, and calls the operator too."""
    x, done = torch.ones(4), []
    dispatched("all_reduce", x, "sum", "g")

    def other() -> None:
        gpu.meanwhile = lambda: None
        thread = threading.Thread(target=lambda: done.append(dispatched("all_reduce", x, "sum", "g")))
        thread.start()
        thread.join(LONG)

    gpu.meanwhile = other
    dispatched("all_reduce", x, "sum", "g")
    assert len(done) == 1
    assert gpu.by == ["Python", "C", "C"]


def test_without_a_compiler_operators_use_python(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(collectives, "_may_be_repeated", lambda x: True)
    monkeypatch.setattr(eager, "_library", None)
    monkeypatch.setenv("CXX", "false")
    held, group = one_process_group(gpu, monkeypatch, SimpleNamespace(default_pg=None, pg_map={}))
    monkeypatch.setattr(collectives, "group_named", lambda name: group)
    gpu.by.clear()
    for _ in range(3):
        dispatched("all_reduce", torch.ones(5), "sum", "g")
    assert gpu.by == ["Python", "C", "C"]
    (record,) = caplog.records
    assert "slower calls through Python: false fails" in record.getMessage()
    del held


def test_an_operator_that_is_interrupted_is_refused_once(named: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = named[0].extension(Engines)[CPU]
    refused: list[object] = []

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(eager, "run", interrupted)
    monkeypatch.setattr(type(engine), "refuse", lambda self, *arguments: refused.append(arguments))
    with pytest.raises(KeyboardInterrupt):
        dispatched("all_reduce", torch.ones(4), "sum", "g")
    assert len(refused) == 1
    assert gpu.by == []


def test_an_interrupt_is_not_lost(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's table is a property in Python, so a signal handler may run in it."""

    class World:
        pg_map: dict[Any, Any] = {}  # noqa: RUF012

        @property
        def default_pg(self) -> Any:
            raise KeyboardInterrupt

    held = one_process_group(gpu, monkeypatch, World())
    gpu.launched.clear()
    with pytest.raises(KeyboardInterrupt):
        eager.run(KINDS["all_reduce"], torch.ones(4), None, "sum", None)
    assert gpu.launched == []
    del held


def test_a_call_without_memory_for_its_result_is_refused(group: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks must know, because they launch it."""
    allocate, is_full = torch.empty_like, False

    def empty_like(x: torch.Tensor) -> torch.Tensor:
        if is_full:
            raise torch.OutOfMemoryError("there is no memory")
        return allocate(x)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr("symmem.ops.refusals.resolve_group", lambda group: group)
    engine = group.extension(Engines)[CPU]
    for _ in range(3):
        ops.all_reduce(torch.ones(4), group)
    assert not engine.gave_up
    is_full = True
    with pytest.raises(torch.OutOfMemoryError):
        ops.all_reduce(torch.ones(4), group)
    assert engine._calls_before == 1
    assert engine.gave_up


def test_a_group_stays_while_it_is_used(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may drop it during the call, but the kernel uses its memory."""
    held = [one_process_group(gpu, monkeypatch, SimpleNamespace(default_pg=None, pg_map={}))]
    group, there = weakref.ref(held[0][1]), []

    def drop() -> None:
        held.clear()
        gc.collect()
        there.append(group() is not None)

    gpu.meanwhile = drop
    assert eager.run(KINDS["all_reduce"], torch.ones(4), "g", "sum", None) is not None
    assert there == [True]
    gc.collect()
    assert group() is None


def test_the_first_call_while_another_device_is_current(group: Any, gpu: Gpu) -> None:
    x = torch.ones(4)
    for gpu.current in (CONTEXT + 1, CONTEXT, CONTEXT + 1):
        ops.all_reduce(x, group)
    assert gpu.by == ["Python", "C", "Python"]


def test_another_device_of_the_group(group: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4)
    for _ in range(2):
        ops.all_reduce(x, group)
    assert gpu.by == ["Python", "C"]
    group.extension(Engines)[CPU].calls.clear()
    group.extension(Engines)[CPU].calls = eager._begun().Calls(
        group=weakref.ref(group),
        process_group=None,
        name="g",
        ordinal=1,
        context=CONTEXT,
        status=0,
        given_up=0,
        last_stream=0,
    )
    for _ in range(2):  # learnt for the GPU 1; the tensors say that they are on 0
        ops.all_reduce(x, group)
    assert gpu.by == ["Python", "C", "Python", "Python"]


# Methods of process groups.


@pytest.fixture
def served(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A process group of the backend symmem, with tensors that seem to be on a GPU."""
    names = [name for name, method in METHODS.items() if method.layout is not None]
    for name in names:  # restored after the test
        monkeypatch.setattr(SymmemProcessGroup, name, vars(SymmemProcessGroup)[name])
    made: Any = SymmemProcessGroup(dist.HashStore(), 0, 1, timedelta(seconds=LONG))
    world = SimpleNamespace(default_pg=None, pg_map={made: 1})
    monkeypatch.setattr(eager.dist.distributed_c10d, "_world", world)  # type: ignore[attr-defined]
    made._group = with_engine(StubGroup(made))
    monkeypatch.setattr(process_group, "_is_on_cuda", lambda tensors: True)
    monkeypatch.setattr(ops, "open_group", lambda group: group)
    monkeypatch.setattr(ops, "_name", lambda group: group.name)
    monkeypatch.setattr(collectives, "group_named", lambda name: made._group)
    yield made
    made._group.close = lambda: None
    made.shutdown()


def options_of(kind: Any, **values: Any) -> Any:
    made = kind()
    for name, value in {"asyncOp": False, **values}.items():
        setattr(made, name, value)
    return made


def method_calls() -> dict[str, tuple[Callable[[], list[Any]], Any]]:
    """Methods by name in torch 2.11: what makes the tensors of a call, and the options."""
    c10d: Any = torch._C._distributed_c10d
    flat, rows = (lambda: torch.ones(12)), (lambda: torch.ones(WORLD * 12))
    total, root = {"reduceOp": dist.ReduceOp.SUM}, {"rootRank": 2}
    return {
        "allreduce": (lambda: [[flat()]], options_of(c10d.AllreduceOptions, **total)),
        "broadcast": (lambda: [[flat()]], options_of(c10d.BroadcastOptions, **root)),
        "_allgather_base": (lambda: [rows(), flat()], options_of(c10d.AllgatherOptions)),
        "_reduce_scatter_base": (lambda: [flat(), rows()], options_of(c10d.ReduceScatterOptions, **total)),
        "alltoall_base": (lambda: [rows(), rows(), [], []], options_of(c10d.AllToAllOptions)),
    }


@pytest.mark.parametrize("name", method_calls())
def test_a_method_is_repeated(name: str, served: Any, gpu: Gpu) -> None:
    """It makes the same launch as Python, and counts the call."""
    make, options = method_calls()[name]
    addresses, works = [], []
    for turn in range(4):
        arguments = make()
        works.append(getattr(served, name)(*arguments, options))
        out, x = [arguments[0][0]] * 2 if isinstance(arguments[0], list) else arguments[:2]
        addresses.append((x.data_ptr(), out.data_ptr()))
        assert out._version >= 1
        assert served.counts == {(METHODS[name].operator, ""): turn + 1}
    assert gpu.by == ["Python", "C", "C", "C"]
    assert all(work.wait() for work in works)
    assert [(each.source, each.out) for each in gpu.launched] == addresses
    for each in gpu.launched:
        each.source = each.out = 0
    assert gpu.launched[1:] == gpu.launched[:1] * 3
    assert vars(SymmemProcessGroup)[name].__wrapped__.__name__ == name


def test_a_method_that_cpp_calls(served: Any, gpu: Gpu) -> None:
    """Torch's C++ finds the method as it finds one in Python."""
    from_cpp: Any = torch._C._distributed_c10d.ProcessGroup.allreduce
    make, total = method_calls()["allreduce"]
    for _ in range(3):
        assert from_cpp(served, *make(), total).wait()
    assert gpu.by == ["Python", "C", "C"]


def test_what_a_method_leaves_to_python(served: Any, gpu: Gpu) -> None:
    c10d: Any = torch._C._distributed_c10d
    make, total = method_calls()["allreduce"]
    for _ in range(2):
        served.allreduce(*make(), total)
    assert gpu.by == ["Python", "C"]
    gpu.by.clear()
    served.allreduce(*make(), options_of(c10d.AllreduceOptions, reduceOp=dist.ReduceOp.MAX))
    served.allreduce([torch.ones(13)], total)
    served.allreduce([torch.ones(12, dtype=torch.float64)], total)
    served.allreduce([torch.ones(24)[::2]], total)
    with torch.autograd.profiler.profile(use_cpu=True):
        served.allreduce(*make(), total)
    gpu.capturing = 1
    served.allreduce(*make(), total)
    gpu.capturing = 0
    assert gpu.by == ["Python"] * 6
    served.allreduce(tensors=make()[0], opts=total)  # named, so the inner group serves it
    with pytest.raises(TypeError):
        served.allreduce()
    with pytest.raises(TypeError):
        served.allreduce([3], total)
    assert len(gpu.by) == 6
    served._group.closed = True
    served.allreduce(*make(), total)
    assert gpu.by == ["Python"] * 7


def test_operands_without_dimensions() -> None:
    """A group of one rank may exchange a number with itself."""
    x, out = torch.ones(()), torch.ones(())
    operands: Any = METHODS["alltoall_base"].operands
    assert operands(SimpleNamespace(size=1), out, x, [], [], None)[0].shape == (1,)


def test_a_method_that_is_not_sound(gpu: Gpu) -> None:
    module = eager._begun()
    parts: dict[str, Any] = {"kind": 1, "python": print, "reductions": None, "has_root": False, "count": 1, "work": 2}
    for wrong in ({"layout": 3}, {"layout": -1}, {"layout": 0, "reductions": []}):
        with pytest.raises(ValueError, match="layout"):
            module.Method(**{**parts, **wrong})
    assert module.Method(layout=0, **parts).__wrapped__ is print


def test_methods_leave_nothing_behind(served: Any, gpu: Gpu) -> None:
    make, total = method_calls()["allreduce"]
    (tensors,) = make()
    values = [tensors, tensors[0], total, served, process_group._LAUNCHED]
    served.allreduce(tensors, total)
    counts = [sys.getrefcount(each) for each in values]
    for _ in range(500):
        served.allreduce(tensors, total)
    assert gpu.by[-1] == "C"
    assert [sys.getrefcount(each) for each in values] == pytest.approx(counts, abs=50)


# References.


def test_nothing_is_left_behind(group: Any, gpu: Gpu) -> None:
    x, out = torch.ones(4), torch.ones(4)
    option = "".join(["s", "um"])
    for given in (None, x, out):
        ops.all_reduce(x, group, option, out=given)
    values = [x, out, option, group, None, KINDS["all_reduce"], torch.Tensor, group.extension(Engines)[CPU].calls]

    def many() -> None:
        for _ in range(500):
            for given in (None, x, out):
                eager.run(KINDS["all_reduce"], x, group, option, given)
            eager.run(KINDS["all_reduce"], x, "nobody", option, None)
            eager.run(KINDS["all_reduce"], torch._neg_view(x), group, option, None)
        gpu.launched.clear()
        gpu.by.clear()
        gc.collect()

    many()
    counts, blocks = [sys.getrefcount(each) for each in values], [sys.getallocatedblocks()]
    for _ in range(3):
        many()
        blocks.append(sys.getallocatedblocks())
    assert [sys.getrefcount(each) for each in values] == pytest.approx(counts, abs=50)
    # 500 blocks or more each time, if a call leaves one. Other threads of the process allocate too, but not each time.
    assert min(later - earlier for earlier, later in itertools.pairwise(blocks)) < 300
    held = sys.getrefcount(option)
    group.extension(Engines)[CPU].calls.clear()
    assert sys.getrefcount(option) < held


def test_what_is_forgotten_while_it_runs(group: Any, gpu: Gpu) -> None:
    """By another thread, because the module releases the interpreter lock during a launch."""
    x = torch.ones(4)
    engine = group.extension(Engines)[CPU]
    ops.all_reduce(x, group)

    def forget() -> None:
        thread = threading.Thread(target=lambda: engine.use(engine.table))
        thread.start()
        thread.join(LONG)
        assert not thread.is_alive()

    gpu.meanwhile = forget
    for _ in range(50):
        assert ops.all_reduce(x, group) is not None
    assert gpu.by == ["Python"] + ["C", "Python"] * 25


def test_arguments_that_are_not_sound(gpu: Gpu) -> None:
    module = eager._begun()
    with pytest.raises(TypeError, match="takes 5 arguments, not 2"):
        module.run(1, 2)
    made = {"name": "g", "ordinal": 0, "context": 1, "status": 0, "given_up": 0, "last_stream": 0}
    for groups in ((StubGroup, None), (weakref.ref(StubGroup), StubGroup)):
        with pytest.raises(TypeError, match="weak"):
            module.Calls(group=groups[0], process_group=groups[1], **made)
    calls = module.Calls(group=weakref.ref(StubGroup), process_group=None, **made)
    given: dict[str, Any] = {"kind": 1, "option": None, "x": torch.ones(1), "form": 0, "out": torch.ones(1)}
    given |= {"new_shape": None, "may_be_same": True, "is_outside": False}
    given |= {"function": 1, "blocks": 1, "threads": 1, "arguments": b"1" * 24}
    for wrong in ({"form": 3}, {"source_at": 17}, {"out_at": 17}, {"source_at": -1}, {"arguments": b"1" * 5000}):
        with pytest.raises(ValueError, match="outside of the arguments"):
            calls.add(**{**given, "source_at": 0, "out_at": 8, **wrong})
    assert calls.add(**given, source_at=0, out_at=16)


def test_a_table_of_functions_that_is_not_known(group: Any, gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.exchange.major = 2
    for _ in range(3):
        ops.all_reduce(torch.ones(4), group)
    assert gpu.by == ["Python"] * 3
    (record,) = caplog.records
    assert "version 2.3 of DLPack's exchange API is not supported" in record.getMessage()


def test_a_table_by_another_name(group: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ctypes.create_string_buffer(b"another")
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", _capsule_of(1, other, None))
    for _ in range(3):
        ops.all_reduce(torch.ones(4), group)
    assert gpu.by == ["Python"] * 3


def test_a_python_without_a_global_lock(group: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else known(name))
    for _ in range(3):
        ops.all_reduce(torch.ones(4), group)
    assert gpu.by == ["Python"] * 3


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("no-such-compiler", "No such file"), ("false", "false fails"), ("gcc '", "No closing quotation")],
)
def test_without_a_compiler(
    compiler: str,
    why: str,
    group: Any,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(3):
        ops.all_reduce(torch.ones(4), group)
    assert gpu.by == ["Python"] * 3
    assert group.extension(Engines)[CPU].calls is None
    (record,) = caplog.records
    assert "slower code in Python" in record.getMessage()
    assert why in record.getMessage()
    assert why in doctor._native_module()


def test_a_group_of_this_process(gpu: Gpu) -> None:
    """A group from a store. Calls name it by the object or by its name, and here only by the object."""
    from torch.distributed import HashStore

    group = with_engine(Group.from_store(RANK, WORLD, HashStore(), "stored"))
    x = torch.ones(4)
    for _ in range(2):
        ops.all_reduce(x, group)
        ops.all_reduce(x, "stored")
    assert gpu.by == ["Python", "Python", "C", "Python"]
    group.close()
    with pytest.raises(GroupError):
        ops.all_reduce(x, group)
