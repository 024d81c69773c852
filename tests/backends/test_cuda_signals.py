"""The host side of signals on CUDA streams: the arguments of a launch, and the error of a failure."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from symmem.backends import cuda_signals, kernel_status
from symmem.backends.cuda_signals import CudaSignals
from symmem.backends.kernel_words import NBYTES
from symmem.backends.signal_kernels import FLAG_BARRIER, OPERATIONS, SOURCE
from symmem.errors import OutOfMemoryError, PeerLostError, PeerTimeoutError, UnsupportedError

WORLD = 3


class Code(int):
    name = "CUDA_ERROR_OUT_OF_MEMORY"


class Call(ctypes.Structure):
    """``struct Call`` of the kernels, declared a second time."""

    _fields_ = (
        ("pads", ctypes.c_uint64 * WORLD),
        ("status", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        *((word, ctypes.c_uint32) for word in ("channel", "rank", "peer", "group", "strict")),
    )


class StubDriver:
    """Records launches; ``codes`` are the results of the next launches."""

    def __init__(self) -> None:
        self.bindings = self
        self.launched: list[tuple[Any, ...]] = []
        self.calls: list[Call] = []
        self.codes: list[int] = []
        self.entered: list[int] = []
        self._memory = (ctypes.c_uint32 * (NBYTES // 4))(*[9] * (NBYTES // 4))

    def cuLaunchKernel(self, *arguments: Any) -> tuple[int]:
        self.launched.append(arguments)
        call = Call.from_address(ctypes.c_void_p.from_address(arguments[9]).value or 0)
        self.calls.append(Call.from_buffer_copy(call))  # the driver copies the arguments at the launch too
        return (Code(self.codes.pop(0) if self.codes else 0),)

    def enter(self, ordinal: int) -> None:
        self.entered.append(ordinal)

    def on(self, ordinal: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def pinned(self, nbytes: int) -> tuple[int, int]:
        assert nbytes == ctypes.sizeof(self._memory)
        return ctypes.addressof(self._memory), 0xABC0


class StubKernels:
    def __init__(self, driver: Any, ordinal: int, source: str, names: Any, macros: Any, **_: str) -> None:
        assert (source, names) == (SOURCE, (*OPERATIONS, FLAG_BARRIER))
        self.functions = {name: f"{name}/{macros['WORLD']}" for name in names}


class StubGroup:
    name, rank, size = "g", 1, WORLD
    gone: tuple[int, ...] = ()

    def when_lost(self, function: Callable[[int], None]) -> None:
        self.lose = function

    def lost(self) -> tuple[int, ...]:
        return self.gone


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    stub = StubDriver()
    monkeypatch.setattr(cuda_signals, "load_driver", lambda: stub)
    monkeypatch.setattr(cuda_signals, "CompiledKernels", StubKernels)
    monkeypatch.setattr("torch._C._cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", lambda ordinal: 70 + ordinal, raising=False)
    cuda_signals.device_of.cache_clear()
    yield stub
    cuda_signals.device_of.cache_clear()
    kernel_status.devices.clear()


def signals(group: Any = None, pads: tuple[int, ...] = (0x1000, 0x2000, 0x3000)) -> CudaSignals:
    return CudaSignals(group or StubGroup(), torch.device("cuda", 0), pads)  # type: ignore[arg-type]


def test_what_a_launch_gets(driver: StubDriver) -> None:
    mine = signals()
    mine.barrier(3, 1.5)
    mine.put_signal(2, 4, 300.0)
    mine.wait_signal(0, 63, 0.25)
    shapes = [(launch[0], launch[1:7], launch[7:9], launch[10]) for launch in driver.launched]
    assert shapes == [
        ("barrier/3", (1, 1, 1, 32, 1, 1), (0, 70), 0),
        ("put_signal/3", (1, 1, 1, 1, 1, 1), (0, 70), 0),
        ("wait_signal/3", (1, 1, 1, 1, 1, 1), (0, 70), 0),
    ]
    for call in driver.calls:
        assert list(call.pads) == [0x1000, 0x2000, 0x3000]
        assert (call.status, call.rank, call.group, call.strict) == (0xABC0, 1, 0, 0)
    words = [(call.limit, call.channel, call.peer) for call in driver.calls]
    assert words == [(1_500_000_000, 3, 1), (300_000_000_000, 4, 2), (250_000_000, 63, 0)]


def test_arguments_are_laid_out_once(driver: StubDriver) -> None:
    mine = signals()
    for _ in range(3):
        mine.barrier(0, 10.0)
    assert len({launch[9] for launch in driver.launched}) == 1
    other = StubGroup()
    signals(other).barrier(0, 10.0)
    assert driver.calls[-1].group == 1  # the report of a failure names the group


def test_a_thread_that_has_not_used_cuda_is_helped(driver: StubDriver) -> None:
    driver.codes = [201, 0]
    signals().barrier(0, 10.0)
    assert driver.entered == [0]
    assert len(driver.launched) == 2


def test_a_launch_that_fails_is_named(driver: StubDriver) -> None:
    driver.codes = [2]
    with pytest.raises(OutOfMemoryError, match="cannot be launched"):
        signals().barrier(0, 10.0)


@pytest.mark.parametrize(("operation", "text"), list(enumerate(OPERATIONS, 1)))
def test_what_a_kernel_left_is_raised_by_name(operation: int, text: str, driver: StubDriver) -> None:
    group, bystander = StubGroup(), signals()
    mine = signals(group)
    mine.check()
    driver._memory[:4] = [operation, 7, 2, 1]
    for use in (mine.check, lambda: mine.put_signal(2, 0, 1.0), bystander.check):
        with pytest.raises(PeerTimeoutError, match=f"rank 1, group g, step {text} on channel 7. rank 2 did") as caught:
            use()
        assert caught.value.peers == (2,)
    assert driver.launched == []
    group.gone = (2,)
    with pytest.raises(PeerLostError, match="process ended"):
        mine.check()


def test_a_kernel_that_stops_amid_a_call_is_named(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the call has checked the status, torch or the launch fails."""
    group = StubGroup()
    mine = signals(group)

    def stop(*_: Any) -> int:
        driver._memory[:4] = [1, 7, 2, 0]
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr("torch._C._cuda_getDevice", stop, raising=False)
        with pytest.raises(PeerTimeoutError, match="barrier on channel 7") as caught:
            mine.barrier(0, 1.0)
    assert "launch failure" in str(caught.value.__cause__)

    driver._memory[:4] = [0] * 4
    launch = driver.cuLaunchKernel

    def stopped(*arguments: Any) -> tuple[int]:
        driver._memory[:4] = [1, 6, 0, 0]
        return launch(*arguments)

    driver.codes = [719]
    with monkeypatch.context() as patch:
        patch.setattr(mine, "_launch_kernel", stopped)
        with pytest.raises(PeerTimeoutError, match=r"rank 1, group g, step barrier on channel 6. rank 0 did"):
            mine.barrier(0, 1.0)


def test_ranks_that_cannot_be_reached_are_named(driver: StubDriver) -> None:
    mine = signals(pads=(0x1000, 0x2000, 0))
    for use in (lambda: mine.barrier(0, 1.0), lambda: mine.put_signal(2, 0, 1.0)):
        with pytest.raises(UnsupportedError, match=r"ranks \[2\] are not load/store reachable") as caught:
            use()
        assert caught.value.peers == (2,)
    mine.put_signal(0, 0, 1.0)
    mine.wait_signal(2, 0, 1.0)  # the other rank writes into this rank's pad
    assert len(driver.launched) == 2


def test_the_kernels_are_there() -> None:
    assert all(f'extern "C" __global__ void {name}(' in SOURCE for name in OPERATIONS)
