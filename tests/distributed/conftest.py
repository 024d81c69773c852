"""Pools of ranks in a default process group of the backend symmem."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from patience import TASK

from symmem.tools.ranks import RankPool


@pytest.fixture(scope="session")
def pool_of() -> Iterator[Callable[[int], RankPool]]:
    """Gives the pool of a size. It lives over all tests of this folder, unless a rank dies."""
    made: dict[int, RankPool] = {}

    def get(size: int) -> RankPool:
        if size not in made or not made[size].alive:
            made[size] = RankPool(size, process_group="symmem", timeout=TASK)
        return made[size]

    yield get
    for pool in made.values():
        pool.close()
