"""One shape for every figure of every benchmark, and how they are shown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

from symmem.tools.table import render

__all__ = ["Figure", "alternate", "show", "slowest"]


@dataclass(frozen=True)
class Figure:
    """One measurement beside a peer's from the same run.

    Attributes:
        figure: What was measured: ``barrier``, ``p2p_pull``, ...
        backend: Of symmem.
        world: Number of ranks.
        bytes: Size of the operation; 0 where it has none.
        value: Ours, in ``unit``.
        unit: ``us``, ``GB/s``, ``count`` or ``bytes``.
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


def alternate(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of two calls, taken in turn and each as often first, so that drift treats both alike."""
    samples: tuple[list[float], list[float]] = ([], [])
    pair = list(zip(samples, (ours, peer), strict=True))
    for _ in range(rounds):
        for taken, call in pair:
            begin = perf_counter()
            call()
            taken.append(perf_counter() - begin)
        pair.reverse()
    return statistics.median(samples[0]), statistics.median(samples[1])


def slowest(results: Sequence[Sequence[float]]) -> list[float]:
    """Of what each rank has measured, the largest of each figure."""
    return [max(column) for column in zip(*results, strict=True)]


def show(figures: Sequence[Figure], *, as_json: bool) -> None:
    """Print figures as JSON lines or as a table."""
    if as_json:
        for figure in figures:
            print(figure.json())
        return
    rows = [
        (
            f.figure,
            f.backend,
            f.world,
            f.bytes,
            f"{f.value:.2f} {f.unit}",
            "-" if f.peer_value is None else f"{f.peer} {f.peer_value:.2f} {f.unit}",
            "-" if f.ratio is None else f"{f.ratio:.3f}",
        )
        for f in figures
    ]
    print(render(("figure", "backend", "world", "bytes", "ours", "peer", "ratio"), rows))
