"""Metadata about GPUs that the ranks of backend ``native`` exchange at a rendezvous, and the checks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from symmem.backends.base import RankGroup
from symmem.backends.driver import Driver
from symmem.backends.vmm import DeviceRange
from symmem.errors import MismatchError, RendezvousError, SymmemError, UnsupportedError

__all__ = ["cannot_map", "check_gpus", "gpu_metadata", "no_multicast"]


def gpu_metadata(driver: Driver, ordinal: int, extent: int, why_no_multicast: str) -> dict[str, Any]:
    """The metadata of this rank, as plain data.

    Args:
        driver: The driver.
        ordinal: The rank's GPU.
        extent: Bytes of its memory, rounded up.
        why_no_multicast: The reason why it may have no multicast pointer; an empty text if it may.
    """
    return {
        "gpu": driver.name(ordinal),
        "identity": driver.identities()[ordinal],
        "extent": extent,
        "no multicast": why_no_multicast,
    }


def check_gpus(driver: Driver, metadata: list[dict[str, Any]], ordinal: int, group: RankGroup) -> None:
    """Check before anything is mapped that this rank can map the memory of all others.

    Raises:
        MismatchError: Ranks round memory up differently.
        RendezvousError: This rank's GPU cannot access the memory of another rank's GPU; the text names both.
    """
    mine = metadata[group.rank]
    visible = driver.identities()
    for rank, entry in enumerate(metadata):
        peer = entry["identity"]
        if entry["extent"] != mine["extent"]:
            raise MismatchError(
                f"ranks round memory up differently: to {mine['extent']} bytes on rank {group.rank} "
                f"({mine['gpu']}), to {entry['extent']} on rank {rank} ({entry['gpu']})",
                hint="use one GPU model and one setting of multicast on all ranks",
                peers=(rank,),
            )
        # The driver can check only GPUs that this process sees. For others, mapping the memory is the test.
        elsewhere = peer != mine["identity"] and peer in visible
        if elsewhere and not driver.can_access_peer(ordinal, visible.index(peer)):
            raise RendezvousError(
                f"{_named(group.rank, mine)} cannot access the memory of {_named(rank, entry)}: no peer-to-peer",
                hint="`nvidia-smi topo -p2p rw` shows which GPUs can; otherwise choose the backend `nvshmem`",
                peers=(rank,),
            )


def _named(rank: int, entry: dict[str, Any]) -> str:
    return f"rank {rank}'s GPU ({entry['gpu']}, GPU-{entry['identity'][:8]})"


def no_multicast(metadata: list[dict[str, Any]]) -> str:
    """The reason why the group may have no multicast pointer; an empty text if it may. The same on all ranks."""
    for rank, entry in enumerate(metadata):
        if entry["no multicast"]:
            return f"on rank {rank} {entry['no multicast']}"
    if len({entry["identity"] for entry in metadata}) < len(metadata):
        return "several ranks share a GPU, which can join a multicast object only once"
    return ""


def cannot_map(
    error: SymmemError, region: DeviceRange, owners: Sequence[int], metadata: Sequence[dict[str, Any]], group: RankGroup
) -> SymmemError:
    """The error of a failed mapping, with the rank of the first piece that is missing or not accessible.

    Args:
        error: The error of the driver.
        region: The range for the memory.
        owners: The rank of every piece, in the order of mapping.
        metadata: The metadata of all ranks.
        group: The group.
    """
    index = region.first_closed()
    rank = owners[index] if index < len(owners) else group.rank
    mine, owner = _named(group.rank, metadata[group.rank]), _named(rank, metadata[rank])
    # Out of memory or descriptors stays that class. Every other error of the driver means that the mapping failed.
    kind = RendezvousError if type(error) in (SymmemError, UnsupportedError) else type(error)
    return kind(f"{mine} cannot map the memory of {owner}: {error.what}", hint=error.hint, peers=(rank,))
