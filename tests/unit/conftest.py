"""What tests of resources share: nothing that a test opens may stay open. Asked for by ``pytest.mark.usefixtures``."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from thread_ranks import descriptors


@pytest.fixture(scope="module")
def what_stays() -> Iterator[None]:
    """What is old is not looked at by each collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    before = descriptors()
    yield
    gc.collect()  # exceptions and their frames go in circles
    assert descriptors() == before
