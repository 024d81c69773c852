"""The life of NVSHMEM in a process: who initialises it, over which ranks, and who finalizes it.

It is initialised once, by a unique id that passes through the group of all ranks. If somebody else has done it,
PyTorch's NVSHMEM transport for one, that is used: both are the same library. If PyTorch comes second, it initialises
once more, over the same ranks, which NVSHMEM counts.

At the end of the process the library is finalized if all ranks come to their end in good order within
``EXIT_TIMEOUT``. If not (a rank died, raised, lags behind, or its GPU still works), or if others use the library, it
is left to the operating system, which takes everything back as well. The exit never waits much longer than that.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from symmem.backends import gpu
from symmem.backends.base import Group
from symmem.backends.nvshmem_library import STAGING_NBYTES, NvshmemLibrary, Staging
from symmem.config import Settings
from symmem.errors import BackendUnavailableError, MismatchError, SymmemError

__all__ = ["EXIT_TIMEOUT", "leave", "start"]

log = logging.getLogger("symmem.nvshmem")

EXIT_TIMEOUT = 5.0
"""Seconds that an exiting process waits for the other ranks, to finalize together."""


def start(library: NvshmemLibrary, job: Group, device: torch.device, malloc: Callable[[int], int]) -> Staging:
    """Initialise the library if nobody has. Collective over the job; may be tried again after a failure.

    Args:
        library: NVSHMEM.
        job: All ranks.
        device: The GPU that it is bound to; the current one.
        malloc: Allocates zeroed memory; collective over the job.

    Raises:
        MismatchError: It was initialised on some ranks only.
        BackendUnavailableError: It was initialised over other ranks.
    """
    _prepare_environment(job.settings)
    with job.collective("initialize nvshmem") as collective:
        ready = library.initialized
        card = {"initialized": ready, "ranks": library.n_pes() if ready else job.size, "id": ""}
        if job.rank == 0 and not ready:
            card["id"] = library.unique_id().hex()
        with collective.exchange("meet", json.dumps(card).encode()) as received:
            cards = [json.loads(contribution.payload) for contribution in received]
        _check(cards, job.size)
        if not ready:
            library.initialize(device.index, bytes.fromhex(cards[0]["id"]), job.rank, job.size)
            atexit.register(leave, library, job, device)
        return Staging(library, device, malloc(STAGING_NBYTES))


def leave(library: NvshmemLibrary, job: Group, device: torch.device) -> None:
    """At the end of the process: finalize with all others, or leave it to the operating system."""
    if getattr(sys, "last_value", None) is not None:
        return  # this process ends with an exception: its peers may never come
    try:
        with job.collective("finalize nvshmem", EXIT_TIMEOUT) as collective:
            willing = not _torch_uses_nvshmem() and gpu.idle(device, EXIT_TIMEOUT / 2)
            with collective.exchange("willing", b"1" if willing else b"") as received:
                willing = all(contribution.payload for contribution in received)
    except (SymmemError, RuntimeError) as error:
        log.info("NVSHMEM is not finalized: %s", error)
        return
    if willing:
        library.finalize()


def _prepare_environment(settings: Settings) -> None:
    """Tell NVSHMEM what it reads from the environment when it is initialised, where the user has not."""
    if 2 * settings.arena_size > 2**30:
        # Room for the first arena and as much again; its own default is 1 GiB.
        os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(2 * settings.arena_size))
    if settings.multicast == "off":
        os.environ["NVSHMEM_DISABLE_NVLS"] = "1"
    if interface := os.environ.get("NCCL_SOCKET_IFNAME"):
        os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", interface)  # as PyTorch does


def _check(cards: Sequence[dict[str, Any]], size: int) -> None:
    ready = tuple(rank for rank, card in enumerate(cards) if card["initialized"])
    if ready and len(ready) < size:
        raise MismatchError(
            f"NVSHMEM has been initialised already on ranks {list(ready)} of {size} only",
            hint="let all ranks of the job use NVSHMEM, or PyTorch's transport over it, alike",
            peers=ready,
        )
    if wrong := tuple(rank for rank, card in enumerate(cards) if card["ranks"] != size):
        raise BackendUnavailableError(
            f"NVSHMEM was initialised over {cards[wrong[0]]['ranks']} ranks, and the job has {size}",
            hint="one process can have one NVSHMEM job: initialise it over all ranks, or let symmem do it",
            peers=wrong,
        )


def _torch_uses_nvshmem() -> bool:
    """Whether PyTorch's transport is over NVSHMEM; its memory is freed when this process unloads torch."""
    try:
        from torch._C._distributed_c10d import _SymmetricMemory
    except ImportError:
        return False
    return _SymmetricMemory.get_backend(torch.device("cuda")) == "NVSHMEM"
