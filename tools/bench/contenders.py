"""Who can do a collective operation: ours, PyTorch's symmetric memory, NCCL and gloo, each over the memory it needs.

PyTorch's operations by multicast are not among them: their set-up is not allowed on all hosts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import symmem
import symmem.ops
from symmem.backends import get_backend
from symmem.errors import SymmemError
from symmem.tools.bench.gpu import Torch

__all__ = ["OPERATORS", "Contender", "WrongResultError", "check", "contenders", "expected", "line_up", "shapes"]

OPERATORS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")

_TORCH = {"torch_one_shot": "one_shot_all_reduce", "torch_two_shot": "two_shot_all_reduce_"}
_VECTOR = 16  # bytes
_EXACT = 256  # bfloat16 has all whole numbers up to this


class WrongResultError(SymmemError, RuntimeError):
    """What was to be measured does not do what it should."""


@dataclass(frozen=True)
class Contender:
    """One library's way to do an operation.

    Attributes:
        name: ``symmem``, ``torch_one_shot``, ``torch_two_shot``, ``nccl`` or ``gloo``.
        source: What it reads; may be filled anew.
        call: Does it once; returns the result, or None.
        out: Holds the result, if the call returns None.
    """

    name: str
    source: torch.Tensor
    call: Callable[[], Any]
    out: torch.Tensor

    def __call__(self) -> torch.Tensor:
        """Do it once; returns the result."""
        returned = self.call()
        return self.out if returned is None else returned


def contenders(operator: str, nbytes: int, backend: str, largest: int) -> list[Contender]:
    """Ours first, then the peers. Collective over all ranks, the first time.

    Args:
        operator: One of :data:`OPERATORS`.
        nbytes: Of the tensor; where there is one with a row for each rank, of that.
        backend: Ours. With one for CUDA ours works on symmetric memory, as torch's does, and in bfloat16; on the CPU
            on plain memory and in float32.
        largest: The most that ``nbytes`` will be, so that memory for all sizes is made once: torch's transports may
            take new memory at an old address for the old one.
    """
    if get_backend(backend).device_type == "cpu":
        return line_up(operator, {name: torch.zeros(nbytes // 4) for name in ("symmem", "gloo")})
    ours = _ours(backend, 2 * largest).tensor
    memories, results = {"symmem": ours[:largest]}, ours[largest:]
    if operator == "all_reduce":
        memories |= dict.fromkeys(_TORCH, _torchs(largest)[0])
    memories["nccl"] = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    given = {name: memory[:nbytes].view(torch.bfloat16) for name, memory in memories.items()}
    return line_up(operator, given, results.view(torch.bfloat16))


def line_up(operator: str, memories: Mapping[str, torch.Tensor], ours: torch.Tensor | None = None) -> list[Contender]:
    """Those who work on these memories, by name; each of the same dtype and [elements]. Fills them with zeros.

    ``ours`` is for our result, of the same dtype, or larger; all others, and without it ours too, get memory of torch.
    """
    group, found = symmem.resolve_group(), []
    for name, memory in memories.items():
        shape, to_shape = shapes(operator, memory.numel(), group.size)
        source = memory.zero_()[: shape.numel()].view(shape)
        out = source
        if to_shape is not None:
            ready = ours if name == "symmem" else None
            out = source.new_zeros(to_shape) if ready is None else ready[: to_shape.numel()].view(to_shape)
        if name == "symmem":
            call: Callable[[], Any] = partial(getattr(symmem.ops, operator), source, group, out=out)
        elif name not in _TORCH:
            call = _call_dist(operator, source, out)
        elif name == "torch_one_shot" or source.nbytes % (_VECTOR * group.size) == 0:
            default = dist.distributed_c10d._get_default_group().group_name
            call = partial(getattr(torch.ops.symm_mem, _TORCH[name]), source, "sum", default)
        else:  # two-shot gives each rank a slice of whole vectors
            continue
        found.append(Contender(name, source, call, out))
    return found


def shapes(operator: str, elements: int, world: int) -> tuple[torch.Size, torch.Size | None]:
    """Shapes of the source and of the result; None for the latter if the operation is done in place."""
    row, rows = torch.Size([elements // world]), torch.Size([world, elements // world])
    return {
        "all_reduce": (torch.Size([elements]), None),
        "all_gather": (row, rows),
        "reduce_scatter": (rows, row),
        "all_to_all": (rows, rows),
        "broadcast": (torch.Size([elements]), None),
    }[operator]


# Memory that stays for as long as the process lives, with what keeps it mapped.


@functools.cache
def _ours(backend: str, nbytes: int) -> symmem.SymmetricTensor:
    return symmem.allocate(nbytes, torch.uint8, backend=backend, arena=False).rendezvous()


@functools.cache
def _torchs(nbytes: int) -> tuple[torch.Tensor, Any]:
    transport = Torch("CUDA")
    memory = transport.allocate(nbytes)
    return memory, transport.rendezvous(memory)


def _call_dist(operator: str, source: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    flat, to = source.view(-1), out.view(-1)
    all_gather, reduce_scatter = (
        getattr(dist, new, None) or getattr(dist, old)  # torch 2.13 has renamed them
        for new, old in (
            ("all_gather_single", "all_gather_into_tensor"),
            ("reduce_scatter_single", "reduce_scatter_tensor"),
        )
    )
    return {
        "all_reduce": partial(dist.all_reduce, source),
        "all_gather": partial(all_gather, to, flat),
        "reduce_scatter": partial(reduce_scatter, to, flat),
        "all_to_all": partial(dist.all_to_all_single, to, flat),
        "broadcast": partial(dist.broadcast, source, 0),
    }[operator]


def check(operator: str, contender: Contender) -> None:
    """Do it once with numbers whose sums are exact, compare each bit, and leave zeros. Collective over all ranks.

    Raises:
        WrongResultError: The result is not what float64 gives.
    """
    rank, world, source = dist.get_rank(), dist.get_world_size(), contender.source
    source.copy_(_pattern(rank, source, world))
    result = contender()
    wrong = (result != expected(operator, rank, world, source)).view(-1).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise WrongResultError(
            f"{contender.name}'s {operator} of {source.nbytes} bytes has {len(wrong)} of {result.numel()} elements "
            f"wrong, the first at {first}: {float(result.reshape(-1)[first])}",
            hint="its time would mean nothing; `symmem validate` tests ours",
            rank=rank,
        )
    source.zero_()  # so that repeated sums stay finite


def expected(operator: str, rank: int, world: int, source: torch.Tensor) -> torch.Tensor:
    """What ``rank`` must have, if :func:`_pattern` filled each rank's source, of the shape of ``source``; float64."""
    if operator == "broadcast":
        return _pattern(0, source, world)
    # One rank after the other: all at once would take eight times the memory for each of them.
    patterns = (_pattern(each, source, world) for each in range(world))
    if operator in ("all_gather", "all_to_all"):
        return torch.stack([each if operator == "all_gather" else each[rank] for each in patterns])
    total = torch.zeros_like(source, dtype=torch.float64)
    for each in patterns:
        total += each
    return total[rank] if operator == "reduce_scatter" else total


def _pattern(rank: int, like: torch.Tensor, world: int) -> torch.Tensor:
    """Whole numbers so small that any sum over ranks is exact in bfloat16, other ones on each rank; float64."""
    reach = max(1, _EXACT // world)
    numbers = torch.arange(like.numel(), device=like.device) * 7 + rank * 13
    return (numbers % (2 * reach + 1) - reach).double().view(like.shape)
