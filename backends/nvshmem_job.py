"""Initialisation and finalization of NVSHMEM in a process.

NVSHMEM is initialised once, with a unique id that passes through the group of all ranks. If other code has initialised
it, for example PyTorch's NVSHMEM transport, symmem uses that job: both use the same library. If PyTorch comes second,
it initialises NVSHMEM again over the same ranks, and NVSHMEM counts the calls.

At the end of the process the library is finalized if all ranks end normally within ``EXIT_TIMEOUT``. Otherwise it is
left to the operating system, which frees everything too: if a rank died, raised, is late or its GPU still works, or if
other code uses the library. The exit never waits much longer than ``EXIT_TIMEOUT``.
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
from symmem.backends.base import RankGroup
from symmem.backends.nvshmem_library import STAGING_NBYTES, NvshmemLibrary, Staging
from symmem.config import Settings
from symmem.errors import BackendUnavailableError, MismatchError, SymmemError

__all__ = ["EXIT_TIMEOUT", "leave", "start"]

log = logging.getLogger("symmem.nvshmem")

EXIT_TIMEOUT = 5.0
"""Seconds that an exiting process waits for the other ranks to finalize together."""


def start(library: NvshmemLibrary, job: RankGroup, device: torch.device, malloc: Callable[[int], int]) -> Staging:
    """Initialise the library unless it is initialised. Collective over the job; may be repeated after a failure.

    Args:
        library: NVSHMEM.
        job: All ranks.
        device: The GPU to bind it to; the current device.
        malloc: Allocates zeroed memory. Collective over the job.

    Raises:
        MismatchError: It was already initialised on some ranks only.
        BackendUnavailableError: It was already initialised over other ranks.
    """
    _prepare_environment(job.settings)
    with job.collective("initialize nvshmem") as collective:
        ready = library.initialized
        own = {"initialized": ready, "ranks": library.n_pes() if ready else job.size, "id": ""}
        if job.rank == 0 and not ready:
            own["id"] = library.unique_id().hex()
        with collective.exchange("compare", json.dumps(own).encode()) as received:
            entries = [json.loads(contribution.payload) for contribution in received]
        _check(entries, job.size)
        if not ready:
            library.initialize(device.index, bytes.fromhex(entries[0]["id"]), job.rank, job.size)
            atexit.register(leave, library, job, device)
        return Staging(library, device, malloc(STAGING_NBYTES))


def leave(library: NvshmemLibrary, job: RankGroup, device: torch.device) -> None:
    """At the end of the process, finalize together with all ranks, or leave it to the operating system."""
    if getattr(sys, "last_value", None) is not None:
        return  # this process ends with an exception, so its peers may never come
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
    """Set variables that NVSHMEM reads at its initialisation, unless the user has set them."""
    if 2 * settings.arena_size > 2**30:
        # Twice the first segment of an arena; NVSHMEM's default is 1 GiB.
        os.environ.setdefault("NVSHMEM_SYMMETRIC_SIZE", str(2 * settings.arena_size))
    if settings.multicast == "off":
        os.environ["NVSHMEM_DISABLE_NVLS"] = "1"
    if interface := os.environ.get("NCCL_SOCKET_IFNAME"):
        os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", interface)  # PyTorch does this too


def _check(entries: Sequence[dict[str, Any]], size: int) -> None:
    ready = tuple(rank for rank, entry in enumerate(entries) if entry["initialized"])
    if ready and len(ready) < size:
        raise MismatchError(
            f"NVSHMEM has been initialised already on ranks {list(ready)} of {size} only",
            hint="use NVSHMEM, or PyTorch's transport over it, on all ranks of the job or on none",
            peers=ready,
        )
    if wrong := tuple(rank for rank, entry in enumerate(entries) if entry["ranks"] != size):
        raise BackendUnavailableError(
            f"NVSHMEM was initialised over {entries[wrong[0]]['ranks']} ranks, and the job has {size}",
            hint="a process can have one NVSHMEM job: initialise it over all ranks, or let symmem initialise it",
            peers=wrong,
        )


def _torch_uses_nvshmem() -> bool:
    """Whether PyTorch uses NVSHMEM. PyTorch frees its memory when this process unloads torch."""
    try:
        from torch._C._distributed_c10d import _SymmetricMemory
    except ImportError:
        return False
    return _SymmetricMemory.get_backend(torch.device("cuda")) == "NVSHMEM"
