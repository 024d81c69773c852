"""``symmem ops list``: lists the operator arguments that must be symmetric memory."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from symmem.errors import InvalidArgumentError
from symmem.tools.commands.subcommands import SubParsers, add_group
from symmem.tools.table import render

if TYPE_CHECKING:
    from symmem.ops import Registration

__all__ = ["add_parser"]


def add_parser(subparsers: SubParsers) -> None:
    """Add the command ``ops``."""
    commands = add_group(subparsers, "ops", "show the operators that need symmetric memory")
    listing = commands.add_parser(
        "list", help="list operators with their symmetric arguments, group, and origin of the registration"
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    modules = "import MODULE first, to show the operators that it registers; may be repeated"
    listing.add_argument("--import", action="append", default=[], dest="modules", metavar="MODULE", help=modules)
    listing.set_defaults(run=_list)


def _list(args: argparse.Namespace) -> int:
    sys.path.insert(0, os.getcwd())  # as for `python -m`, instead of the folder of the command
    for name in args.modules:
        _import(name)
    from symmem.ops import registered

    known = registered()
    if args.json:
        print(json.dumps([_as_data(each) for each in known], indent=2))
    else:
        header = ("op", "symmetric arguments", "group by", "registered by")
        print(render(header, [_as_row(each) for each in known]))
    return 0


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise InvalidArgumentError(
            f"cannot import {name!r}: {error}", hint="run the command where python can import it, or set PYTHONPATH"
        ) from error


def _as_data(known: Registration) -> dict[str, Any]:
    return {
        "op": known.op,
        "args": list(known.args),
        "types": {name: known.parameters[name].type for name in known.args},
        "mutated": list(known.mutated),
        "group_arg": known.group_arg,
        "unclear_group": list(known.unclear_group),
        "exit_barrier": known.exit_barrier,
        "one_sided": known.one_sided,
        "source": known.source,
    }


def _as_row(known: Registration) -> tuple[str, str, str, str]:
    types = {name: known.parameters[name].type for name in known.args}
    args = [name if types[name] == "Tensor" else f"{name}: {types[name]}" for name in known.args]
    group = "unclear" if known.unclear_group else known.group_arg or "default group"
    return known.op, ", ".join(args), group, known.source
