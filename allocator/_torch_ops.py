"""Make ``torch.ops.symmem`` work as soon as symmem and torch are both imported, in either order.

The modules that define the operators need most of symmem, so they are loaded when a program first looks up an operator.
Until then the namespace object ``torch.ops.symmem`` has a class that loads them; afterwards it has torch's class again.

If torch is not imported yet, a finder in ``sys.meta_path`` waits for it. The finder wraps the loader of torch itself
and of no other module. It removes itself when torch is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["install"]

_MODULES = ("symmem.ops.collectives", "symmem.ops.one_sided")


def install() -> None:
    """Prepare ``torch.ops.symmem`` now, or when torch is imported."""
    torch = sys.modules.get("torch")
    if torch is None:
        sys.meta_path.insert(0, _TorchFinder())
    elif hasattr(torch, "ops"):  # it is missing if torch imports symmem while torch itself is being imported
        _make_lazy(torch.ops.symmem)


def _make_lazy(namespace: Any) -> None:
    """Let an operator namespace of torch load the modules that define its operators."""
    plain: Any = type(namespace)
    if plain.__name__ == "LazyNamespace":
        return

    class LazyNamespace(plain):  # type: ignore[misc]
        __module__ = plain.__module__  # torch derives the names of operators from it

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("__"):
                    raise
            for module in _MODULES:
                importlib.import_module(module)
            self.__class__ = plain
            return getattr(self, name)

    namespace.__class__ = LazyNamespace


class _TorchFinder:
    """Finds torch with the other finders, and has :func:`install` called after the import."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if name != "torch":
            return None
        for finder in tuple(sys.meta_path):
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _TorchLoader(self, spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _TorchLoader:
    """Wraps torch's loader for one import."""

    def __init__(self, finder: _TorchFinder, loader: Any) -> None:
        self._finder, self._loader = finder, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Import torch as if this loader did not exist, then prepare its namespace of operators."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        install()
