"""``symmem doctor``: probes every backend, and prints which ones work and how to fix the others."""

from __future__ import annotations

import json
import platform
import textwrap
from dataclasses import asdict, dataclass

import torch

from symmem import native
from symmem.backends import available_names, get_backend
from symmem.backends.base import Capability
from symmem.errors import SymmemError
from symmem.tools.table import render
from symmem.version import VERSION

__all__ = ["Finding", "examine", "run"]


@dataclass(frozen=True)
class Finding:
    """The result of a probe of one backend.

    Attributes:
        backend: Name of the backend.
        available: Whether a real allocation, export and map succeeded.
        device: Device type of its memory.
        capabilities: Names of its :class:`Capability` flags.
        why_not: The reason why it is not available.
        remedy: A way to make it available.
    """

    backend: str
    available: bool
    device: str
    capabilities: tuple[str, ...]
    why_not: str = ""
    remedy: str = ""


def examine(name: str) -> Finding:
    """Probe one backend. Uses memory for a moment. Local."""
    try:
        backend = get_backend(name)
    except SymmemError as error:
        return Finding(name, False, "", (), error.what, error.hint or "")
    flags = tuple(flag.name.lower() for flag in Capability if flag in backend.capabilities and flag.name)
    try:
        backend.probe()
    except SymmemError as error:
        return Finding(name, False, backend.device_type, flags, error.what, error.hint or "")
    except Exception as error:  # a fault of this backend must not hide the other findings
        why = f"its probe failed: {type(error).__name__}: {error}"
        return Finding(name, False, backend.device_type, flags, why, "report this to the authors of the backend")
    return Finding(name, True, backend.device_type, flags)


def _native_module() -> str:
    """Whether the module in C can be used. Compiles it if needed."""
    try:
        native.load_module()
    except (ImportError, OSError) as error:
        return f"missing, so Python does the same more slowly ({error})"
    return "works"


def run(*, as_json: bool) -> int:
    """Print the findings. The exit code is 0 if any backend works."""
    findings = [examine(name) for name in available_names()]
    machine = {
        "symmem": VERSION,
        "torch": torch.__version__,
        "cuda devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "module in C": _native_module(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if as_json:
        print(json.dumps({"machine": machine, "backends": [asdict(f) for f in findings]}, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in machine.items()), end="\n\n")
        rows = [(f.backend, "works" if f.available else "no", f.device, ", ".join(f.capabilities)) for f in findings]
        print(render(("backend", "here", "memory", "can do"), rows))
        for finding in findings:
            if not finding.available:
                print(f"\n{finding.backend}: {finding.why_not}")
                print(textwrap.indent(f"-> {finding.remedy}", "  "))
    return 0 if any(finding.available for finding in findings) else 1
