"""Exports of a package that are loaded at their first use, and functions that wait for the import of a module."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["lazy_exports", "load", "when_imported"]


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


def when_imported(name: str, function: Callable[[], object]) -> None:
    """Call a function when a module has been imported: now, or later.

    Until then a finder in ``sys.meta_path`` waits for the module. It wraps the loader of this module and of no other
    one, and removes itself when the module is imported.
    """
    if sys.modules.get(name) is None:
        sys.meta_path.insert(0, _WaitingFinder(name, function))
    else:
        function()


class _WaitingFinder:
    """Finds one module with the other finders, and calls a function after the import."""

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self._name, self._function = name, function

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if name != self._name:
            return None
        for finder in tuple(sys.meta_path):
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _WrappedLoader(self, spec.loader)  # type: ignore[assignment]
                return spec
        return None

    def imported(self) -> None:
        """The module has been imported."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._function()


class _WrappedLoader:
    """Wraps a module's loader for one import."""

    def __init__(self, finder: _WaitingFinder, loader: Any) -> None:
        self._finder, self._loader = finder, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Import the module as if this loader did not exist, then tell the finder."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.imported()
