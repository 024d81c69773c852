"""Outcomes of a task on the ranks of a pool. Does not import torch, so that the command line stays quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Outcome", "RanksFailedError"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task on one rank.

    Attributes:
        value: The result of the function.
        error: The exception that it raised, or RuntimeError if the process died or did not answer in time.
        trace: The traceback as text.
    """

    value: Any = None
    error: BaseException | None = None
    trace: str = ""


class RanksFailedError(RuntimeError):
    """A task failed on some ranks; ``outcomes`` has the outcomes of all ranks."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        texts: dict[str, list[int]] = {}
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                texts.setdefault(outcome.trace or repr(outcome.error), []).append(rank)
        failed = sum(map(len, texts.values()))
        shown = [
            f"--- rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}\n{text}" for text, ranks in texts.items()
        ]
        super().__init__("\n".join([f"{failed} of {len(outcomes)} ranks failed", *shown]))
        self.outcomes = list(outcomes)
