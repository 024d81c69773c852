"""torch.compile and registered arguments under hostile use: every result is right, or an error names the cause.

Every case runs with an empty compile cache, and in other processes with the cache that the first left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter

import fault_cases
import pytest
from compile_support import PATIENCE, case_pool, cases_of

from symmem.errors import BackendUnavailableError, PeerLostError, ResourceLimitError
from symmem.tools.ranks import RankPool

ENV = {"SYMMEM_ENABLE": "rendezvous_timeout(60s),signal_timeout(60s)"}
pytestmark = pytest.mark.timeout(PATIENCE + 60)


@pytest.mark.parametrize("case", cases_of(fault_cases), ids=attrgetter("__name__"))
def test_case(pool: RankPool, case: Callable[[], None]) -> None:
    pool.run(case)


@pytest.fixture(scope="module")
def frail(env: dict[str, str]) -> Iterator[RankPool]:
    settings = "rendezvous_timeout(120s),signal_timeout(120s),arena_size(1MiB),arena_limit(2MiB)"
    with case_pool({**env, "SYMMEM_ENABLE": settings}) as made:
        yield made


def test_arena_exhausted(frail: RankPool) -> None:
    for rank, (kind, text, at) in enumerate(frail.run(fault_cases.too_large)):
        assert kind == ResourceLimitError.__name__, (kind, text)
        assert at == rank
        assert "arena_limit" in text


def test_backend_unavailable(frail: RankPool) -> None:
    for kind, text, _rank in frail.run(fault_cases.unavailable):
        assert kind == BackendUnavailableError.__name__, (kind, text)
        assert "native" in text


def test_one_rank_dies(frail: RankPool) -> None:
    """The other rank gets an error long before the timeout of 120 seconds."""
    alive, dead = frail.outcomes(fault_cases.one_dies)
    assert dead.error is not None
    kind, text, _rank, seconds = alive.value
    assert kind == PeerLostError.__name__, (kind, text)
    assert seconds < 60
