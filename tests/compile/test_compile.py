"""torch.compile places registered arguments (mission B4 to B6, C1, C2, D1 to D5, E1, E2, E4, G2, G7).

Each case runs on two ranks, once with an empty compile cache and once, in other processes, with the cache that the
first left: what comes out of a cache is placed as well. The cases are in compile_cases.py, which only ranks import.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from symmem.errors import PeerTimeoutError
from symmem.tools.ranks import RankPool

HERE = Path(__file__).parent
CASES = re.findall(r"^def (case_\w+)", (HERE / "compile_cases.py").read_text(), re.MULTILINE)


def run_case(name: str) -> object:
    sys.path.insert(0, str(HERE))
    return getattr(importlib.import_module("compile_cases"), name)()


@pytest.mark.parametrize("name", CASES)
def test_case(pool: RankPool, name: str) -> None:
    pool.run(run_case, name)


def test_one_rank_alone_changes_its_tensor(env: dict[str, str]) -> None:
    """Both ranks learn of it (G2); neither gets a wrong result."""
    short = {"SYMMEM_ENABLE": "rendezvous_timeout(2s),signal_timeout(4s)"}
    with RankPool(2, env={**env, **short}, timeout=60) as pool:
        results = pool.run(run_case, "one_changes")
    assert all("nothing" not in each for each in results), results
    assert PeerTimeoutError.__name__ in results[1]
    assert "ct::total: the argument 'x'" in results[1]
