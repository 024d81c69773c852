"""torch.compile places registered arguments.

Every case runs on two ranks with an empty compile cache, and in other processes with the cache that the first left,
because code from a cache must be placed too.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import compile_cases
import pytest
from compile_support import PATIENCE, case_pool, cases_of

from symmem.errors import PeerTimeoutError
from symmem.tools.ranks import RankPool

pytestmark = pytest.mark.timeout(PATIENCE + 60)


@pytest.mark.parametrize("case", cases_of(compile_cases), ids=attrgetter("__name__"))
def test_case(pool: RankPool, case: Callable[[], None]) -> None:
    pool.run(case)


@pytest.mark.ranks
def test_one_rank_alone_changes_its_tensor(env: dict[str, str]) -> None:
    """Both ranks get an error, and no rank gets a wrong result."""
    with case_pool(env) as pool:
        results = pool.run(compile_cases.one_changes)
    assert all("nothing" not in result for result in results), results
    assert PeerTimeoutError.__name__ in results[1]
    assert "ct::total: the argument 'x'" in results[1]
