"""Collective operators, ``torch.ops.symmem.*``: definitions, kernels and fake kernels.

An operator has three forms. The functional form returns a new tensor. The other forms return nothing, so compilers need
not guess which tensors alias::

    torch.ops.symmem.all_reduce(x, "sum", group_name) -> Tensor
    torch.ops.symmem.all_reduce_(x, "sum", group_name)
    torch.ops.symmem.all_reduce_out(x, "sum", group_name, out=out)

================ ===================== =============== =================================== =========================
operator         x                     result          in place                            gradient of x
================ ===================== =============== =================================== =========================
all_reduce       shape                 shape           x                                   all_reduce; none of min, max
all_gather       shape                 [world, *shape] x [world, ...], this rank's: x[rank] reduce_scatter
reduce_scatter   [world, *shape]       shape           x[rank]; the rest of x stays        all_gather; none of min, max
all_to_all       [world, *shape]       as x            x                                   all_to_all
broadcast        shape                 shape           x                                   on root the sum, else zeros
================ ===================== =============== =================================== =========================

Two more operators take several leaves per rank, and have no form in place. ``all_reduce_tree`` maps [leaves, *shape] to
shape, and ``reduce_scatter_tree`` maps [leaves, world, *shape] to shape. They sum or average floating-point tensors as
one tree over the leaves of all ranks, see :mod:`symmem.ops.engines.arithmetic`. So the bits of the result are the same
for every number of ranks that shares the leaves. The number of ranks, and of leaves of a rank, must be a power of two.

Gradients are for reverse mode. Forward mode raises UnsupportedError.

All ranks of the group call the same operators with the same shapes and dtypes, in the same order. This includes
backward passes. ``x`` may be any memory, symmetric or not, with any strides; a tensor that is not contiguous is copied.
Sums of float16, bfloat16 and float8 are computed in float32, in the order of ranks, and rounded once. So the bits of an
element depend on nothing but the ranks' elements at its place. They are the same on all ranks, from run to run, for
every shape around the element, and with every algorithm. Only the sign and payload of a NaN may differ on the CPU. An
operator on the CPU is complete when it returns. On CUDA it is work on the current stream.

On CUDA, ``all_gather``, ``all_to_all`` and ``broadcast`` store parts of more than 1 MiB directly into the peers'
results, if the results were allocated as symmetric memory (and not by an op within ``use_symmetric_memory``). So for
such sizes ``out`` must be in symmetric memory on all ranks, at the same offset of the same allocation, or in other
memory on all ranks. Anything else ends in a MismatchError.

Errors:

* A rank with invalid arguments raises InvalidArgumentError. On the CPU the other ranks raise the same error, and the
  next call works. The same holds for any other error of a rank, for example one of autograd, or an interrupt. Calls
  with meta or fake tensors are local.
* If a rank does not come in time, the ranks that wait raise PeerTimeoutError. That rank may be late, or may have
  skipped a call: nobody can tell. On the CPU it raises PeerTimeoutError in its next call of the group. The next call of
  the others waits for that, and then raises PeerTimeoutError too. So all have raised, and make their next call
  together.
* On CUDA the other ranks have launched the call already, or soon will. It ends within milliseconds. Its results are
  NaNs; if elements are only moved, all their bits are 1. ``group.check()`` or ``SymmetricTensor.synchronize()`` of a
  tensor of the group raises the error once, and a line in the log has it. The next call of every rank first waits for
  all ranks, and then works. If a rank has launched further calls before it knew, they gave up too, and the other ranks
  raise the error in these calls. Until the next call that is neither captured nor replayed, replays of graphs give up.
* If ranks make different calls, all of them raise MismatchError on the CPU. On CUDA ranks compare nothing, because a
  comparison takes longer than the operation.
* With the setting ``collective_check: each``, ranks compare their calls on any device before the operation starts. If
  the calls differ, all ranks raise MismatchError. If a rank refuses its arguments, the others raise its error.
* If a rank does not come within the setting ``signal_timeout``, or dies, the others raise PeerTimeoutError or
  PeerLostError, which names it. On CUDA the results are NaNs as above, also on the late rank, and the next call raises
  the PeerTimeoutError once. The calls after it wait for all ranks once, and then work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from symmem.backends.untraced import untraced
from symmem.errors import InvalidArgumentError, RankError
from symmem.group.group import Group
from symmem.group.resolve import group_named
from symmem.ops import eager
from symmem.ops.dispatch import is_usual_keyset
from symmem.ops.engines.base import REDUCTIONS, Engine
from symmem.ops.engines.collective_kernels import TYPES
from symmem.ops.engines.select import engine_for
from symmem.ops.gradients import with_gradient, without_gradient
from symmem.ops.refusals import refuse, refuse_in, refusing
from symmem.tensor.arguments import check_dense, check_integer, check_memory, check_written

__all__ = ["KINDS", "LIBRARY", "REPEATED", "OperatorKind", "begun", "functional", "in_place", "into", "is_reduced"]

LIBRARY: Any = torch.library.Library("symmem", "FRAGMENT")  # type: ignore[no-untyped-call]  # so are its methods
"""Defines the operators. They exist as long as this object."""

_FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_REDUCED = {
    **dict.fromkeys(_FLOATS, REDUCTIONS),
    **dict.fromkeys(_INTEGERS, ("sum", "min", "max")),
    **dict.fromkeys((torch.complex64, torch.complex128), ("sum", "avg")),
}
"""Valid reductions by dtype."""


def is_reduced(device_type: str, dtype: torch.dtype, reduction: str) -> bool:
    """Whether the operators have a reduction of a dtype on a type of device."""
    return reduction in _REDUCED.get(dtype, ()) and (device_type != "cuda" or dtype in TYPES)


Shape = Sequence[int]  # or symbolic integers

_REDUCTION = "str reduction"

_NOT_DENSE = [f"{kind}{device}" for kind in ("Quantized", "NestedTensor") for device in ("CPU", "CUDA")]
"""Dispatch keys of tensors that are strided, but hold more than their elements."""


@dataclass(frozen=True)
class OperatorKind:
    """One collective operation.

    Attributes:
        name: The name of the operator and of the engine's method.
        option: The declaration of the argument between tensor and group in the schema. May be empty.
        shape: Computes the result's shape from the shape of ``x`` and the number of ranks.
        in_place: Works in the memory of ``x``. Takes engine, group, a contiguous tensor and the options. None if the
            engine itself accepts ``x`` as ``out``.
        rows: Whether ``x`` has one row per rank: in the functional form, and in the in-place form.
        is_tree: Whether the first dimension of ``x`` is leaves of a tree. Then there is no in-place form.
    """

    name: str
    option: str
    shape: Callable[[Shape, int], Shape]
    in_place: Callable[..., None] | None
    rows: tuple[bool, bool]
    is_tree: bool = False

    def check(self, x: torch.Tensor, options: Sequence[Any], world: int, in_place: bool = False) -> None:
        """Raise if a call is invalid. Does not read memory."""
        if x.layout is not torch.strided:
            check_dense(x, self.name)
        if self.option == _REDUCTION:
            if options[0] not in _REDUCED.get(x.dtype, ()):
                _refuse_reduction(x.dtype, options[0])
            if self.is_tree:
                _check_tree(x, options[0], world, self.name == "reduce_scatter_tree")
        elif self.option:
            _check_root(options[0], world)
        if self.rows[in_place] and (x.dim() == 0 or x.shape[0] != world):
            raise InvalidArgumentError(
                f"x must have a first dimension of {world}, the number of ranks, not the shape {list(x.shape)}",
                hint=f"x.unflatten(0, ({world}, -1)) makes rows of a first dimension that is a multiple of {world}",
            )

    def check_option(self, option: object) -> None:
        """Raise InvalidArgumentError if the option has the wrong type."""
        if self.option == _REDUCTION:
            if not isinstance(option, str):
                _refuse_reduction(None, option)
        elif self.option:
            check_integer(option, "root", self.name)

    def check_out(self, x: torch.Tensor, out: torch.Tensor, world: int) -> None:
        """Raise if ``out`` has the wrong shape, dtype or device for ``x``."""
        shape = x.shape if self.like_x else tuple(self.shape(x.shape, world))
        if out.shape != shape or out.dtype != x.dtype or out.device != x.device:
            text = "shape {}, dtype {}, device {}"
            wanted, given = (list(shape), x.dtype, x.device), (list(out.shape), out.dtype, out.device)
            raise InvalidArgumentError(f"out must have {text.format(*wanted)}, not {text.format(*given)}")

    @property
    def like_x(self) -> bool:
        """Whether the result has the shape of ``x``, so that it can replace ``x``."""
        return self.shape is _as_x

    def shared_row(self, rank: int) -> int | None:
        """The row of the larger of ``x`` and ``out`` that the smaller may be; None if they must not share memory."""
        if self.in_place is None:
            return None if self.is_tree else 0
        return None if self.like_x else rank

    def result(self, x: torch.Tensor, world: int) -> torch.Tensor:
        """Allocate the result. ``x`` must be contiguous."""
        return torch.empty_like(x) if self.like_x else x.new_empty(self.shape(x.shape, world))  # empty_like is quicker


def _refuse_reduction(dtype: torch.dtype | None, reduction: object) -> NoReturn:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise InvalidArgumentError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    raise InvalidArgumentError(f"there is no {reduction!r} of {dtype}", hint="convert the tensor first")


def _check_tree(x: torch.Tensor, reduction: str, world: int, has_rows: bool) -> None:
    """Raise if ``x`` has no valid leaves of a tree. ``has_rows``: every leaf has one row per rank."""
    if reduction not in ("sum", "avg") or not x.dtype.is_floating_point:
        raise InvalidArgumentError(
            f"there is no {reduction!r} of {x.dtype} as a tree, only 'sum' and 'avg' of floating-point numbers",
            hint="minima, maxima and sums of integers have the same bits in every order: reduce the leaves first, for "
            "example by x.amin(0), and use the order 'ranks'; pass complex numbers by torch.view_as_real",
        )
    if x.dim() <= has_rows or (has_rows and x.shape[1] != world):
        shape = f"[leaves of a rank, {world}, ...]" if has_rows else "[leaves of a rank, ...]"
        raise InvalidArgumentError(
            f"x must have the shape {shape}, not {list(x.shape)}", hint="x.unsqueeze(0) is one leaf per rank"
        )
    leaves = int(x.shape[0])
    if leaves < 1 or leaves & (leaves - 1) or world & (world - 1):
        raise InvalidArgumentError(
            f"a tree needs a power of two of leaves on each rank, and a power of two of ranks, not {leaves} leaves on "
            f"each of {world} ranks",
            hint="append leaves of zeros, or use the order 'ranks', for which the bits depend on the number of ranks",
        )


def _check_root(root: int, world: int) -> None:
    check_integer(root, "root", "broadcast")
    if not 0 <= root < world:
        raise RankError(f"root {root} is not in range({world})", hint="pass a rank of the group, not a global rank")


# In place.


def _gather(engine: Engine, group: Group, x: torch.Tensor) -> None:
    engine.all_gather(x[group.rank], x)


def _scatter(engine: Engine, group: Group, x: torch.Tensor, reduction: str) -> None:
    engine.reduce_scatter(x, x[group.rank], reduction)


def _transpose(engine: Engine, group: Group, x: torch.Tensor) -> None:
    with refusing(group, x.device, "all_to_all"):
        source = x.clone()
    engine.all_to_all(source, x)


def _as_x(shape: Shape, world: int) -> Shape:
    return shape


KINDS = {
    kind.name: kind
    for kind in (
        OperatorKind("all_reduce", _REDUCTION, _as_x, None, (False, False)),
        OperatorKind("all_gather", "", lambda shape, world: [world, *shape], _gather, (False, True)),
        OperatorKind("reduce_scatter", _REDUCTION, lambda shape, world: shape[1:], _scatter, (True, True)),
        OperatorKind("all_to_all", "", _as_x, _transpose, (True, True)),
        OperatorKind("broadcast", "int root", _as_x, None, (False, False)),
        OperatorKind("all_reduce_tree", _REDUCTION, lambda shape, world: shape[1:], None, (False, False), is_tree=True),
        OperatorKind(
            "reduce_scatter_tree", _REDUCTION, lambda shape, world: shape[2:], None, (False, False), is_tree=True
        ),
    )
}
"""The operations by name."""

REPEATED = tuple(kind for kind in KINDS.values() if not kind.is_tree)
"""The operations with calls that C can repeat."""


# The three forms.


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the memory holds the elements themselves, contiguously."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if _is_plain(tensor) else tensor.resolve_conj().resolve_neg().contiguous()


def _check_mode(tensor: torch.Tensor, name: str) -> None:
    """Raise, as torch would half-way, if a tensor of inference mode would be written outside of it."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise InvalidArgumentError(
            f"{name} is a tensor of inference mode, and would be written outside of inference mode",
            hint="pass its clone(), or make the call under torch.inference_mode()",
        )


def _check_apart(kind: OperatorKind, group: Group, x: torch.Tensor, out: torch.Tensor) -> None:
    """Raise if results would overwrite memory that is still read. Tensors that are copied first cannot overlap."""
    begin, other = x.data_ptr(), out.data_ptr()
    if begin + x.nbytes <= other or other + out.nbytes <= begin or not (_is_plain(x) and _is_plain(out)):
        return
    row = kind.shared_row(group.rank)
    if row is None or abs(begin - other) != row * min(x.nbytes, out.nbytes):
        whole = "x" if kind.rows[0] else "out"
        allowed = "the same tensor" if kind.in_place is None else f"this rank's row of {whole}"
        raise InvalidArgumentError(
            "x and out share memory" + (f", but are not {allowed}" if row is not None else ""),
            hint="pass another out"
            + (f", or call symmem::{kind.name}_ to work in place" if row is None and not kind.is_tree else ""),
        )


def functional(kind: OperatorKind, group: Group, x: torch.Tensor, options: Sequence[Any]) -> torch.Tensor:
    """The kernel of the functional form."""
    try:
        kind.check(x, options, group.size)
        check_memory(x, "x")
        source = _plain(x)
        out = kind.result(source, group.size)
    except BaseException as error:
        refuse(group, x.device, kind.name, error)
        raise
    getattr(engine_for(group, x.device), kind.name)(source, out, *options)
    return out


def into(kind: OperatorKind, group: Group, x: torch.Tensor, options: Sequence[Any], out: torch.Tensor) -> None:
    """The kernel of the form with ``out``."""
    try:
        kind.check(x, options, group.size)
        kind.check_out(x, out, group.size)
        _check_mode(out, "out")
        plain = _is_plain(out)
        if not plain:
            check_written(out, "out")
        check_memory(x, "x")
        check_memory(out, "out")
        _check_apart(kind, group, x, out)
        source = _plain(x)
        target = out if plain else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    except BaseException as error:
        refuse(group, x.device, kind.name, error)
        raise
    getattr(engine_for(group, x.device), kind.name)(source, target, *options)
    if target is not out:
        out.copy_(target)
    _written(out)


def in_place(kind: OperatorKind, group: Group, x: torch.Tensor, options: Sequence[Any]) -> None:
    """The kernel of the in-place form."""
    try:
        kind.check(x, options, group.size, in_place=True)
        _check_mode(x, "x")
        plain = _is_plain(x)
        if not plain:
            check_written(x, "x")
        check_memory(x, "x")
        target = x if plain else _plain(x)
    except BaseException as error:
        refuse(group, x.device, kind.name, error)
        raise
    engine = engine_for(group, x.device)
    if kind.in_place is None:
        getattr(engine, kind.name)(target, target, *options)
    else:
        kind.in_place(engine, group, target, *options)
    if target is not x:
        x.copy_(target)
    _written(x)


def _written(tensor: torch.Tensor) -> None:
    """Tell autograd, so that a backward pass that needs the old values raises."""
    if not tensor.is_inference():
        torch._C._increment_version((tensor,))


def _not_dense(kind: OperatorKind, group: Group, x: torch.Tensor, options: Sequence[Any], **out: torch.Tensor) -> None:
    """The kernel for quantized and nested tensors, which have dispatch keys of their own."""
    try:
        for tensor in (x, *out.values()):
            check_dense(tensor, kind.name)
    except InvalidArgumentError as error:
        refuse(group, x.device, kind.name, error)
        raise


# Fake kernels: the same checks, without memory.


def _fake_functional(kind: OperatorKind, group: Group, x: torch.Tensor, options: Sequence[Any]) -> torch.Tensor:
    kind.check(x, options, group.size)
    return x.new_empty(kind.shape(x.shape, group.size))


def _fake_into(kind: OperatorKind, group: Group, x: torch.Tensor, options: Sequence[Any], out: torch.Tensor) -> None:
    kind.check(x, options, group.size)
    kind.check_out(x, out, group.size)


def _fake_in_place(kind: OperatorKind, group: Group, x: torch.Tensor, options: Sequence[Any]) -> None:
    kind.check(x, options, group.size, in_place=True)


class _Begun(threading.local):
    """How many kernels a thread has begun, apart from those for fake tensors. A kernel reports its errors itself."""

    kernels = 0


begun = _Begun()


def _by_name(work: Callable[..., Any], kind: OperatorKind, is_real: bool = True) -> Callable[..., Any]:
    """Make a kernel. Its arguments are x, the option if there is one, and the group's name."""

    @untraced
    def kernel(x: torch.Tensor, *rest: Any, **out: torch.Tensor) -> Any:
        begun.kernels += is_real
        return work(kind, group_named(rest[-1]), x, rest[:-1], **out)

    return kernel


def _may_be_repeated(x: torch.Tensor) -> bool:
    return x.is_cuda


def _remembered(work: Callable[..., Any], kind: OperatorKind) -> Callable[..., Any]:
    """Make a device's kernel. On CUDA it lets the next call of its kind be repeated without Python."""

    @untraced
    def kernel(x: torch.Tensor, *rest: Any, **options: torch.Tensor) -> Any:
        begun.kernels += 1
        group = group_named(rest[-1])
        made = work(kind, group, x, rest[:-1], **options)
        if _may_be_repeated(x):
            out = x if work is in_place else options.get("out")
            option = rest[0] if kind.option else None
            if eager.learn(kind, group, x, option, out, made if out is None else out):
                eager.register(REPEATED)
        return made

    return kernel


def _repeating(kind: OperatorKind, is_in_place: bool, run: Callable[..., Any]) -> Callable[..., Any]:
    """The Autograd kernel for CUDA: it repeats the launch of an earlier call, or else is ``run``.

    As soon as :func:`symmem.ops.eager.register` has registered kernels in C++, only they call it.
    """

    @untraced
    def kernel(keyset: torch._C.DispatchKeySet, x: torch.Tensor, *rest: Any, **options: torch.Tensor) -> Any:
        if not is_usual_keyset(keyset) or (x.requires_grad and torch.is_grad_enabled()):
            return run(keyset, x, *rest, **options)
        option, name = rest[0] if kind.option else None, rest[-1]
        out = x if is_in_place else options.get("out")
        try:
            made = eager.run(kind, x, name, option, out)
        except BaseException as error:  # it has launched nothing
            begun.kernels += 1  # an outer call must not report the error again
            refuse_in(name, kind.name, error, x, out)
            raise
        if made is None:
            return run(keyset, x, *rest, **options)
        return made if out is None else None

    return kernel


def _define(kind: OperatorKind) -> None:
    name, option = kind.name, f"{kind.option}, " if kind.option else ""
    forms: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...] = (
        (name, f"(Tensor x, {option}str group_name) -> Tensor", functional, _fake_functional),
        (f"{name}_", f"(Tensor(a!) x, {option}str group_name) -> ()", in_place, _fake_in_place),
        (f"{name}_out", f"(Tensor x, {option}str group_name, *, Tensor(a!) out) -> ()", into, _fake_into),
    )
    for form, schema, work, fake in forms:
        if work is in_place and kind.is_tree:
            continue
        kernel = _remembered(work, kind)
        LIBRARY.define(form + schema)
        LIBRARY.impl(form, kernel, "CompositeExplicitAutograd")
        for lazy in ("Conjugate", "Negative"):  # torch's fallback for these fails if an operator returns nothing
            LIBRARY.impl(form, torch.library.fallthrough_kernel, lazy)
        for key in _NOT_DENSE:
            LIBRARY.impl(form, _by_name(_not_dense, kind), key)
        torch.library.register_fake(f"symmem::{form}", _by_name(fake, kind, is_real=False), lib=LIBRARY)
        connect = with_gradient if form == name else without_gradient
        run = connect(getattr(torch.ops.symmem, form).default, kernel)
        LIBRARY.impl(form, run, "AutogradCPU", with_keyset=True)
        # For all other keys: a kernel for AutogradCUDA, as eager.register makes, then replaces no registered kernel.
        LIBRARY.impl(form, _repeating(kind, form == f"{name}_", run), "Autograd", with_keyset=True)


for _kind in KINDS.values():
    _define(_kind)
