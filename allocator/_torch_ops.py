"""Make ``torch.ops.symmem`` work as soon as symmem and torch are both imported, in either order.

The modules that define the operators need most of symmem, so they are loaded when a program first looks up an operator.
Until then the namespace object ``torch.ops.symmem`` has a class that loads them; afterwards it has torch's class again.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from symmem._lazy import when_imported

__all__ = ["install"]

_MODULES = ("symmem.ops.collectives", "symmem.ops.one_sided")


def install() -> None:
    """Prepare ``torch.ops.symmem`` now, or when torch is imported."""
    when_imported("torch", _prepare)


def _prepare() -> None:
    torch: Any = sys.modules["torch"]
    if hasattr(torch, "ops"):  # it is missing if torch imports symmem while torch itself is being imported
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
