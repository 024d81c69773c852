"""The record of one registered operator, :class:`Registration`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from symmem.errors import GroupError
from symmem.group.group import Group
from symmem.group.resolve import resolve_group
from symmem.ops.registry.schema import Parameter

__all__ = ["BUILT_IN", "UPSTREAM", "Registration"]

BUILT_IN = "symmem"
"""The source of built-in registrations, for torch.ops.symm_mem and torch.ops.symmem."""

UPSTREAM = "torch.library"
"""The source of registrations through ``torch.library.Library.register_symm_mem_args``."""


@dataclass(frozen=True)
class Registration:
    """The arguments of an operator that must be in symmetric memory.

    Attributes:
        op: Qualified name: ``"lib::op"`` for the default overload, else ``"lib::op.overload"``.
        args: Names of the arguments. If an argument is a list, all tensors in it must be symmetric memory. None values
            are allowed.
        group_arg: Name of the argument that carries the group, as a process group or its name. If None, the op uses the
            default process group.
        exit_barrier: Whether peers have finished with these arguments when the op completes on its stream. Then their
            memory can be overwritten at once.
        one_sided: Whether a single rank calls it, for a peer's memory. A copy of the argument would be useless then.
        source: Origin of the registration: ``"module:line"``, ``"symmem"`` if built in, or ``"torch.library"``.
        unclear_group: Arguments that may carry the group. If there are any, :meth:`group_of` raises.
        schema: The op's ``torch.FunctionSchema``.
        parameters: The op's arguments by name.
    """

    op: str
    args: tuple[str, ...]
    group_arg: str | None
    exit_barrier: bool
    one_sided: bool
    source: str
    unclear_group: tuple[str, ...] = ()
    schema: Any = field(default=None, compare=False, repr=False)
    parameters: Mapping[str, Parameter] = field(default_factory=dict, compare=False, repr=False)

    @property
    def mutated(self) -> tuple[str, ...]:
        """The arguments in :attr:`args` that the op writes to."""
        return tuple(name for name in self.args if self.parameters[name].mutated)

    def value_of(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
        """The value of an argument in a call: the given value, else the default, else None."""
        if kwargs and name in kwargs:
            return kwargs[name]
        parameter = self.parameters[name]
        if parameter.position < len(args):
            return args[parameter.position]
        return parameter.default

    def tensors_of(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
        """The tensors of a call that must be in symmetric memory, with their places, such as ``outs[1]``."""
        for name in self.args:
            yield from _tensors(name, self.value_of(name, args, kwargs))

    def group_of(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Group:
        """The group of a call, from :attr:`group_arg`; the default process group if :attr:`group_arg` is None. Local.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Raises:
            GroupError: There is no such group, or the argument that carries it is unknown. Names op and argument.
        """
        if self.unclear_group:
            raise GroupError(
                f"{self.op}: the registration does not tell which argument carries the group; "
                f"it may be {self.unclear_group[0]!r}",
                hint=f"call symmem.register_symm_mem_args({self.op!r}, {list(self.args)}, "
                f"group_arg={self.unclear_group[0]!r}, replace=True), or group_arg=None for the default group",
            )
        value = None if self.group_arg is None else self.value_of(self.group_arg, args, kwargs)
        if isinstance(value, torch.ScriptObject):
            value = dist.ProcessGroup.unbox(value)
        try:
            return resolve_group(value)
        except GroupError as error:
            where = f"argument {self.group_arg!r}" if self.group_arg is not None else "the default process group"
            raise GroupError(f"{self.op}: no group by {where}: {error.what}", hint=error.hint) from error


def _tensors(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, list | tuple):
        for index, element in enumerate(value):
            yield from _tensors(f"{place}[{index}]", element)
