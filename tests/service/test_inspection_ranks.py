"""The inspection commands on hanging ranks, with 3 processes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from looking import seen, stuck
from patience import LONG, SETTINGS, TASK

import symmem
from symmem.ops import functions as ops
from symmem.tools import cli
from symmem.tools.live.processes import Process, ask_all
from symmem.tools.ranks import RankPool, rank_store

JOB = "the-job-that-hangs"
WORLD = 3
ENV = {"SYMMEM_ENABLE": SETTINGS, "SYMMEM_JOB_ID": JOB}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(WORLD, env=ENV, timeout=TASK) as made:
        made.run(warm_up)
        yield made


def warm_up() -> None:
    """Make everything that is made once, so that the tests see what an inspection leaves behind."""
    kept = symmem.allocate(16, torch.uint8, backend="host", name="warm")
    kept.barrier()
    ops.all_reduce(torch.ones(4))


def rank() -> int:
    return symmem.resolve_group().rank


def barrier(held: int, go: str) -> str:
    memory = symmem.allocate((4, 5), torch.int32, backend="host", name="gradients")
    if rank() == held:
        rank_store().wait([go])
    memory.barrier(channel=3)
    return memory.backend


def collect(held: int, go: str) -> None:
    if rank() == held:
        rank_store().wait([go])
    symmem.collect()


def all_reduce(held: int, go: str) -> float:
    if rank() == held:
        rank_store().wait([go])
    total: torch.Tensor = ops.all_reduce(torch.ones(1000))
    return float(total[0])


def ring(go: str) -> None:
    """Every rank waits for a signal of the next one. A helper thread sends it after the key ``go``."""
    memory = symmem.allocate(8, torch.uint8, backend="host")
    rest = symmem.resolve_group()

    def help_out() -> None:
        rank_store().wait([go])
        memory.put_signal((rest.rank - 1) % WORLD, channel=5)

    helper = threading.Thread(target=help_out, name="helper")
    helper.start()
    memory.wait_signal((rest.rank + 1) % WORLD, channel=5)
    helper.join()


def usage() -> tuple[int, list[str]]:
    return len(os.listdir("/proc/self/fd")), sorted(thread.name for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("task", "held", "step"),
    [
        (barrier, 1, "barrier on channel 3"),
        (collect, 1, "collect: compare"),
        (collect, 0, "collect: compare"),
        (all_reduce, 2, "all_reduce(sum) of 1000 torch.float32"),
    ],
)
def test_who_is_waited_for_and_at_which_step(
    task: Callable[..., Any],
    held: int,
    step: str,
    pool: RankPool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    go, before = f"{task.__name__} {held}", pool.run(usage)
    pool.submit(task, held, go)
    seen(JOB, stuck(WORLD - 1))
    try:
        assert cli.main(["dump", "--job", JOB, "-o", str(tmp_path / "dump.json")]) == 0
        text = capsys.readouterr().out
        assert f"job {JOB}: 3 processes, 2 of them wait for others" in text
        assert f"All waiting processes wait for rank {held} (process {pool.pids[held]})" in text
        assert f"in {task.__name__}: rank_store().wait([go])" in text  # the line where it waits
        assert "CYCLE" not in text

        dumped = json.loads((tmp_path / "dump.json").read_text())
        assert {wait["pid"] for wait in dumped["waits"]} == {*pool.pids} - {pool.pids[held]}
        for wait in dumped["waits"]:
            assert (wait["step"], wait["waits_for"], wait["waits_for_pids"]) == (step, [held], [pool.pids[held]])
            assert wait["seconds"] >= 0
            assert 0 < wait["seconds_left"] <= LONG
            answers = next(each for each in dumped["processes"] if each["pid"] == wait["pid"])
            frames = next(each["frames"] for each in answers["stacks"] if each["thread"] == wait["thread"])
            assert any(f"in {task.__name__}:" in frame for frame in frames)

        assert cli.main(["top", "--once", "--job", JOB]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(JOB)]
        assert [f"waits for rank {held} in '{step}'" in line for line in lines] == [r != held for r in range(WORLD)]
    finally:
        pool._store.set(go, "1")
        outcomes = pool.collect()
    assert [outcome.error for outcome in outcomes] == [None] * WORLD
    after = pool.run(usage)
    assert after == before
    assert [threads.count("symmem-inspection") for _, threads in after] == [1] * WORLD
    assert seen(JOB, stuck(0)).awaited == []


def test_a_cycle_is_found(pool: RankPool, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pool.submit(ring, "round")
    found = seen(JOB, stuck(WORLD))
    try:
        (cycle,) = found.cycles
        ranks = [node.rank for node in cycle]
        assert sorted(rank or 0 for rank in ranks) == [0, 1, 2]
        assert all(((a or 0) + 1) % WORLD == b for a, b in zip(ranks, [*ranks[1:], ranks[0]], strict=True))
        assert found.awaited == []
        assert cli.main(["dump", "--job", JOB, "-o", str(tmp_path / "dump.json")]) == 0
        assert "A CYCLE: rank" in capsys.readouterr().out
    finally:
        pool._store.set("round", "1")
        outcomes = pool.collect()
    assert [outcome.error for outcome in outcomes] == [None] * WORLD


def test_inspect(pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool.submit(barrier, 0, "inspected")
    seen(JOB, stuck(WORLD - 1))
    try:
        assert cli.main(["inspect", "--job", JOB]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "gradients" in line]
        assert len(lines) == WORLD
        assert all("int32 [4, 5]" in line and "host" in line and "in barrier" in line for line in lines)
        assert cli.main(["inspect", "--json", "--parts", "groups,tensors,stacks", "--job", JOB]) == 0
        answers = json.loads(capsys.readouterr().out)
        assert [each["rank"] for each in answers] == [0, 1, 2]
        assert all("gradients" in {tensor["name"] for tensor in each["tensors"]} for each in answers)
        assert all(each["groups"][0]["arenas"][0]["live_bytes"] >= 80 for each in answers)

        assert cli.main(["inspect", "--snapshots", str(tmp_path), "--job", JOB]) == 0
        files = [str(tmp_path / f"snapshot-{pid}.json") for pid in pool.pids]
        assert cli.main(["memory-map", *files, "-o", str(tmp_path / "map.html")]) == 0
    finally:
        pool._store.set("inspected", "1")
        outcomes = pool.collect()
    assert [outcome.error for outcome in outcomes] == [None] * WORLD


def test_a_stopped_rank_holds_nobody_up(pool: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    """The stopped rank does not answer; the others do."""
    os.kill(pool.pids[1], signal.SIGSTOP)
    try:
        found: list[Process] = []
        # The signal may take a moment, and so may the answers of the others on a busy machine.
        while len([each for each in found if each.answer or "stopped" in each.problem]) < WORLD:
            found = ask_all(["groups"], JOB, timeout=0.5)
        assert [each.pid for each in found if each.problem] == [pool.pids[1]]
        assert [each.rank for each in found if each.answer] == [0, 2]
    finally:
        os.kill(pool.pids[1], signal.SIGCONT)
    assert [each.problem for each in ask_all(["groups"], JOB)] == [""] * WORLD


def test_a_dead_rank_leaves_no_socket(new_pool: Callable[..., RankPool]) -> None:
    job = "the-job-that-dies"
    pool = new_pool(2, env={**ENV, "SYMMEM_JOB_ID": job}, process_group="gloo")
    pool.run(warm_up)
    assert [each.pid for each in ask_all([], job)] == pool.pids
    pool.kill(1)
    pool._processes[1].join(LONG)
    assert [each.pid for each in ask_all([], job)] == pool.pids[:1]
    folder = Path(os.environ["XDG_RUNTIME_DIR"], "symmem")
    assert len(list(folder.glob(f"{job}.*"))) == 1
