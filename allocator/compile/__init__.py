"""torch.compile places the registered arguments of operators in symmetric memory.

symmem.compile.enable()                       # for everything compiled from now on
compiled = torch.compile(f)
print(symmem.compile.explain(f, *args))       # shows which arguments are placed or copied, and why

torch.compile(f, backend="symmem")            # for one function
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from symmem._lazy import lazy_exports

if TYPE_CHECKING:
    from symmem.compile.control import disable, enable, enabled
    from symmem.compile.explanation import explain
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

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("Decision", "GraphReport", "Report"), "symmem.compile.report"),
        **dict.fromkeys(("disable", "enable", "enabled"), "symmem.compile.control"),
        "explain": "symmem.compile.explanation",
        "specify_symmetric_memory": "symmem.compile.specify",
    },
)
