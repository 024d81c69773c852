"""Named errors for things that torch and NVSHMEM4Py lack or refuse, without ranks or a GPU."""

from __future__ import annotations

import builtins
import ctypes
import dataclasses
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import symmem
from symmem.backends import cuda_signals, get_backend, gpu, signal_kernels, torch_transport
from symmem.backends.collective_heap import job_group
from symmem.backends.nvshmem_library import NvshmemLibrary
from symmem.backends.pads import MAX_RANKS, SLOTS, PadSlots
from symmem.backends.torch_transport import BACKENDS, TorchTransport
from symmem.errors import (
    BackendUnavailableError,
    GroupError,
    InvalidArgumentError,
    OutOfMemoryError,
    ResourceLimitError,
)

GPU = torch.device("cuda", 0)


class Symm:
    """The part of torch's ``_SymmetricMemory`` that chooses a transport."""

    def __init__(self, active: str | None, refusal: str = "") -> None:
        self.active, self.refusal = active, refusal
        self.chosen: list[str] = []

    def get_backend(self, device: torch.device) -> str | None:
        assert device == GPU
        return self.active

    def set_backend(self, name: str) -> None:
        self.chosen.append(name)
        if self.refusal:
            raise RuntimeError(f"{self.refusal}\nException raised from set_backend at ...")

    def empty_strided_p2p(self, *_args: object) -> torch.Tensor:
        raise RuntimeError(f"{self.refusal}\nException raised from alloc at ...")


def use(monkeypatch: pytest.MonkeyPatch, active: str | None, refusal: str = "") -> Symm:
    symm = Symm(active, refusal)
    monkeypatch.setattr(torch_transport, "_symmetric_memory", lambda: symm)
    return symm


def test_symmem_below_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    symm = use(monkeypatch, "SYMMEM")
    with pytest.raises(BackendUnavailableError, match=r"is symmem itself in this process") as info:
        TorchTransport("CUDA").activate(GPU)
    assert "'native'" in str(info.value.hint)
    assert not symm.chosen


# Probing.


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@pytest.mark.parametrize("name", ["nvshmem", *BACKENDS.values()])
def test_probe_names_torch_without_cuda(name: str) -> None:
    with pytest.raises(BackendUnavailableError, match=r"built without CUDA") as info:
        get_backend(name).probe()
    assert repr(name) in info.value.what
    assert "install a CUDA build" in str(info.value.hint)


def test_probe_names_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="finds no usable GPU"):
        get_backend("pytorch_cuda").probe()


def test_probe_names_what_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda name: None)
    symm = use(monkeypatch, "CUDA")
    get_backend("pytorch_cuda").probe()
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match=r"'pytorch_nccl' .* built without NCCL"):
        get_backend("pytorch_nccl").probe()
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    with pytest.raises(BackendUnavailableError, match=r"NCCL 2\.27"):
        get_backend("pytorch_nccl").probe()
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    get_backend("pytorch_nccl").probe()
    monkeypatch.setattr(torch._C._distributed_c10d, "_is_nvshmem_available", lambda: False, raising=False)
    with pytest.raises(BackendUnavailableError, match="cannot load NVSHMEM"):
        get_backend("pytorch_nvshmem").probe()
    monkeypatch.delattr(torch._C._distributed_c10d, "_is_nvshmem_available")
    with pytest.raises(BackendUnavailableError, match="built without NVSHMEM"):
        get_backend("pytorch_nvshmem").probe()
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match=r"without torch\.distributed"):
        get_backend("pytorch_cuda").probe()
    assert symm.chosen == []  # a probe changes nothing


# One transport per process.


def test_the_active_transport_is_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    symm = use(monkeypatch, "CUDA", "SymmetricMemory does not find allocation backend CUDA")  # as in 2.11
    TorchTransport("CUDA").activate(GPU)
    assert symm.chosen == []


def test_another_transport_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    symm = use(monkeypatch, "CUDA")
    TorchTransport("NVSHMEM").activate(GPU)
    assert symm.chosen == ["NVSHMEM"]


def test_a_frozen_transport_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "NVSHMEM", "Backend can not be changed after use.")
    with pytest.raises(BackendUnavailableError, match=r"uses its NVSHMEM transport .* CUDA: Backend can not") as info:
        TorchTransport("CUDA").activate(GPU)
    assert "Exception raised" not in str(info.value)
    for text in ("'pytorch_nvshmem'", "TORCH_SYMMMEM=CUDA", "'native'"):
        assert text in str(info.value.hint)


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        ("CUDA driver error: out of memory", OutOfMemoryError),
        ("nvshmem_malloc failed", OutOfMemoryError),
        ("CUDA driver error: operation not permitted", ResourceLimitError),
    ],
)
def test_torchs_reason_is_told(refusal: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "CUDA", refusal)
    with pytest.raises(kind, match=f"100 bytes on cuda:0: {refusal}"):
        TorchTransport("CUDA").empty(100, GPU)


# Multicast.


def settings(multicast: str) -> Any:
    return dataclasses.replace(symmem.Group.from_store(0, 1, dist.HashStore()).settings, multicast=multicast)


def test_libraries_are_told_that_multicast_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "")
    for name in BACKENDS:
        TorchTransport(name).obey(settings("auto"))
    assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == ""
    with pytest.raises(BackendUnavailableError, match="NCCL") as info:
        TorchTransport("NCCL").obey(settings("off"))
    assert "NCCL_NVLS_ENABLE=0" in str(info.value.hint)
    TorchTransport("CUDA").obey(settings("off"))
    assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == os.environ["NVSHMEM_DISABLE_NVLS"] == "1"
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    TorchTransport("NCCL").obey(settings("off"))


# Groups and devices.


def test_a_cuda_device_is_needed() -> None:
    for name in ("nvshmem", *BACKENDS.values()):
        with pytest.raises(InvalidArgumentError, match="not on cpu"):
            get_backend(name).allocate(4, torch.device("cpu"), None)


def group(rank: int, size: int, name: str) -> symmem.Group:
    return symmem.Group.from_store(rank, size, dist.HashStore(), name)


def test_which_group_is_the_job() -> None:
    job, part, larger = group(0, 4, "job"), group(0, 2, "part"), group(0, 8, "larger")
    assert job_group("b", job, None) is job
    assert job_group("b", None, job) is job
    assert job_group("b", part, job) is job  # smaller than the group before: a subgroup
    again = group(0, 4, "again")
    assert job_group("b", again, job) is again
    with pytest.raises(GroupError, match="began with the 4 ranks of 'job'"):
        job_group("b", larger, job)
    with pytest.raises(GroupError, match="there is no process group"):
        job_group("b", None, None)


def test_the_slots_of_pads() -> None:
    slots = PadSlots(1000)
    taken = [slots.take() for _ in range(SLOTS)]
    assert taken == [1024 + slots.slot_nbytes * number for number in range(SLOTS)]
    assert slots.extent == taken[-1] + slots.slot_nbytes
    with pytest.raises(ResourceLimitError):
        slots.take()
    slots.give_back(taken[3])
    assert slots.take() == taken[3]
    assert PadSlots(0).take() == 256


@pytest.fixture
def for_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """symmem.torch_backend is enabled."""
    monkeypatch.setattr(signal_kernels, "for_torch", True)
    signal_kernels.torch_nbytes.cache_clear()
    yield
    signal_kernels.torch_nbytes.cache_clear()


def test_slots_have_room_for_the_pads_of_pytorchs_kernels(for_torch: None) -> None:
    slots = PadSlots(1000)
    pads, nbytes = cuda_signals.CudaSignals.torch_pads([slots.take()] * MAX_RANKS)
    assert nbytes > 0
    assert pads[0] + nbytes <= slots.take()


# NVSHMEM4Py.


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_nvshmem4py_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "nvshmem")
    with pytest.raises(BackendUnavailableError, match="needs NVSHMEM4Py: No module") as info:
        NvshmemLibrary()
    assert info.value.hint == "pip install nvshmem4py-cu13"


class UniqueId:
    def __init__(self, nbytes: int = 128) -> None:
        self.bytes = ctypes.create_string_buffer(nbytes)
        self.ptr = ctypes.addressof(self.bytes)
        self._data = types.SimpleNamespace(nbytes=nbytes)


@pytest.fixture
def nvshmem4py(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules in the shape of NVSHMEM4Py 0.4.1."""
    root, core, bindings = (types.ModuleType(f"nvshmem{part}") for part in ("", ".core", ".bindings"))
    root.core, root.bindings = core, bindings  # type: ignore[attr-defined]
    cuda, cuda_core = types.ModuleType("cuda"), types.ModuleType("cuda.core")
    fakes: Any = types.SimpleNamespace(core=core, bindings=bindings, calls=[])

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def set_current(self) -> None:
            fakes.calls.append(("set_current", self.index))

    def get_unique_id(empty: bool = False) -> UniqueId:
        unique = UniqueId()
        unique.bytes.raw = b"\0" * 128 if empty else bytes(range(128))
        return unique

    def init(device: Any, uid: UniqueId, rank: int, nranks: int, initializer_method: str) -> None:
        fakes.calls.append(("init", device.index, uid.bytes.raw, rank, nranks, initializer_method))

    vars(core).update(
        get_version=lambda: types.SimpleNamespace(libnvshmem_version="3.4.5"),
        get_unique_id=get_unique_id,
        init=init,
        finalize=lambda: fakes.calls.append("finalize"),
    )
    fakes.status = 0
    vars(bindings).update(
        Init_status=types.SimpleNamespace(STATUS_IS_INITIALIZED=2, STATUS_INVALID=32767),
        init_status=lambda: fakes.status,
        Team_id=types.SimpleNamespace(TEAM_WORLD=0),
        mc_ptr=lambda team, pointer: fakes.calls.append(("mc_ptr", team, pointer)) or 0,
        putmem_on_stream=lambda *args: fakes.calls.append(("put", *args)),
        getmem_on_stream=lambda *args: fakes.calls.append(("get", *args)),
        quiet_on_stream=lambda *args: fakes.calls.append(("quiet", *args)),
        malloc=lambda nbytes: 4096,
        ptr=lambda pointer, pe: pointer + pe,
    )
    vars(cuda_core)["Device"] = Device
    for name, module in {"": root, ".core": core, ".bindings": bindings}.items():
        monkeypatch.setitem(sys.modules, f"nvshmem{name}", module)
    monkeypatch.setitem(sys.modules, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "cuda.core", cuda_core)
    return fakes


def test_the_library_cannot_be_loaded(nvshmem4py: Any) -> None:
    def fail() -> None:
        raise RuntimeError("libnvshmem_host.so.3: cannot open shared object file")

    nvshmem4py.core.get_version = fail
    with pytest.raises(BackendUnavailableError, match="cannot open shared object file") as info:
        NvshmemLibrary()
    assert "nvidia-nvshmem-cu13" in str(info.value.hint)


def test_the_librarys_calls(nvshmem4py: Any) -> None:
    library = NvshmemLibrary()
    assert library.version == "3.4.5"
    for status, initialized in ((0, False), (1, False), (2, True), (3, True), (4, True), (32767, False)):
        nvshmem4py.status = status
        assert library.initialized is initialized
    unique_id = library.unique_id()
    assert unique_id == bytes(range(128))
    library.initialize(3, unique_id, 5, 8)
    assert nvshmem4py.calls == [("set_current", 3), ("init", 3, unique_id, 5, 8, "uid")]
    with pytest.raises(BackendUnavailableError, match="100 bytes on rank 0 and 128 here"):
        library.initialize(3, unique_id[:100], 5, 8)
    nvshmem4py.calls.clear()
    library.put(1, 2, 3, 4, 5)
    library.get(1, 2, 3, 4, 5)
    assert library.multicast_pointer(7) == 0
    assert nvshmem4py.calls == [("put", 1, 2, 3, 4, 5), ("quiet", 5), ("get", 1, 2, 3, 4, 5), ("mc_ptr", 0, 7)]
    assert (library.malloc(9), library.peer_pointer(100, 2)) == (4096, 102)
