"""The inspection commands on ranks with hanging GPUs.

One rank per GPU, or two ranks on the only GPU.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from looking import seen, stuck
from patience import LONG, SETTINGS, SOON, TASK

import symmem
from symmem.ops import functions as ops
from symmem.tools import cli
from symmem.tools.commands.doctor import examine
from symmem.tools.live.waiting import Analysis
from symmem.tools.ranks import RankPool, rank_store

JOB = "the-job-whose-gpus-hang"
WORLD = min(max(torch.cuda.device_count(), 2), 4)
LATE = WORLD - 1
ENV = {"SYMMEM_ENABLE": SETTINGS, "SYMMEM_JOB_ID": JOB}
FOUND = examine("native")

pytestmark = pytest.mark.skipif(not FOUND.available, reason=FOUND.why_not)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(WORLD, env=ENV, timeout=TASK) as made:
        made.run(warm_up)
        yield made


def shared() -> symmem.SymmetricTensor:
    return symmem.allocate(1 << 20, torch.float32, backend="native").rendezvous()


def warm_up() -> None:
    """Compile and make everything that is made once."""
    kept = shared()
    kept.barrier()
    for operation in (small, large, gathered):
        operation()
    kept.synchronize()


def rank() -> int:
    return symmem.resolve_group().rank


def small() -> None:
    ops.all_reduce(torch.ones(1000, device="cuda"))


def large() -> None:
    """Reduce symmetric memory in place."""
    x = symmem.allocate(8 << 20, torch.float32, backend="native", name="large").rendezvous()
    ops.all_reduce(x.tensor, out=x.tensor)


def gathered() -> None:
    ops.all_gather(torch.ones(1000, device="cuda"))


def run(operation: Callable[[symmem.SymmetricTensor], object], late: list[int], go: str) -> None:
    """Run the operation on the GPU and wait for it. Late ranks wait for the key ``go`` first."""
    st = shared()
    st.synchronize()
    if rank() in late:
        rank_store().wait([go])
    operation(st)
    st.synchronize()


def barrier(late: list[int], go: str) -> None:
    run(lambda st: st.barrier(channel=3), late, go)


def wait_signal(late: list[int], go: str) -> None:
    """All other ranks wait for a signal of the late rank."""

    def signal(st: symmem.SymmetricTensor) -> None:
        for other in range(WORLD):
            if rank() in late and other not in late:
                st.put_signal(other, channel=4)
        if rank() not in late:
            st.wait_signal(late[0], channel=4)

    run(signal, late, go)


def in_a_graph(late: list[int], go: str) -> None:
    st, graph = shared(), torch.cuda.CUDAGraph()
    st.barrier()
    with torch.cuda.graph(graph):
        st.barrier(channel=5)
    run(lambda _: graph.replay(), late, go)


def all_reduce(late: list[int], go: str) -> None:
    run(lambda _: small(), late, go)


def all_reduce_in_place(late: list[int], go: str) -> None:
    x = symmem.allocate(8 << 20, torch.float32, backend="native", name="large").rendezvous()
    run(lambda _: ops.all_reduce(x.tensor, out=x.tensor), late, go)


def all_gather(late: list[int], go: str) -> None:
    run(lambda _: gathered(), late, go)


def in_triton(late: list[int], go: str) -> None:
    import triton_kernels

    view = shared().device_view()
    run(lambda _: triton_kernels.meet[(1,)](view.signals, 6, view.rank, view.world_size), late, go)


def exactly(late: list[int]) -> Callable[[Analysis], bool]:
    """Whether every other rank waits for all late ranks. Several ranks may report at different moments."""

    def found(seen: Analysis) -> bool:
        return stuck(WORLD - len(late))(seen) and all(list(wait.ranks) == late for wait in seen.waits)

    return found


CASES: list[tuple[Callable[..., None], str]] = [
    (barrier, "barrier on channel 3"),
    (wait_signal, "wait_signal on channel 4"),
    (in_a_graph, "barrier on channel 5"),
    (all_reduce, "all_reduce"),
    (all_reduce_in_place, "all_reduce"),
    (all_gather, "all_gather"),
]


@pytest.mark.parametrize(("task", "step"), CASES)
def test_whom_the_gpus_wait_for(
    task: Callable[..., None], step: str, pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_commands(pool, task, step, [LATE], tmp_path, capsys)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_whom_a_triton_kernel_waits_for(pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_commands(pool, in_triton, "barrier on channel 6", [LATE], tmp_path, capsys)


@pytest.mark.skipif(WORLD < 3, reason="needs three GPUs")
@pytest.mark.parametrize(("task", "step"), [case for case in CASES if case[0] is not wait_signal])
def test_several_that_are_late(
    task: Callable[..., None], step: str, pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_commands(pool, task, step, [LATE - 1, LATE], tmp_path, capsys)


def check_commands(
    pool: RankPool,
    task: Callable[..., None],
    step: str,
    late: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run a task with late ranks; check the output of the commands meanwhile and afterwards."""
    go = f"{task.__name__} {late}"
    pool.submit(task, late, go)
    try:
        found = seen(JOB, exactly(late))
        assert {node.rank for node, _ in found.awaited} == set(late)
        assert found.cycles == []
        assert cli.main(["dump", "--job", JOB, "-o", str(tmp_path / "dump.json")]) == 0
        text = capsys.readouterr().out
        print(text)
        assert f"job {JOB}: {WORLD} processes, {WORLD - len(late)} of them wait for others" in text
        assert "rank_store().wait([go])" in text  # the line where it waits
        dumped = json.loads((tmp_path / "dump.json").read_text())
        assert {wait["pid"] for wait in dumped["waits"]} == {*pool.pids} - {pool.pids[each] for each in late}
        for wait in dumped["waits"]:
            assert (wait["step"], wait["waits_for"]) == (step, late)
            assert wait["device"].startswith("cuda:")
            assert 0.06 < wait["seconds"] < SOON
            assert 0 < wait["seconds_left"] <= LONG
        assert cli.main(["top", "--once", "--job", JOB]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(JOB)]
        assert sum(f"in '{step}', on the GPU cuda:" in line for line in lines) == WORLD - len(late)
    finally:
        pool._store.set(go, "1")
        outcomes = pool.collect()
    assert [outcome.error for outcome in outcomes] == [None] * WORLD
    assert seen(JOB, stuck(0)).awaited == []


def crossed(go: str) -> None:
    """Rank 0's GPU waits for rank 1, rank 1's host waits for rank 0, and rank 0's host waits for its GPU."""
    st = shared()
    st.synchronize()

    def help_out() -> None:
        rank_store().wait([go])
        st.put_signal(0, channel=7)

    helper = threading.Thread(target=help_out, name="helper")
    if rank() == 0:
        st.wait_signal(1, channel=7)
        st.synchronize()
    if rank() == 1:
        helper.start()
    symmem.collect()
    if rank() == 1:
        helper.join()
    st.synchronize()


def test_a_cycle_by_way_of_a_gpu(pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool.submit(crossed, "crossed")
    try:
        found = seen(JOB, stuck(WORLD))
        (cycle,) = found.cycles
        assert {node.rank for node in cycle} == {0, 1}
        assert cli.main(["dump", "--job", JOB, "-o", str(tmp_path / "dump.json")]) == 0
        text = capsys.readouterr().out
        print(text)
        assert "A CYCLE: rank" in text
        assert "'wait_signal on channel 7'" in text
    finally:
        pool._store.set("crossed", "1")
        outcomes = pool.collect()
    assert [outcome.error for outcome in outcomes] == [None] * WORLD
