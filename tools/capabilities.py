"""The capabilities of all backends as a table for ``docs/backends.md``, made from the backends' flags."""

from __future__ import annotations

from collections.abc import Mapping

from symmem.backends import get_backend
from symmem.backends.base import Capability
from symmem.config import BACKENDS

__all__ = ["capability_table"]

_MEANING: Mapping[Capability, str] = {
    Capability.REMOTE_TENSOR: "`remote_tensor`, `remote_pointers`, `device_view`: peers' memory by load and store",
    Capability.CONTIGUOUS_VIEW: "`contiguous_view`: all ranks' memory as one tensor",
    Capability.MULTICAST: "`multicast_ptr`, where the GPUs have it",
    Capability.SIGNALS: "`barrier`, `put_signal`, `wait_signal`",
    Capability.ONE_SIDED: "`put` and `get`",
    Capability.MULTI_HOST: "a group may span hosts, whatever joins them",
    Capability.SECOND_GROUP: "several groups may rendezvous the same memory",
    Capability.COLLECTIVE_ALLOCATION: "limitation: all ranks of the job allocate together",
}


def capability_table() -> str:
    """Make the table in Markdown, with a row per capability and a column per built-in backend.

    It probes nothing, so it is the same on every machine.
    """
    backends = [get_backend(name) for name in BACKENDS]
    rows = [("", *(f"`{backend.name}`" for backend in backends)), ("---",) * (len(backends) + 1)]
    rows.append(("memory of the device", *(backend.device_type for backend in backends)))
    for capability in Capability:
        marks = ("yes" if capability in backend.capabilities else "-" for backend in backends)
        rows.append((f"{_MEANING[capability]}", *marks))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
