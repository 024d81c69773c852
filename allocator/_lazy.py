"""Exports of a package that are loaded at their first use."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazy_exports", "load"]


def lazy_exports(
    package: str, homes: Mapping[str, str], subpackages: frozenset[str] = frozenset()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Args:
        package: The package's ``__name__``.
        homes: The defining module, by exported name.
        subpackages: Names of subpackages that are imported at their first use.
    """

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return functools.partial(load, package, homes, subpackages), names


def load(package: str, homes: Mapping[str, str], subpackages: frozenset[str], name: str) -> Any:
    """Import the module that defines a name. For the arguments see :func:`lazy_exports`."""
    if name in subpackages:
        return importlib.import_module(f"{package}.{name}")
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(homes[name]), name)
    setattr(sys.modules[package], name, value)
    return value
