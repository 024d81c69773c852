"""Collective operations of ranks on several hosts: within each host by symmem, between the hosts by inner groups.

Every host has the same number of ranks. A rank belongs to the local group of its host, and to the rail of its number
within the host: one rank of every host. An operation has steps in the local group and steps in the rail, so that every
host sends and receives the least bytes:

============== =====================================================================================
all_reduce     local reduce_scatter, all_reduce in the rail, local all_gather; small: no scatter
all_gather     all_gather in the rail, local all_gather
reduce_scatter local reduce_scatter, reduce_scatter in the rail
all_to_all     local all_to_all of the parts for the same number within a host, all_to_all in the rail
broadcast      broadcast in the root's rail, local broadcast
barrier        local barrier, barrier in the rail
============== =====================================================================================

The inner group of all ranks is quicker for some calls (:meth:`Hosts.obstacle`), and serves them.

If a rank fails, it gives up its rail, and refuses the next step of its local group. So the ranks that wait for it there
fail too, and so on until every rank has failed in one call. The first one reports its error to the group of all ranks;
the others learn it there. The next call of every rank makes new rails. If a rank died or did not come in time, no later
call works.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from symmem.errors import PeerLostError, PeerTimeoutError, RendezvousError, SymmemError, from_wire, to_wire
from symmem.group.compare import SAME_CALLS
from symmem.group.group import Group
from symmem.ops import functions as ops
from symmem.ops.engines.arithmetic import SIGNED_ZEROS, sign_zeros
from symmem.ops.refusals import refuse

__all__ = ["Hosts"]

_ReduceOp: Any = dist.ReduceOp
_CPU = torch.device("cpu")
_CONNECTION = "connection between hosts"
_LEARN = 10.0  # seconds that a rank waits for the rank that failed first

SMALL = 64 << 10
"""Bytes up to which every rank of a host sends the whole sum to the other hosts: that saves a step."""

_LEAST_RANKS = {"all_to_all": 16, "barrier": 8}
"""Ranks from which on the steps of a call are quicker than gloo's. With 4 ranks, they took up to twice as long."""

_MOST_BYTES = {"all_gather": 128 << 10, "all_reduce": 1 << 20, "all_to_all": 256 << 10, "broadcast": 0}
"""Bytes of a tensor of one rank up to which the steps are quicker than gloo's, for 2 hosts with 2 ranks. all_to_all was
measured with 4 hosts of 4 ranks. Over a link of 1 Gbit/s, all_gather and all_reduce are quicker for all sizes."""

_OF_GLOO = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
)
"""The dtypes that gloo has."""


class Hosts:
    """The collective operations of one process group over several hosts.

    The methods take the arguments of the functions of the same names in :mod:`symmem.ops.functions`.

    Args:
        group: The group of all ranks, which have joined.
        store: All ranks share it. Nothing else uses these keys.
        make_rail: Makes an inner process group of a store, a rank, a number of ranks and a timeout.
    """

    def __init__(self, group: Group, store: Store, make_rail: Callable[..., Any]) -> None:
        self._group, self._store, self._make_rail = group, store, make_rail
        ranks: dict[int, list[int]] = {}
        for rank, place in enumerate(group.places):
            ranks.setdefault(place, []).append(rank)
        self._hosts = list(ranks.values())
        self._host = group.places[group.rank]
        self._order = [rank for host in self._hosts for rank in host]  # the ranks, host by host
        self._is_in_order = self._order == list(range(group.size))
        own = self._hosts[self._host]
        name = f"{group.name}, host {self._host}"
        self._local = Group.from_store(own.index(group.rank), len(own), PrefixStore("local", store), name)
        self._local.settings = group.settings
        # The group in errors that another rank, or the network, has caused.
        self._between_hosts = f"{group.name}, between hosts"
        counts = {len(host) for host in self._hosts}
        self._shape = "" if len(counts) == 1 else "hosts with different numbers of ranks"
        if counts == {1}:
            self._shape = "one rank on every host"
        self._rail: Any = None
        self._is_told = False  # whether the ranks of this host know the error of the call
        self._final: dict[str, Any] | None = None  # the error after which no call works

    def obstacle(self, operation: str, tensors: Sequence[torch.Tensor] = ()) -> str:
        """Why the inner group of all ranks must run a call, or is quicker; empty if it is not.

        For matching calls, all ranks get the same answer.
        """
        if self._shape:
            return self._shape
        if any(x.device.type != "cpu" for x in tensors):
            return "tensors on cuda, on several hosts"
        if any(x.dtype not in _OF_GLOO for x in tensors):
            return ""
        nbytes = min((x.nbytes for x in tensors), default=0)  # the result of all_gather is larger
        if self._group.size < _LEAST_RANKS.get(operation, 0) or nbytes > _MOST_BYTES.get(operation, nbytes):
            return "calls that the inner group makes quicker over several hosts"
        return ""

    def run(self, operation: str, call: Callable[[], None]) -> None:
        """Make a call of the methods. If it fails on a rank, it fails on all of them."""
        if os.getpid() != self._group.process:
            _meet(self._group, operation)  # raises ForkedError
        if self._final is not None:
            raise from_wire(self._final)
        self._is_told = False
        try:
            self._connect()
            call()
        except BaseException as error:
            self._disconnect()
            is_caused_elsewhere = isinstance(error, SymmemError) and error.group == self._between_hosts
            if not is_caused_elsewhere:
                self._group.fail(operation, error)
            if not self._is_told:
                refuse(self._local, _CPU, operation, error)
            try:
                if is_caused_elsewhere:
                    self._learn(operation, error)
                raise
            except (PeerLostError, PeerTimeoutError) as final:
                self._final = to_wire(final)
                with contextlib.suppress(RuntimeError):  # of a broken store; this rank raises its own error
                    self._store.set("final", json.dumps(self._final))
                raise

    def _learn(self, operation: str, error: BaseException) -> None:
        """Raise the error of the rank that failed first, if there is one."""
        self._raise_final(error)
        try:
            _meet(self._group, f"{operation}: why it failed", _LEARN)
        except PeerTimeoutError:
            self._raise_final(error)  # without rank 0, which collects the errors
            raise
        if "timed out" in str(error).lower():
            raise PeerTimeoutError(
                f"ranks of several hosts waited for each other in {operation} for longer than the timeout",
                hint=f"{SAME_CALLS}. If ranks are only slow, raise the timeout",
                rank=self._group.rank,
                group=self._group.name,
                step=operation,
            ) from error

    def _raise_final(self, error: BaseException) -> None:
        """Raise the error of another rank after which no call works, if there is one."""
        final = None
        with contextlib.suppress(RuntimeError):  # of a broken store
            final = self._store.get("final") if self._store.check(["final"]) else None
        if final is not None:
            raise from_wire(json.loads(final)) from error

    def close(self) -> None:
        """Leave the groups: ranks that wait for this one fail. Local; may be called again."""
        self._local.close()
        self._disconnect()

    def _connect(self) -> None:
        """Make the rail, unless there is one. Collective over all ranks: all have failed, or make their first call."""
        if self._rail is not None:
            return
        self._within(_meet, self._local, _CONNECTION)  # it notices the death of a rank of this host
        number = _meet(self._group, _CONNECTION)
        store = PrefixStore(f"{number}/{self._local.rank}", self._store)
        timeout = timedelta(seconds=self._group.settings.signal_timeout)
        self._rail = self._between(lambda: self._make_rail(store, self._host, len(self._hosts), timeout))

    def _disconnect(self) -> None:
        rail, self._rail = self._rail, None
        if rail is not None:
            rail.abort()

    # The operations.

    def all_reduce(self, x: torch.Tensor, group: Group, reduction: str, out: torch.Tensor) -> None:
        """Reduce over all ranks."""
        if x.nbytes <= SMALL:
            total = self._within(ops.all_reduce, x, self._local, reduction).contiguous()
            self._reduce(total, reduction)
            out.copy_(total)
            return
        local = self._local.size
        rows, padding = x.reshape(-1), -x.numel() % local
        if padding:
            rows = torch.nn.functional.pad(rows, (0, padding))
        part = self._within(ops.reduce_scatter, rows.view(local, -1), self._local, reduction)
        self._reduce(part, reduction)
        if not padding and out.is_contiguous():
            self._within(ops.all_gather, part, self._local, out.view(local, -1))
        else:
            out.copy_(self._within(ops.all_gather, part, self._local).view(-1)[: x.numel()].view(x.shape))

    def all_gather(self, x: torch.Tensor, group: Group, out: torch.Tensor | None = None) -> torch.Tensor:
        """Gather over all ranks, in rank order."""
        out = x.new_empty((group.size, *x.shape)) if out is None else out
        rail = x.new_empty((len(self._hosts), *x.shape))
        self._send("all_gather_single", "_allgather_base", rail, x)
        if self._is_in_order and x.nbytes > SMALL:
            for row, of_host in zip(rail, out.view(len(rail), self._local.size, *x.shape), strict=True):
                self._within(ops.all_gather, row, self._local, of_host)
        else:
            self._put(self._within(ops.all_gather, rail, self._local).transpose(0, 1), out)
        return out

    def reduce_scatter(self, x: torch.Tensor, group: Group, reduction: str, out: torch.Tensor) -> None:
        """Reduce over all ranks; this rank gets its row."""
        rail = self._within(ops.reduce_scatter, self._by_number(x), self._local, reduction)
        self._reduce(rail, reduction)
        out.copy_(rail[self._host])

    def all_to_all(self, x: torch.Tensor, group: Group, out: torch.Tensor) -> None:
        """Exchange rows between all ranks."""
        rows = self._within(ops.all_to_all, self._by_number(x), self._local).transpose(0, 1).contiguous()
        taken = torch.empty_like(rows)
        self._send("all_to_all_single", "alltoall_base", taken, rows, [], [])
        self._put(taken, out)

    def broadcast(self, x: torch.Tensor, group: Group, root: int, out: torch.Tensor) -> None:
        """Copy the tensor of the root."""
        host, number = divmod(self._order.index(root), self._local.size)
        if self._local.rank == number:
            options = dist.BroadcastOptions()
            options.rootRank = host
            x = x.contiguous() if self._host == host else torch.empty_like(x, memory_format=torch.contiguous_format)
            self._between(lambda: self._rail.broadcast([_bytes(x)], options).wait())
        self._within(ops.broadcast, x, self._local, number, out)

    def barrier(self, x: None, group: Group) -> None:
        """Wait for all ranks. ``x`` must be None."""
        self._within(ops.barrier, x, self._local)
        self._between(lambda: self._rail.barrier(dist.BarrierOptions()).wait())

    # Rows of ranks, [size, ...].

    def _by_number(self, rows: torch.Tensor) -> torch.Tensor:
        """Sort the rows of all ranks: [ranks of a host, hosts, ...]."""
        rows = rows if self._is_in_order else rows[self._order]
        return rows.reshape(len(self._hosts), self._local.size, *rows.shape[1:]).transpose(0, 1).contiguous()

    def _put(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write rows, [hosts, ranks of a host, ...], to the rows of all ranks."""
        if self._is_in_order:
            out.view(rows.shape).copy_(rows)
        else:
            out[self._order] = rows.flatten(0, 1)

    # Steps.

    def _within(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """Make a step in the local group, which tells its errors to all ranks of this host."""
        try:
            return step(*arguments)
        except BaseException as error:
            self._is_told = True
            if isinstance(error, SymmemError) and error.group == self._local.name:
                own = self._hosts[self._host]
                numbers = ", ".join(f"{number} is rank {rank}" for number, rank in enumerate(own))
                error.what += f" (counted within the host: {numbers})"
                error.rank = None if error.rank is None else own[error.rank]
                error.peers = tuple(own[peer] for peer in error.peers)
                error.group = self._group.name
            raise

    def _reduce(self, x: torch.Tensor, reduction: str) -> None:
        """Reduce a tensor in place over the hosts. An average of hosts is an average of ranks."""
        if x.dtype not in _OF_GLOO:
            rows = x.new_empty((len(self._hosts), *x.shape))
            self._send("all_gather_single", "_allgather_base", rows, x)
            x.copy_(_combined(rows, reduction))
            return
        options = dist.AllreduceOptions()
        options.reduceOp = getattr(_ReduceOp, "SUM" if reduction == "avg" else reduction.upper())
        self._between(lambda: self._rail.allreduce([x], options).wait())
        if reduction == "avg":
            x.div_(len(self._hosts))

    def _send(self, name: str, older_name: str, out: torch.Tensor, x: torch.Tensor, *sizes: Sequence[int]) -> None:
        method = getattr(self._rail, name, None) or getattr(self._rail, older_name)  # torch 2.12
        self._between(lambda: method(_bytes(out), _bytes(x), *sizes).wait())

    def _between(self, step: Callable[[], Any]) -> Any:
        """Make a step in the rail.

        Raises:
            RendezvousError: A rank of another host failed, died, left or did not come in time.
        """
        try:
            return step()
        except RuntimeError as error:
            others = [host[self._local.rank] for host in self._hosts if host is not self._hosts[self._host]]
            text = str(error).partition("] ")[2] or str(error)  # without the line of gloo's code
            raise RendezvousError(
                f"the connection to one of the ranks {others[:16]} failed: {text[:100]}",
                hint="look at the logs of these ranks for the first error",
                rank=self._group.rank,
                group=self._between_hosts,
            ) from error


def _meet(group: Group, operation: str, timeout: float | None = None) -> int:
    """Wait for all ranks, or raise the error that one of them has. Returns a new number, the same on all ranks."""
    with group.collective(operation, timeout) as collective:
        return collective.serial


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as bytes, which gloo can send for every dtype."""
    return x.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _combined(rows: torch.Tensor, reduction: str) -> torch.Tensor:
    """Combine the rows of all hosts, in float32 if the dtype is narrower."""
    wide = rows.float() if rows.is_floating_point() and rows.itemsize < 4 else rows
    total = wide[0].clone()
    for row in wide[1:]:
        if reduction in ("sum", "avg"):
            total.add_(row)
        else:
            total = torch.minimum(total, row) if reduction == "min" else torch.maximum(total, row)
    if reduction in ("min", "max") and total.dtype in SIGNED_ZEROS:
        sign_zeros(wide.unbind(), total, reduction, torch.empty_like(total))
    return total.div_(len(rows)) if reduction == "avg" else total
