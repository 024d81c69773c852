"""Two ranks with an empty compile cache, then two other ranks with the cache that these filled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compile_support import case_pool

from symmem.tools.ranks import PRELOAD, RankPool

# Every rank that compiles would load Inductor, in 4 s. If these tests are collected, all ranks of the run have it.
# Inductor imports Triton, and that reads the variable then. Without GPUs, all kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    PRELOAD.insert(0, "symmem.tools.warm_inductor")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(scope="module")
def env(request: pytest.FixtureRequest, cache: Path) -> dict[str, str]:
    """The environment of the ranks: the variable ENV of the test module, and the compile cache."""
    own = getattr(request.module, "ENV", {})
    return {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache), **own}


@pytest.fixture(scope="module", params=["cold", "warm"])
def pool(request: pytest.FixtureRequest, env: dict[str, str]) -> Iterator[RankPool]:
    with case_pool(env) as made:
        yield made
