"""The setting ``torch_backend``: enable :mod:`symmem.torch_backend` when a program imports torch's symmetric memory."""

from __future__ import annotations

import importlib
import os

from symmem._lazy import when_imported

__all__ = ["install"]


def install() -> None:
    """Read the setting now or at that import. If nothing can have changed it, nothing waits for the import."""
    if "torch_backend" in os.environ.get("SYMMEM_ENABLE", "") or "SYMMEM_CONFIG" in os.environ:
        when_imported("torch.distributed._symmetric_memory", _enable_if_set)


def _enable_if_set() -> None:
    from symmem.config import load_settings

    if load_settings().torch_backend == "on":
        importlib.import_module("symmem.torch_backend").enable()
