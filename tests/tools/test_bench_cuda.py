"""``symmem bench`` for CUDA, run on the CPU with stand-ins for torch's operators, graphs and events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from patience import TASK

import symmem
from symmem.tools.bench import collectives, contenders, p2p
from symmem.tools.ranks import RankPool

NAMES = ["symmem", "torch_one_shot", "torch_two_shot", "nccl"]


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Graph:
    """Replays the calls that were made during its capture."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextlib.contextmanager
def capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    Graph.capturing = graph
    yield
    Graph.capturing = None


def recorded(call: Any, *args: Any, **options: Any) -> Any:
    """During a capture, keep the call instead of making it."""
    if Graph.capturing is not None:
        Graph.capturing.calls.append(lambda: call(*args, **options))
        return None
    return call(*args, **options)


class Transport:
    """Stands in for torch's symmetric memory, with symmem's backend host."""

    def __init__(self, name: str) -> None:
        assert name == "CUDA"

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.st = symmem.allocate(nbytes, torch.uint8, backend="host", arena=False)
        return self.st.tensor

    def rendezvous(self, memory: torch.Tensor) -> Any:
        st = self.st.rendezvous()
        assert memory is st.tensor
        return SimpleNamespace(get_buffer=lambda peer, sizes, dtype: st.remote_tensor(peer))


def on_cpu(function: Any) -> Any:
    """Replace ``device="cuda"`` by the CPU."""
    return lambda *args, **options: function(*args, **(options | {"device": "cpu"}))


@contextlib.contextmanager
def stand_ins() -> Iterator[list[str]]:
    backend = SimpleNamespace(device_type="cuda")
    synchronised: list[str] = []
    library = torch.library.Library("symm_mem", "IMPL", "CPU")

    def one_shot(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
        return two_shot(x.clone(), op, group)

    def two_shot(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
        assert (op, group) == ("sum", dist.group.WORLD.group_name)  # type: ignore[union-attr]
        dist.all_reduce(x)
        return x

    library.impl("one_shot_all_reduce", one_shot)
    library.impl("two_shot_all_reduce_", two_shot)
    cuda = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "synchronize": lambda: synchronised.append("all"),
        "_sleep": lambda cycles: synchronised.append("asleep"),
    }
    with contextlib.ExitStack() as stack:
        for module in (contenders, collectives, p2p):
            stack.enter_context(patch.object(module, "get_backend", lambda name: backend))
        for module in (contenders, p2p):
            stack.enter_context(patch.object(module, "Torch", Transport))
        stack.enter_context(patch.dict(p2p._RUN, cuda=1 << 20))
        stack.enter_context(patch.multiple("torch.cuda", **cuda))  # type: ignore[call-overload]
        stack.enter_context(patch.multiple("torch", zeros=on_cpu(torch.zeros), ones=on_cpu(torch.ones)))
        yield synchronised
    library._destroy()


def collective(operator: str) -> tuple[list[tuple[str, str]], bool, int]:
    with stand_ins() as synchronised:
        clock = collectives.clock_of("cuda")  # type: ignore[attr-defined]
        found = contenders.contenders(operator, 1024, "host", 4096)
        assert {each.source.dtype for each in found} == {torch.bfloat16}
        assert [symmem.find(each.source) is not None for each in found] == [each.name != "nccl" for each in found]
        kept = [
            contenders.Contender(each.name, each.source, lambda call=each.call: recorded(call), each.out)  # type: ignore[misc]
            for each in found
        ]
        samples = collectives.sample(operator, kept, clock, rounds=2)
    return (
        list(samples),
        all(seconds > 0 for times in samples.values() for seconds in times),
        synchronised.count("asleep"),
    )


@pytest.mark.ranks
def test_each_contender_is_timed_in_a_graph_eager_and_by_the_host() -> None:
    with RankPool(2, timeout=TASK) as pool:
        for operator, names in (("all_reduce", NAMES), ("all_gather", ["symmem", "nccl"])):
            for keys, positive, asleep in pool.run(collective, operator):
                assert keys == [(ending, name) for ending in ("_graph", "_eager", "_host") for name in names]
                assert positive
                assert asleep == 3 * len(names)  # before every replay; one does not count
        for found in pool.run(pairs):
            assert {name for name, _ in found} == {
                f"p2p_{way}_{when}" for way in ("pull", "push") for when in ("alone", "together")
            }
            assert all(seconds > 0 for times in found.values() for seconds in times)


def pairs() -> p2p.Copies:
    with stand_ins():
        return p2p._on_rank("host", 1 << 20)
