"""torch.compile places registered arguments.

Every case runs on two ranks with an empty compile cache, and in other processes with the cache that the first left,
because code from a cache must be placed too.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import compile_cases
import pytest
from compile_support import PATIENCE, cases_of

from symmem.tools.ranks import RankPool

pytestmark = pytest.mark.timeout(PATIENCE + 60)


@pytest.mark.parametrize("case", cases_of(compile_cases), ids=attrgetter("__name__"))
def test_case(pool: RankPool, case: Callable[[], None]) -> None:
    pool.run(case)
