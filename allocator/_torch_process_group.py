"""Register the process group backend ``symmem`` as soon as symmem and torch.distributed are both imported."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from symmem._lazy import when_imported

__all__ = ["install"]

_MODULE = "torch.distributed.distributed_c10d"


def install() -> None:
    """Register the backend now, or at that import."""
    when_imported(_MODULE, _register)


def _register() -> None:
    backend: Any = getattr(sys.modules[_MODULE], "Backend", None)
    if backend is not None:  # it is missing if torch imports symmem while torch itself is being imported
        backend.register_backend("symmem", _make, extended_api=True, devices=["cpu", "cuda"])


def _make(options: Any, backend_options: Any) -> Any:
    """Make a process group. The modules that it needs are loaded here, because few programs make one."""
    return importlib.import_module("symmem.distributed.process_group").make_process_group(options, backend_options)
