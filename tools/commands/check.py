"""``symmem check reproducible``: checks on this machine that sums have the bits that the documentation promises."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from symmem.errors import UnsupportedError
from symmem.tools.commands.subcommands import SubParsers, add_group, positive

if TYPE_CHECKING:
    from symmem.tools.reproducible import Comparison

__all__ = ["add_parser", "report"]

_SHOWN = 4  # differences of a case


def add_parser(subparsers: SubParsers) -> None:
    """Add the command ``check``."""
    commands = add_group(subparsers, "check", "check promises of the documentation on this machine")
    about = "check that sums have the same bits in every batch, with every algorithm, on every rank, in every run"
    parser = commands.add_parser("reproducible", help=about)
    parser.add_argument("--ranks", type=positive, metavar="N", help="number of ranks (default: all GPUs, else 8)")
    devices = "where (default cuda if there are two GPUs or more, else cpu)"
    parser.add_argument("--device", choices=("cpu", "cuda"), help=devices)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Run all cases. The exit code is 1 if bits differ.

    Raises:
        UnsupportedError: There are more ranks than GPUs.
    """
    import torch

    from symmem.tools.reproducible import examine

    gpus = torch.cuda.device_count()
    device = args.device or ("cuda" if gpus > 1 else "cpu")
    ranks = args.ranks or (gpus if device == "cuda" else 8)
    if device == "cuda" and not 0 < ranks <= gpus:
        raise UnsupportedError(
            f"`symmem check reproducible --device cuda` needs a GPU for each rank, not {ranks} ranks on {gpus} GPUs",
            hint="pass --ranks with at most the number of GPUs, or --device cpu",
        )
    return report(examine(ranks, device), ranks, device, as_json=args.json)


def report(cases: Sequence[Comparison], ranks: int, device: str, *, as_json: bool) -> int:
    """Print a line per case and the outcome. Returns the exit code: 1 if bits differ in a case."""
    different = [case for case in cases if case.differs]
    if as_json:
        shown = [asdict(case) for case in cases]
        print(json.dumps({"ranks": ranks, "device": device, "same": not different, "cases": shown}, indent=2))
    else:
        for case in cases:
            places = ", ".join(case.differs[:_SHOWN]) + (", ..." if len(case.differs) > _SHOWN else "")
            verdict = "DIFFERENT" if case.differs else "same"
            print(f"{verdict:10} {case.contract:11} {case.operation:15} {case.dtype:9} {places}".rstrip())
    if different:
        names = "; ".join(f"{case.contract} {case.operation} {case.dtype}" for case in different)
        print(f"symmem: bits differ in {len(different)} of {len(cases)} cases: {names}", file=sys.stderr)
        return 1
    if not as_json:
        print(f"\nThe bits are the same in all {len(cases)} cases, on {ranks} ranks ({device}).")
    return 0
