"""The same cases on every backend. A backend that does not work here is skipped with the reason of its probe."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from symmem.backends import get_backend
from symmem.tools.commands.doctor import examine
from symmem.tools.conformance import CASES, run_case
from symmem.tools.ranks import RanksFailedError


@functools.cache
def _why_not(backend: str) -> str:
    finding = examine(backend)
    return "" if finding.available else f"{finding.why_not} -> {finding.remedy}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    backends = option("--backends").split(",")
    worlds = [int(world) for world in option("--worlds").split(",")]
    # Sorted by backend, because one pool is alive at a time and a process cannot change its transport.
    metafunc.parametrize(
        ("backend", "world", "name"),
        [
            pytest.param(backend, world, name, id=f"{backend}-{world}-{name}", marks=_marks(backend))
            for backend in backends
            for world in worlds
            for name in CASES
        ],
    )


def _marks(backend: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if get_backend(backend).device_type == "cuda" else []


def test_case(backend: str, world: int, name: str, pools: Any, new_pool: Any, request: pytest.FixtureRequest) -> None:
    required = backend in request.config.getoption("--require").split(",")
    if why_not := _why_not(backend):
        (pytest.fail if required else pytest.skip)(why_not)
    if get_backend(backend).device_type == "cuda" and world > max(torch.cuda.device_count(), 2):
        pytest.skip(f"needs {world} GPUs")  # only two ranks may share a single GPU
    case = CASES[name]
    pools.keep_only(backend)
    breaks = case.breaks and backend != "host"
    pool = new_pool(world) if breaks else pools.get(world, "" if backend == "host" else backend)
    try:
        reasons = set(pool.run(run_case, name, backend))
    except RanksFailedError:
        pool.close()  # its ranks may be at different steps now
        raise
    assert len(reasons) == 1, f"ranks disagree on whether to skip: {reasons}"
    if reason := reasons.pop():
        pytest.skip(reason)
