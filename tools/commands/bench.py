"""``symmem bench``: the suites, and their common options: JSON lines or a table, a picture, progress.

A suite is a module of :mod:`symmem.tools.bench` with the suite's name. Its ``run`` takes the suite's options by name
and a :class:`.Progress`, and yields figures. The module is imported only when it runs, because most suites need torch.
To add a suite, add an entry to :data:`SUITES`.
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
from symmem.tools.commands.subcommands import SubParsers, add_group, number, positive

__all__ = ["SUITES", "Suite", "add_parser"]

_PEERS = ("cuda", "nvshmem", "nccl")
_PARTS = ("overhead", "compile", "chain", "input")
_OPERATORS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


class _Option(NamedTuple):
    flag: str
    arguments: dict[str, Any]


class Suite(NamedTuple):
    """One suite: its help text, and its options beside the common ones."""

    help: str
    options: tuple[_Option, ...]


def _option(flag: str, **arguments: Any) -> _Option:
    return _Option(flag, arguments)


def _backend(default: str) -> _Option:
    return _option("--backend", default=default, metavar="NAME", help=f"backend to measure (default {default})")


def _choice(flag: str, names: tuple[str, ...], default: tuple[str, ...] | None, about: str) -> _Option:
    text = f"{about}: {', '.join(names)}"
    return _option(flag, nargs="+", choices=names, default=default, metavar="NAME", help=text)


_WORLD_SIZES = "numbers of ranks"
_RANKS = _option("--ranks", type=positive, nargs="+", default=[2, 4], metavar="N", help=f"{_WORLD_SIZES} (default 2 4)")
_GPUS = _option(
    "--ranks", type=positive, nargs="+", metavar="N", help=f"{_WORLD_SIZES} (default: all GPUs; on the CPU 2 4)"
)

_OF_OPERATORS = (
    _backend("host"),
    _GPUS,
    _option(
        "--sizes",
        type=positive,
        nargs="+",
        default=(),
        metavar="N",
        help="sizes in bytes (default 1 KiB to 16 MiB; on CUDA 2 KiB to 128 MiB)",
    ),
    _choice("--operators", _OPERATORS, _OPERATORS, "operators to measure"),
)

SUITES = {
    "host": Suite("shared memory of the host, beside gloo and a local copy", (_RANKS,)),
    "gpu": Suite(
        "one backend beside PyTorch's transports, on all GPUs of this machine",
        (
            _backend("native"),
            _choice("--peers", _PEERS, _PEERS, "transports to compare with"),
            _option("--ranks", type=positive, metavar="N", help="number of ranks (default: all GPUs)"),
        ),
    ),
    "torch_backend": Suite(
        "torch's symmetric memory with symmem as its backend, beside its own, on all GPUs of this machine",
        (
            _option("--ranks", type=positive, metavar="N", help="number of ranks (default: all GPUs)"),
            _option("--rounds", type=positive, default=5, metavar="N", help="rounds of both sides (default 5)"),
        ),
    ),
    "p2p": Suite(
        "copies between all pairs of ranks, beside PyTorch's transport or a local copy",
        (
            _backend("host"),
            _GPUS,
            _option(
                "--bytes",
                dest="nbytes",
                type=positive,
                metavar="N",
                help="bytes of a copy (default 16 MiB; on CUDA 64 MiB)",
            ),
        ),
    ),
    "alloc": Suite(
        "allocation in a warm arena, reclaiming, and leaks of a long run",
        (
            _backend("host"),
            _choice("--peers", _PEERS, None, "transports to compare with (default: all that work here)"),
            _RANKS,
            _option(
                "--pairs",
                type=positive,
                default=1_000_000,
                metavar="N",
                help="allocations of the long run (default 1000000)",
            ),
        ),
    ),
    "collectives": Suite("collective operators beside gloo, or beside PyTorch and NCCL", _OF_OPERATORS),
    "process_group": Suite("torch.distributed over the backend symmem, beside gloo or NCCL", _OF_OPERATORS),
    "compile": Suite(
        "functions compiled with symmem.compile, beside stock Inductor and eager code",
        (
            _backend("host"),
            _option(
                "--ranks",
                type=positive,
                nargs="+",
                metavar="N",
                help=f"{_WORLD_SIZES} (default: all GPUs; on the CPU 2)",
            ),
            _option("--hidden", type=positive, metavar="N", help="columns of a layer (default 4096; on the CPU 1024)"),
            _choice("--parts", _PARTS, _PARTS, "parts to measure"),
            _option(
                "--rounds", type=positive, default=5, metavar="N", help="times that every function compiles (default 5)"
            ),
        ),
    ),
    "scale": Suite(
        "requests of the groups of a large job to its store, counted",
        (
            _option("--ranks", type=positive, default=10_000, metavar="N", help="ranks of the job (default 10000)"),
            _option("--group-size", type=positive, default=72, metavar="M", help="ranks of a group (default 72)"),
        ),
    ),
}
"""All suites by name. The options of a suite are the parameters of its ``run``."""


def add_parser(subparsers: SubParsers) -> None:
    """Add the command ``bench``."""
    commands = add_group(subparsers, "bench", "measure symmem beside a peer in the same run", "suites", "SUITE")
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=suite.help)
        names = [command.add_argument(option.flag, **option.arguments).dest for option in suite.options]
        command.add_argument("--json", action="store_true", help="print one JSON object per figure, each on its line")
        _add_plot(command)
        command.set_defaults(run=_runner(name, names))
    show = commands.add_parser("show", help="print the figures of a file as a table, or draw them")
    show.add_argument("file", type=Path, metavar="FILE.json", help="output of a suite with --json")
    _add_plot(show)
    show.set_defaults(run=_show)
    compare = commands.add_parser("compare", help="show what became slower from one file of figures to another")
    for which in ("old", "new"):
        compare.add_argument(which, type=Path, metavar=f"{which.upper()}.json", help="output of a suite with --json")
    fail = "exit with 1 if a figure became more than X times worse (without it, more than 1.1 times is only reported)"
    limit = number(1, float("inf"), "a number from 1, such as 1.1")
    compare.add_argument("--fail-over", type=limit, metavar="X", help=fail)
    compare.set_defaults(run=_compare)


def _add_plot(command: argparse.ArgumentParser) -> None:
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures (needs matplotlib)")


def _runner(name: str, options: Iterable[str]) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        with _picture(args.plot, f"symmem bench {name}") as figures:
            module = importlib.import_module(f"symmem.tools.bench.{name}")
            progress = Progress(name, sys.stderr)
            try:
                for figure in module.run(**{option: getattr(args, option) for option in options}, progress=progress):
                    figures.append(figure)
                    if args.json:
                        progress.clear()
                        print(figure.json(), flush=True)  # at once, so that a later failure does not lose it
            finally:
                progress.clear()
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
    """Draw the figures of the yielded list to ``file``, if given. Checks before the measurement that it can."""
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
