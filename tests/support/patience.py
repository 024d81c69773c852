"""How long tests wait, in seconds. A test that passes waits for none of these, however busy the machine is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The first use of a GPU compiles kernels, for which a cold machine takes minutes.
_FACTOR = 5.0 if Path("/dev/nvidiactl").exists() else 1.0

LONG = 120.0 * _FACTOR
"""The timeout of an operation that must end before it: by success, or by an error about something else."""

SOON = 60.0 * _FACTOR
"""The time within which such an operation must have ended. Far from LONG, and long enough for a busy machine."""

TASK = 240.0 * _FACTOR
"""The time that ranks have for a task."""

SETTINGS = f"rendezvous_timeout({LONG:g}s),signal_timeout({LONG:g}s)"
"""For SYMMEM_ENABLE."""

OPTIONS: dict[str, Any] = {"env": {"SYMMEM_ENABLE": SETTINGS}, "timeout": TASK}
"""The options of a pool of ranks, unless a test says otherwise."""
