"""The Triton functions: in Triton's interpreter with several processes over host memory, and compiled to PTX."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from programs import run_program

import symmem

KERNELS = Path(__file__).parents[1] / "support" / "triton_kernels.py"
needs_triton = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("triton", "numpy")), reason="Triton or numpy is not installed"
)
BLOCK, BLOCKS = 16, 3


def kernels():  # type: ignore[no-untyped-def]
    """The module of kernels, for the interpreter: Triton reads the environment when it is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton_kernels

    return triton_kernels


def tensors(*shapes: int | tuple[int, int], dtype: torch.dtype = torch.int32) -> list[symmem.SymmetricTensor]:
    made = [symmem.allocate(shape, dtype, backend="host").rendezvous() for shape in shapes]
    for st in made:
        st.tensor.zero_()
        st.barrier()
    return made


def meet() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    st, own, many = tensors(BLOCK * BLOCKS, BLOCK * BLOCKS, (100, world))
    for signals in (None, many):
        view = st.device_view(signals)
        channels = 64 if signals is None else 100
        assert (view.rank, view.world_size, view.channels, view.nbytes) == (rank, world, channels, st.nbytes)
        for turn in range(5):
            kernels().sum_of_all[(BLOCKS,)](
                st.tensor, own.tensor, view.pointers, view.signals, rank, turn, channels - BLOCKS, world, BLOCK
            )
            each = torch.arange(BLOCK * BLOCKS, dtype=torch.int32)
            assert torch.equal(own.tensor, sum(each * (peer + 1) + turn for peer in range(world)))  # type: ignore[arg-type]
    assert not st.signal_pad(rank).view(torch.int32).any()  # at rest
    assert not many.tensor.any()


def ring() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    st, own = tensors(BLOCK, BLOCK)
    view = st.device_view()
    kernel, right, left = kernels().pass_on, (rank + 1) % world, (rank - 1) % world
    for step in range(3):
        value = 100 * step + rank
        kernel[(1,)](st.tensor, own.tensor, view.pointers, view.signals, rank, right, left, value, world, BLOCK)
        assert (own.tensor == 100 * step + left).all()
    st.put_signal(right, 6)  # put by the host, taken by a kernel
    kernels().take[(1,)](view.signals, left, 6, 1, rank, world)
    kernels().put[(1,)](view.signals, right, 7, 1, rank, world)  # and the other way round
    st.wait_signal(left, 7)
    kernels().put[(1,)](view.signals, right, 8, 3, rank, world)
    kernels().take[(1,)](view.signals, left, 8, 2, rank, world)
    assert st.signal_pad(rank)[8, left].item() == 1
    kernels().see[(1,)](view.signals, left, 8, 1, rank, world)
    assert st.signal_pad(rank)[8, left].item() == 1


def atomics(times: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    (st,) = tensors(4)
    view = st.device_view()
    kernels().count[(times,)](st.tensor, view.pointers, rank, times)
    st.barrier()
    counted, won, last, _ = st.get(0).tolist()
    assert counted == times * world  # none was lost
    assert (won, last) in [(peer + 1, other + 1) for peer in range(world) for other in range(world)]
    st.barrier()


def late(channel: int) -> str:
    world = dist.get_world_size()
    (st,) = tensors(4)
    view = st.device_view(timeout=0.2)

    def wait() -> None:
        if dist.get_rank() == 0:
            kernels().meet[(1,)](view.signals, channel, 0, world)
        else:
            kernels().take[(1,)](view.signals, 0, channel + 1, 1, 1, world)

    with pytest.raises(Exception, match="PeerTimeoutError") as caught:
        wait()
    with pytest.raises(Exception, match="signal channel 64, but its device view has 64 channels"):
        kernels().meet[(1,)](view.signals, 64, dist.get_rank(), world)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, symmem.errors.PeerTimeoutError):
        error = error.__cause__
    return str(error)


@needs_triton
@pytest.mark.parametrize("task", [meet, ring])
@pytest.mark.parametrize("world", [2, 3])
def test_blocks_of_all_ranks_meet_and_signal(world: int, task: Callable[[], None], pools) -> None:  # type: ignore[no-untyped-def]
    pools.get(world, "triton").run(task)


@needs_triton
def test_atomics_of_processes(pools) -> None:  # type: ignore[no-untyped-def]
    pools.get(2, "triton").run(atomics, 40)


@needs_triton
def test_who_is_late_is_named(new_pool) -> None:  # type: ignore[no-untyped-def]
    first, second = new_pool(2).run(late, 5)
    assert re.match(r"\[rank 0, step barrier on channel 5\] rank 1 did not come in time", first)
    assert re.match(r"\[rank 1, step wait_signal on channel 6\] rank 0 did not come in time", second)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("world", [2, 72])
def test_what_it_is_compiled_to(world: int, tmp_path: Path) -> None:
    """In a separate process, because Triton may use the interpreter in this one."""
    script = (
        f"import sys; sys.path.insert(0, {str(KERNELS.parent)!r}); import triton_kernels as k; k.print_ptx({world})"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = run_program(script, env=env)
    assert done.returncode == 0, done.stderr
    ptx = done.stdout
    chunks = -(-world // 32)
    release, acquire = r"(?:atom|red)\.global\.sys\.release\.add\.u32", r"atom\.global\.sys\.acquire\.add\.u32"
    assert len(re.findall(rf"bar\.sync\s+0;(?:(?!bar\.sync|st\.global).)*?{release}", ptx, re.DOTALL)) >= 2
    assert len(re.findall(release, ptx)) == chunks + 1  # from the barrier and from the signal
    taken = rf"bar\.sync\s+0;(?:(?!bar\.sync).)*?{acquire}[^;]*;(?:(?!ld\.global).)*?bar\.sync"
    assert len(re.findall(taken, ptx, re.DOTALL)) == chunks + 1
    waiting = [part for part in ptx.split("\n$L__BB") if re.search("// .*Loop", part.splitlines()[0])]
    assert any("ld.volatile.global.b32" in part for part in waiting)
    assert not any("bar.sync" in part for part in waiting)  # warps may make different numbers of iterations
    # Every place that waits reports long waits and records a failure.
    assert len(re.findall(r"st\.volatile\.global\.v4\.u32", ptx)) >= 2 * (chunks + 1)
    assert len(re.findall(r"shr\.(?:s|u)64\s+%rd\d+, %rd\d+, 26;", ptx)) >= chunks + 1
    assert "globaltimer" in ptx
    assert "trap;" in ptx
    assert "ld.global.v4.b32" in ptx  # loads from a peer are as wide as local loads


@pytest.mark.slow
def test_without_triton_the_error_is_named() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import symmem\n"
        "try: symmem.triton\n"
        "except symmem.errors.UnsupportedError as error: print(error)"
    )
    done = run_program(script)
    assert "symmem.triton needs Triton" in done.stdout, done.stderr
    assert "pip install triton" in done.stdout
