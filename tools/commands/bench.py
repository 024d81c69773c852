"""``symmem bench``: its suites, and what all of them have in common: JSON lines or a table, a picture, progress.

A suite is a module beside this one, named like it, whose ``run`` takes the suite's options by name and a
:class:`.Progress`, and yields its figures; it is imported when it is chosen, since most need torch. A new one is a line
of :data:`SUITES`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from symmem.tools.bench.figures import Figure
from symmem.tools.bench.progress import Progress
from symmem.tools.bench.tables import table
from symmem.tools.commands.subcommands import SubParsers, add_group
from symmem.tools.numbers import positive

__all__ = ["SUITES", "Suite", "add_parser"]

_PEERS = ("cuda", "nvshmem", "nccl")
_PARTS = ("overhead", "compile", "chain", "input")
_OPERATORS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


class _Option(NamedTuple):
    flag: str
    words: dict[str, Any]


class Suite(NamedTuple):
    """One suite: what ``--help`` says, and its options beside those that all have."""

    help: str
    options: tuple[_Option, ...]


def _option(flag: str, **words: Any) -> _Option:
    return _Option(flag, words)


def _backend(default: str) -> _Option:
    return _option("--backend", default=default, metavar="NAME", help=f"ours ({default})")


def _peers(default: tuple[str, ...] | None) -> _Option:
    return _option("--peers", nargs="+", choices=_PEERS, default=default, metavar="NAME", help=" ".join(_PEERS))


_RANKS = _option("--ranks", type=positive, nargs="+", default=[2, 4], metavar="N", help="world sizes (2 4)")
_GPUS = _option("--ranks", type=positive, nargs="+", metavar="N", help="world sizes (one rank a GPU; on the CPU 2 4)")

SUITES = {
    "host": Suite("host shared memory beside gloo and a local copy", (_RANKS,)),
    "gpu": Suite(
        "one backend beside torch's transports, on all GPUs of this machine",
        (
            _backend("native"),
            _peers(_PEERS),
            _option("--ranks", type=positive, metavar="N", help="number of ranks (default: all GPUs)"),
        ),
    ),
    "p2p": Suite(
        "copies between all pairs of ranks, beside torch's transport or a local copy",
        (
            _backend("host"),
            _GPUS,
            _option("--bytes", dest="nbytes", type=positive, metavar="N", help="of a copy (16 MiB; on CUDA 64 MiB)"),
        ),
    ),
    "alloc": Suite(
        "allocation in a warm arena, reclaiming, and what a long run leaves",
        (
            _backend("host"),
            _peers(None),
            _RANKS,
            _option("--pairs", type=positive, default=1_000_000, metavar="N", help="of the long run (1000000)"),
        ),
    ),
    "collectives": Suite(
        "the collective operators beside gloo's, or torch's and NCCL's",
        (
            _backend("host"),
            _GPUS,
            _option(
                "--sizes",
                type=positive,
                nargs="+",
                default=(),
                metavar="N",
                help="bytes (1 KiB to 16 MiB; on CUDA 2 KiB to 128 MiB)",
            ),
            _option(
                "--operators",
                nargs="+",
                choices=_OPERATORS,
                default=_OPERATORS,
                metavar="NAME",
                help=" ".join(_OPERATORS),
            ),
        ),
    ),
    "compile": Suite(
        "what symmem.compile makes of a function, beside stock Inductor and eager code",
        (
            _backend("host"),
            _option(
                "--ranks", type=positive, nargs="+", metavar="N", help="world sizes (one rank a GPU; on the CPU 2)"
            ),
            _option("--hidden", type=positive, metavar="N", help="columns of a layer (4096; on the CPU 1024)"),
            _option("--parts", nargs="+", choices=_PARTS, default=_PARTS, metavar="NAME", help=" ".join(_PARTS)),
            _option("--rounds", type=positive, default=5, metavar="N", help="how often each is compiled (5)"),
        ),
    ),
    "scale": Suite(
        "what the groups of a large job ask of its store, counted",
        (
            _option("--ranks", type=positive, default=10_000, metavar="N", help="of the job (10000)"),
            _option("--group-size", type=positive, default=72, metavar="M", help="ranks of a group (72)"),
            _option("--report", type=Path, metavar="PATH", help="write a report in Markdown there"),
        ),
    ),
}
"""By name. The options of a suite are what its ``run`` takes."""


def add_parser(subparsers: SubParsers) -> None:
    """Add the command ``bench``."""
    commands = add_group(subparsers, "bench", "measure, beside a peer in the same run", "suites", "SUITE")
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=suite.help)
        names = [command.add_argument(option.flag, **option.words).dest for option in suite.options]
        command.add_argument("--json", action="store_true", help="print one JSON object a figure and line")
        _add_plot(command)
        command.set_defaults(run=_runner(name, names))
    show = commands.add_parser("show", help="figures of a file, as a table and as a picture")
    show.add_argument("file", type=Path, metavar="FILE.json", help="what a suite printed by --json")
    _add_plot(show)
    show.set_defaults(run=_show)
    compare = commands.add_parser("compare", help="what became slower, from one file of figures to another")
    for which in ("old", "new"):
        compare.add_argument(which, type=Path, metavar=f"{which.upper()}.json", help="what a suite printed by --json")
    fail = "exit with 1 if a figure became more than so many times worse (1.1 is what is told without this)"
    compare.add_argument("--fail-over", type=_limit, metavar="X", help=fail)
    compare.set_defaults(run=_compare)


def _add_plot(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures, with matplotlib")


def _limit(text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 1 <= limit < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 1, such as 1.1, got {text!r}")
    return limit


def _runner(name: str, options: Iterable[str]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        with _picture(args.plot, f"symmem bench {name}") as figures:
            module = importlib.import_module(f"symmem.tools.bench.{name}")
            progress = Progress(name, sys.stderr)
            try:
                for figure in module.run(**{option: getattr(args, option) for option in options}, progress=progress):
                    figures.append(figure)
                    if args.json:
                        progress.hide()
                        print(figure.json(), flush=True)  # at once: what was measured stays if a later one fails
                        progress.show()
            finally:
                progress.hide()
            if not args.json:
                print(table(figures))
        return 0

    return run


def _show(args: argparse.Namespace) -> int:
    from symmem.tools.bench import compare

    with _picture(args.plot, args.file.stem) as figures:
        figures += compare.read(args.file)
        print(table(figures))
    return 0


@contextlib.contextmanager
def _picture(file: Path | None, title: str) -> Iterator[list[Figure]]:
    """What is put into the list is drawn, if there is a file to draw it to; whether it can be shows before."""
    figures: list[Figure] = []
    if file is None:
        yield figures
        return
    from symmem.tools.bench import plot

    plot.check(file)
    yield figures
    if figures:
        plot.draw(figures, title, file)


def _compare(args: argparse.Namespace) -> int:
    from symmem.tools.bench import compare

    text, worse = compare.run(args.old, args.new, args.fail_over or 1.1)
    print(text)
    return 1 if worse and args.fail_over else 0
