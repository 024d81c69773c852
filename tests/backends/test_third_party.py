"""A backend of another package is found by its entry point, and passes the conformance suite."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from patience import TASK

import symmem
from symmem.backends import available_names, get_backend
from symmem.errors import BackendUnavailableError, ConfigError, UnsupportedError
from symmem.tools.commands.doctor import examine
from symmem.tools.conformance import CASES, run_case
from symmem.tools.ranks import RankPool

WORLD = 3


def join(folder: str) -> list[str]:
    """Add the package to this process; returns the names of its backends then."""
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    return list(available_names())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of an installed third-party package, for sys.path."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).parents[1] / "support" / "toy_backend.py", folder)
    info = folder / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[symmem.backends]\ntoy = toy_backend:ToyBackend\nhost = toy_backend:ToyBackend\n"
        "broken = no_such_module:Backend\n"
    )
    return folder


@pytest.fixture(scope="module")
def pool(package: Path) -> Iterator[RankPool]:
    with RankPool(WORLD, timeout=TASK) as pool:
        for names in pool.run(join, str(package)):
            assert {"toy", "broken", "host"} <= set(names)
        yield pool


@pytest.mark.parametrize("name", CASES)
def test_it_passes_the_conformance_suite(name: str, pool: RankPool) -> None:
    """Its capabilities work, the rest raises named errors. Nothing is skipped, and nothing leaks."""
    assert pool.run(run_case, name, "toy") == [None] * WORLD


def view_it() -> None:
    """Peers are reachable, but there are no signals: kernels need words of the user."""
    st, own = (symmem.allocate((4, WORLD), torch.int32, backend="toy").rendezvous() for _ in range(2))
    with pytest.raises(UnsupportedError, match="signals` of your own"):
        st.device_view()
    view = st.device_view(own)
    assert view.channels == 4
    assert view.pointers.tolist() == st.remote_pointers.tolist()


def test_kernels_may_use_it(pool: RankPool) -> None:
    pool.run(view_it)


def use_it() -> str:
    group = symmem.resolve_group()
    st = symmem.allocate(8, backend="toy").rendezvous()
    st.tensor.fill_(group.rank)
    with group.collective("meet"):
        pass
    assert [st.remote_tensor(rank)[0].item() for rank in range(WORLD)] == list(range(WORLD))
    with group.collective("read"):
        pass
    return st.backend


def choose_by_environment() -> str:
    os.environ["SYMMEM_ENABLE"] = "symmetric_memory_backend(toy)"
    try:
        return symmem.allocate(8).backend
    finally:
        del os.environ["SYMMEM_ENABLE"]


def test_it_is_chosen_by_argument_and_by_environment(pool: RankPool) -> None:
    """Its name works like the name of a built-in backend."""
    assert pool.run(use_it) == ["toy"] * WORLD
    assert pool.run(choose_by_environment) == ["toy"] * WORLD


def ask_for_what_it_lacks() -> list[str]:
    st = symmem.allocate(8, backend="toy").rendezvous()
    told = []
    for use in (st.barrier, st.contiguous_view, lambda: st.multicast_ptr, lambda: st.signal_pad(0)):
        try:
            use()
        except symmem.SymmemError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_what_it_lacks_is_the_named_error(pool: RankPool) -> None:
    """Without code for these in the backend."""
    for told in pool.run(ask_for_what_it_lacks):
        assert len(told) == 4
        assert all("'toy' has no" in text for text in told)
        assert [text.split(":")[0] for text in told].count("UnsupportedError") == 3


def test_installing_it_changes_nothing_unless_it_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` never takes it, it cannot replace a built-in name, and a broken package gives its reason."""
    with pytest.raises(ConfigError, match="unknown backend 'toy'"):
        symmem.allocate(1, backend="toy")
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setattr("symmem.backends._instances", {})
    monkeypatch.setattr("symmem.backends._probed", set())
    assert symmem.allocate(1, device="cpu").backend == "host"
    assert type(get_backend("host")).__module__ == "symmem.backends.host"
    with pytest.raises(BackendUnavailableError, match=r"'broken' cannot be imported.*no_such_module"):
        symmem.allocate(1, backend="broken")
    finding = examine("toy")
    assert finding.available
    assert finding.capabilities == ("remote_tensor", "one_sided")
