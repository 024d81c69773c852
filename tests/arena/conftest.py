"""Fixtures of a group of one rank and its arena."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from arena_rank import Make, Rank

import symmem


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    def make(**settings: object) -> Rank:
        options = ",".join(f"{name}({value})" for name, value in settings.items())
        monkeypatch.setenv("SYMMEM_ENABLE", options)
        return Rank(symmem.Group.from_store(0, 1, dist.HashStore(), "arena"))

    return make


@pytest.fixture
def rank(make: Make) -> Rank:
    return make(arena_size="2MiB")
