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
from symmem.tools import config_command, live_command, ops_command
from symmem.tools.outcomes import RanksFailedError
from symmem.version import VERSION

__all__ = ["main"]

_PEERS = ("cuda", "nvshmem", "nccl")


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
    demo.add_argument("--ranks", type=_positive, default=4, metavar="N", help="number of processes (default 4)")
    demo.add_argument("--backend", metavar="NAME", help="backend (default: the configuration's)")
    demo.add_argument("--json", action="store_true", help="print JSON")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure, beside a peer in the same run")
    suites = bench.add_subparsers(title="suites", metavar="SUITE", required=True)
    host = suites.add_parser("host", help="host shared memory beside gloo and a local copy")
    host.add_argument("--ranks", type=_positive, nargs="+", default=[2, 4], metavar="N", help="world sizes (2 4)")
    host.add_argument("--json", action="store_true", help="print one JSON object a figure and line")
    host.set_defaults(run=_bench_host)

    alloc = suites.add_parser("alloc", help="allocation in a warm arena, reclaiming, and what a long run leaves")
    alloc.add_argument("--backend", default="host", metavar="NAME", help="ours (host)")
    alloc.add_argument("--peers", nargs="*", choices=_PEERS, default=(), metavar="NAME", help="cuda nvshmem nccl")
    alloc.add_argument("--ranks", type=_positive, nargs="+", default=[2, 4], metavar="N", help="world sizes (2 4)")
    alloc.add_argument("--pairs", type=_positive, default=1_000_000, metavar="N", help="of the long run (1000000)")
    alloc.add_argument("--json", action="store_true", help="print one JSON object a figure and line")
    alloc.set_defaults(run=_bench_alloc)

    gpu = suites.add_parser("gpu", help="one backend beside torch's transports, on all GPUs of this machine")
    gpu.add_argument("--backend", default="native", metavar="NAME", help="ours (native)")
    gpu.add_argument("--peers", nargs="+", choices=_PEERS, default=_PEERS, metavar="NAME", help="cuda nvshmem nccl")
    gpu.add_argument("--ranks", type=_positive, metavar="N", help="number of ranks (default: all GPUs)")
    gpu.add_argument("--json", action="store_true", help="print one JSON object a figure and line")
    gpu.set_defaults(run=_bench_gpu)

    collectives = suites.add_parser("collectives", help="the collective operators on the CPU beside gloo's")
    worlds = "world sizes (2 4)"
    collectives.add_argument("--ranks", type=_positive, nargs="+", default=[2, 4], metavar="N", help=worlds)
    collectives.add_argument("--json", action="store_true", help="print one JSON object a figure and line")
    collectives.set_defaults(run=_bench_collectives)

    scale = suites.add_parser("scale", help="what the groups of a large job ask of its store, counted")
    scale.add_argument("--ranks", type=_positive, default=10_000, metavar="N", help="of the job (10000)")
    scale.add_argument("--group-size", type=_positive, default=72, metavar="M", help="ranks of a group (72)")
    scale.add_argument("--report", type=Path, metavar="PATH", help="write a report in Markdown there")
    scale.add_argument("--json", action="store_true", help="print one JSON object a figure and line")
    scale.set_defaults(run=_bench_scale)

    validate = commands.add_parser("validate", help="run the conformance suite and the figures, and write a report")
    names = "comma-separated, or all"
    validate.add_argument("--backends", type=_some_names, default=["all"], metavar="NAMES", help=names)
    validate.add_argument("--require", type=_names, default=[], metavar="NAMES", help="whose skips are failures")
    validate.add_argument("--ranks", type=_positive, metavar="N", help="number of ranks (default: GPUs, else 4)")
    validate.add_argument("--report", type=Path, metavar="DIR", help="write validation-N.md and .json there")
    validate.add_argument("--no-figures", action="store_true", help="only the conformance suite")
    validate.set_defaults(run=_validate)

    memory_map = commands.add_parser("memory-map", help="draw the arenas of snapshots, as a page to open in a browser")
    what = "what symmem.memory_snapshot() returned, as JSON; one a rank"
    memory_map.add_argument("snapshots", type=Path, nargs="+", metavar="SNAPSHOT", help=what)
    where = "write the page there (memory-map.html)"
    memory_map.add_argument("-o", "--output", type=Path, default="memory-map.html", metavar="PATH", help=where)
    memory_map.set_defaults(run=_memory_map)

    config_command.add_parser(commands)
    ops_command.add_parser(commands)
    live_command.add_parsers(commands)

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


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _some_names(text: str) -> list[str]:
    if not (names := _names(text)):
        raise argparse.ArgumentTypeError(f"expected names of backends, got {text!r}")
    return names


def _doctor(args: argparse.Namespace) -> int:
    from symmem.tools import doctor

    return doctor.run(as_json=args.json)


def _demo(args: argparse.Namespace) -> int:
    from symmem.tools import demo

    return demo.run(args.ranks, args.backend, as_json=args.json)


def _bench_host(args: argparse.Namespace) -> int:
    from symmem.tools.bench import host

    return host.run(args.ranks, as_json=args.json)


def _bench_alloc(args: argparse.Namespace) -> int:
    from symmem.tools.bench import alloc

    return alloc.run(args.backend, args.peers, args.ranks, pairs=args.pairs, as_json=args.json)


def _bench_gpu(args: argparse.Namespace) -> int:
    import torch

    from symmem.tools.bench import gpu

    return gpu.run(args.backend, args.peers, args.ranks or torch.cuda.device_count(), as_json=args.json)


def _bench_collectives(args: argparse.Namespace) -> int:
    from symmem.tools.bench import collectives

    return collectives.run(args.ranks, as_json=args.json)


def _bench_scale(args: argparse.Namespace) -> int:
    from symmem.tools.bench import scale

    return scale.run(args.ranks, args.group_size, args.report, as_json=args.json)


def _validate(args: argparse.Namespace) -> int:
    import torch

    from symmem.backends import available_names, get_backend
    from symmem.tools import validate

    backends, required = (
        list(available_names()) if names == ["all"] else names for names in (args.backends, args.require)
    )
    for name in {*backends, *required}:
        get_backend(name)
    world = args.ranks or torch.cuda.device_count() or 4
    return validate.run(backends, required, world, args.report, figures=not args.no_figures)


def _memory_map(args: argparse.Namespace) -> int:
    from symmem.tools import memory_map

    return memory_map.run(args.snapshots, args.output)


if __name__ == "__main__":
    sys.exit(main())
