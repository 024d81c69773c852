"""The report of ``symmem bench scale``, in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from symmem.tools.bench.counting import Request
from symmem.tools.bench.scale import HANDLE, Cost, Curve, Job, line
from symmem.version import VERSION

__all__ = ["write"]

_OPERATIONS = ("set", "add", "wait", "get", "check", "multi_get", "delete")
_STEPS = {
    "one_host": ("count of groups", "join", "connect"),
    "many_hosts": ("count of groups", "join", "compare", "map", "agree"),
}
_TITLES = {"one_host": "All ranks on one host", "many_hosts": "Each rank on its own host"}

_HEAD = """\
# What a rendezvous asks of the job's store

Written by `symmem bench scale --ranks {ranks} --group-size {size} --report PATH`; symmem {version}, torch {torch}.

The store of a job is one process that serves all ranks, so what each group asks of it adds up. PyTorch says of its own
rendezvous that the store "gets overloaded at large rank counts" (`ProcessGroup.use_pg_for_symm_mem_rendezvous`). Here
the requests of ours are counted.

## What was simulated

- A job of {ranks:,} ranks in {count} groups of up to {size}, which rendezvous one group after the other on one store.
- Groups of {sizes} ranks, each alone on its store.
- The code is that of a real job: `Group.from_store`, `rendezvous`, the wires and the sockets. The ranks of a
  group are threads. The backend maps nothing: in one exchange each rank gives {handle} bytes, like a fabric handle.
- **One host**: all ranks have the same place. After two rounds over the store, sockets carry all others.
- **Many hosts**: each rank has a host of its own, by `SYMMEM_HOST_ID`. The store carries every round. The 72 ranks of
  an NVLink domain are of this kind, for it has many hosts.
- Each call of the store is one request. Bytes in are names of keys and values; bytes out are values.
"""

_ROUND = """\
## By round

Requests of the first rendezvous of {size} ranks. A round takes 4 from each rank but rank 0: its message, a count, a
wait, and the verdict. Rank 0 deletes the keys of the round before, one by one.
"""

_MEANING = """\
## What it means

- **Requests and keys grow linearly**: for a first rendezvous of n ranks,

{linear}

  Rank 0's share is most of all deletions: n + 3 keys a round.
- **A further rendezvous** of a group asks {again_one} requests on one host and {again_many} on many, and no more keys
  stay: each round deletes those of the round before.
- **Groups do not add to each other's cost.** {job}
- **Bytes out grow with the square of the group**, for each of n ranks reads what n ranks gave: {few} bytes for
  {fewest} ranks and {many} for {size}, in a first rendezvous on many hosts. In the number of groups they are linear:
  with groups of {size}, each rank reads {each} bytes however many ranks the job has, and all {ranks} together
  {total} MB, which one process sends.

## What it does not say

- Times. Threads of one process share a lock and have no network between them; only the counts are those of a job.
- How long requests queue at the store when all groups meet at once. Their number is the sum of what is above.
- Messages on the network. A `TCPStore` puts a wait of its own before each get, so it sends {messages} messages for the
  {requests} requests of a first rendezvous of {size} ranks on many hosts.
- Other stores. One without `multi_get`, such as FileStore, is asked for each rank's message on its own: 2 more requests
  a rank and round, still linear.
- Other backends. Each further exchange is one more round, as `map`.
- Failures. The keys of a round that failed go in the next one that succeeds.
- Bytes elsewhere: they differ by some percent with the length of the host's name.
"""


def write(path: Path, curves: Sequence[Curve], job: Job) -> None:
    """Write the report.

    Args:
        path: Of the file; its folder is there.
        curves: Of each situation, with the same sizes; the last is the job's.
        job: Of groups as large as the largest of the curves.
    """
    one, many = curves
    largest = many.first[-1]
    parts = [
        _HEAD.format(
            ranks=job.ranks,
            size=largest.ranks,
            count=len(job.groups),
            sizes=", ".join(str(cost.ranks) for cost in many.first),
            handle=HANDLE,
            version=VERSION,
            torch=torch.__version__,
        ),
        *("\n".join(_curve_lines(each)) for each in curves),
        _ROUND.format(size=largest.ranks),
        *("\n".join(_round_lines(each)) for each in curves),
        "\n".join(_job_lines(job, largest)),
        _MEANING.format(
            linear="\n".join(_linear(curves)),
            again_one=f"{one.again[-1].requests:,}",
            again_many=f"{many.again[-1].requests:,}",
            job=_together(job, largest),
            few=f"{many.first[0].received:,}",
            fewest=many.first[0].ranks,
            many=f"{largest.received:,}",
            size=largest.ranks,
            each=f"{largest.received / largest.ranks:,.0f}",
            ranks=f"{job.ranks:,}",
            total=f"{sum(cost.received for cost in job.groups) / 1e6:,.1f}",
            messages=f"{largest.messages:,}",
            requests=f"{largest.requests:,}",
        ),
    ]
    path.write_text("\n".join(parts))


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]


def _curve_lines(curve: Curve) -> list[str]:
    header = (
        "ranks",
        "requests",
        "a rank",
        "of rank 0",
        "keys made",
        "keys left",
        "bytes in",
        "bytes out",
        "out / ranks²",
    )
    lines = [f"## {_TITLES[curve.situation]}", "", "The first rendezvous of a group:", ""]
    lines += [*_table(header, map(_row, curve.first)), ""]
    if any(cost.requests for cost in curve.again):
        return [*lines, "One more, of new memory:", "", *_table(header, map(_row, curve.again)), ""]
    return [*lines, "One more, of new memory, asks nothing of the store.", ""]


def _row(cost: Cost) -> list[object]:
    n = cost.ranks
    each, square = f"{cost.requests / n:.1f}", f"{cost.received / n**2:.0f}"
    return [n, cost.requests, each, cost.leader, cost.keys, cost.left, cost.sent, cost.received, square]


def _round_lines(curve: Curve) -> list[str]:
    counts = Counter((request.step, request.operation) for request in curve.requests)
    steps = sorted({request.step for request in curve.requests})
    rows: list[list[object]] = []
    for step in steps:
        of_step = [counts[step, operation] for operation in _OPERATIONS]
        rows.append([_step(curve, step), *of_step, sum(of_step), *_bytes_of(curve.requests, step)])
    header = ("round", *_OPERATIONS, "all", "bytes in", "bytes out")
    return [f"{_TITLES[curve.situation]}:", "", *_table(header, rows), ""]


def _step(curve: Curve, number: int) -> str:
    names = _STEPS[curve.situation]
    return names[number] if number < len(names) else f"round {number}"


def _bytes_of(requests: Iterable[Request], step: int) -> tuple[int, int]:
    of_step = [request for request in requests if request.step == step]
    return sum(request.sent for request in of_step), sum(request.received for request in of_step)


def _job_lines(job: Job, alone: Cost) -> list[str]:
    full = [cost for cost in job.groups if cost.ranks == alone.ranks]
    rows: list[list[object]] = []
    for name, what in (
        ("requests", "requests"),
        ("keys made", "keys"),
        ("keys left", "left"),
        ("bytes in", "sent"),
        ("bytes out", "received"),
    ):
        values = [getattr(cost, what) for cost in full]
        total = sum(getattr(cost, what) for cost in job.groups)
        rows.append([name, getattr(alone, what), min(values), max(values), total, f"{total / job.ranks:.1f}"])
    header = ("", "a group alone", "in the job: least", "most", "all groups", "a rank of the job")
    return [
        "## The whole job",
        "",
        f"{job.ranks:,} ranks: {_TITLES[job.situation].lower()}, one rendezvous of each group. Beside a group of "
        f"{alone.ranks} that is alone on its",
        "store stand those of this size in the job.",
        "",
        *_table(header, rows),
        "",
        f"There were never more than {job.most:,} keys at a time, and {job.left:,} at the end.",
        "",
    ]


def _linear(curves: Sequence[Curve]) -> list[str]:
    names = {"requests": "requests", "keys": "keys made", "left": "keys left"}
    rows = [(_TITLES[each.situation], *(_formula(each.first, what) for what in names)) for each in curves]
    return [f"  {row}" for row in _table(("", *names.values()), rows)]


def _formula(costs: Sequence[Cost], what: str) -> str:
    """As ``20n + 17``; says so if not all sizes lie on that line."""
    slope, constant = line(costs, what)
    exact = all(getattr(cost, what) == slope * cost.ranks + constant for cost in costs)
    text = f"{slope:g}n" if slope != 1 else "n"
    return text + (f" + {constant:g}" if constant else "") + ("" if exact else " (**not at all sizes**)")


def _together(job: Job, alone: Cost) -> str:
    full = [cost for cost in job.groups if cost.ranks == alone.ranks]
    same = all((cost.requests, cost.keys, cost.left) == (alone.requests, alone.keys, alone.left) for cost in full)
    return (
        f"Each of the {len(full)} groups of {alone.ranks}, the last as the first, took "
        f"{'' if same else '**not** '}as many\n  requests and keys as one that is alone. What stays is a key for each "
        "rank, which counts the groups of this name, and\n  the keys of the last round."
    )
