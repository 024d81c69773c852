"""``symmem.collect``: free the memory that all ranks have dropped."""

from __future__ import annotations

from collections.abc import Callable

from symmem.arena.arena import used_arenas
from symmem.arena.reclaim import ReclaimRound
from symmem.backends.untraced import untraced
from symmem.group.resolve import GroupLike, resolve_group
from symmem.memory import cuda_graphs

__all__ = ["before_collecting", "collect"]

before_collecting: list[Callable[[], object]] = []
"""Functions that :func:`collect` calls first. They drop memory that is no longer used."""


@untraced
def collect(group: GroupLike = None, *, trim: bool = False, timeout: float | None = None) -> int:
    """Free the tensors that all ranks of a group have dropped. Collective over the group.

    It takes one exchange for all arenas, and one round in which the ranks agree. An arena also does this before it
    would grow, and at every rendezvous of its group. The call waits for the work that is enqueued on the devices of the
    arenas. Garbage that Python has not collected yet counts as in use.

    Args:
        group: See :meth:`SymmetricTensor.rendezvous`.
        trim: Whether to release segments without live blocks.
        timeout: Seconds; default the setting ``rendezvous_timeout``.

    Returns:
        Bytes freed on this rank. All ranks can use them again.

    Raises:
        DivergenceError: The ranks have allocated differently.
        GroupError: A callback called this during another collective operation of the group.
        UnsupportedError: A CUDA graph is being captured.
        SymmemError: See :meth:`Group.collective`.
    """
    resolved = resolve_group(group)
    arenas = used_arenas(resolved)
    if not any(cuda_graphs.is_capturing(arena.device) for arena in arenas):  # otherwise all ranks refuse below
        for prepare in before_collecting:
            prepare()
    with ReclaimRound([arena.log for arena in arenas], trim) as reclaim_round:
        with resolved.collective("collect", timeout) as collective:
            for arena in arenas:
                cuda_graphs.refuse(arena.device, "arenas cannot be collected")
            reclaim_round.run(collective)
        return reclaim_round.apply()
