"""torch.compile and registered arguments: hostile use, where an answer must be right or an error with a name.

Each case runs with an empty compile cache and, in other processes, with the one that the first left. The cases are in
fault_cases.py, which only ranks import.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from symmem.errors import BackendUnavailableError, PeerLostError, ResourceLimitError
from symmem.tools.ranks import RankPool

HERE = Path(__file__).parent
CASES = re.findall(r"^def (case_\w+)", (HERE / "fault_cases.py").read_text(), re.MULTILINE)
ENV = {"SYMMEM_ENABLE": "rendezvous_timeout(10s),signal_timeout(10s)"}


def run_case(name: str) -> object:
    sys.path.insert(0, str(HERE))
    return getattr(importlib.import_module("fault_cases"), name)()


@pytest.mark.parametrize("name", CASES)
def test_case(pool: RankPool, name: str) -> None:
    pool.run(run_case, name)


@pytest.fixture(scope="module")
def frail(env: dict[str, str]) -> Iterator[RankPool]:
    settings = "rendezvous_timeout(20s),signal_timeout(20s),arena_size(1MiB),arena_limit(2MiB)"
    with RankPool(2, env={**env, "SYMMEM_ENABLE": settings}, timeout=60) as made:
        yield made


def test_arena_exhausted(frail: RankPool) -> None:
    for rank, (kind, text, at) in enumerate(frail.run(run_case, "too_large")):
        assert kind == ResourceLimitError.__name__, (kind, text)
        assert at == rank
        assert "arena_limit" in text


def test_backend_unavailable(frail: RankPool) -> None:
    for kind, text, _rank in frail.run(run_case, "unavailable"):
        assert kind == BackendUnavailableError.__name__, (kind, text)
        assert "native" in text


def test_one_rank_dies(frail: RankPool) -> None:
    """The other is told long before the timeout of 20 seconds."""
    alive, dead = frail.outcomes(run_case, "one_dies")
    assert dead.error is not None
    kind, text, _rank, seconds = alive.value
    assert kind == PeerLostError.__name__, (kind, text)
    assert seconds < 15
