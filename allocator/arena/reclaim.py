"""Reclaim rounds: the ranks compare their allocation logs, and free the blocks that all of them have dropped.

Every rank sends the number and the digest of its allocations, and a mask of the slots that it has in quarantine. Slots
are the same on all ranks. All ranks then free the slots that every rank has sent, in the same order. One exchange
serves all arenas of a group, however many blocks there are.

Before a rank sends its slots, its device completes all work that was enqueued, so that nothing uses the blocks any
more. Before a slot is free, every rank has zeroed its signal pad, if any rank has signalled with it. A round takes
effect only after the collective operation has succeeded on this rank; if it fails, nothing changes. This is why the
ranks agree after the exchange. Otherwise a rank that is interrupted during the exchange, or that cannot zero its pads,
would have a different log, and would place its next allocation at another offset than its peers.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from symmem.arena.slot_mask import from_text, slots_of, to_text
from symmem.errors import DivergenceError
from symmem.group.agreement import CollectiveOperation
from symmem.group.compare import check_equal, differing, exchange_json
from symmem.memory import cuda_graphs

if TYPE_CHECKING:
    from symmem.arena.allocation_log import AllocationLog, AllocationRecord

__all__ = ["ReclaimRound", "compare_logs"]


class ReclaimRound:
    """One reclaim round over some arenas of a group; a context manager that holds the locks of their logs.

    Args:
        logs: The allocation logs. All ranks give the same arenas in the same order.
        trim: Whether to remove segments without live blocks.
    """

    def __init__(self, logs: Sequence[AllocationLog], trim: bool = False) -> None:
        self._logs, self._trim = tuple(logs), trim
        self._agreed: list[int] = []
        self._locks = contextlib.ExitStack()
        self._started = self._applying = False

    def __enter__(self) -> ReclaimRound:
        with contextlib.ExitStack() as undo:
            for log in self._logs:
                undo.enter_context(log.lock)
            self._locks = undo.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._started:
            for log in self._logs:
                log.in_transaction = False
            if error is not None and (self._applying or not all(log.shares(error) for log in self._logs)):
                for log in self._logs:
                    log.group.fail("collect", log.stop("a collection", error))
                    error.propagated_to = log.group.name  # type: ignore[attr-defined]  # not to report it again
        self._locks.close()

    def run(self, collective: CollectiveOperation) -> None:
        """Exchange and agree, in a collective operation that does nothing else."""
        self.agree(collective, exchange_json(collective, "compare", self.metadata()))

    def metadata(self) -> list[dict[str, Any]]:
        """The metadata that this rank sends, per arena. Starts the round on this rank.

        Raises:
            GroupError: Another allocation or collection is in progress, or was interrupted.
        """
        cuda_graphs.forget_ended()
        for log in self._logs:
            log.check_idle("reclaim")
        self._started = True
        for log in self._logs:
            log.in_transaction = True  # until the round has taken effect
        masks = [(log, *log.quarantine()) for log in self._logs]
        for device in {log.device for log, dropped, _ in masks if dropped and log.device.type == "cuda"}:
            from symmem.backends.gpu import synchronize

            synchronize(device)
        return [
            {
                "arena": log.kind,
                "trim": self._trim,
                "number": log.count,
                "digest": log.digest,
                "quarantine": to_text(dropped),
                "signalled": to_text(signalled),
            }
            for log, dropped, signalled in masks
        ]

    def agree(self, collective: CollectiveOperation, received: Sequence[list[dict[str, Any]]]) -> None:
        """Compare the metadata of all ranks, and prepare to free slots. Collective if ranks have diverged.

        Raises:
            DivergenceError: The ranks have allocated differently. On all ranks.
            MismatchError: Only some ranks trim.
        """
        if self._logs:
            collective.half_done = self._stop
        kinds = [[str(arena["arena"]) for arena in metadata] for metadata in received]
        if any(kind != kinds[0] for kind in kinds):
            self._explain_kinds(collective, kinds)
        trims = [metadata[0]["trim"] if metadata else False for metadata in received]
        check_equal(
            trims, "ranks disagree on 'trim' of their arenas:", "call collect() with the same arguments on all ranks"
        )
        self._agreed = []
        by_log = list(zip(self._logs, zip(*received, strict=True), strict=True))
        numbers = [{(metadata["number"], metadata["digest"]) for metadata in by_rank} for _, by_rank in by_log]
        if different := [log for log, each in zip(self._logs, numbers, strict=True) if len(each) > 1]:
            _explain(different, collective)
        for log, by_rank in by_log:
            agreed = functools.reduce(operator.and_, [from_text(metadata["quarantine"]) for metadata in by_rank])
            signalled = functools.reduce(operator.or_, [from_text(metadata["signalled"]) for metadata in by_rank])
            log.pads.clear(slots_of(agreed & signalled))
            self._agreed.append(agreed)

    def _stop(self, error: BaseException) -> DivergenceError:
        """Other ranks may have freed slots; see :attr:`CollectiveOperation.half_done`."""
        reasons = [log.stop("a collection", error) for log in self._logs]
        return reasons[0]

    def _explain_kinds(self, collective: CollectiveOperation, kinds: Sequence[list[str]]) -> None:
        """Raise the error that says which ranks use a backend that others do not use, and where. Collective."""
        common = set(kinds[0]).intersection(*kinds[1:])
        only = [log for log in self._logs if log.kind not in common] or self._logs
        mine = "; ".join(f"{log.kind}: {next(iter(log.recent()))}" for log in only) or "nothing"
        text, peers = differing(exchange_json(collective, "difference", mine))
        error = DivergenceError(
            f"the ranks have allocated with different backends, or on different devices: {text}",
            hint="all ranks of a group must make the same allocations. If only some ranks need a tensor, allocate it "
            "with arena=False or in a group of those ranks",
            peers=peers,
        )
        for log in self._logs:
            log.invalidate(error)
        raise error

    def apply(self) -> int:
        """Free the agreed slots, after the operation has succeeded; returns bytes."""
        pairs = list(zip(self._logs, self._agreed, strict=True))
        self._agreed = []
        self._applying = True  # from here on, an exception of a signal handler ends the arenas
        freed = sum(log.reclaim(agreed) for log, agreed in pairs)
        if self._trim:
            for log, _ in pairs:
                log.trim()
        self._applying = False
        return freed


def compare_logs(
    log: AllocationLog, collective: CollectiveOperation, proposed: AllocationRecord, nbytes: int, sites: bool = False
) -> None:
    """Compare the allocations of all ranks; dropped blocks do not matter. Collective.

    Args:
        log: This rank's allocation log.
        collective: The operation in progress.
        proposed: The next allocation.
        nbytes: Bytes that the arena is about to grow by.
        sites: Whether the call sites must be equal too.

    Raises:
        DivergenceError: On all ranks.
        MismatchError: The arena would grow by different numbers of bytes, for the same allocations.
    """
    site = f"{proposed.site.code.co_name}:{proposed.site.line}" if sites else ""
    mine = [[log.count, proposed.digest, site], f"{nbytes} bytes, with signal pads of {log.pads.nbytes} bytes"]
    received = exchange_json(collective, "compare", mine)
    if any(other[0] != received[0][0] for other in received):
        _explain([log], collective, proposed)
    check_equal(
        [other[1] for other in received],
        f"the arena of {log.kind} would grow differently: by",
        "set arena_size, arena_growth and arena_limit to the same values on all ranks; enable symmem.torch_backend on "
        "all or on none, before they allocate",
    )


def _explain(
    logs: Sequence[AllocationLog], collective: CollectiveOperation, proposed: AllocationRecord | None = None
) -> None:
    """Find the first allocation that differs in the first of these logs, and raise the error. Collective."""
    log = logs[0]
    records = {record.number: record for record in log.recent()}
    if proposed:
        records[proposed.number] = proposed
    digests = {number: record.digest for number, record in records.items()}
    histories = [dict(history) for history in exchange_json(collective, "history", list(digests.items()))]
    first = max(min(history, default=1) for history in histories)  # the first that all ranks remember
    last = max(max(history, default=0) for history in histories)
    number = next((n for n in range(first, last + 1) if len({history.get(n) for history in histories}) > 1), last)
    texts = exchange_json(collective, "difference", str(records.get(number) or "nothing"))
    text, peers = differing(texts)
    same = len(set(texts)) == 1  # only an interrupt can cause this
    if same:
        text = f"not in the remembered allocations (up to number {number}): their offsets or the freed blocks differ"
    forgotten = "" if first == 1 else f" since allocation {first}, the oldest that is remembered,"
    error = DivergenceError(
        f"the ranks have allocated differently from the arena of {log.kind}; the first difference"
        f"{forgotten} is {'' if same else f'allocation {number}: '}{text}",
        hint="all ranks of a group must make the same allocations from its arena, in the same order. If only some "
        "ranks need a tensor, allocate it with arena=False or in a group of those ranks. allocation_check(each) finds "
        "the place at once",
        peers=peers,
        arena=log.kind,
    )
    for each in logs:
        each.invalidate(error)
    raise error
