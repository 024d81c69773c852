"""``torch.library.Library`` with the method that torch has from 2.13 on, for every torch, and with its checks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch._library.utils import RegistrationHandle

from symmem.ops.registry.registry import FROM_SCHEMA, _source, described, enter, withdraw
from symmem.ops.registry.schema import OpLike, find_op

__all__ = ["Library"]

_HINT = re.compile(r"\bsymm\s+(\S+)\s+(\w+)")


class Library(torch.library.Library):
    """A ``torch.library.Library`` whose :meth:`register_symm_mem_args` checks what it is told. Works with torch 2.11.

        lib = symmem.ops.Library("lib", "FRAGMENT")
        lib.define("op(Tensor x, str tp) -> Tensor")
        lib.register_symm_mem_args("op", ["x"], group_arg="tp")

    or, for an op with one argument that carries the group, in the schema itself::

        lib.define("op(symm Tensor x, str group_name) -> Tensor")

    What was registered ends with the library, as its ops do.
    """

    def define(self, schema: str, *args: Any, **kwargs: Any) -> Any:
        """``torch.library.Library.define``; arguments with ``symm`` before their type are registered.

        Args:
            schema: Of the op: ``"op(symm Tensor x, symm Tensor(a!)[] outs, str group_name) -> ()"``.
            args: As there.
            kwargs: As there.

        Raises:
            InvalidArgumentError: As :func:`symmem.register_symm_mem_args`.
        """
        name = super().define(_HINT.sub(r"\1 \2", schema), *args, **kwargs)  # type: ignore[no-untyped-call]
        hinted = [match.group(2) for match in _HINT.finditer(schema)]
        if hinted:
            self.register_symm_mem_args(schema.partition("(")[0].strip(), hinted)
        return name

    def register_symm_mem_args(
        self,
        op_name: OpLike,
        arg_names: Iterable[str],
        *,
        group_arg: str | None = FROM_SCHEMA,
        exit_barrier: bool = False,
        one_sided: bool = False,
        replace: bool = False,
    ) -> None:
        """:func:`symmem.register_symm_mem_args` for an op, by default of this library's namespace.

        Args:
            op_name: As there; also ``"op"`` and ``"op.overload"``.
            arg_names: As there, and all that follow.
            group_arg: See there.
            exit_barrier: See there.
            one_sided: See there.
            replace: See there.

        Raises:
            InvalidArgumentError: As there.
        """
        if isinstance(op_name, str) and "::" not in op_name:
            op_name = f"{self.ns}::{op_name}"
        made = described(find_op(op_name), arg_names, group_arg, exit_barrier, one_sided, _source())
        enter(made, replace=replace)
        handles: list[Any] = self._registration_handles
        handles.append(RegistrationHandle(lambda: withdraw(made)))
