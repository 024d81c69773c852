"""torch.compile places the registered arguments of operators in symmetric memory.

symmem.compile.enable()                       # for all that is compiled from here on
compiled = torch.compile(f)
print(symmem.compile.explain(f, *args))       # what was placed, what is copied, and why

torch.compile(f, backend="symmem")            # for one function
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from symmem.compile.control import disable, enable, enabled
    from symmem.compile.explaining import explain
    from symmem.compile.report import Decision, GraphReport, Report
    from symmem.compile.specify import specify_symmetric_memory

__all__ = [
    "Decision",
    "GraphReport",
    "Report",
    "disable",
    "enable",
    "enabled",
    "explain",
    "specify_symmetric_memory",
]

_HOMES = {
    **dict.fromkeys(("Decision", "GraphReport", "Report"), "symmem.compile.report"),
    **dict.fromkeys(("disable", "enable", "enabled"), "symmem.compile.control"),
    "explain": "symmem.compile.explaining",
    "specify_symmetric_memory": "symmem.compile.specify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'symmem.compile' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
