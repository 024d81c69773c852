"""Contenders of a collective operation: symmem, PyTorch's symmetric memory, NCCL and gloo, with their memory.

PyTorch's multicast operators are not included, because not all hosts allow their set-up.
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

__all__ = [
    "OPERATORS",
    "Contender",
    "WrongResultError",
    "check",
    "contenders",
    "expected",
    "line_up",
    "shapes",
    "through_torch",
]

OPERATORS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")

_TORCH = {"torch_one_shot": "one_shot_all_reduce", "torch_two_shot": "two_shot_all_reduce_"}
_VECTOR = 16  # bytes
_EXACT = 256  # bfloat16 represents all whole numbers up to this


class WrongResultError(SymmemError, RuntimeError):
    """A contender of a benchmark returns a wrong result."""


@dataclass(frozen=True)
class Contender:
    """An operation of one library.

    Attributes:
        name: ``symmem``, ``torch_one_shot``, ``torch_two_shot``, ``nccl`` or ``gloo``.
        source: The input. Callers may write to it.
        call: Runs the operation once; returns the result, or None.
        out: Holds the result if the call returns None.
    """

    name: str
    source: torch.Tensor
    call: Callable[[], Any]
    out: torch.Tensor

    def __call__(self) -> torch.Tensor:
        """Run the operation once, and return the result."""
        returned = self.call()
        return self.out if returned is None else returned


def contenders(operator: str, nbytes: int, backend: str, largest: int) -> list[Contender]:
    """Return symmem's contender, then the peers. The first call is collective over all ranks.

    Args:
        operator: One of :data:`OPERATORS`.
        nbytes: Bytes of the tensor, or of the tensor with a row per rank.
        backend: symmem's backend. On CUDA, symmem and torch work on symmetric memory in bfloat16; on the CPU, symmem
            works on plain memory in float32.
        largest: The largest ``nbytes`` of all calls. Memory for all sizes is allocated once, because torch's transports
            may confuse new memory at an old address with the old memory.
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
    """Make the contenders over these memories, by name. All memories have the same dtype and shape [elements].

    Fills the memories with zeros. ``ours`` is memory for symmem's result, of the same dtype and at least as large.
    Without it, and for the other contenders, results are in plain memory.
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
        else:  # two-shot needs a slice of whole vectors per rank
            continue
        found.append(Contender(name, source, call, out))
    return found


def through_torch(operator: str, nbytes: int, device: torch.device, groups: Mapping[str, Any]) -> list[Contender]:
    """Make contenders that call torch.distributed with plain tensors, by the name of the process group.

    The arguments are those of :func:`contenders`. float32 on the CPU, bfloat16 on CUDA.
    """
    dtype, found = torch.float32 if device.type == "cpu" else torch.bfloat16, []
    for name, group in groups.items():
        shape, to_shape = shapes(operator, nbytes // dtype.itemsize, dist.get_world_size())
        source = torch.zeros(shape, dtype=dtype, device=device)
        out = source if to_shape is None else source.new_zeros(to_shape)
        found.append(Contender(name, source, _call_dist(operator, source, out, group), out))
    return found


def shapes(operator: str, elements: int, world: int) -> tuple[torch.Size, torch.Size | None]:
    """Shapes of the source and of the result. The second is None if the operation works in place."""
    row, rows = torch.Size([elements // world]), torch.Size([world, elements // world])
    return {
        "all_reduce": (torch.Size([elements]), None),
        "all_gather": (row, rows),
        "reduce_scatter": (rows, row),
        "all_to_all": (rows, rows),
        "broadcast": (torch.Size([elements]), None),
    }[operator]


# Memory that lives as long as the process, and the handles that keep it mapped.


@functools.cache
def _ours(backend: str, nbytes: int) -> symmem.SymmetricTensor:
    return symmem.allocate(nbytes, torch.uint8, backend=backend, arena=False).rendezvous()


@functools.cache
def _torchs(nbytes: int) -> tuple[torch.Tensor, Any]:
    transport = Torch("CUDA")
    memory = transport.allocate(nbytes)
    return memory, transport.rendezvous(memory)


def _call_dist(operator: str, source: torch.Tensor, out: torch.Tensor, group: Any = None) -> Callable[[], Any]:
    flat, to = source.view(-1), out.view(-1)
    all_gather, reduce_scatter = (
        getattr(dist, new, None) or getattr(dist, old)  # torch 2.13 has renamed them
        for new, old in (
            ("all_gather_single", "all_gather_into_tensor"),
            ("reduce_scatter_single", "reduce_scatter_tensor"),
        )
    )
    return {
        "all_reduce": partial(dist.all_reduce, source, group=group),
        "all_gather": partial(all_gather, to, flat, group=group),
        "reduce_scatter": partial(reduce_scatter, to, flat, group=group),
        "all_to_all": partial(dist.all_to_all_single, to, flat, group=group),
        "broadcast": partial(dist.broadcast, source, 0, group=group),
    }[operator]


def check(operator: str, contender: Contender) -> None:
    """Run the operation on numbers with exact sums, compare all bits, and leave zeros. Collective over all ranks.

    Raises:
        WrongResultError: The result differs from a float64 result.
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
            hint="a time of a wrong result means nothing; `symmem validate` tests symmem",
            rank=rank,
        )
    source.zero_()  # so that repeated sums stay finite


def expected(operator: str, rank: int, world: int, source: torch.Tensor) -> torch.Tensor:
    """The expected result of ``rank`` in float64, if :func:`_pattern` filled the sources of all ranks."""
    if operator == "broadcast":
        return _pattern(0, source, world)
    # A generator, because float64 patterns of all ranks at once would need much memory.
    patterns = (_pattern(each, source, world) for each in range(world))
    if operator in ("all_gather", "all_to_all"):
        return torch.stack([each if operator == "all_gather" else each[rank] for each in patterns])
    total = torch.zeros_like(source, dtype=torch.float64)
    for each in patterns:
        total += each
    return total[rank] if operator == "reduce_scatter" else total


def _pattern(rank: int, like: torch.Tensor, world: int) -> torch.Tensor:
    """Whole numbers that differ between ranks, small enough for exact sums over ranks in bfloat16; as float64."""
    reach = max(1, _EXACT // world)
    numbers = torch.arange(like.numel(), device=like.device) * 7 + rank * 13
    return (numbers % (2 * reach + 1) - reach).double().view(like.shape)
