"""A failing assertion in a rank shows the values and the rank, as pytest does in one process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from symmem.tools import assertions
from symmem.tools.conformance import run_case
from symmem.tools.ranks import RankPool, RanksFailedError


def three() -> int:
    return 3


def fail_with_the_rank() -> None:
    assert three() == dist.get_rank() + 40


def fail_alike() -> None:
    first, expected = three(), [1, 2, 3]
    assert [first, 2] == expected


def fail_in_a_case() -> None:
    """Rank 1 sees a tensor that is one element short."""
    from symmem.tools.conformance import case

    shared = case.Context.shared

    def short(context: case.Context, *args: Any, **options: Any) -> Any:
        tensor = shared(context, *args, **options)
        return tensor if options else SimpleNamespace(tensor=tensor.tensor[context.rank :])

    case.Context.shared = short  # type: ignore[assignment, method-assign]
    try:
        run_case("memory_is_zeroed_and_local", "host")
    finally:
        case.Context.shared = shared  # type: ignore[method-assign]


def failure(pool: RankPool, function: Callable[[], None]) -> str:
    with pytest.raises(RanksFailedError) as caught:
        pool.run(function)
    return str(caught.value)


def test_a_pool_function_shows_values_and_rank(pools: Any) -> None:
    text = failure(pools.get(2), fail_with_the_rank)
    for rank in range(2):
        shown = text.partition(f"--- rank {rank}\n")[2].partition("\n---")[0]
        assert f"AssertionError: assert 3 == ({rank} + 40)\n +  where 3 = three()" in shown, text


def test_identical_failures_are_shown_once_and_with_differences(pools: Any) -> None:
    text = failure(pools.get(2), fail_alike)
    assert text.startswith("2 of 2 ranks failed\n--- ranks 0, 1\nTraceback")
    assert text.count("Traceback") == 1
    assert "assert [3, 2] == [1, 2, 3]" in text
    assert "At index 0 diff: 3 != 1" in text


def test_a_conformance_case_shows_values_and_rank(new_pool: Callable[..., RankPool]) -> None:
    pool = new_pool(2)
    text = failure(pool, fail_in_a_case)
    shown = text.partition("--- rank 1\n")[2]
    assert "AssertionError: assert torch.Size([0]) == (1,)" in shown, text
    assert "RendezvousError: [rank 1, " in text, text  # rank 0 is told at once


def test_without_pytest_the_names_of_the_statement_are_shown(
    new_pool: Callable[..., RankPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assertions, "rewriting", lambda: None)
    text = failure(new_pool(1), fail_alike)
    assert "AssertionError: [first, 2] == expected\n  expected = [1, 2, 3]\n  first = 3" in text


def test_modules_that_only_ranks_import_are_rewritten_too() -> None:
    found = assertions.rewriting()
    assert found is not None
    assert {"compile_cases", "fault_cases", "looking"} <= set(found[1])
