"""The format of all figures of all benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import NamedTuple

__all__ = ["UNITS", "Figure", "Measurement", "measurements", "pair_of"]

UNITS = {"us": False, "GB/s": True, "count": False, "bytes": False}
"""All units, and whether more is better."""


@dataclass(frozen=True)
class Figure:
    """One measurement, beside a peer's from the same run.

    Attributes:
        figure: Name, such as ``barrier`` or ``all_reduce_graph``. A figure of a pair of ranks ends with the pair:
            ``p2p_pull_alone/0/3`` is a copy by rank 0 from rank 3's memory.
        backend: symmem's backend.
        world: Number of ranks.
        bytes: Size of the operation, or 0.
        value: symmem's value, in ``unit``.
        unit: One of :data:`UNITS`.
        peer: Name of the peer, such as ``gloo``, ``nccl`` or ``local``; empty without a peer.
        peer_value: The peer's value, in ``unit``.
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
        """Write the figure as one line of JSON."""
        return json.dumps(asdict(self) | {"ratio": self.ratio})


class Measurement(NamedTuple):
    """A measurement with all its peers: figures that differ only in the peer."""

    lines: tuple[Figure, ...]

    @property
    def first(self) -> Figure:
        """Any of the lines; they have the same value."""
        return self.lines[0]

    @property
    def best(self) -> Figure | None:
        """The line of the best peer; None without a peer."""
        found = [line for line in self.lines if line.peer_value is not None]
        if not found:
            return None
        return (max if UNITS[self.first.unit] else min)(found, key=lambda line: line.peer_value or 0.0)


def measurements(figures: Iterable[Figure]) -> list[Measurement]:
    """Group consecutive figures that differ only in the peer."""
    grouped = groupby(figures, lambda f: (f.figure, f.backend, f.world, f.bytes, f.unit, f.value))
    return [Measurement(tuple(lines)) for _, lines in grouped]


def pair_of(figure: str) -> tuple[str, int, int] | None:
    """Split the name of a figure into name, rank and peer; None if it is not about a pair of ranks."""
    name, *ranks = figure.split("/")
    if len(ranks) != 2 or not all(map(str.isdecimal, ranks)):
        return None
    return name, int(ranks[0]), int(ranks[1])
