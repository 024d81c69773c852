"""Cases of torch.compile with hostile use, for test_compile_faults.py.

Most of them need no C++ compiler, which takes seconds per kernel: they use operators and mm instead of arithmetic.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compile_operators import POINTERS
from compile_support import (
    Deferred,
    case,
    check,
    compiled,
    ct,
    current_graph,
    explanation,
    group,
    outcomes,
    peer,
    summed,
    values,
)
from patience import LONG
from torch.utils.checkpoint import checkpoint

import symmem
from symmem.compile.records import ArgumentRecord
from symmem.compile.report import COPIED, PLACED
from symmem.errors import DivergenceError, InvalidArgumentError, UnsupportedError

runtime = Deferred("symmem.compile.run.graph")

# Kinds of tensors.

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


@case()
def case_dtypes() -> None:
    name = group()
    torch._dynamo.reset()
    raw = [torch.randint(0, 2, (3, 4 * each.itemsize), dtype=torch.uint8) + dist.get_rank() for each in DTYPES]
    tensors = [x.eq(1) if dtype is torch.bool else x.view(dtype) for x, dtype in zip(raw, DTYPES, strict=True)]
    run = compiled(lambda *xs: [(ct.echo(x, name), ct.echo(ct.echo(x, name), name)) for x in xs])
    for x, (first, second) in zip(tensors, run(*tensors), strict=True):
        assert first.view(torch.uint8).equal(peer(x).view(torch.uint8)), x.dtype
        assert second.view(torch.uint8).equal(x.view(torch.uint8)), x.dtype


def layouts() -> dict[str, torch.Tensor]:
    x = values(4, 6, 5, 3)
    return {
        "transposed": x[0, 0].t(),
        "stepped": x[:, ::2, 1],
        "inner": x[1:3, 2:5, 1:, 1],
        "channels_last": x.to(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2),
        "scalar": x[1, 2, 3, 1],
        "one": x[:1, :1, :1, :1],
        "overlapping": x.as_strided((5, 4), (2, 1)),
    }


@case()
def case_layouts_of_inputs() -> None:
    name, known = group(), layouts()
    torch._dynamo.reset()
    run = compiled(lambda *xs: [ct.echo(x, name) for x in xs])
    for _ in range(2):
        for each, result in zip(known, run(*known.values()), strict=True):
            torch.testing.assert_close(result, peer(known[each]), msg=each)


@case()
def case_layouts_within() -> None:
    """The graph makes the views."""
    name = group()
    x = values(6, 6)

    def f(x: torch.Tensor) -> Any:
        y = x @ x
        views = (
            y[1:3, 2:], y[::2], y.t()[1:], y[2, 3], y[2:3].expand(4, 6), y.view(3, 2, 6).permute(2, 0, 1),
            y.as_strided((3, 3), (2, 1), 4), y.diagonal(),
        )  # fmt: skip
        return tuple(ct.echo(each, name) for each in views)

    run = compiled(f)
    y = x @ x
    wanted = (
        y[1:3, 2:], y[::2], y.t()[1:], y[2, 3], y[2:3].expand(4, 6), y.view(3, 2, 6).permute(2, 0, 1),
        y.as_strided((3, 3), (2, 1), 4), y.diagonal(),
    )  # fmt: skip
    torch.testing.assert_close(run(x), tuple(map(peer, wanted)))


@case()
def case_conjugates() -> None:
    name = group()
    x = torch.complex(values(3, 2), values(3, 2, seed=1))
    run = compiled(lambda x: ct.echo(x, name))
    torch.testing.assert_close(run(x.conj()), peer(x.conj().resolve_conj()))
    torch._dynamo.reset()
    run = compiled(lambda x: ct.echo(x.conj(), name))
    torch.testing.assert_close(run(x), peer(x.conj().resolve_conj()))


@case()
def case_one_tensor_in_two_arguments() -> None:
    name = group()

    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        z = x @ x
        return ct.both(x, x, name), ct.both(z, z, name), ct.both(y, y.t(), name), ct.both(z, z.t(), name)

    check(
        f,
        lambda step: (values(4, 4, seed=step), values(4, 4, seed=step + 9)),
        lambda x, y: (
            2 * peer(x),
            2 * peer(x @ x),
            peer(y) + peer(y.t()),
            peer(x @ x) + peer((x @ x).t()),
        ),
    )


@case()
def case_written_and_read_by_one_operator() -> None:
    name = group()

    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        z = x @ x
        ct.add_of_peer_(z, z, name)
        ct.add_of_peer_(y, x, name)
        return z, z @ z

    torch._dynamo.reset()
    run = compiled(f)
    for step in range(3):
        x, y = values(3, 3, seed=step) / 4, values(3, 3, seed=step + 9)
        z, wanted = x @ x + peer(x @ x), y + peer(x)
        torch.testing.assert_close(run(x, y), (z, z @ z))
        torch.testing.assert_close(y, wanted)


# Writes between operators.


@case()
def case_written_between_operators() -> None:
    """An input and an intermediate change several times between operators."""
    name = group()

    def f(x: torch.Tensor) -> Any:
        results = []
        y = ct.opaque(x)
        z = x @ x
        for _ in range(3):
            results += [ct.echo(x, name), ct.echo(y, name), ct.echo(z, name), ct.echo(x.t(), name)]
            ct.plus_one_(x), ct.plus_one_(y), ct.plus_one_(z)
        return (*results, x @ x)

    for _ in range(2):
        torch._dynamo.reset()
        run = compiled(f)
        for step in range(2):
            x = values(3, 3, seed=step)
            start = x.clone()
            result = run(x)
            wanted = []
            for add in range(3):
                each = (start + add, start * 2 + add, start @ start + add, (start + add).t())
                wanted += [peer(each) for each in each]
            torch.testing.assert_close(x, start + 3)
            torch.testing.assert_close(result, (*wanted, x @ x))


@case()
def case_registered_then_written_in_place() -> None:
    name = group()

    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        first = ct.echo(x, name)
        ct.add_peer_(x, name)
        second = ct.echo(x, name)
        back = ct.add_peer_back_(x[:2], name)
        third = ct.echo(x, name)
        return first, second, third, back

    torch._dynamo.reset()
    run = compiled(f)
    symmetric = symmem.allocate((4, 4), dtype=torch.float32).tensor
    for step in range(4):
        start = values(4, 4, seed=step)
        x = symmetric.copy_(start) if step % 2 else start.clone()
        result = run(x, start)
        one = summed(start)
        two = one.clone()
        two[:2] = summed(one[:2].contiguous())
        torch.testing.assert_close(result, (peer(start), peer(one), peer(two), two[:2]))
        torch.testing.assert_close(x, two)


@case()
def case_inputs_that_share_memory() -> None:
    """Writing to one input changes the other, in plain or symmetric memory."""
    name = group()

    def f(x: torch.Tensor, y: torch.Tensor) -> Any:
        ct.add_peer_(x, name)
        return ct.echo(y, name), ct.echo(x, name)

    torch._dynamo.reset()
    run = compiled(f)
    symmetric = symmem.allocate((6, 4), dtype=torch.float32).tensor
    for step in range(4):
        whole = values(6, 4, seed=step)
        wanted = whole.clone()
        wanted[:4] = summed(wanted[:4])
        given = symmetric.copy_(whole) if step % 2 else whole
        torch.testing.assert_close(run(given[:4], given[2:]), (peer(wanted[2:]), peer(wanted[:4])))
        torch.testing.assert_close(given, wanted)


@case()
def case_written_inputs_that_share_memory() -> None:
    """Inputs overlap that were separate at compile time. Torch does not check again, so one copy could hide another."""
    name = group()
    f = lambda x, y: ct.pair_plus_(x, y, name)  # noqa: E731
    refused = pytest.raises(InvalidArgumentError, match="ct::pair_plus_ writes to several arguments that share memory")
    torch._dynamo.reset()
    run = compiled(f)
    one, other, whole = torch.zeros(5), torch.zeros(5), torch.zeros(10)
    run(one, other)
    run(whole[:5], whole[5:])
    assert torch.cat((one, other, whole)).eq(1).all()
    for offset in (0, 4):
        with refused:
            run(whole[:5], whole[offset : offset + 5])
    assert whole.eq(1).all()
    # In symmetric memory nothing is copied, so inputs may overlap.
    torch._dynamo.reset()
    run = compiled(f)
    one, other, whole = (symmem.allocate(size, dtype=torch.float32).tensor.zero_() for size in (5, 5, 8))
    run(one, other)
    run(whole[:5], whole[3:])
    assert whole.tolist() == [1, 1, 1, 2, 2, 1, 1, 1]


@case()
def case_results_that_alias() -> None:
    """The graph returns inputs, views of inputs, and tensors that an operator wrote."""
    name = group()

    def f(x: torch.Tensor) -> Any:
        y = x @ x
        ct.add_peer_(y, name)
        return x, x[1:], ct.echo(x, name), y, y[1:], y.t()

    torch._dynamo.reset()
    run = compiled(f)
    kept = []
    for step in range(3):
        x = values(4, 4, seed=step)
        result = run(x)
        assert result[0] is x
        assert result[1].data_ptr() == x[1:].data_ptr()
        y = summed(x @ x)
        kept.append((result, (x, x[1:], peer(x), y, y[1:], y.t())))
    for result, wanted in kept:
        torch.testing.assert_close(result, wanted)


@case()
def case_several_results() -> None:
    name = group()

    def f(x: torch.Tensor) -> Any:
        first, second = ct.pair(x @ x, name)
        again, _ = ct.pair(first, name)
        return first, second, again

    report = check(f, lambda step: (values(4, 4, seed=step),), lambda x: (peer(x @ x), (x @ x).sum(0), x @ x))
    assert outcomes(report) == [PLACED, COPIED]


# Graph breaks, nesting and repetition.


@case()
def case_graph_breaks_and_nesting() -> None:
    name = group()

    @torch.compiler.disable
    def outside(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    inner = compiled(lambda x: ct.echo(x @ x, name))

    def f(x: torch.Tensor, depth: int) -> torch.Tensor:
        x = ct.echo(x @ x, name)
        torch._dynamo.graph_break()
        x = inner(outside(ct.echo(x, name)))
        return f(x, depth - 1) if depth else x

    def expected(x: torch.Tensor, depth: int) -> torch.Tensor:
        x = peer(peer(x @ x))
        x = peer(x @ x)
        return expected(x, depth - 1) if depth else x

    check(f, lambda step: (values(3, 3, seed=step) / 3, 1), expected)


@case()
def case_equal_code() -> None:
    """Two functions with equal code have separate memory, also if one runs during the turn of the other."""
    name = group()

    def make() -> Callable[..., Any]:
        def f(x: torch.Tensor) -> Any:
            return ct.echo(x @ x, name), ct.echo(x, name)

        return compiled(f)

    torch._dynamo.reset()
    first, second = make(), make()
    for step in range(3):
        x, y = values(3, 3, seed=step), values(3, 3, seed=step + 9)
        a, b = first(x), second(y)
        torch.testing.assert_close((a, b), ((peer(x @ x), peer(x)), (peer(y @ y), peer(y))))


@case()
def case_many_shapes() -> None:
    """Automatic dynamic shapes, and a dimension that is marked as dynamic."""
    name = group()

    def f(x: torch.Tensor) -> Any:
        return ct.echo(x @ x.t(), name), ct.echo(x, name), ct.echo(x[1:], name)

    torch._dynamo.reset()
    with explanation.reporting() as report:
        run = compiled(f)
        for size in (3, 5, 4, 9, 3, 12, 5):
            x = values(size, 4, seed=size)
            torch.testing.assert_close(run(x), (peer(x @ x.t()), peer(x), peer(x[1:])))
    assert len(report.graphs) == 2
    torch._dynamo.reset()
    with explanation.reporting() as report:
        run = compiled(f)
        for size in (3, 5, 9, 4):
            x = values(size, 4, seed=size)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(run(x), (peer(x @ x.t()), peer(x), peer(x[1:])))
    assert len(report.graphs) == 1


@case()
def case_shapes_from_data() -> None:
    name = group()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = compiled(lambda x: (ct.echo(x.nonzero(), name), ct.echo(ct.opaque(x.nonzero()), name)), fullgraph=True)
        for size in (3, 4, 2, 7):
            wanted = torch.ones(size, 2).nonzero()
            torch.testing.assert_close(run(torch.ones(size, 2)), (wanted, 2 * wanted))


# Modes of torch.


@case()
def case_modes() -> None:
    name = group()
    torch._dynamo.reset()
    run = compiled(lambda x, w: ct.echo(x @ w, name), fullgraph=True)
    x, w = values(4, 4), values(4, 4, seed=3).requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(run(x, w), peer((x @ w).detach()))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        result = run(x, w)
        assert result.dtype is torch.bfloat16
        torch.testing.assert_close(result, peer(x @ w))


@case()
def case_checkpointing() -> None:
    name = group()

    class Echo(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return ct.echo(x, name)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return ct.echo(gradient @ gradient.new_ones(4, 4), name)

    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = Echo.apply(x @ w)
        return y @ y

    weight = summed(values(4, 4, seed=8))

    def f(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, weight, use_reentrant=False)

    torch._dynamo.reset()
    run = compiled(f)
    for step in range(2):
        x = values(4, 4, seed=step).requires_grad_()
        run(x).backward(torch.ones(4, 4))
        other = x.detach().clone().requires_grad_()
        y = peer((other @ weight).detach()).requires_grad_()
        (y @ y).backward(torch.ones(4, 4))
        gradient = peer(y.grad @ torch.ones(4, 4))  # type: ignore[operator]
        torch.testing.assert_close(x.grad, gradient @ weight.t())


@case()
def case_vmap() -> None:
    """The operators have no batching rule, so torch falls back to a loop."""
    name = group()
    torch._dynamo.reset()
    x = values(3, 4, 4)
    run = compiled(lambda x: torch.vmap(lambda y: ct.echo(y, name))(x))
    torch.testing.assert_close(run(x), peer(x))


@case()
def case_freezing() -> None:
    """Parameters become constants, and constants are copied."""
    name = group()
    module = torch.nn.Linear(4, 4, bias=False)

    def f(x: torch.Tensor) -> Any:
        return ct.echo(module.weight, name), module(ct.echo(x @ module.weight, name))

    with torch.no_grad():
        check(
            f,
            lambda step: (values(4, 4, seed=step),),
            lambda x: (peer(module.weight), module(peer(x @ module.weight))),
            options={"freezing": True},
        )


@case()
def case_options_of_inductor() -> None:
    name = group()
    for options in (
        {"allow_buffer_reuse": False},
        {"triton.cudagraphs": True},
        {"max_autotune": True},
        {"inplace_buffers": False},
        {"reorder_for_peak_memory": False},
        {"size_asserts": False, "alignment_asserts": False},
        {"graph_partition": True},
    ):
        check(
            lambda x: ct.echo(ct.echo(x @ x, name) @ x, name) @ ct.echo(x, name),
            lambda step: (values(4, 4, seed=step),),
            lambda x: peer(peer(x @ x) @ x) @ peer(x),
            options=options,
        )


@case()
def case_odd_group_names() -> None:
    """Names of groups are written into generated code and read back for reports."""
    for name in ("it's", 'a "b"', "\\n'\"{x} %s", "'); raise SystemExit  # \N{SNOWMAN}\n"):
        made = dist.new_group(list(range(dist.get_world_size())))
        made._set_group_name(name)
        dist.distributed_c10d._world.pg_names[made] = name  # type: ignore[assignment]
        torch._C._distributed_c10d._register_process_group(name, made)  # type: ignore[arg-type]
        odd_group_name(name)
        dist.destroy_process_group(made)


def odd_group_name(name: str) -> None:
    report = check(
        lambda x: (ct.echo(x @ x, name), ct.echo(x, name)),
        lambda step: (values(3, 3, seed=step),),
        lambda x: (peer(x @ x), peer(x)),
    )
    (graph,) = report.graphs
    assert {each.group for each in graph.decisions} == {name}
    assert [each.group for each in graph.buffers] == [name]


# A slow peer.


@case()
def case_slow_peer() -> None:
    """Rank 1 reads late, and the operator has no exit barrier. The next producer waits for rank 1."""
    name = group()

    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = ct.echo_late(x @ x, name)
        return x

    def expected(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = peer(x @ x)
        return x

    report = check(f, lambda step: (values(2, 2, seed=step),), expected)
    assert report.graphs[0].reuses == 2
    check(lambda x: ct.echo_late(x, name), lambda step: (values(2, 2, seed=step),), peer)


# Memory.


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@case()
def case_many_functions() -> None:
    """Functions that were deleted leave no memory, descriptors or threads."""
    name = group()

    def make() -> Callable[..., Any]:
        space: dict[str, Any] = {"ct": ct, "name": name}
        exec(compile("def f(x): return ct.echo(x @ x, name), ct.echo(x, name)", __file__, "exec"), space)
        return compiled(space["f"], dynamic=False)

    def use(count: int) -> Any:
        for step in range(count):
            x = values(2, 2, seed=step)
            run = make()
            torch.testing.assert_close(run(x), (peer(x @ x), peer(x)))
        del run
        torch._dynamo.reset()
        gc.collect()
        symmem.collect()
        stats = symmem.memory_stats()
        return stats["live_blocks"], stats["quarantined_blocks"], descriptors(), threading.active_count()

    before = use(5)
    assert use(int(os.environ.get("FUNCTIONS", 20))) == before


@case()
def case_threads() -> None:
    """Threads compile at the same time, for different groups."""
    world = range(dist.get_world_size())
    groups = [[dist.new_group([rank]) for rank in world][dist.get_rank()].group_name for _ in range(4)]
    torch._dynamo.reset()
    wrong: list[BaseException] = []

    def work(name: str, number: int) -> None:
        try:
            for step in range(3):
                run = compiled(lambda x: ct.echo(x @ x, name) + number)
                x = values(2 + number, 2 + number, seed=step)
                torch.testing.assert_close(run(x), x @ x + number)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(name, number)) for number, name in enumerate(groups)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if wrong:
        raise wrong[0]


@case()
def case_threads_of_one_function() -> None:
    """Threads that call one compiled function take turns, because its buffers serve one call at a time."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()].group_name
    torch._dynamo.reset()
    run = compiled(lambda x: ct.echo_slowly(x @ x, alone))
    run(torch.eye(3))
    results: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda at: results.__setitem__(at, run(torch.eye(3) * at)), args=(at,))
        for at in range(3)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for at in range(3):
        torch.testing.assert_close(results[at], torch.eye(3) * at * at)


@case()
def case_threads_wait_for_their_turn() -> None:
    """A thread gets the turn when another thread ends its turn, also by an error. Only one thread has it."""
    begun, inside = threading.Event(), 0
    failed: list[BaseException] = []

    def function(waiting: int) -> None:
        nonlocal inside
        inside += 1
        graph = current_graph.running.here.graph
        begun.set()
        while len(graph.waiting) < waiting:  # the other threads arrive now
            os.sched_yield()
        assert inside == 1
        inside -= 1
        raise KeyError(waiting)

    def work(waiting: int) -> None:
        try:
            call(waiting)
        except BaseException as error:
            failed.append(error)

    call = current_graph.bound(function)
    first, *others = (threading.Thread(target=work, args=(waiting,)) for waiting in (2, 0, 0))
    first.start()
    begun.wait()
    for each in others:
        each.start()
    for each in (first, *others):
        each.join()
    assert [repr(each) for each in failed] == ["KeyError(2)", "KeyError(0)", "KeyError(0)"]


@case()
def case_child_takes_turns_of_missing_threads() -> None:
    """The parent's other threads do not exist in a forked child, so the child takes back their turns."""
    begun, over = threading.Event(), threading.Event()

    def function(wait: bool) -> None:
        if wait:
            begun.set()
            over.wait(60)

    call = current_graph.bound(function)
    thread = threading.Thread(target=call, args=(True,))
    thread.start()
    begun.wait()
    child = os.fork()
    if not child:
        signal.alarm(20)  # ends the child if it waits forever
        call(False)
        os._exit(0)
    over.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


@case()
def case_interrupted_as_the_turn_is_given_back() -> None:
    """A signal handler may raise at the start of any function. A waiting thread still gets its turn."""
    begun = threading.Event()

    def function(waiting: int) -> None:
        graph = current_graph.running.here.graph
        begun.set()
        while len(graph.waiting) < waiting:
            os.sched_yield()

    def interrupt(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_globals["__name__"] == current_graph.__name__ and frame.f_code.co_name != "call":
            sys.setprofile(None)
            raise KeyboardInterrupt

    call = current_graph.bound(function)
    other = threading.Thread(target=lambda: (begun.wait(), call(0)), daemon=True)
    other.start()
    assert current_graph.running.here  # making it calls a function too
    sys.setprofile(interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            call(1)
    finally:
        sys.setprofile(None)
    other.join(LONG)
    assert not other.is_alive()


@case()
def case_within_itself() -> None:
    """An operator must not call the function that calls it, because it would overwrite its arguments or deadlock."""
    calls: list[Any] = []
    outer = current_graph.bound(lambda inputs: calls[inputs.pop(0)](inputs) if inputs else "done")
    inner = current_graph.bound(lambda inputs: calls[inputs.pop(0)](inputs) if inputs else "done")
    calls += [outer, inner]
    for order in ([0], [1, 0], [1, 1]):
        with pytest.raises(UnsupportedError, match="within its own call"):
            outer(order)
    assert outer([]) == outer([1]) == inner([0]) == "done"


# Changes on one rank.


@case(gpu=False)
def case_address_changes_on_one_rank() -> None:
    """All ranks get an error that names the argument, and all later calls are right."""
    name, rank = group(), dist.get_rank()
    torch._dynamo.reset()
    POINTERS.clear()
    first, other, second, another = (symmem.allocate((3, 3), torch.float32).tensor for _ in range(4))
    for x, y in ((first, second), (other, another)):
        x.copy_(values(3, 3)), y.copy_(values(3, 3, seed=1))
    wanted = summed(first) + 10 * summed(second)
    run = compiled(lambda x, y: ct.total(x, name) + 10 * ct.total(y, name))
    torch.testing.assert_close(run(first, second), wanted)
    changed = (other, second) if rank == 0 else (first, another)
    for _ in range(2):
        with pytest.raises(DivergenceError) as caught:
            run(*changed)
        assert "rank 0 waits for all ranks in the comparison of ct::total: the argument 'x'" in caught.value.what
        assert "because its address changed; rank 1 went on without" in caught.value.what
        assert caught.value.peers == (0,)
        for _ in range(4):
            torch.testing.assert_close(run(*changed), wanted)
        # The tensors in whose barriers a rank waited work too.
        for _ in range(5):
            torch.testing.assert_close(run(first, second), wanted)
        assert POINTERS[-2:] == [first.data_ptr(), second.data_ptr()]


@case(gpu=False)
def case_growth_on_one_rank() -> None:
    """All ranks get an error that names the argument. Then the memory has room for the largest size."""
    name, rank, weight = group(), dist.get_rank(), values(8, 8, seed=7)
    torch._dynamo.reset()
    run = compiled(lambda x: (ct.heads(x @ weight, name), ct.heads(x, name)), dynamic=True)

    def check_call(rows: tuple[int, int]) -> None:
        x = values(rows[rank], 8, seed=sum(rows))
        wanted = [torch.empty(4, 8) for _ in range(2)]
        for out, part in zip(wanted, ((x @ weight)[:2], x[:2]), strict=True):
            dist.all_gather(list(out.chunk(2)), part.contiguous())
        torch.testing.assert_close(list(run(x)), wanted)

    check_call((4, 4))
    for rows in ((4, 70), (900, 4)):
        with pytest.raises(DivergenceError, match="the allocation of memory for ct::heads: the argument 'x'") as caught:
            check_call(rows)
        assert f"because this rank needs {8 * max(rows)} elements" in caught.value.what
        for _ in range(3):
            check_call(rows)
        check_call((6, 6))


@case(gpu=False)
def case_results_of_uneven_sizes() -> None:
    """The graph returns a symmetric buffer with another size on every rank; also if only one is large."""
    name, rank = group(), dist.get_rank()

    def f(x: torch.Tensor) -> Any:
        y = x + 1
        return ct.heads(y, name), y

    for rows in ((600, 900), (5, 700), (800, 6)):
        torch._dynamo.reset()
        run, kept = compiled(f, dynamic=False), []
        for step in range(3):
            x = values(rows[rank], 512, seed=step)
            heads = torch.empty(4, 512)
            dist.all_gather(list(heads.chunk(2)), x[:2] + 1)
            kept.append((run(x), (heads, x + 1)))
        for results, wanted in kept:
            torch.testing.assert_close(results, wanted)
            assert (symmem.find(results[1]) is not None) == (rows[rank] >= 512)
    handle = symmem.allocate(4, torch.float32)
    handle.tensor.fill_(rank)
    handle.barrier()
    assert handle.remote_tensor(1 - rank).tolist() == [1 - rank] * 4
    handle.barrier()


@case(gpu=False)
def case_symmetric_inputs_take_turns() -> None:
    """They are used in place. If the ranks take different ones, all ranks get an error, and the next call works."""
    name, rank = group(), dist.get_rank()
    torch._dynamo.reset()
    tensors = [symmem.allocate((3, 3), torch.float32).tensor for _ in range(10)]
    run = compiled(lambda x: ct.total(x, name))
    for _ in range(2):
        for step in range(40):
            POINTERS.clear()
            x = tensors[step % 10].copy_(values(3, 3, seed=step))
            torch.testing.assert_close(run(x), summed(x))
            assert x.data_ptr() == POINTERS[0]
        with pytest.raises(DivergenceError, match="uses ct::total: the argument 'x' differently than rank") as caught:
            run(tensors[rank])
        assert caught.value.rank == rank


@case(gpu=False)
def case_many_turns() -> None:
    """Ranks compare which of several tensors they use. From time to time they wait for each other."""
    record, shape = ArgumentRecord(0, group(), None, "agree", False, "op"), ((2, 2), (2, 1))
    tensors = [symmem.allocate((2, 2), torch.float32).tensor for _ in range(3)]
    graph, points = runtime.Graph(), symmem.resolve_group().sync_points
    assert points is not None
    serials = set()
    for step in range(1500):
        graph.begin()
        assert graph.place(record, tensors[step % 3], *shape) is tensors[step % 3]
        serials.add(points._serial)
    assert len(serials) < 8


@case(gpu=False)
def case_change_on_one_rank_is_told_outside_of_the_function() -> None:
    """A rank may have gone on to an eager barrier or operator, or to another function. Those work afterwards."""
    name, rank = group(), dist.get_rank()
    record, shape = ArgumentRecord(0, name, None, "agree", False, "op"), ((2, 2), (2, 1))
    first, second = (symmem.allocate((2, 2), torch.float32).tensor.fill_(1) for _ in range(2))
    handle = symmem.SymmetricTensor.wrap(first)
    other = compiled(lambda x: ct.total(x @ x, name))
    graph = runtime.Graph()
    for goes_on in (handle.barrier, lambda: symmem.ops.all_reduce(first), lambda: other(first)):
        for _ in range(2):
            graph.begin()
            graph.place(record, first, *shape)
            goes_on()
        graph.begin()
        refused = pytest.raises(DivergenceError, match="rank 0 waits for all ranks in the comparison of op at")
        if rank:
            graph.place(record, first, *shape)
            with refused:
                goes_on()
        else:
            with refused:
                graph.place(record, second, *shape)
        for _ in range(2):
            handle.barrier()
            assert symmem.ops.all_reduce(first).eq(2).all()
            torch.testing.assert_close(other(first), torch.full((2, 2), 4.0))


# Failures at run time.


def failure(run: Callable[..., Any], *args: Any) -> tuple[str, str, Any]:
    try:
        run(*args)
    except symmem.errors.SymmemError as error:
        return type(error).__name__, str(error), error.rank
    return "nothing", "", None


def too_large() -> tuple[str, str, Any]:
    """The arena has no room for the second buffer of a call. The next, smaller call succeeds."""
    name = group()
    run = compiled(lambda x: (ct.echo(x @ x, name), ct.echo(x, name)), dynamic=True)
    torch.testing.assert_close(run(values(3, 3)), (peer(values(3, 3) @ values(3, 3)), peer(values(3, 3))))
    large = torch.eye(600)
    failed = failure(run, large)
    for step in range(2):
        x = values(4, 4, seed=step)
        torch.testing.assert_close(run(x), (peer(x @ x), peer(x)))
    return failed


def unavailable() -> tuple[str, str, Any]:
    """The configured backend needs a GPU, and there is none."""
    world = list(range(dist.get_world_size()))
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMMEM_ENABLE", "symmetric_memory_backend(native)")
        name = dist.new_group(world).group_name
        run = compiled(lambda x: ct.echo(x @ x, name))
        return failure(run, values(3, 3))


def one_dies() -> tuple[str, str, Any, float]:
    name = group()
    torch._dynamo.reset()
    run = compiled(lambda x: ct.dies(x @ x, name) @ x)
    started = time.monotonic()
    return (*failure(run, values(3, 3)), time.monotonic() - started)
