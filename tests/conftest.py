"""Options, and pools of ranks that stay alive over many tests."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from symmem.config import BACKENDS
from symmem.service import server
from symmem.tools.ranks import RankPool

# A failing assertion shows its values in these modules as well. Some are imported only by ranks.
HERE = Path(__file__).parent
pytest.register_assert_rewrite(*(path.stem for path in [*HERE.glob("support/*.py"), *HERE.glob("*/*_cases.py")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", default=",".join(BACKENDS), help="names of backends to run conformance on")
    parser.addoption("--require", default="", help="names of backends whose skips are failures")
    parser.addoption("--worlds", default="2,4", help="numbers of ranks for conformance")


# A rank that fails a test must not let the others wait for long.
ENV = {"SYMMEM_ENABLE": "rendezvous_timeout(30s),signal_timeout(20s)"}


class Pools:
    """Pools by number of ranks and purpose; a pool of which a rank died is replaced."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, str], RankPool] = {}

    def get(self, size: int, purpose: str = "") -> RankPool:
        key = (size, purpose)
        if key in self._pools and not self._pools[key].alive:
            self._pools.pop(key).close()
        if key not in self._pools:
            self._pools[key] = RankPool(size, env=ENV)
        return self._pools[key]

    def keep_only(self, purpose: str) -> None:
        for key in [key for key in self._pools if key[1] not in ("", purpose)]:
            self._pools.pop(key).close()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope="session", autouse=True)
def own_sockets() -> Iterator[None]:
    """What tests start is inspected by tests alone. The socket of this process stays as long as it does."""
    with tempfile.TemporaryDirectory(prefix="symmem-tests-") as folder:
        before = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = folder
        server.begin()
        yield
        server.end()
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


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
            made.append(RankPool(size, **options))
        return made[-1]

    yield get
    for pool in made:
        pool.close()


@pytest.fixture
def new_pool() -> Iterator[Callable[..., RankPool]]:
    """Makes pools for one test, which may kill ranks."""
    made: list[RankPool] = []

    def make(size: int, **options: object) -> RankPool:
        options.setdefault("env", ENV)
        made.append(RankPool(size, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for pool in made:
        pool.close()


@pytest.fixture(scope="module")
def what_stays() -> Iterator[None]:
    """What is old is not looked at by each collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    from thread_ranks import descriptors  # pytest rewrites it, so it is imported after the registration above

    before = descriptors()
    yield
    gc.collect()  # exceptions and their frames go in circles
    assert descriptors() == before
