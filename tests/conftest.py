"""Options, and pools of ranks that stay alive over many tests."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from patience import OPTIONS
from programs import serving

from symmem.config import BACKENDS

if TYPE_CHECKING:  # this module imports no torch, because the process that starts the workers needs none
    from symmem.tools.ranks import RankPool

# Until all tests are collected: what is imported stays, and the trees of rewritten assertions are no circles.
gc.disable()

# A failing assertion shows its values in these modules as well. Some are imported only by ranks.
HERE = Path(__file__).parent
MODULES = {path.stem for path in HERE.glob("*/*.py") if not path.stem.startswith("test_")}
pytest.register_assert_rewrite(*(MODULES - {"patience", "programs"}))

# The machine may be busy, and no test depends on its speed, so nothing that Hypothesis does has a time limit.
settings.register_profile("symmem", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("symmem")

POOLS = {"pools", "living_pool", "new_pool", "pool", "pools_of", "frail"}
"""The fixtures that start processes of ranks. The tests that use them are marked with ``ranks``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", default=",".join(BACKENDS), help="names of backends to run conformance on")
    parser.addoption("--require", default="", help="names of backends whose skips are failures")
    parser.addoption("--worlds", default="2,4", help="numbers of ranks for conformance")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist use the server of the process that started them
        server = contextlib.ExitStack()
        server.enter_context(serving())
        config.add_cleanup(server.close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the markers of the tiers, and put the files that take long first, so that workers end at the same time."""
    tiers: dict[Path, int] = {}
    for item in items:
        if item.path.stem.endswith("_gpu"):
            item.add_marker("gpu")
        if "wheel" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") or POOLS & set(getattr(item, "fixturenames", ())):
            item.add_marker("ranks")
        compiles = item.path.parent.name in ("compile", "examples") or item.path.stem == "test_docs_code"
        tier = 0 if compiles else 1 if item.get_closest_marker("ranks") or item.get_closest_marker("slow") else 2
        tiers[item.path] = min(tier, tiers.get(item.path, tier))
    items.sort(key=lambda item: tiers[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def collections_are_short() -> None:
    """The collections of garbage in a module leave out what was imported before. Tests collect hundreds of times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def ranks_are_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test without the marker ``ranks`` starts no ranks, so `make test-fast` stays fast."""
    if request.node.get_closest_marker("ranks"):
        yield
        return

    def refuse(*args: object, **options: object) -> None:
        pytest.fail("this test starts ranks: mark it with pytest.mark.ranks")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("symmem.tools.ranks.RankPool.__init__", refuse)
        yield


def new_rank_pool(size: int, **options: Any) -> RankPool:
    from symmem.tools.ranks import RankPool

    return RankPool(size, **OPTIONS | options)


class Pools:
    """Pools by number of ranks and purpose; a pool of which a rank died is replaced."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, str], RankPool] = {}

    def get(self, size: int, purpose: str = "") -> RankPool:
        key = (size, purpose)
        if key in self._pools and not self._pools[key].alive:
            self._pools.pop(key).close()
        if key not in self._pools:
            self._pools[key] = new_rank_pool(size)
        return self._pools[key]

    def keep_only(self, purpose: str) -> None:
        for key in [key for key in self._pools if key[1] not in ("", purpose)]:
            self._pools.pop(key).close()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="session", autouse=True)
def own_folders() -> Iterator[None]:
    """Sockets and compiled code of the tests of this process are apart from all others.

    The socket of this process stays as long as it does.
    """
    from symmem.service import server

    with tempfile.TemporaryDirectory(prefix="symmem-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes beside the ranks
        # Without vectors, Inductor need not try which instructions the compiler knows, and its headers are shorter.
        patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")
        server.begin()
        yield
        server.end()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    made = Pools()
    yield made
    made.close()


@pytest.fixture(scope="module")
def living_pool() -> Iterator[Callable[..., RankPool]]:
    """Gives the tests of a module one pool; another one, made alike, once a rank of it has died."""
    made: list[RankPool] = []

    def get(size: int, **options: Any) -> RankPool:
        if not made or not made[-1].alive:
            made.append(new_rank_pool(size, **options))
        return made[-1]

    yield get
    for pool in made:
        pool.close()


@pytest.fixture
def new_pool() -> Iterator[Callable[..., RankPool]]:
    """Makes pools for one test, which may kill ranks."""
    made: list[RankPool] = []

    def make(size: int, **options: Any) -> RankPool:
        made.append(new_rank_pool(size, **options))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    from thread_ranks import open_files  # pytest rewrites it, so it is imported after the registration above

    gc.collect()  # of earlier tests
    before = open_files()
    yield
    gc.collect()  # exceptions and their frames go in circles
    assert open_files() - before == set()  # by name: a thread of an earlier test may still close others
