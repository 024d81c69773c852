"""A ``torch.library.Library`` with ``register_symm_mem_args`` for all versions of torch, and with checks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch._library.utils import RegistrationHandle

from symmem.ops.registry.registry import FROM_SCHEMA, caller_line, described, described_by, enter, withdraw
from symmem.ops.registry.schema import OpLike, find_op

__all__ = ["Library"]

_HINT = re.compile(r"\b(?:symm\s+|SymmMem(?=Tensor))(\S+)\s+(\w+)")


class Library(torch.library.Library):
    """A ``torch.library.Library`` with a :meth:`register_symm_mem_args` that checks its input. Works with torch 2.11.

        lib = symmem.ops.Library("lib", "FRAGMENT")
        lib.define("op(Tensor x, str tp) -> Tensor")
        lib.register_symm_mem_args("op", ["x"], group_arg="tp")

    If only one argument of an op can carry the group, the schema itself can say it::

        lib.define("op(symm Tensor x, str group_name) -> Tensor")
        lib.define("op(SymmMemTensor x, str group_name) -> Tensor")  # the same
        lib.define("op(Tensor x, str group_name) -> Tensor", symm_mem_hint="x")  # the same

    Registrations end with the library, like its ops.
    """

    def define(
        self, schema: str, *args: Any, symm_mem_hint: str | int | Iterable[str | int] = (), **kwargs: Any
    ) -> Any:
        """``torch.library.Library.define``, which also registers arguments.

        Args:
            schema: For example ``"op(symm Tensor x, symm Tensor(a!)[] outs, str group_name) -> ()"``. It registers the
                arguments with ``symm`` before their type, and those of a type that begins with ``SymmMemTensor``.
            args: See ``torch.library.Library.define``.
            symm_mem_hint: Further arguments to register, by name or position.
            kwargs: See ``torch.library.Library.define``.

        Raises:
            InvalidArgumentError: As :func:`symmem.register_symm_mem_args`. Then the op is not defined either.
        """
        plain, op = _HINT.sub(r"\1 \2", schema), schema.partition("(")[0].strip()
        hinted: list[str | int] = [match.group(2) for match in _HINT.finditer(schema)]
        hinted += [symm_mem_hint] if isinstance(symm_mem_hint, str | int) else symm_mem_hint
        if hinted:  # refuse before the op is defined, because a library cannot undefine it
            known = torch._C.parse_schema(f"{self.ns}::{plain}")
            described_by(f"{self.ns}::{op}", known, hinted, FROM_SCHEMA, False, False, "")
        name = super().define(plain, *args, **kwargs)  # type: ignore[no-untyped-call]
        if hinted:
            self.register_symm_mem_args(op, hinted)
        return name

    def register_symm_mem_args(
        self,
        op_name: OpLike,
        arg_names: Iterable[str | int],
        *,
        group_arg: str | None = FROM_SCHEMA,
        exit_barrier: bool = False,
        one_sided: bool = False,
        replace: bool = False,
    ) -> None:
        """:func:`symmem.register_symm_mem_args` for an op. The default namespace is the library's.

        Args:
            op_name: See :func:`symmem.register_symm_mem_args`. Also accepts ``"op"`` and ``"op.overload"``.
            arg_names: See :func:`symmem.register_symm_mem_args`.
            group_arg: See :func:`symmem.register_symm_mem_args`.
            exit_barrier: See :func:`symmem.register_symm_mem_args`.
            one_sided: See :func:`symmem.register_symm_mem_args`.
            replace: See :func:`symmem.register_symm_mem_args`.

        Raises:
            InvalidArgumentError: See :func:`symmem.register_symm_mem_args`.
        """
        if isinstance(op_name, str) and "::" not in op_name:
            op_name = f"{self.ns}::{op_name}"
        made = described(find_op(op_name), arg_names, group_arg, exit_barrier, one_sided, caller_line())
        enter(made, replace=replace)
        handles: list[Any] = self._registration_handles
        handles.append(RegistrationHandle(lambda: withdraw(made)))
