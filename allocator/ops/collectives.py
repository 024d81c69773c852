"""Collective operators, ``torch.ops.symmem.*``: definitions, kernels, fake kernels and gradients.

Each comes in three forms. The functional one returns a new tensor; the others return nothing, so that compilers need
not guess what aliases what::

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

All ranks of the group call the same operators with the same shapes and dtypes, in the same order; that holds for
backward passes as well. ``x`` is any memory, symmetric or not, of any strides: what is not contiguous is copied. Sums
of float16, bfloat16 and float8 are made in float32; results are bitwise the same on all ranks and from run to run. On
the CPU an operator is done when it returns, on CUDA it is work on the current stream.

A rank whose arguments are refused raises InvalidArgumentError, and on the CPU the others raise MismatchError, which
names it; ranks that do not call alike all raise MismatchError there. One that does not come within the setting
``signal_timeout``, or dies, is named by PeerTimeoutError or PeerLostError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from symmem.errors import InvalidArgumentError, RankError, SymmemError, UnsupportedError
from symmem.group import Group
from symmem.ops.engine import REDUCTIONS, Engine
from symmem.ops.engines import engine_for, group_named

__all__ = ["LIBRARY"]

LIBRARY: Any = torch.library.Library("symmem", "FRAGMENT")  # type: ignore[no-untyped-call]  # so are its methods
"""Defines the operators; they are there as long as it is."""

_REDUCED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.complex64, torch.complex128),
}

Shape = Sequence[int]  # or symbolic integers


@dataclass(frozen=True)
class _Kind:
    """One collective operation.

    Attributes:
        name: Of the operator, and of the engine's method.
        option: The one argument between tensor and group, as the schema declares it; may be empty.
        shape: The result's, of the shape of ``x`` and the number of ranks.
        in_place: Does it in the memory of ``x``: engine, group, a contiguous tensor, and options.
        rows: Whether ``x`` has a row for each rank; in place, whether it has.
        same: Whether ``out`` may be ``x`` itself.
    """

    name: str
    option: str
    shape: Callable[[Shape, int], Shape]
    in_place: Callable[..., None]
    rows: tuple[bool, bool]
    same: bool = False

    def check(self, x: torch.Tensor, options: Sequence[Any], world: int, in_place: bool = False) -> None:
        """Raise unless a call is sound, as far as that shows without looking at memory."""
        if x.layout != torch.strided:
            raise InvalidArgumentError(f"x must be a dense tensor, not {x.layout}")
        if self.option == "str reduction":
            _check_reduction(x.dtype, options[0])
        elif self.option:
            _check_root(options[0], world)
        if self.rows[in_place] and (x.dim() == 0 or x.shape[0] != world):
            raise InvalidArgumentError(
                f"x must have a row for each of {world} ranks, not the shape {list(x.shape)}",
                hint=f"x.unflatten(0, ({world}, -1)) makes rows of a first dimension that is a multiple of {world}",
            )

    def check_out(self, x: torch.Tensor, out: torch.Tensor, world: int) -> None:
        """Raise unless ``out`` is of the right kind for ``x``."""
        wanted = (list(self.shape(x.shape, world)), x.dtype, x.device)
        given = (list(out.shape), out.dtype, out.device)
        if wanted != given:
            text = "shape {}, dtype {}, device {}"
            raise InvalidArgumentError(f"out must have {text.format(*wanted)}, not {text.format(*given)}")

    def run(self, engine: Engine, x: torch.Tensor, out: torch.Tensor, options: Sequence[Any]) -> None:
        """Do it, with contiguous tensors."""
        getattr(engine, self.name)(x, out, *options)


def _check_reduction(dtype: torch.dtype, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise InvalidArgumentError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    exact = not dtype.is_floating_point and not dtype.is_complex
    if dtype not in _REDUCED or (reduction == "avg" and exact) or (reduction in ("min", "max") and dtype.is_complex):
        raise InvalidArgumentError(f"there is no {reduction!r} of {dtype}", hint="convert the tensor first")


def _check_root(root: int, world: int) -> None:
    if not 0 <= root < world:
        raise RankError(f"root {root} is not in range({world})", hint="ranks are those of the group, not global ranks")


# In place.


def _same(name: str) -> Callable[..., None]:
    def run(engine: Engine, group: Group, x: torch.Tensor, *options: Any) -> None:
        getattr(engine, name)(x, x, *options)

    return run


def _gather(engine: Engine, group: Group, x: torch.Tensor) -> None:
    engine.all_gather(x[group.rank].clone(), x)


def _scatter(engine: Engine, group: Group, x: torch.Tensor, reduction: str) -> None:
    out = torch.empty_like(x[group.rank])
    engine.reduce_scatter(x, out, reduction)
    x[group.rank].copy_(out)


def _transpose(engine: Engine, group: Group, x: torch.Tensor) -> None:
    engine.all_to_all(x.clone(), x)


def _as_x(shape: Shape, world: int) -> Shape:
    return shape


KINDS = (
    _Kind("all_reduce", "str reduction", _as_x, _same("all_reduce"), (False, False), same=True),
    _Kind("all_gather", "", lambda shape, world: [world, *shape], _gather, (False, True)),
    _Kind("reduce_scatter", "str reduction", lambda shape, world: shape[1:], _scatter, (True, True)),
    _Kind("all_to_all", "", _as_x, _transpose, (True, True)),
    _Kind("broadcast", "int root", _as_x, _same("broadcast"), (False, False), same=True),
)


# Kernels. The arguments of each are x, the kind's option if it has one, and the group's name.


def _refused(group: Group, device: torch.device, operation: str, error: SymmemError) -> None:
    """Tell the other ranks, which come for an operation that this rank does not do."""
    error.located(rank=group.rank, group=group.name, step=operation)
    engine = group.engines.get(device)
    if engine is None:
        group.fail(operation, error)  # they are about to make the engine
    elif hasattr(engine, "refuse"):
        engine.refuse()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the elements lie in memory as they are, one after the other."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if _is_plain(tensor) else tensor.resolve_conj().resolve_neg().contiguous()


def _check_written(tensor: torch.Tensor, name: str) -> None:
    if not tensor.is_contiguous() and torch._debug_has_internal_overlap(tensor) == 1:
        raise InvalidArgumentError(
            f"several elements of {name} share memory, so results would overwrite one another",
            hint="pass a tensor that was not expanded",
        )


def _check_apart(kind: _Kind, x: torch.Tensor, out: torch.Tensor) -> None:
    """Raise if results would be written to memory that is still read. What is copied first cannot be."""
    if not (_is_plain(x) and _is_plain(out)):
        return
    begin, other = x.data_ptr(), out.data_ptr()
    apart = begin + x.nbytes <= other or other + out.nbytes <= begin
    if not (apart or (kind.same and begin == other)):
        raise InvalidArgumentError(
            "x and out share memory" + (", and are not the same" if kind.same else ""),
            hint="pass another out" + ("" if kind.same else f", or call symmem::{kind.name}_ to work in place"),
        )


def _functional(kind: _Kind, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *options, group_name = rest
    group = group_named(group_name)
    try:
        kind.check(x, options, group.size)
    except SymmemError as error:
        _refused(group, x.device, kind.name, error)
        raise
    engine = engine_for(group, x.device)
    out = x.new_empty(kind.shape(x.shape, group.size))
    kind.run(engine, _plain(x), out, options)
    return out


def _out(kind: _Kind, x: torch.Tensor, *rest: Any, out: torch.Tensor) -> None:
    *options, group_name = rest
    group = group_named(group_name)
    try:
        kind.check(x, options, group.size)
        kind.check_out(x, out, group.size)
        _check_written(out, "out")
        _check_apart(kind, x, out)
    except SymmemError as error:
        _refused(group, x.device, kind.name, error)
        raise
    engine = engine_for(group, x.device)
    target = out if _is_plain(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    kind.run(engine, _plain(x), target, options)
    if target is not out:
        out.copy_(target)
    _written(out)


def _in_place(kind: _Kind, x: torch.Tensor, *rest: Any) -> None:
    *options, group_name = rest
    group = group_named(group_name)
    try:
        kind.check(x, options, group.size, in_place=True)
        _check_written(x, "x")
    except SymmemError as error:
        _refused(group, x.device, kind.name, error)
        raise
    target = _plain(x)
    kind.in_place(engine_for(group, x.device), group, target, *options)
    if target is not x:
        x.copy_(target)
    _written(x)


def _written(tensor: torch.Tensor) -> None:
    """Let autograd know, so that a backward pass that needs what was there raises."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


# Fake kernels: the same checks, as far as nothing lies in memory.


def _fake(kind: _Kind, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *options, group_name = rest
    world = group_named(group_name).size
    kind.check(x, options, world)
    return x.new_empty(kind.shape(x.shape, world))


def _fake_out(kind: _Kind, x: torch.Tensor, *rest: Any, out: torch.Tensor) -> None:
    *options, group_name = rest
    world = group_named(group_name).size
    kind.check(x, options, world)
    kind.check_out(x, out, world)


def _fake_in_place(kind: _Kind, x: torch.Tensor, *rest: Any) -> None:
    *options, group_name = rest
    kind.check(x, options, group_named(group_name).size, in_place=True)


# Gradients. Each rank's loss counts: the gradient of x is that of the sum of all ranks' losses.


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.options = inputs[1:]


def _no_gradient(name: str, reduction: str) -> UnsupportedError:
    return UnsupportedError(
        f"symmem::{name} has no gradient for {reduction!r}",
        hint="use 'sum' or 'avg', or detach() what goes in",
        step=f"backward of {name}",
    )


def _all_reduce_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    reduction, group_name = ctx.options
    if reduction not in ("sum", "avg"):
        raise _no_gradient("all_reduce", reduction)
    return torch.ops.symmem.all_reduce(gradient, reduction, group_name), None, None


def _all_gather_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return torch.ops.symmem.reduce_scatter(gradient, "sum", ctx.options[0]), None


def _reduce_scatter_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    reduction, group_name = ctx.options
    if reduction not in ("sum", "avg"):
        raise _no_gradient("reduce_scatter", reduction)
    gathered = torch.ops.symmem.all_gather(gradient, group_name)
    return gathered / gathered.shape[0] if reduction == "avg" else gathered, None, None


def _all_to_all_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    return torch.ops.symmem.all_to_all(gradient, ctx.options[0]), None


def _broadcast_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    root, group_name = ctx.options
    total = torch.ops.symmem.all_reduce(gradient, "sum", group_name)
    return total if group_named(group_name).rank == root else torch.zeros_like(total), None, None


_BACKWARD = {
    "all_reduce": _all_reduce_backward,
    "all_gather": _all_gather_backward,
    "reduce_scatter": _reduce_scatter_backward,
    "all_to_all": _all_to_all_backward,
    "broadcast": _broadcast_backward,
}


def without_gradient(op: OpOverload) -> None:
    """Let an operator that writes to its arguments raise if one of them requires a gradient."""

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **options):
            raise UnsupportedError(
                f"{op._name} writes to its arguments, and has no gradient",
                hint="use the functional form; or call it under torch.no_grad()",
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    LIBRARY.impl(op._opname, kernel, "Autograd", with_keyset=True)


def _define(kind: _Kind) -> None:
    name, option = kind.name, f"{kind.option}, " if kind.option else ""
    forms: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...] = (
        (name, f"(Tensor x, {option}str group_name) -> Tensor", _functional, _fake),
        (f"{name}_", f"(Tensor(a!) x, {option}str group_name) -> ()", _in_place, _fake_in_place),
        (f"{name}_out", f"(Tensor x, {option}str group_name, *, Tensor(a!) out) -> ()", _out, _fake_out),
    )
    for form, schema, kernel, fake in forms:
        LIBRARY.define(form + schema)
        LIBRARY.impl(form, functools.partial(kernel, kind), "CompositeExplicitAutograd")
        for lazy in ("Conjugate", "Negative"):  # torch's own way with these fails for operators that return nothing
            LIBRARY.impl(form, torch.library.fallthrough_kernel, lazy)
        torch.library.register_fake(f"symmem::{form}", functools.partial(fake, kind), lib=LIBRARY)
        if form != name:
            without_gradient(getattr(torch.ops.symmem, form).default)
    torch.library.register_autograd(f"symmem::{name}", _BACKWARD[name], setup_context=_remember, lib=LIBRARY)


for _kind in KINDS:
    _define(_kind)
