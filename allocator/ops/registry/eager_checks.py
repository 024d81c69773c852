"""Check eager calls of registered ops: plain memory raises an error, or is copied.

There are three ways, with different costs:

* symmem's own ops check their arguments themselves.
* :func:`check` is a line for a wrapper around somebody else's op. It costs some microseconds.
* :func:`checked` is for whole programs. Inside it, a dispatch mode sees every call of this thread. This costs some
  microseconds per call of any op. Outside of it there is no cost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from symmem.backends.untraced import untraced
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
    """Whether this torch can recognise its symmetric memory without a rendezvous. True from torch 2.12 on."""
    return hasattr(_torchs(), "is_symm_mem_tensor")


def backend_of(namespace: str, device_type: str) -> str | None:
    """The backend that an operator needs, by its namespace and device; None for the configured backend."""
    if namespace != NAMESPACE:
        return None
    from torch.distributed import _symmetric_memory as torch_symmetric

    transport = torch_symmetric.get_backend(torch.device(device_type))
    if transport == "SYMMEM":  # torch's symmetric memory is symmem's, see symmem.torch_backend
        return None
    return f"pytorch_{transport.lower()}" if transport else "pytorch_cuda"  # torch's default


def _torchs() -> Any:
    return torch._C._distributed_c10d._SymmetricMemory if dist.is_available() else None


def check(op: OpLike, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
    """Raise if a call of a registered op would receive plain memory. Independent of the settings. Local.

    Ignores tensors without memory (fake, meta, functional, wrapper classes) and empty tensors.

    Args:
        op: As for :func:`symmem.register_symm_mem_args`. An op that is not registered passes.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

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
    """Check this thread's eager calls of registered ops inside the context. Also a decorator.

    Not collective. But with ``copy``, a call is collective over the op's group: if one rank's tensor is copied, the
    tensors of all ranks must be.

    It sees ops below autograd. So gradients do not change, and it works in ``torch.no_grad()`` and
    ``torch.inference_mode()``. It ignores tensors without memory (fake, meta, functional, wrapper classes) and empty
    tensors. Functions of ``torch.compile`` run uncompiled. It does not see an op that is only a composition of other
    ops (``CompositeImplicitAutograd``), but it sees those other ops.

    Args:
        mode: ``"error"`` raises :class:`NotSymmetricError` before the op runs. ``"copy"`` runs the op on a copy in the
            group's symmetric memory. It copies back what the op writes, and if the op returns the argument, it returns
            the caller's tensor. After an op without an exit barrier it adds a barrier, so that the copy can be freed.
            Different tensors that overlap get separate copies. One-sided ops raise as with ``"error"``. ``"off"`` does
            nothing. None uses the setting ``symmetric_arguments``, read when a plain argument is found.

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
    """The dispatch mode of :func:`checked`, for one thread."""

    supports_higher_order_operators = True

    def __init__(self, mode: str | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # with True, torch wraps the next method, and the wrapper imports the compiler at the first op

    @untraced
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        beneath = torch._C._len_torch_dispatch_stack() > 0  # other modes, which NotImplemented would skip
        if not beneath and any(_dispatches(kind) for kind in types):
            return NotImplemented  # the class's own ops, on the tensors that it wraps, come here again
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
    """Whether a class of tensors has its own dispatch. Most of these classes have no memory."""
    return getattr(kind, "__torch_dispatch__", _NO_DISPATCH) is not _NO_DISPATCH


def _setting(known: Registration, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    try:
        group = known.group_of(args, kwargs).name
    except GroupError:  # the NotSymmetricError of this call is more useful
        group = None
    return load_settings(group=group).symmetric_arguments


def _misplaced(
    known: Registration, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    def group() -> str:
        return known.group_of(args, kwargs).name

    return ((place, tensor) for place, tensor in known.tensors_of(args, kwargs) if not _is_usable(known, tensor, group))


def _namespace(known: Registration) -> str:
    return known.op.partition("::")[0]


def _is_usable(known: Registration, tensor: torch.Tensor, group: Callable[[], str]) -> bool:
    """Whether a tensor has no memory, or is in symmetric memory where the operator finds it."""
    if tensor.device.type == "meta" or tensor.numel() == 0 or _dispatches(type(tensor)):
        return True
    address = address_of(tensor)
    if address is None:
        return tensor.layout == torch.strided  # other layouts have memory in several pieces
    block = block_at(address)
    if block is not None:
        there = not block.closed and block.allocation.device == tensor.device
        return there and (backend_of(_namespace(known), tensor.device.type) is None or _begins(tensor, block))
    return is_torchs(tensor, group)


def _begins(tensor: torch.Tensor, block: Block) -> bool:
    """Whether a tensor's storage begins at the start of the allocation."""
    return tensor.untyped_storage().data_ptr() == block.allocation.pointer


def is_torchs(tensor: torch.Tensor, group: Callable[[], str]) -> bool:
    """Whether a tensor is in symmetric memory that torch allocated, where torch's operators find it.

    The operators (of torch 2.11) assume that the tensor's storage is the allocation. So the storage must begin at the
    start of the allocation. For tensors from an arena or a pool this is mostly false.

    Local from torch 2.12 on. Older versions can tell only by a rendezvous, like the operator itself. This is collective
    over the group the first time, if the tensor is symmetric.

    Args:
        tensor: A tensor with memory.
        group: Returns the name of the operator's group.
    """
    memory = _torchs()
    if asked_locally():
        if not memory.is_symm_mem_tensor(tensor):
            return False
        block = block_at(tensor.data_ptr())
        return block is None or _begins(tensor, block)
    if memory is None or not tensor.is_cuda:  # torch has symmetric memory on CUDA only
        return False
    try:
        handle = memory.rendezvous(tensor, group())
        return handle is not None and handle.offset == 0
    except GroupError:  # the operator would not find the tensor either
        return False
    except RuntimeError as error:  # from the transports NVSHMEM and NCCL; CUDA returns None
        if "not within any SymmetricMemory allocation" in str(error):
            return False
        raise


def _error(known: Registration, place: str, tensor: torch.Tensor) -> NotSymmetricError:
    shape, device = tuple(tensor.shape), str(tensor.device)
    backend = backend_of(_namespace(known), tensor.device.type)
    if backend is None:
        found = "is a plain tensor"
        hint = (
            f"allocate it with symmem.allocate({shape}, {tensor.dtype}, {device!r}).tensor, or make it inside "
            "`with symmem.use_symmetric_memory():`"
        )
    else:
        found = "is not at the beginning of an allocation of torch: a tensor"
        hint = f"allocate it with symmem.allocate({shape}, {tensor.dtype}, backend={backend!r}, arena=False).tensor"
    if not known.one_sided:
        hint += "; or let symmem.ops.checked('copy') copy it at every call"
    what = f"{known.op}: the argument {place!r} must be symmetric memory, but {found} of shape {shape}"
    return NotSymmetricError(f"{what}, {tensor.dtype}, on {device}", hint=hint, step=known.op)


# Copies.


class _Copies:
    """The symmetric copies of one call. A tensor that is passed several times has one copy."""

    def __init__(self, known: Registration, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._known = known
        self._group = known.group_of(args, kwargs)
        self._made: dict[Any, tuple[torch.Tensor, SymmetricTensor]] = {}

    def placed(self, value: Any) -> Any:
        """Replace the plain tensors in an argument by copies."""
        if isinstance(value, list | tuple):
            return type(value)([self.placed(element) for element in value])
        if not isinstance(value, torch.Tensor) or _is_usable(self._known, value, lambda: self._group.name):
            return value
        key = _geometry(value)
        if key not in self._made:
            self._made[key] = value, self._copy(value)
        return self._made[key][1].tensor

    def _copy(self, tensor: torch.Tensor) -> SymmetricTensor:
        strides = torch.empty_like(tensor, device="meta").stride()
        backend = backend_of(_namespace(self._known), tensor.device.type)
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
        """Make sure that peers no longer use the copies."""
        handles = [handle for _original, handle in self._made.values()]
        if handles and not self._known.exit_barrier:
            handles[0].barrier(group=self._group)

    def copy_back(self, value: Any) -> None:
        """Copy the copies back to the caller's tensors, after the op has written to them."""
        if isinstance(value, list | tuple):
            for element in value:
                self.copy_back(element)
        elif isinstance(value, torch.Tensor) and (made := self._made.get(_geometry(value))):
            value.copy_(made[1].tensor)
            if not value.is_inference():
                torch.autograd.graph.increment_version(value)  # torch does not do this below a dispatch mode

    def original(self, value: Any) -> Any:
        """Replace the copies in a result by the caller's tensors."""
        if isinstance(value, list | tuple):
            return type(value)([self.original(element) for element in value])
        if isinstance(value, torch.Tensor):
            for original, handle in self._made.values():
                if _geometry(value) == _geometry(handle.tensor):
                    return original
        return value


def _geometry(tensor: torch.Tensor) -> Any:
    return address_of(tensor), tensor.dtype, tensor.shape, tensor.stride() if tensor.layout == torch.strided else None


def _with_copies(known: Registration, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call an op with copies of plain tensors. Collective over its group."""
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
