"""``symmem.collect``: free what all ranks have dropped, now."""

from __future__ import annotations

from collections.abc import Callable

from symmem.arena.reclaim import Meeting, used_arenas
from symmem.group.group import GroupLike, resolve_group
from symmem.memory import cuda_graphs

__all__ = ["before_collecting", "collect"]

before_collecting: list[Callable[[], object]] = []
"""What :func:`collect` calls first, so that memory that is no longer used shows as such."""


def collect(group: GroupLike = None, *, trim: bool = False, timeout: float | None = None) -> int:
    """Free the tensors that all ranks of a group have dropped. Collective over the group: one exchange, and agreeing.

    An arena does this by itself when it would have to grow, and at each rendezvous of its group. Waits for the work
    that was enqueued on the devices concerned. Garbage that Python has not collected yet counts as in use.

    Args:
        group: See :meth:`SymmetricTensor.rendezvous`.
        trim: Give up segments in which nothing lives, on all ranks.
        timeout: Seconds; default the setting ``rendezvous_timeout``.

    Returns:
        Bytes freed on this rank, which all ranks can use again.

    Raises:
        DivergenceError: The ranks have allocated differently.
        GroupError: It was called from a callback amid another collective operation of the group.
        UnsupportedError: A CUDA graph is being captured.
        SymmemError: See :meth:`Group.collective`.
    """
    resolved = resolve_group(group)
    arenas = used_arenas(resolved)
    if not any(cuda_graphs.is_capturing(arena.device) for arena in arenas):  # else all ranks refuse, below
        for prepare in before_collecting:
            prepare()
    with Meeting(arenas, trim) as meeting:
        with resolved.collective("collect", timeout) as collective:
            for arena in arenas:
                cuda_graphs.refuse(arena.device, "arenas cannot be collected")
            meeting.hold(collective)
        return meeting.settle()
