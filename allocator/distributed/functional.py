"""The functional collectives of compiled graphs, ``torch.ops._c10d_functional``, by symmem's operators.

Compiled code calls :func:`collective`. The operator and the order of the calls are as in the process group, see
:mod:`.methods` and :class:`.SymmemProcessGroup`. Where symmem does not serve a call, the functional collective runs.

The setting ``compiled_collectives`` says for which groups. ``auto`` takes process groups of the backend symmem alone,
because in others sums may have other bits and waits other timeouts than without symmem. ``on`` takes all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from symmem.distributed.methods import FUNCTIONAL, OTHER_REDUCTION, Method
from symmem.distributed.process_group import SymmemProcessGroup, meet
from symmem.errors import GroupError
from symmem.group.group import Group
from symmem.group.resolve import group_named
from symmem.ops import functions as ops
from symmem.ops.engines.base import REDUCTIONS

__all__ = ["base_name", "collective", "group_asked", "obstacle"]


def base_name(name: str) -> str:
    """The name of a functional collective without the suffix of its form, as in :data:`.methods.FUNCTIONAL`."""
    return name.removesuffix("_out").removesuffix("_").removesuffix("_coalesced")


def group_asked(name: object) -> Group | None:
    """The group of a functional collective, if its settings want symmem's operators. Local.

    Args:
        name: The argument ``group_name``.
    """
    if not isinstance(name, str):  # torch's option `compile_on_one_rank` passes the process group itself
        return None
    try:
        group = group_named(name)
    except GroupError:  # torch tells it when the collective runs
        return None
    setting = group.settings.compiled_collectives
    is_ours = isinstance(group.process_group, SymmemProcessGroup)
    return group if setting == "on" or (setting == "auto" and is_ours) else None


def obstacle(name: str, reduction: str | None, device: str, dtype: torch.dtype, nbytes: int) -> str:
    """Why symmem does not serve a functional collective, as far as a compiler can tell; empty if it does. Local.

    Args:
        name: See :func:`base_name`.
        reduction: The argument ``reduce_op``, if there is one.
        device: Type of the device.
        dtype: Element type.
        nbytes: Bytes of the larger one of input and result; 0 if they are not known.
    """
    if reduction not in (None, *REDUCTIONS):
        return OTHER_REDUCTION
    return FUNCTIONAL[name].obstacle(reduction, device, dtype, nbytes)


class _Meeting:
    """The first meeting of a group with another backend than symmem, and the calls of its compiled graphs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.obstacle: str | None = None

    def serve_now(self, group: Group, method: Method, arguments: tuple[Any, ...]) -> bool:
        """See :meth:`SymmemProcessGroup.serve_now`."""
        with self.lock:
            if self.obstacle is None:
                self.obstacle = meet(group)
        plan = self.obstacle or method.plan(ops, group, arguments)
        if isinstance(plan, str):
            return False
        plan()
        return True


def _serve(name: str, method: Method, arguments: tuple[Any, ...]) -> bool:
    group = group_asked(name)
    if group is None:  # a compile cache may have the code of a program with other settings
        return False
    process_group = group.process_group
    if isinstance(process_group, SymmemProcessGroup):
        return process_group.serve_now(method, arguments)
    return group.extension(_Meeting).serve_now(group, method, arguments)


def collective(name: str, *arguments: Any) -> Callable[..., torch.Tensor]:
    """Return ``call(x, out)``, which runs a functional collective from compiled code and returns the result.

    If symmem serves the call, the result is ``out``, and the call is complete, on CUDA on the current stream.
    Otherwise the functional collective runs. Then the result is its own, and is complete after ``wait_tensor``.

    Collective over the group. Which of the two happens is the same on all ranks.

    Args:
        name: A name in ``torch.ops._c10d_functional``, but no coalesced form.
        arguments: Its arguments behind the tensor. The last one is the name of the group. Those of all_to_all_single
            before it are arguments of ``call`` instead: the sizes of the parts of the result, and of ``x``.
    """
    base, group_name = base_name(name), arguments[-1]
    functional, method = getattr(torch.ops._c10d_functional, name).default, FUNCTIONAL[base]
    options = SimpleNamespace(asyncOp=False)
    if base in ("all_reduce", "reduce_scatter_tensor"):
        options.reduceOp = dist.ReduceOp(getattr(dist.ReduceOp, arguments[0].upper()))
    elif base == "broadcast":
        options.rootRank = arguments[0]

    def call(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if _serve(group_name, method, (out, x, options)):
            return out
        result: torch.Tensor = functional(x, *arguments, **({"out": out} if name.endswith("_out") else {}))
        return result

    def exchange(x: torch.Tensor, out: torch.Tensor, outs: Sequence[int], ins: Sequence[int]) -> torch.Tensor:
        if _are_even(group_name, [*outs, *ins]) and _serve(group_name, method, (out, x, options)):
            return out
        result: torch.Tensor = functional(x, outs, ins, group_name)
        return result

    return exchange if base == "all_to_all_single" else call


def _are_even(group_name: str, sizes: Sequence[int]) -> bool:
    """Whether all parts on all ranks have one size. The ranks compare, because a rank knows only its own parts."""
    flag = torch.tensor([len(set(sizes)) == 1], dtype=torch.uint8)
    options = SimpleNamespace(asyncOp=False, reduceOp=dist.ReduceOp(dist.ReduceOp.MIN))
    return _serve(group_name, FUNCTIONAL["all_reduce"], (flag, flag, options)) and bool(flag)
