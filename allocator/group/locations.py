"""Where ranks run. This decides whether they can pass file descriptors to each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from symmem.errors import RendezvousError
from symmem.group.compare import differing

__all__ = ["Location", "are_connectable", "not_connectable"]


@dataclass(frozen=True)
class Location:
    """Where a rank runs.

    Attributes:
        host: SYMMEM_HOST_ID, else the boot id of the kernel, which all containers of a host share.
        network: The inode of the network namespace. Abstract sockets do not reach other namespaces.
        name: The host's name, for messages.
        pid: The process id, in the PID namespace of the process.
    """

    host: str
    network: int
    name: str
    pid: int

    @classmethod
    def here(cls) -> Location:
        """Return the location of this process."""
        host = os.environ.get("SYMMEM_HOST_ID") or Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(host, os.stat("/proc/self/ns/net").st_ino, socket.gethostname(), os.getpid())


def are_connectable(locations: Sequence[Location]) -> bool:
    """Whether unix sockets can connect all ranks."""
    return len({(location.host, location.network) for location in locations}) == 1


def not_connectable(locations: Sequence[Location]) -> RendezvousError:
    """Make the error for descriptors that cannot pass between all ranks; it names the ranks that are apart."""
    if len({location.host for location in locations}) > 1:
        text, peers = differing([f"host {location.name} ({location.host})" for location in locations])
        hint = "choose a backend that spans hosts (`nvshmem`), or a group within one host"
    else:
        text, peers = differing([f"{each.name} (network namespace {each.network})" for each in locations])
        hint = (
            "the ranks are in different containers of one host: let them share the network namespace "
            "(docker: --network=host; Kubernetes: one pod), or choose a backend that spans hosts (`nvshmem`)"
        )
    return RendezvousError(f"file descriptors cannot pass between all ranks: {text}", hint=hint, peers=peers)
