"""``symmem config show`` and ``symmem config check``; neither imports torch."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys

from symmem.config import SETTINGS, Settings, check_sources, gpu_model, load_settings
from symmem.errors import ConfigError
from symmem.tools.commands.subcommands import SubParsers, add_group

__all__ = ["add_parser"]


def add_parser(subparsers: SubParsers) -> None:
    """Add the command ``config``."""
    commands = add_group(subparsers, "config", "show or check the configuration")
    show = commands.add_parser("show", help="print every setting, its unit and where its value came from")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.add_argument("--group", metavar="NAME", help="show what holds for the group of this name")
    show.set_defaults(run=_show)
    check = commands.add_parser("check", help="check the environment and the cluster file")
    check.add_argument("file", nargs="?", metavar="FILE", help="the cluster file (default: $SYMMEM_CONFIG)")
    check.set_defaults(run=_check)


def _show(args: argparse.Namespace) -> int:
    try:
        settings = load_settings(group=args.group)
    except ConfigError as error:
        return _report(error)
    context = {
        "host": socket.gethostname(),
        "gpu": gpu_model(),
        "group": args.group,
        "file": os.environ.get("SYMMEM_CONFIG") or None,
    }
    print(_as_json(settings, context) if args.json else _as_table(settings, context))
    return 0


def _check(args: argparse.Namespace) -> int:
    status = 0
    for source, found in check_sources(os.environ, args.file):
        if isinstance(found, ConfigError):
            status = _report(found)
        else:
            print(f"ok  {source}: {found}")
    return status


def _report(error: ConfigError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _as_json(settings: Settings, context: dict[str, str | None]) -> str:
    values = {
        name: {
            "value": getattr(settings, name),
            "unit": setting.kind.unit or None,
            "origin": settings.origins[name],
        }
        for name, setting in SETTINGS.items()
    }
    return json.dumps({**context, "settings": values}, indent=2)


def _as_table(settings: Settings, context: dict[str, str | None]) -> str:
    rows = [("SETTING", "VALUE", "UNIT", "FROM")]
    for name, setting in SETTINGS.items():
        value = setting.kind.format(getattr(settings, name))
        rows.append((name, value, setting.kind.unit or "-", settings.origins[name]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [", ".join(f"{label}: {text or 'none'}" for label, text in context.items()), ""]
    lines += ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    return "\n".join(lines)
