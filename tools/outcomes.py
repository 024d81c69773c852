"""What becomes of a task on the ranks of a pool. Without torch, so that the command line stays quick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Outcome", "RanksFailedError"]


@dataclass(frozen=True)
class Outcome:
    """What became of a task on one rank.

    Attributes:
        value: What the function returned.
        error: What it raised, or RuntimeError if the process died or did not answer in time.
        trace: The traceback as text.
    """

    value: Any = None
    error: BaseException | None = None
    trace: str = ""


class RanksFailedError(RuntimeError):
    """A task failed on some ranks; ``outcomes`` has all ranks'."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        failed = {rank: o for rank, o in enumerate(outcomes) if o.error is not None}
        super().__init__(
            f"{len(failed)} of {len(outcomes)} ranks failed\n"
            + "\n".join(f"--- rank {rank}\n{o.trace or repr(o.error)}" for rank, o in failed.items())
        )
        self.outcomes = list(outcomes)
