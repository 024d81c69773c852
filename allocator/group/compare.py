"""Let the ranks of a group compare values, so that a difference is the same error on all ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from symmem.errors import MismatchError

if TYPE_CHECKING:
    from symmem.backends.base import Collective, RankGroup

__all__ = [
    *("SAME_CALLS", "called_at", "check_equal", "compare", "compare_in_group", "different_calls", "differing"),
    "exchange_json",
]

SAME_CALLS = "all ranks of a group must make the same calls in the same order"
"""What errors about ranks at different places advise."""


_NAMED = 16
"""Values, and ranges of ranks per value, that an error names. All ranks of a large group get the text."""


def compare_in_group(group: RankGroup, step: str, values: Mapping[str, object], hint: str) -> None:
    """Compare values in a collective operation that does nothing else. Collective; waits for all ranks.

    Args:
        group: The group.
        step: The operation that follows; it must be the same on all ranks too.
        values: The values by name.
        hint: The hint of the error.

    Raises:
        MismatchError: Values differ; on all ranks.
        SymmemError: An error that a rank passed to :meth:`Group.fail` instead, or a rank died or did not come.
    """
    if group.size > 1:
        with group.collective("comparison", group.settings.signal_timeout) as collective:
            compare(collective, {"operation": step, **values}, {"line": collective.line}, hint=hint, step=step)


def compare(
    collective: Collective,
    values: Mapping[str, object],
    state: Mapping[str, object] | None = None,
    *,
    hint: str,
    hints: Mapping[str, str] | None = None,
    step: str | None = None,
) -> list[dict[str, Any]]:
    """Compare values within a collective operation, in one exchange.

    Args:
        collective: The operation in progress.
        values: Values that must be equal on all ranks, by name.
        state: Values to exchange that may differ. The error names the ``"line"`` of every rank, if there is one.
        hint: The hint of the error.
        hints: Other hints for some of the names.
        step: The step that the error names; default the collective operation.

    Returns:
        The values and the state of every rank, in rank order.

    Raises:
        MismatchError: Values differ. The error names the first difference and the ranks of every value.
    """
    received = exchange_json(collective, "compare", {**values, **(state or {})})
    for name in values:
        check_equal(
            [rank.get(name) for rank in received],
            f"ranks disagree on {name!r}:",
            (hints or {}).get(name, hint),
            step=step,
            lines=[rank.get("line") for rank in received],
        )
    return received


def exchange_json(collective: Collective, step: str, value: object) -> list[Any]:
    """Exchange plain data; returns the values of all ranks. Values that JSON does not know become text."""
    with collective.exchange(step, json.dumps(value, default=str).encode()) as received:
        return [json.loads(contribution.payload) for contribution in received]


def check_equal(
    values: Sequence[object],
    problem: str,
    hint: str,
    step: str | None = None,
    lines: Sequence[str | None] = (),
) -> None:
    """Raise MismatchError unless all ranks have the same value.

    Args:
        values: The value of every rank.
        problem: The beginning of the error; the values and their ranks follow.
        hint: The hint of the error.
        step: The step that the error names.
        lines: The line of the program that every rank called; see :func:`called_at`.
    """
    texts = [str(value) for value in values]
    if len(set(texts)) > 1:
        text, peers = differing(texts)
        raise MismatchError(f"{problem} {text}{called_at(lines)}", hint=hint, step=step, peers=peers)


def different_calls(calls: Sequence[str], lines: Sequence[str | None], called: str = "called") -> MismatchError:
    """The error for operations that differ, from the description and the line of every rank's call."""
    text, peers = differing(calls)
    return MismatchError(
        f"ranks are at different operations: {text}{called_at(lines, called)}",
        hint=f"{SAME_CALLS}, with the same shapes and dtypes",
        peers=peers,
    )


def called_at(lines: Sequence[str | None], called: str = "called") -> str:
    """The end of an error: the lines of the program, and the ranks of every line; empty if one is unknown."""
    return f"; {called} at {differing(lines)[0]}" if all(lines) and lines else ""


def differing(values: Sequence[object]) -> tuple[str, tuple[int, ...]]:
    """Return a text with the ranks of every value, and the ranks outside the majority. On a draw, rank 0 decides."""
    ranks: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    named = [f"{value} on rank{'s' * (len(r) > 1)} {_spans(r)}" for value, r in itertools.islice(ranks.items(), _NAMED)]
    text = ", ".join(named) + (f", and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")
    common = max(ranks.values(), key=len)
    return text, tuple(rank for rank in range(len(values)) if rank not in common)


def _spans(ranks: list[int]) -> str:
    """Write sorted ranks compactly: 0-3, 6."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans[:_NAMED])
    return text + (", ..." if len(spans) > _NAMED else "")
