"""Eager calls of registered ops with memory that is not symmetric: an error, or a copy.

Where it is checked, and what that costs:

* An op of symmem's own checks its arguments itself.
* :func:`check` is one line in whatever wraps an op of somebody else's: some microseconds, no other cost.
* :func:`checked` is for whole programs: within it, a dispatch mode looks at each call of this thread. That costs some
  microseconds a call, of any op, so it is switched on where it is wanted, and outside of it nothing is spent at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from symmem.config import load_settings
from symmem.errors import GroupError, NotSymmetricError
from symmem.memory.block import Block
from symmem.memory.registry import block_at
from symmem.ops.registry.built_in import NAMESPACE
from symmem.ops.registry.registration import Registration
from symmem.ops.registry.registry import lookup
from symmem.ops.registry.schema import OpLike, find_op
from symmem.redirect.cpu_dispatch import flags
from symmem.tensor.lookup import address_of
from symmem.tensor.tensor import SymmetricTensor

__all__ = ["asked_locally", "backend_of", "check", "checked", "is_torchs"]


def asked_locally() -> bool:
    """Whether this torch, from 2.12 on, tells what is its symmetric memory without a rendezvous."""
    return hasattr(_torchs(), "is_symm_mem_tensor")


def backend_of(namespace: str) -> str | None:
    """The backend whose memory an operator needs, by its namespace; None for any that the configuration chooses."""
    if namespace != NAMESPACE:
        return None
    from torch.distributed import _symmetric_memory as torch_symmetric

    transport = torch_symmetric.get_backend(torch.device("cuda"))
    return f"pytorch_{transport.lower()}" if transport else "pytorch_cuda"  # which is the one without a choice


def _torchs() -> Any:
    return torch._C._distributed_c10d._SymmetricMemory if dist.is_available() else None


def check(op: OpLike, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
    """Raise if a call of a registered op would be given other than symmetric memory, whatever the setting. Local.

    Tensors with no memory of their own (fake, meta, functional, wrapper classes) and empty ones are left alone.

    Args:
        op: As for :func:`symmem.register_symm_mem_args`. One that is not registered passes.
        args: Of the call.
        kwargs: Of the call.

    Raises:
        NotSymmetricError: Names op and argument, and how to allocate it.
        InvalidArgumentError: There is no such op.
    """
    known = lookup(find_op(op))
    if known is not None:
        for place, tensor in _misplaced(known, args, kwargs):
            raise _error(known, place, tensor)


@contextlib.contextmanager
def checked(mode: str | None = None) -> Iterator[None]:
    """Within it, this thread's eager calls of registered ops must be given symmetric memory. Also a decorator.

    Not collective; but with ``copy`` a call is, over the op's group, in that all ranks must pass alike: where one
    rank's tensor is copied, so must be those of the others.

    It sees ops beneath autograd, so that gradients are what they are without it, and with ``torch.no_grad()`` and
    ``torch.inference_mode()`` as well. Tensors with no memory of their own (fake, meta, functional, wrapper classes)
    and empty ones are left alone. Functions of ``torch.compile`` run uncompiled. It does not see an op that is only a
    composition of others (``CompositeImplicitAutograd``), only what that consists of.

    Args:
        mode: ``"error"``: raise :class:`NotSymmetricError`, before the op runs. ``"copy"``: run it on a copy in the
            group's symmetric memory; what the op writes is copied back, and where it returns that argument, the
            caller's tensor is returned. Behind an op with no exit barrier there is then a barrier, so that the copy
            can be let go. Tensors that overlap, and are not the same, are copied apart. One-sided ops raise all the
            same. ``"off"``: nothing. None: the setting
            ``symmetric_arguments``, as it is when an argument is found that is not symmetric.

    Raises:
        ConfigError: There is no such mode.
    """
    if mode is not None:
        load_settings({"symmetric_arguments": mode}, environ={})
    entry = cast("Any", _Checked(mode))
    flags.enter(entry)
    try:
        yield
    finally:
        flags.leave(entry)


class _Checked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at the calls of one thread."""

    supports_higher_order_operators = True

    def __init__(self, mode: str | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler for the first op; it compiles nothing under a mode anyway

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        beneath = torch._C._len_torch_dispatch_stack() > 0  # other modes, which would not be asked any more
        if not beneath and any(_dispatches(kind) for kind in types):
            return NotImplemented  # its own ops, on the tensors that it wraps, come here again
        known = lookup(func) if isinstance(func, OpOverload) else None
        if known is None:
            return func(*args, **kwargs)
        found = dict(_misplaced(known, args, kwargs))
        mode = (self._mode or _setting(known, args, kwargs)) if found else "off"
        if mode == "off":
            return func(*args, **kwargs)
        for place, tensor in found.items():
            if mode == "error" or known.one_sided or tensor.layout != torch.strided:
                raise _error(known, place, tensor)
        return _with_copies(known, func, args, kwargs)


_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl


def _dispatches(kind: type) -> bool:
    """Whether a class of tensors has a dispatch of its own; most that do have no memory."""
    return getattr(kind, "__torch_dispatch__", _NO_DISPATCH) is not _NO_DISPATCH


def _setting(known: Registration, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    try:
        group = known.group_of(args, kwargs).name
    except GroupError:  # which a call with an error to tell does not depend on
        group = None
    return load_settings(group=group).symmetric_arguments


def _misplaced(
    known: Registration, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    def group() -> str:
        return known.group_of(args, kwargs).name

    return (each for each in known.tensors_of(args, kwargs) if not _is_in_place(known, each[1], group))


def _namespace(known: Registration) -> str:
    return known.op.partition("::")[0]


def _is_in_place(known: Registration, tensor: torch.Tensor, group: Callable[[], str]) -> bool:
    """Whether a tensor lies in symmetric memory, where the operator finds it, or in none at all."""
    if tensor.device.type == "meta" or tensor.numel() == 0 or _dispatches(type(tensor)):
        return True
    address = address_of(tensor)
    if address is None:
        return tensor.layout == torch.strided  # else it has memory, of several pieces
    block = block_at(address)
    if block is not None:
        there = not block.closed and block.allocation.device == tensor.device
        return there and (_namespace(known) != NAMESPACE or _begins(tensor, block))
    return is_torchs(tensor, group)


def _begins(tensor: torch.Tensor, block: Block) -> bool:
    """Whether a tensor's storage begins where the allocation does."""
    return tensor.untyped_storage().data_ptr() == block.allocation.pointer


def is_torchs(tensor: torch.Tensor, group: Callable[[], str]) -> bool:
    """Whether a tensor lies in symmetric memory that torch has allocated, where torch's operators find it.

    They take the allocation for the tensor's storage (those of torch 2.11), so the one must begin where the other does:
    tensors of an arena, or of a pool, mostly do not.

    Local from torch 2.12 on. Until then torch tells only by a rendezvous, as the operator does that takes the tensor:
    collective over the group the first time, of a tensor that is.

    Args:
        tensor: It has memory.
        group: The name of the operator's group.
    """
    memory = _torchs()
    if asked_locally():
        if not memory.is_symm_mem_tensor(tensor):
            return False
        block = block_at(tensor.data_ptr())
        return block is None or _begins(tensor, block)
    if memory is None or not tensor.is_cuda:  # there is none elsewhere
        return False
    try:
        handle = memory.rendezvous(tensor, group())
        return handle is not None and handle.offset == 0
    except GroupError:  # by which the operator does not find it either
        return False
    except RuntimeError as error:  # by the transports NVSHMEM and NCCL; CUDA returns None
        if "not within any SymmetricMemory allocation" in str(error):
            return False
        raise


def _error(known: Registration, place: str, tensor: torch.Tensor) -> NotSymmetricError:
    shape, device = tuple(tensor.shape), str(tensor.device)
    backend = backend_of(_namespace(known))
    if backend is None:
        found = "is a plain tensor"
        hint = (
            f"allocate it with symmem.allocate({shape}, {tensor.dtype}, {device!r}).tensor, or make it within "
            "`with symmem.use_symmetric_memory():`"
        )
    else:
        found = "is not at the beginning of any that torch allocated: a tensor"
        hint = f"allocate it with symmem.allocate({shape}, {tensor.dtype}, backend={backend!r}, arena=False).tensor"
    if not known.one_sided:
        hint += "; or have it copied at each call within symmem.ops.checked('copy')"
    what = f"{known.op}: the argument {place!r} must be symmetric memory, and {found} of shape {shape}"
    return NotSymmetricError(f"{what}, {tensor.dtype}, on {device}", hint=hint, step=known.op)


# Copies.


class _Copies:
    """The symmetric copies of one call; one of each tensor, however often it is passed."""

    def __init__(self, known: Registration, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._known = known
        self._group = known.group_of(args, kwargs)
        self._made: dict[Any, tuple[torch.Tensor, SymmetricTensor]] = {}

    def placed(self, value: Any) -> Any:
        """A value of the call with its plain tensors replaced."""
        if isinstance(value, list | tuple):
            return type(value)([self.placed(each) for each in value])
        if not isinstance(value, torch.Tensor) or _is_in_place(self._known, value, lambda: self._group.name):
            return value
        key = _geometry(value)
        if key not in self._made:
            self._made[key] = value, self._copy(value)
        return self._made[key][1].tensor

    def _copy(self, tensor: torch.Tensor) -> SymmetricTensor:
        strides = torch.empty_like(tensor, device="meta").stride()
        backend = backend_of(_namespace(self._known))
        handle = SymmetricTensor.allocate(
            tensor.shape,
            tensor.dtype,
            tensor.device,
            strides=strides,
            group=self._group,
            backend=backend,
            arena=None if backend is None else False,
        ).rendezvous(self._group)
        handle.tensor.copy_(tensor)
        return handle

    def finish(self) -> None:
        """See to it that peers have done with the copies."""
        handles = [handle for _original, handle in self._made.values()]
        if handles and not self._known.exit_barrier:
            handles[0].barrier(group=self._group)

    def copy_back(self, value: Any) -> None:
        """Copy to the caller's tensors what an op has written to their copies."""
        if isinstance(value, list | tuple):
            for each in value:
                self.copy_back(each)
        elif isinstance(value, torch.Tensor) and (made := self._made.get(_geometry(value))):
            value.copy_(made[1].tensor)
            if not value.is_inference():
                torch.autograd.graph.increment_version(value)  # which torch leaves out beneath a dispatch mode

    def original(self, value: Any) -> Any:
        """A result with the caller's tensors in the place of their copies."""
        if isinstance(value, list | tuple):
            return type(value)([self.original(each) for each in value])
        if isinstance(value, torch.Tensor):
            for original, handle in self._made.values():
                if _geometry(value) == _geometry(handle.tensor):
                    return original
        return value


def _geometry(tensor: torch.Tensor) -> Any:
    return address_of(tensor), tensor.dtype, tensor.shape, tensor.stride() if tensor.layout == torch.strided else None


def _with_copies(known: Registration, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call an op with copies of what is not symmetric memory. Collective over its group."""
    copies = _Copies(known, args, kwargs)
    new_args, new_kwargs = list(args), dict(kwargs)
    for name in known.args:
        placed = copies.placed(known.value_of(name, args, kwargs))
        position = known.parameters[name].position
        if name in new_kwargs:
            new_kwargs[name] = placed
        elif position < len(new_args):
            new_args[position] = placed
    result = func(*new_args, **new_kwargs)
    copies.finish()
    for name in known.mutated:
        copies.copy_back(known.value_of(name, args, kwargs))
    return copies.original(result)
