"""Conformance cases, and how a rank runs one."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import symmem
from symmem.arena.arena import supports_arenas
from symmem.backends import get_backend
from symmem.backends.base import Backend, Capability
from symmem.errors import SymmemError, UnsupportedError
from symmem.group.group import Group
from symmem.group.resolve import resolve_group

__all__ = ["CASES", "Case", "Context", "Resources", "case", "expect", "run_case"]


class Context:
    """The argument of a case: this rank in the default process group, and the backend under test.

    Attributes:
        backend: The backend under test.
        rank: This rank.
        world: Number of ranks.
        device: Device of the backend's memory on this rank.
        arena: Whether :meth:`allocate` takes memory from the default group's arena.
    """

    def __init__(self, name: str, arena: bool = False) -> None:
        self.backend: Backend = get_backend(name)
        self.arena = arena
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        cuda = self.backend.device_type == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    @property
    def next(self) -> int:
        """The rank after this one, in a ring."""
        return (self.rank + 1) % self.world

    @property
    def previous(self) -> int:
        """The rank before this one, in a ring."""
        return (self.rank - 1) % self.world

    @property
    def group(self) -> Group:
        """The default group."""
        return resolve_group()

    def allocate(self, sizes: Any, dtype: torch.dtype = torch.float32, **options: Any) -> symmem.SymmetricTensor:
        """Allocate with the backend under test."""
        return symmem.allocate(sizes, dtype, backend=self.backend.name, **{"arena": self.arena, **options})

    def shared(self, sizes: Any, dtype: torch.dtype = torch.float32, **options: Any) -> symmem.SymmetricTensor:
        """Allocate, and rendezvous in the default group."""
        return self.allocate(sizes, dtype, **options).rendezvous()

    def meet(self) -> None:
        """Wait until all ranks are here and their device work is done, without the code under test."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        with self.group.collective("meet", timeout=30):
            pass


@dataclass(frozen=True)
class Case:
    """A check that every backend must pass.

    Attributes:
        name: Unique name of the property that must hold.
        function: Runs on all ranks.
        requires: Capabilities that the case needs. A backend without them must raise a named error instead.
        world: Smallest number of ranks; the case is skipped with fewer.
        breaks: The case makes the processes unusable (a CUDA context after a trap), so it needs a separate pool.
        arena: The case allocates from an arena.
    """

    name: str
    function: Callable[[Context], None]
    requires: Capability | None
    world: int
    breaks: bool
    arena: bool = False


CASES: dict[str, Case] = {}
"""All cases by name."""


def case(
    *,
    requires: Capability | None = None,
    world: int = 1,
    breaks: bool = False,
    arena: bool = False,
    both: bool = False,
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Add a function to the suite; with ``both``, a second time for tensors of an arena."""

    def enter(function: Callable[[Context], None]) -> Callable[[Context], None]:
        name = function.__name__
        assert name not in CASES, f"two cases {name}"
        CASES[name] = Case(name, function, requires, world, breaks, arena)
        if both:
            name += "_in_an_arena"
            CASES[name] = Case(name, function, requires, world, breaks, True)
        return function

    return enter


@contextlib.contextmanager
def expect(kind: type[SymmemError], *texts: str, peers: tuple[int, ...] | None = None) -> Iterator[None]:
    """Check that the block raises an error of exactly this class, with all of ``texts`` in its text."""
    try:
        yield
    except SymmemError as error:
        assert type(error) is kind, f"expected {kind.__name__}, got {type(error).__name__}: {error}"
        for text in texts:
            assert text in str(error), f"expected {text!r} in: {error}"
        assert peers is None or error.peers == peers, f"expected peers {peers}, got {error.peers}: {error}"
    else:
        raise AssertionError(f"expected {kind.__name__}, but nothing was raised")


@dataclass(frozen=True)
class Resources:
    """System resources that a process holds.

    Attributes:
        descriptors: Open file descriptors.
        mappings: Mappings of symmem's memory files.
    """

    descriptors: int
    mappings: int

    @classmethod
    def now(cls) -> Resources:
        """Collect garbage, then count."""
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return cls(len(list(Path("/proc/self/fd").iterdir())), maps.count("/memfd:symmem"))


def run_case(name: str, backend: str) -> str | None:
    """Run one case. Collective over the default process group.

    Returns:
        None, or the reason why the case was skipped.

    Raises:
        AssertionError: The check failed, or something leaked.
    """
    chosen, context = CASES[name], Context(backend, CASES[name].arena)
    if context.world < chosen.world:
        return f"needs {chosen.world} ranks"
    if chosen.arena and not supports_arenas(context.backend):
        return "an arena cannot hold this backend's memory"
    lacking = (chosen.requires or Capability(0)) & ~context.backend.capabilities
    function = functools.partial(_refuses, lacking=lacking) if lacking else chosen.function
    _warm_up(context)
    before = Resources.now()
    try:
        function(context)
        if not chosen.breaks:
            context.meet()
            gc.collect()
            symmem.collect()  # so that later cases do not grow the arena
            with context.group.collective("release", timeout=30):
                _check_released(before)
    except BaseException as error:
        context.group.fail(name, error)  # so that the other ranks do not wait for this one
        raise
    return None


_warm: set[str] = set()


def _warm_up(ctx: Context) -> None:
    """Make the group and the backend's library set up their permanent resources: sockets, watches, heaps, kernels."""
    if ctx.backend.name not in _warm:
        st = ctx.shared(16, arena=False)
        in_arena = ctx.shared(16, arena=True) if supports_arenas(ctx.backend) else None
        if Capability.SIGNALS in ctx.backend.capabilities:
            st.barrier()
        if in_arena and Capability.CONTIGUOUS_VIEW in ctx.backend.capabilities:
            in_arena.contiguous_view()  # maps the whole segment
        _warm.add(ctx.backend.name)
        del st, in_arena
        gc.collect()
        gc.freeze()  # so that later collections skip torch's own objects, which take 0.1 s
    ctx.meet()


_USES: dict[Capability, Callable[[symmem.SymmetricTensor, Context], object]] = {
    Capability.REMOTE_TENSOR: lambda st, ctx: st.remote_tensor(ctx.next),
    Capability.CONTIGUOUS_VIEW: lambda st, ctx: st.contiguous_view(),
    Capability.SIGNALS: lambda st, ctx: st.barrier(),
    Capability.ONE_SIDED: lambda st, ctx: st.get(ctx.next),
    Capability.SECOND_GROUP: lambda st, ctx: _rendezvous_again(st, ctx),
}


def _rendezvous_again(st: symmem.SymmetricTensor, ctx: Context) -> None:
    group = dist.new_group(list(range(ctx.world)))
    try:
        st.rendezvous(group)
    finally:
        dist.destroy_process_group(group)  # it holds sockets


def _refuses(ctx: Context, lacking: Capability) -> None:
    """Check that the backend refuses the capabilities that it does not list, with a named error."""
    st = ctx.shared(16)
    for capability, use in _USES.items():
        if capability in lacking:
            with expect(UnsupportedError, ctx.backend.name):
                use(st, ctx)
    ctx.meet()


def _check_released(before: Resources) -> None:
    """Check for leaks, and allow for descriptors that threads of other libraries hold for a moment."""
    deadline = time.monotonic() + 2.0
    while (after := Resources.now()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert after.descriptors <= before.descriptors, f"descriptors leaked: {before} before, {after} after"
    assert after.mappings <= before.mappings, f"mappings leaked: {before} before, {after} after"
