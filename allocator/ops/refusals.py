"""A call that this rank refuses is refused on all ranks.

A rank may raise before it takes part in a collective operation: because of its arguments, because of autograd, because
it has no memory left, or because it is interrupted. The other ranks must get that error in the operation that matches,
or that operation would pair with this rank's next one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from symmem.errors import SymmemError
from symmem.group.agreement import as_symmem_error
from symmem.group.group import Group
from symmem.group.resolve import GroupLike, resolve_group
from symmem.ops.engines.base import Engines

__all__ = ["refuse", "refuse_in", "refusing"]


def refuse(group: Group, device: torch.device | None, operation: str, error: BaseException) -> None:
    """Report an error to the other ranks, which wait for this rank in the operation.

    It waits for them only if they have not come to the call that this rank refused before.

    Args:
        group: The group of the call.
        device: The device of the call; None for the CPU, if the arguments do not tell.
        operation: The name of the operation.
        error: What this rank raises. An error that a collective of the group raised is known to all ranks already.
    """
    if getattr(error, "propagated_to", None) == group.name:
        return
    reported = as_symmem_error(error)
    reported.located(rank=group.rank, group=group.name, step=operation)
    engines = group.extension(Engines)
    engine: Any = engines.get(torch.device("cpu") if device is None else device)
    if engine is None:
        group.fail(operation, reported)  # the others are about to make the engine
    elif hasattr(engine, "refuse"):
        with contextlib.suppress(SymmemError):  # the caller raises its own error
            engine.refuse(operation, reported)
    with contextlib.suppress(AttributeError):  # of an exception without attributes
        error.propagated_to = group.name  # type: ignore[attr-defined]  # an outer call must not report it again


@contextlib.contextmanager
def refusing(group: Group, device: torch.device, operation: str) -> Iterator[None]:
    """Call :func:`refuse` for an error of the block."""
    try:
        yield
    except BaseException as error:
        refuse(group, device, operation, error)
        raise


def refuse_in(group: GroupLike, operation: str, error: BaseException, *values: object) -> None:
    """The same, of any arguments. Calls of meta or fake tensors are local: they report nothing."""
    with torch._C.DisableTorchFunction():  # the error may come from there
        real = [each for each in values if isinstance(each, torch.Tensor) and not _has_no_memory(each)]
        if not real and values and isinstance(values[0], torch.Tensor):
            return
        try:
            resolved = resolve_group(group)
        except SymmemError:
            return  # no ranks wait in a group that does not exist
        if not resolved.closed:
            refuse(resolved, real[0].device if real else None, operation, error)


def _has_no_memory(tensor: Any) -> bool:
    """Whether a tensor is on meta, or fake."""
    if tensor.is_meta:
        return True
    module = sys.modules.get("torch._subclasses.fake_tensor")  # not imported here: that takes seconds
    return module is not None and isinstance(tensor, module.FakeTensor)
