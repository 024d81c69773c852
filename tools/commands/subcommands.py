"""Helpers for the parsers of subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["SubParsers", "add_group", "number", "positive"]

SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The object that commands are added to."""


def add_group(
    subparsers: SubParsers, name: str, about: str, title: str = "commands", metavar: str = "COMMAND"
) -> SubParsers:
    """Add a command with subcommands, such as ``symmem bench``, and return the object to add them to.

    Every subcommand must set ``run``, a function that takes the parsed arguments and returns the exit code.
    """
    parser = subparsers.add_parser(name, help=about)
    return parser.add_subparsers(title=title, metavar=metavar, required=True)


def positive(text: str) -> int:
    """The ``type`` of an argument that is a whole number from 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def number(least: float, most: float, expected: str) -> Callable[[str], float]:
    """Make the ``type`` of an argument that is a finite number from ``least`` to ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or value == float("inf"):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse
