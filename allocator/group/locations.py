"""Where ranks run. This decides whether they can pass file descriptors to each other."""

from __future__ import annotations

import base64
import itertools
import json
import os
import socket
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from symmem.errors import RendezvousError
from symmem.group.compare import differing

__all__ = ["Location", "Places"]


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


@dataclass(frozen=True)
class Places:
    """Where all ranks of a group run. A place is a host and a network namespace: unix sockets connect its ranks.

    Attributes:
        of_ranks: The number of every rank's place. Places are numbered in the order of their first ranks.
        differing: The places and their ranks, for messages; empty if there is one place.
        are_hosts: Whether there are several hosts.
    """

    of_ranks: tuple[int, ...]
    differing: str = ""
    are_hosts: bool = False

    @classmethod
    def of(cls, locations: Sequence[Location]) -> Places:
        """Return the places of all ranks, from their locations in rank order."""
        numbers: dict[tuple[str, int], int] = {}
        of_ranks = tuple(numbers.setdefault((each.host, each.network), len(numbers)) for each in locations)
        are_hosts = len({each.host for each in locations}) > 1
        if len(numbers) == 1:
            return cls(of_ranks)
        name = "host {0.name} ({0.host})" if are_hosts else "{0.name} (network namespace {0.network})"
        return cls(of_ranks, differing([name.format(each) for each in locations])[0], are_hosts)

    @property
    def are_connected(self) -> bool:
        """Whether unix sockets can connect all ranks."""
        return not self.differing

    def pack(self) -> str:
        """Return a text that is short if places repeat regularly, as they do in the jobs of launchers."""
        steps = [number - before for before, number in zip((0, *self.of_ranks), self.of_ranks, strict=False)]
        packed = base64.b64encode(zlib.compress(json.dumps(steps).encode(), 9)).decode()
        return json.dumps([packed, self.differing, self.are_hosts])

    @classmethod
    def unpack(cls, text: str) -> Places:
        """Return the places from :meth:`pack`."""
        packed, differing, are_hosts = json.loads(text)
        steps = json.loads(zlib.decompress(base64.b64decode(packed)))
        return cls(tuple(itertools.accumulate(steps)), differing, are_hosts)

    def not_connectable(self) -> RendezvousError:
        """Make the error for descriptors that cannot pass between all ranks; it names the ranks that are apart."""
        if self.are_hosts:
            hint = "choose a backend that spans hosts (`nvshmem`), or a group within one host"
        else:
            hint = (
                "the ranks are in different containers of one host: let them share the network namespace "
                "(docker: --network=host; Kubernetes: one pod), or choose a backend that spans hosts (`nvshmem`)"
            )
        _, peers = differing(self.of_ranks)
        text = f"file descriptors cannot pass between all ranks: {self.differing}"
        return RendezvousError(text, hint=hint, peers=peers)
