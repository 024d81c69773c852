"""The options of ``symmem tune``; see :mod:`symmem.tools.tune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from symmem.config.kernel_tables import KERNELS
from symmem.config.kinds import SIZE
from symmem.config.values import InvalidValue
from symmem.errors import InvalidArgumentError
from symmem.tools.commands.subcommands import SubParsers

__all__ = ["add_parser"]


def add_parser(subparsers: SubParsers) -> None:
    """Add the command ``tune``; it sets ``run``, which takes the parsed arguments."""
    parser = subparsers.add_parser("tune", help="measure which kernels are quickest on these GPUs, and write a table")
    parser.add_argument("--ranks", type=int, metavar="N", help="number of ranks (default: all GPUs)")
    where = "the table; other rows in it stay (algorithms.yaml)"
    parser.add_argument("-o", "--output", type=Path, default="algorithms.yaml", metavar="PATH", help=where)
    which = f"of {', '.join(KERNELS)} (all)"
    parser.add_argument("--operations", nargs="+", choices=tuple(KERNELS), default=tuple(KERNELS), help=which)
    parser.add_argument("--least", type=_size, default="2KiB", metavar="SIZE", help="fewest bytes measured (2KiB)")
    parser.add_argument("--most", type=_size, default="64MiB", metavar="SIZE", help="most bytes measured (64MiB)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a figure and line")
    parser.set_defaults(run=_run)


def _size(text: str) -> int:
    try:
        size = SIZE.parse([text])
    except InvalidValue as bad:
        raise argparse.ArgumentTypeError(f"{bad.what}: {bad.hint}") from None
    if size & (size - 1) or size < 16:
        raise argparse.ArgumentTypeError(f"expected a power of two from 16 bytes, got {text!r}")
    return size


def _run(args: argparse.Namespace) -> int:
    from symmem.tools import tune

    sizes = [1 << power for power in range(args.least.bit_length() - 1, args.most.bit_length())]
    if not sizes:
        raise InvalidArgumentError(f"--least {args.least} bytes is more than --most {args.most} bytes")
    return tune.run(args.ranks, args.operations, sizes, args.output, as_json=args.json)
