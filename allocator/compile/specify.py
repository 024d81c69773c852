"""``specify_symmetric_memory``: register the arguments of another library's operator."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from symmem.ops.registry.registration import Registration
from symmem.ops.registry.registry import FROM_SCHEMA, enter, register_symm_mem_args, registration, restore
from symmem.ops.registry.schema import OpLike

__all__ = ["specify_symmetric_memory"]


class specify_symmetric_memory:
    """Require symmetric memory for arguments of an operator, for good or within a ``with`` block.

        symmem.compile.specify_symmetric_memory("lib::op", "x")              # for good
        with symmem.compile.specify_symmetric_memory("lib::op", "x"):        # until the block ends
            torch.compile(f)(x)

    It replaces an earlier registration of the operator; a ``with`` block restores that one at its end. Compiled
    functions that call the operator are recompiled. The call is local. Make it on all ranks.

    Args:
        op: As for :func:`symmem.register_symm_mem_args`, like the other arguments.
        arg_names: Names of arguments.
        group_arg: Name of the argument that carries the group.
        exit_barrier: Whether no peer accesses the arguments once the operator is done on its stream.
        one_sided: Whether a rank calls the operator alone.

    Raises:
        InvalidArgumentError: As for :func:`symmem.register_symm_mem_args`.
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
        if registration(self._made.op) is not self._made:  # the block was entered and left before
            self._before = registration(self._made.op)
            enter(self._made, replace=True)
        return self._made

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        if registration(self._made.op) is self._made:  # otherwise a later registration replaced it
            restore(self._made, self._before)
