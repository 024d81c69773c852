"""What the ranks of backend ``native`` tell each other of their GPUs at a rendezvous, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from symmem.backends.base import Group
from symmem.backends.driver import Driver
from symmem.backends.vmm import DeviceRange
from symmem.errors import MismatchError, RendezvousError, SymmemError, UnsupportedError

__all__ = ["cannot_map", "check_cards", "gpu_card", "no_multicast"]


def gpu_card(driver: Driver, ordinal: int, extent: int, why_no_multicast: str) -> dict[str, Any]:
    """A rank's card: plain data.

    Args:
        driver: The driver.
        ordinal: The rank's GPU.
        extent: Bytes of its memory, rounded up.
        why_no_multicast: Why it may have no multicast pointer; an empty text if it may.
    """
    return {
        "gpu": driver.name(ordinal),
        "identity": driver.identities()[ordinal],
        "extent": extent,
        "no multicast": why_no_multicast,
    }


def check_cards(driver: Driver, cards: list[dict[str, Any]], ordinal: int, group: Group) -> None:
    """Refuse what cannot work, by name, before anything is mapped.

    Raises:
        MismatchError: Ranks round memory up differently.
        RendezvousError: This rank's GPU cannot access the memory of another rank's; names both.
    """
    mine = cards[group.rank]
    visible = driver.identities()
    for rank, card in enumerate(cards):
        peer = card["identity"]
        if card["extent"] != mine["extent"]:
            raise MismatchError(
                f"ranks round memory up differently: to {mine['extent']} bytes on rank {group.rank} "
                f"({mine['gpu']}), to {card['extent']} on rank {rank} ({card['gpu']})",
                hint="use one GPU model and one setting of multicast on all ranks",
                peers=(rank,),
            )
        # A GPU that this process does not see cannot be asked about: mapping its memory will tell.
        elsewhere = peer != mine["identity"] and peer in visible
        if elsewhere and not driver.can_access_peer(ordinal, visible.index(peer)):
            raise RendezvousError(
                f"{_named(group.rank, mine)} cannot access the memory of {_named(rank, card)}: no peer-to-peer",
                hint="`nvidia-smi topo -p2p rw` shows which GPUs can; else choose the backend `nvshmem`",
                peers=(rank,),
            )


def _named(rank: int, card: dict[str, Any]) -> str:
    return f"rank {rank}'s GPU ({card['gpu']}, GPU-{card['identity'][:8]})"


def no_multicast(cards: list[dict[str, Any]]) -> str:
    """Why the group may have no multicast pointer: the first rank's reason, the same text on all ranks."""
    for rank, card in enumerate(cards):
        if card["no multicast"]:
            return f"on rank {rank} {card['no multicast']}"
    if len({card["identity"] for card in cards}) < len(cards):
        return "several ranks share a GPU, which can join a multicast object only once"
    return ""


def cannot_map(
    error: SymmemError, region: DeviceRange, owners: Sequence[int], cards: Sequence[dict[str, Any]], group: Group
) -> SymmemError:
    """Say whose memory could not be mapped: that of the first piece that is not accessible, or that is missing.

    Args:
        error: What went wrong.
        region: Where the memory was to be mapped.
        owners: The rank of each piece, in the order of mapping.
        cards: Of each rank.
        group: The group.
    """
    index = region.first_closed()
    rank = owners[index] if index < len(owners) else group.rank
    text = f"{_named(group.rank, cards[group.rank])} cannot map the memory of {_named(rank, cards[rank])}: {error.what}"
    # Memory or descriptors that have run out are that; whatever else the driver says, the mapping is what failed.
    kind = RendezvousError if type(error) in (SymmemError, UnsupportedError) else type(error)
    return kind(text, hint=error.hint, peers=(rank,))
