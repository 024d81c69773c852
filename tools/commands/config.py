"""``symmem config show`` and ``symmem config check``; neither imports torch."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys

from symmem.config import SETTINGS, Settings, check_sources, gpu_model, load_node_settings, load_settings
from symmem.config.settings import GROUP_NAMES
from symmem.errors import ConfigError
from symmem.tools.commands.subcommands import SubParsers, add_group

__all__ = ["add_parser"]


def add_parser(subparsers: SubParsers) -> None:
    """Add the command ``config``."""
    commands = add_group(subparsers, "config", "show or check the configuration")
    show = commands.add_parser("show", help="print every setting, its unit and the origin of its value")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.add_argument("--group", metavar="NAME", help="show the settings of the group with this name")
    show.add_argument("--host", metavar="HOST", help="show the settings of another host, by the same cluster file")
    show.add_argument("--gpu", metavar="MODEL", help="the GPU model of the host (an empty text: no GPU)")
    show.set_defaults(run=_show)
    check = commands.add_parser("check", help="check the environment and the cluster file")
    check.add_argument("file", nargs="?", metavar="FILE", help="the cluster file (default: $SYMMEM_CONFIG)")
    check.set_defaults(run=_check)


def _show(args: argparse.Namespace) -> int:
    try:
        if args.host is None:
            settings = load_settings(group=args.group, gpu=args.gpu)
        else:
            settings = load_node_settings(args.host, args.gpu, group=args.group)
    except ConfigError as error:
        return _report(error)
    this_gpu = gpu_model() if args.host is None else None
    context = {
        "host": args.host or socket.gethostname(),
        "gpu": this_gpu if args.gpu is None else args.gpu or None,
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
    lines += ["", GROUP_NAMES] if context["group"] else []
    return "\n".join(lines)
