"""``specify_symmetric_memory``: say from outside which arguments of an operator must be symmetric memory."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from symmem.ops.registry.registration import Registration
from symmem.ops.registry.registry import FROM_SCHEMA, enter, register_symm_mem_args, registration, restore
from symmem.ops.registry.schema import OpLike

__all__ = ["specify_symmetric_memory"]


class specify_symmetric_memory:
    """Say which arguments of an operator must lie in symmetric memory: from here on, or within a ``with`` block.

        symmem.compile.specify_symmetric_memory("lib::op", "x")              # from here on
        with symmem.compile.specify_symmetric_memory("lib::op", "x"):        # as long as the block lasts
            torch.compile(f)(x)

    It takes the place of what was registered before, which a ``with`` block brings back at its end. Compiled functions
    with the operator are compiled anew. Local, and the same on all ranks.

    Args:
        op: See :func:`symmem.register_symm_mem_args`.
        arg_names: Names of arguments.
        group_arg: See there.
        exit_barrier: See there.
        one_sided: See there.

    Raises:
        InvalidArgumentError: As there.
    """

    def __init__(
        self,
        op: OpLike,
        *arg_names: str,
        group_arg: str | None = FROM_SCHEMA,
        exit_barrier: bool = False,
        one_sided: bool = False,
    ) -> None:
        self._before = registration(op)
        self._made: Registration = register_symm_mem_args(
            op, arg_names, group_arg=group_arg, exit_barrier=exit_barrier, one_sided=one_sided, replace=True
        )

    def __enter__(self) -> Registration:
        if registration(self._made.op) is not self._made:  # it was entered and left before
            self._before = registration(self._made.op)
            enter(self._made, replace=True)
        return self._made

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        if registration(self._made.op) is self._made:  # else somebody else has said otherwise meanwhile
            restore(self._made, self._before)
