"""The ``symmem`` command. Each subcommand is a module that is imported when it is chosen, so that the rest is quick."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symmem.errors import SymmemError
from symmem.tools.commands import bench as bench_command
from symmem.tools.commands import config, live, ops, tune
from symmem.tools.numbers import positive
from symmem.tools.outcomes import RanksFailedError
from symmem.version import VERSION

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """One that takes no abbreviated options; the parsers of its subcommands are of its class."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``symmem ARGV``; returns the exit code: 0, 1 for what was found to be wrong, 2 for wrong usage.

    As for commands that a signal ends: 130 when interrupted, 141 when nobody reads the output any more.
    """
    parser: argparse.ArgumentParser = _Parser(prog="symmem", description="Symmetric memory for PyTorch.")
    parser.add_argument("--version", action="version", version=f"symmem {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    doctor = commands.add_parser("doctor", help="which backends work here, why not, and how to fix it")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="let several processes share memory, and check what they see")
    demo.add_argument("--ranks", type=positive, default=4, metavar="N", help="number of processes (default 4)")
    demo.add_argument("--backend", metavar="NAME", help="backend (default: the configuration's)")
    demo.add_argument("--json", action="store_true", help="print JSON")
    demo.set_defaults(run=_demo)

    bench_command.add_parser(commands)

    validate = commands.add_parser("validate", help="run conformance suite, examples and figures, and write a report")
    names = "comma-separated, or all"
    validate.add_argument("--backends", type=_some_names, default=["all"], metavar="NAMES", help=names)
    validate.add_argument("--require", type=_names, default=[], metavar="NAMES", help="whose skips are failures")
    validate.add_argument("--ranks", type=positive, metavar="N", help="number of ranks (default: GPUs, else 4)")
    validate.add_argument("--report", type=Path, metavar="DIR", help="write validation-N.md and .json there")
    validate.add_argument("--no-figures", action="store_true", help="only the conformance suite and the examples")
    folder = "where the example programs are (examples)"
    validate.add_argument("--examples", type=Path, default="examples", metavar="DIR", help=folder)
    validate.set_defaults(run=_validate)

    memory_map = commands.add_parser("memory-map", help="draw the arenas of snapshots, as a page to open in a browser")
    what = "what symmem.memory_snapshot() returned, as JSON; one a rank"
    memory_map.add_argument("snapshots", type=Path, nargs="+", metavar="SNAPSHOT", help=what)
    where = "write the page there (memory-map.html)"
    memory_map.add_argument("-o", "--output", type=Path, default="memory-map.html", metavar="PATH", help=where)
    memory_map.set_defaults(run=_memory_map)

    include_path = commands.add_parser("include-path", help="print the folder of symmem.cuh, for nvcc -I")
    include_path.set_defaults(run=_include_path)

    config.add_parser(commands)
    ops.add_parser(commands)
    tune.add_parser(commands)
    live.add_parsers(commands)

    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (SymmemError, RanksFailedError) as error:
        print(f"symmem: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("symmem: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        return 128 + signal.SIGPIPE


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _some_names(text: str) -> list[str]:
    if not (names := _names(text)):
        raise argparse.ArgumentTypeError(f"expected names of backends, got {text!r}")
    return names


def _doctor(args: argparse.Namespace) -> int:
    from symmem.tools.commands import doctor

    return doctor.run(as_json=args.json)


def _demo(args: argparse.Namespace) -> int:
    from symmem.tools.commands import demo

    return demo.run(args.ranks, args.backend, as_json=args.json)


def _validate(args: argparse.Namespace) -> int:
    import torch

    from symmem.backends import available_names, get_backend
    from symmem.tools.commands import validate

    backends, required = (
        list(available_names()) if names == ["all"] else names for names in (args.backends, args.require)
    )
    for name in {*backends, *required}:
        get_backend(name)
    world = args.ranks or torch.cuda.device_count() or 4
    return validate.run(backends, required, world, args.report, args.examples, figures=not args.no_figures)


def _memory_map(args: argparse.Namespace) -> int:
    from symmem.tools.commands import memory_map

    return memory_map.run(args.snapshots, args.output)


def _include_path(args: argparse.Namespace) -> int:
    from symmem.tensor.device_view import include_path

    print(include_path())
    return 0


if __name__ == "__main__":
    sys.exit(main())
