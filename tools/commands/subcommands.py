"""Commands that have subcommands: ``symmem ops list``, ``symmem bench host``."""

from __future__ import annotations

import argparse
from typing import TypeAlias

__all__ = ["SubParsers", "add_group"]

SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What commands are added to."""


def add_group(
    subparsers: SubParsers, name: str, about: str, title: str = "commands", metavar: str = "COMMAND"
) -> SubParsers:
    """Add a command of which one subcommand must be chosen; returns what these are added to.

    Each of them sets ``run``, which takes the parsed arguments and returns the exit code.
    """
    parser = subparsers.add_parser(name, help=about)
    return parser.add_subparsers(title=title, metavar=metavar, required=True)
