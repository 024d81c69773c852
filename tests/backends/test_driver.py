"""The wrapper over cuda.bindings.driver: the arguments of every call, with the real types and without a GPU."""

from __future__ import annotations

import ctypes
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

from symmem.backends import driver as module
from symmem.backends.driver import Driver
from symmem.errors import (
    BackendUnavailableError,
    OutOfMemoryError,
    ResourceLimitError,
    SymmemError,
    UnsupportedError,
)

cu: Any = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

try:
    HAS_DRIVER = bool(ctypes.CDLL("libcuda.so.1"))
except OSError:
    HAS_DRIVER = False

RESULTS = {
    "cuInit": (),
    "cuDeviceGetCount": (2,),
    "cuDeviceGet": (0,),
    "cuDeviceGetName": (b"H200" + b"\0" * 92,),
    "cuDeviceGetUuid": (cu.CUuuid(),),
    "cuDeviceGetAttribute": (1,),
    "cuDeviceCanAccessPeer": (1,),
    "cuDevicePrimaryCtxRetain": (cu.CUcontext(5),),
    "cuCtxPopCurrent": (cu.CUcontext(5),),
    "cuThreadExchangeStreamCaptureMode": (cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL,),
    "cuMemGetAllocationGranularity": (1 << 21,),
    "cuMemCreate": (cu.CUmemGenericAllocationHandle(77),),
    "cuMemExportToShareableHandle": (9,),
    "cuMemImportFromShareableHandle": (cu.CUmemGenericAllocationHandle(78),),
    "cuMemAddressReserve": (cu.CUdeviceptr(1 << 40),),
    "cuMulticastCreate": (cu.CUmemGenericAllocationHandle(79),),
    "cuMulticastGetGranularity": (1 << 21,),
    "cuStreamCreate": (cu.CUstream(6),),
    "cuMemHostAlloc": (1 << 20,),
    "cuMemHostGetDevicePointer": (cu.CUdeviceptr(1 << 20),),
    "cuKernelGetFunction": (cu.CUfunction(8),),
}


class Recorder:
    """Replaces the module: its types are real, its functions only record their arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.codes: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(cu, name)
        if not name.startswith("cu"):
            return real

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            assert len(arguments) == parameters_of(real), f"{name}{arguments}"
            if not HAS_DRIVER:  # the function converts its arguments and then fails
                with pytest.raises(RuntimeError, match=r"libcuda|NVIDIA driver"):
                    real(*arguments)
            code = getattr(cu.CUresult, self.codes.get(name, "CUDA_SUCCESS"))
            return code, *RESULTS.get(name, ())

        return function


def parameters_of(function: Any) -> int:
    """The number of parameters of a function of cuda.bindings, from the first line of its documentation."""
    (inside,) = re.findall(r"\((.*)\)", inspect.getdoc(function).split("\n")[0])  # type: ignore[union-attr]
    return len(re.sub(r"\[[^\]]*\]*", "", inside).split(",")) if inside else 0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(module, "_import_bindings", lambda: recorder)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Recorder, "cuGetErrorString", staticmethod(lambda code: (code, b"some text")), raising=False)
    yield recorder
    Driver.context.cache_clear()
    Driver._own_stream.cache_clear()


def test_every_call_fits_the_package(recorder: Recorder) -> None:
    driver = Driver()
    assert driver.identities() == ("00" * 16,) * 2
    assert driver.name(1) == "H200"
    for attribute in ("MULTICAST_SUPPORTED", "HANDLE_TYPE_FABRIC_SUPPORTED", "COMPUTE_CAPABILITY_MAJOR"):
        assert driver.attribute(0, attribute) == 1
    assert driver.can_access_peer(0, 1)
    with driver.on(1):
        assert driver.granularity(1, False) == 1 << 21
        assert driver.create(1, 1 << 21, False) == 77
        assert driver.export_descriptor(77) == 9
        assert driver.import_descriptor(9) == 78
        assert driver.import_fabric(bytes(64)) == 78
        assert driver.reserve(1 << 22, 1 << 21) == 1 << 40
        driver.map(1 << 40, 1 << 21, 77)
        driver.allow(1, 1 << 40, 1 << 21)
        driver.zero(1, 1 << 40, 1 << 21)
        assert driver.quiesce(1)
        driver.unmap(1 << 40, 1 << 21)
        driver.unreserve(1 << 40, 1 << 22)
        driver.release(77)
        assert driver.multicast_granularity(1) == 1 << 21
        assert driver.multicast_create(1 << 21, 2, False) == 79
        driver.multicast_add(79, 1)
        driver.multicast_bind(79, 77, 1 << 21)
        driver.multicast_unbind(79, 1, 1 << 21)
        assert driver.pinned(16) == (1 << 20, 1 << 20)
        driver.function(4)
        driver.enter(1)
    names = [name for name, _arguments in recorder.calls]
    assert names.index("cuCtxPushCurrent") < names.index("cuMemCreate") < names.index("cuCtxPopCurrent")
    modes = [arguments[0] for name, arguments in recorder.calls if name == "cuThreadExchangeStreamCaptureMode"]
    assert [mode.name for mode in modes] == ["CU_STREAM_CAPTURE_MODE_RELAXED", "CU_STREAM_CAPTURE_MODE_GLOBAL"]


def test_memory_is_asked_for_as_it_must_be(recorder: Recorder) -> None:
    driver = Driver()
    for fabric, types in ((False, 1), (True, 9)):
        driver.create(1, 1 << 21, fabric)
        nbytes, prop, flags = recorder.calls[-1][1]
        assert (nbytes, flags) == (1 << 21, 0)
        assert prop.type == cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        assert prop.location.type == cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        assert prop.location.id == 1
        # Read the struct itself: the package cannot represent two flags together.
        assert ctypes.c_int.from_address(int(prop.getPtr()) + 4).value == types
    driver.allow(1, 1 << 40, 1 << 21)
    address, nbytes, (access,), count = recorder.calls[-1][1]
    assert (address, nbytes, count) == (1 << 40, 1 << 21, 1)
    assert access.location.id == 1
    assert access.flags == cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    driver.multicast_create(1 << 22, 4, True)
    (prop,) = recorder.calls[-1][1]
    assert (prop.numDevices, prop.size, prop.handleTypes) == (4, 1 << 22, 9)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", OutOfMemoryError),
        ("CUDA_ERROR_NOT_PERMITTED", UnsupportedError),
        ("CUDA_ERROR_NOT_SUPPORTED", UnsupportedError),
        ("CUDA_ERROR_OPERATING_SYSTEM", ResourceLimitError),
        ("CUDA_ERROR_INVALID_VALUE", SymmemError),
    ],
)
def test_errors_are_named(name: str, kind: type[SymmemError], recorder: Recorder) -> None:
    driver = Driver()
    recorder.codes["cuMemCreate"] = name
    with pytest.raises(SymmemError, match=rf"cuMemCreate: {name} \(some text\)") as caught:
        driver.create(0, 1 << 21, False)
    assert type(caught.value) is kind
    assert caught.value.hint


def test_a_wait_amid_a_capture_is_not_forced(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    recorder.codes["cuCtxSynchronize"] = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    assert not driver.quiesce(0)
    recorder.codes["cuCtxSynchronize"] = "CUDA_ERROR_LAUNCH_FAILED"
    assert driver.quiesce(0)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    recorder.calls.clear()
    assert not driver.quiesce(0)
    assert recorder.calls == []


def test_what_is_missing_is_named(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match=r"torch .* (without CUDA|no usable CUDA device)"):
        Driver()
    recorder.codes["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    with pytest.raises(BackendUnavailableError, match="CUDA_ERROR_NO_DEVICE") as caught:
        Driver()
    assert "CUDA_VISIBLE_DEVICES" in (caught.value.hint or "")
    del recorder.codes["cuInit"]
    monkeypatch.setitem(RESULTS, "cuDeviceGetCount", (0,))
    with pytest.raises(BackendUnavailableError, match="no NVIDIA GPU"):
        Driver()

    def fail(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(Recorder, "cuInit", staticmethod(fail), raising=False)
    with pytest.raises(BackendUnavailableError, match=r"driver library cannot be loaded.*libcuda\.so\.1"):
        Driver()
