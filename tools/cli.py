"""The ``symmem`` command. A subcommand's module is imported only when it runs, so that the rest is quick."""

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
from symmem.tools.commands import check, config, live, ops, tune
from symmem.tools.commands.subcommands import positive
from symmem.tools.outcomes import RanksFailedError
from symmem.version import VERSION

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """A parser without abbreviated options. Parsers of subcommands have the same class."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``symmem ARGV``.

    Returns:
        The exit code: 0 for success, 1 if something is wrong or failed, 2 for wrong usage, 130 after Ctrl-C, and 141
        if the reader of the output has gone. Without a subcommand, the help goes to stderr and the code is 2.
    """
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (SymmemError, RanksFailedError) as error:
        print(f"symmem: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print(f"symmem: PyTorch is not installed for {sys.executable}: pip install 'torch>=2.11'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("symmem: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Python flushes stdout again at exit; let that go to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(prog="symmem", description="Symmetric memory for PyTorch.")
    parser.add_argument("--version", action="version", version=f"symmem {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    doctor = commands.add_parser("doctor", help="show which backends work here, and how to fix the others")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="start processes that share memory, and check what they see")
    demo.add_argument("--ranks", type=positive, default=4, metavar="N", help="number of processes (default 4)")
    demo.add_argument("--backend", metavar="NAME", help="backend (default: from the configuration)")
    demo.add_argument("--json", action="store_true", help="print JSON")
    demo.set_defaults(run=_demo)

    bench_command.add_parser(commands)

    validate = commands.add_parser(
        "validate", help="run the conformance suite, examples and benchmarks; write a report"
    )
    names = "backends to test: comma-separated, or all (default all)"
    validate.add_argument("--backends", type=_some_names, default=["all"], metavar="NAMES", help=names)
    required = "backends that must not skip a case: comma-separated, or all"
    validate.add_argument("--require", type=_names, default=[], metavar="NAMES", help=required)
    validate.add_argument("--ranks", type=positive, metavar="N", help="number of ranks (default: all GPUs, else 4)")
    validate.add_argument(
        "--report", type=Path, metavar="DIR", help="write validation-N.md and validation-N.json to DIR"
    )
    validate.add_argument("--no-figures", action="store_true", help="skip the benchmarks")
    folder = "folder of the example programs (default examples)"
    validate.add_argument("--examples", type=Path, default="examples", metavar="DIR", help=folder)
    validate.set_defaults(run=_validate)

    memory_map = commands.add_parser("memory-map", help="show the arenas of memory snapshots on an HTML page")
    snapshots = "JSON file with the result of symmem.memory_snapshot(); one per rank"
    memory_map.add_argument("snapshots", type=Path, nargs="+", metavar="SNAPSHOT", help=snapshots)
    output = "default: memory-map.html, or memory-map.pickle with --torch"
    memory_map.add_argument("-o", "--output", type=Path, metavar="PATH", help=output)
    memory_map.add_argument("--torch", action="store_true", help="convert one snapshot for pytorch.org/memory_viz")
    memory_map.set_defaults(run=_memory_map)

    include_path = commands.add_parser(
        "include-path", help="print the folder of symmem.cuh and symmem_registry.h, for -I"
    )
    include_path.set_defaults(run=_include_path)

    config.add_parser(commands)
    check.add_parser(commands)
    ops.add_parser(commands)
    tune.add_parser(commands)
    live.add_parsers(commands)
    return parser


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

    return memory_map.run(args.snapshots, args.output, as_torch=args.torch)


def _include_path(args: argparse.Namespace) -> int:
    from symmem.tensor.device_view import include_path

    print(include_path())
    return 0


if __name__ == "__main__":
    sys.exit(main())
