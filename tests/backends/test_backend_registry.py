"""How a backend is found and chosen."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from patience import LONG

from symmem import backends
from symmem.backends import AUTO_ORDER, available_names, get_backend, select_backend
from symmem.backends.base import Capability
from symmem.config import BACKENDS
from symmem.errors import BackendUnavailableError, ConfigError
from symmem.tools.commands.doctor import examine


class Fake:
    """A backend that counts its probes, and fails them on request."""

    device_type = "cuda"
    why_not: str | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.probes = 0

    def probe(self) -> None:
        self.probes += 1
        if self.why_not:
            raise BackendUnavailableError(self.why_not, hint=f"mend {self.name}")


class FakeHost(Fake):
    device_type = "cpu"


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """All built-in names lead to fakes, and nothing is loaded or probed yet."""
    module = ModuleType("fake_backends")
    module.Fake, module.FakeHost = Fake, FakeHost  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    targets = {name: f"fake_backends:{'FakeHost' if name == 'host' else 'Fake'}" for name in BACKENDS}
    monkeypatch.setattr(backends, "_BUILTIN", targets)
    monkeypatch.setattr(backends, "_instances", {})
    monkeypatch.setattr(backends, "_probed", set())
    return module


def fail(**reasons: str) -> None:
    for name, reason in reasons.items():
        fake(name).why_not = reason


def fake(name: str) -> Any:
    return get_backend(name)


def refusal(order: tuple[str, ...], device_type: str | None) -> str:
    with pytest.raises(BackendUnavailableError) as caught:
        select_backend(order, device_type)
    assert caught.value.hint
    return str(caught.value)


def test_a_backend_is_loaded_once_and_not_probed() -> None:
    assert fake("host") is fake("host")
    assert fake("host").name == "host"
    assert fake("host").probes == 0
    assert list(backends._instances) == ["host"]  # no other backend was loaded


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        get_backend("hots")
    assert all(name in str(caught.value) for name in ("'hots'", "auto", *available_names()))
    assert set(available_names()) >= set(BACKENDS)


def test_a_module_that_cannot_be_imported_is_an_unavailable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._BUILTIN, "native", "no_such_module_anywhere:Backend")
    with pytest.raises(BackendUnavailableError, match=r"'native' cannot be imported.*no_such_module_anywhere"):
        get_backend("native")
    assert "no_such_module_anywhere" in refusal(("native",), "cuda")
    assert select_backend(("native", "nvshmem"), "cuda") is fake("nvshmem")


def test_initialisation_that_failed_can_be_tried_again(monkeypatch: pytest.MonkeyPatch, fakes: ModuleType) -> None:
    monkeypatch.delitem(sys.modules, fakes.__name__)
    with pytest.raises(BackendUnavailableError):
        get_backend("native")
    monkeypatch.setitem(sys.modules, fakes.__name__, fakes)
    fail(native="busy")
    assert "busy" in refusal(("native",), "cuda")
    fake("native").why_not = None
    assert select_backend(("native",), "cuda") is fake("native")


def test_the_first_that_works_in_the_order_given_is_taken() -> None:
    assert select_backend(("nvshmem", "native"), "cuda") is fake("nvshmem")
    fail(nvshmem="not here")
    assert select_backend(("nvshmem", "native"), "cuda").name == "nvshmem"  # it worked once: not probed again
    assert select_backend(("pytorch_cuda", "native"), "cuda").name == "pytorch_cuda"
    assert fake("native").probes == 0


def test_probing_happens_once_a_process_and_name() -> None:
    started = threading.Barrier(4)

    def select(_: int) -> str:
        started.wait(LONG)
        return select_backend(("native",), "cuda").name

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(select, range(4))) == {"native"}
    assert select_backend(("auto",), "cuda").name == "native"
    assert fake("native").probes == 1


def test_an_explicit_choice_that_fails_is_an_error_and_no_other_is_tried() -> None:
    fail(native="no driver")
    text = refusal(("native",), None)
    assert text == "no driver\n  What to do: mend native"  # its own error, not a list of one
    assert list(backends._instances) == ["native"]


def test_the_error_has_the_reason_of_every_candidate() -> None:
    fail(native="no driver", nvshmem="no library")
    text = refusal(("native", "nvshmem", "host"), "cuda")
    reasons = "- native: no driver\n    mend native\n", "- nvshmem: no library\n    mend nvshmem\n", "memory is cpu"
    for reason in reasons:
        assert reason in text
    assert "cuda tensors" in text
    assert text.count("What to do") == 1


def test_a_backend_is_not_taken_for_the_other_kind_of_memory() -> None:
    assert "'native' is not for cpu tensors: its memory is cuda" in refusal(("native",), "cpu")
    assert fake("native").probes == 0
    assert select_backend(("native", "host"), "cpu") is fake("host")
    assert select_backend(("host",), None) is fake("host")


@pytest.mark.parametrize("stated", [True, False])
def test_auto_never_takes_host_for_cuda(stated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a machine has a GPU and no CUDA backend works, ``auto`` fails with a reason per backend."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fail(**{name: f"{name} is broken" for name in BACKENDS if name != "host"})
    text = refusal(("auto",), "cuda" if stated else None)
    assert all(f"{name}: {name} is broken" in text for name in BACKENDS if name != "host")
    assert "host" not in backends._instances
    assert "host" not in AUTO_ORDER["cuda"]


def test_auto_follows_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = AUTO_ORDER["cuda"]
    assert set(tried) == set(BACKENDS) - {"host"}
    for position, name in enumerate(tried):
        assert select_backend(("auto",), "cuda").name == name
        assert [other for other in tried if fake(other).probes] == list(tried[: position + 1])
        fail(**{name: "broken"})
        backends._probed.clear()


def test_auto_without_a_gpu_takes_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_backend(("auto",), None) is fake("host")
    assert select_backend(("auto",), "cpu") is fake("host")


def test_a_device_that_no_backend_serves_is_named() -> None:
    text = refusal(("auto",), "meta")
    assert "meta tensors" in text
    assert "use cuda or cpu tensors" in text


@pytest.mark.parametrize("kind", [AttributeError, OSError, RuntimeError, SyntaxError])
def test_whatever_goes_wrong_in_an_import_is_an_unavailable_backend(
    kind: type[Exception], fakes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the other backends are still tried, and `symmem doctor` shows them."""

    def load(name: str) -> ModuleType:
        raise kind("libmissing.so")

    if kind is AttributeError:
        monkeypatch.delattr(fakes, "Fake")
    else:
        monkeypatch.setattr(backends.importlib, "import_module", load)  # type: ignore[attr-defined]
    text = refusal(("native",), "cuda")
    assert f"'native' cannot be imported: {kind.__name__}" in text
    assert text.count("What to do") == 1
    finding = examine("native")
    assert (finding.available, kind.__name__ in finding.why_not, bool(finding.remedy)) == (False, True, True)


def test_a_probe_that_breaks_does_not_break_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise OSError("no such device")

    monkeypatch.setattr(fake("native"), "probe", probe)
    monkeypatch.setattr(fake("native"), "capabilities", Capability(0), raising=False)
    finding = examine("native")
    assert "OSError: no such device" in finding.why_not
    assert finding.remedy
