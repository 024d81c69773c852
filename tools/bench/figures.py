"""One shape for every figure of every benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import NamedTuple

__all__ = ["UNITS", "Figure", "Measurement", "measurements", "pair_of"]

UNITS = {"us": False, "GB/s": True, "count": False, "bytes": False}
"""Each unit, and whether more of it is better."""


@dataclass(frozen=True)
class Figure:
    """One measurement beside a peer's from the same run.

    Attributes:
        figure: What was measured: ``barrier``, ``all_reduce_graph``, ...; of a pair of ranks with them at its end:
            ``p2p_pull_alone/0/3`` is what rank 0 did with rank 3's memory.
        backend: Of symmem.
        world: Number of ranks.
        bytes: Size of the operation; 0 where it has none.
        value: Ours, in ``unit``.
        unit: One of :data:`UNITS`.
        peer: What it is compared with: ``gloo``, ``nccl``, ``local``, ...; empty if there is nothing to compare.
        peer_value: The peer's, in ``unit``.
    """

    figure: str
    backend: str
    world: int
    bytes: int
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """``value`` over ``peer_value``."""
        return self.value / self.peer_value if self.peer_value else None

    def json(self) -> str:
        """One line."""
        return json.dumps(asdict(self) | {"ratio": self.ratio})


class Measurement(NamedTuple):
    """One of ours with all peers of the same run: the lines that differ only in the peer."""

    lines: tuple[Figure, ...]

    @property
    def first(self) -> Figure:
        """Any of the lines."""
        return self.lines[0]

    @property
    def best(self) -> Figure | None:
        """The line of the best peer; None if there is no peer."""
        found = [line for line in self.lines if line.peer_value is not None]
        if not found:
            return None
        return (max if UNITS[self.first.unit] else min)(found, key=lambda line: line.peer_value or 0.0)


def measurements(figures: Iterable[Figure]) -> list[Measurement]:
    """Put together what was measured once and compared with several peers, line after line."""
    grouped = groupby(figures, lambda f: (f.figure, f.backend, f.world, f.bytes, f.unit, f.value))
    return [Measurement(tuple(lines)) for _, lines in grouped]


def pair_of(figure: str) -> tuple[str, int, int] | None:
    """What was measured, the rank and its peer, of the name of a figure; None if it is not of a pair of ranks."""
    name, *ranks = figure.split("/")
    if len(ranks) != 2 or not all(map(str.isdecimal, ranks)):
        return None
    return name, int(ranks[0]), int(ranks[1])
