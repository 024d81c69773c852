"""hello.py with every documented way to choose a backend, under torchrun or on a pool of ranks, which starts faster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from patience import TASK

from symmem.config import BACKENDS
from symmem.tools.examples import run_file
from symmem.tools.ranks import RankPool

ROOT = Path(__file__).parents[2]
HELLO = ROOT / "examples/hello.py"
LAPTOP = str(ROOT / "examples/clusters/laptop.yaml")
VARIABLES = ("SYMMEM_ENABLE", "NVFUSER_ENABLE", "SYMMEM_CONFIG")


@dataclass(frozen=True)
class Way:
    """A way to choose a backend: options of the program and its environment."""

    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    ranks: int = 2
    torchrun: bool = False


WAYS = {
    "default": Way(torchrun=True),
    "argument": Way(("--backend", "host"), ranks=4),
    "SYMMEM_ENABLE": Way(env={"SYMMEM_ENABLE": "symmetric_memory_backend(host)"}),
    "NVFUSER_ENABLE": Way(env={"NVFUSER_ENABLE": "other_option(1),symmetric_memory_backend(host)"}),
    "SYMMEM_CONFIG": Way(env={"SYMMEM_CONFIG": LAPTOP}),
    # The argument is wrong, and wins over the file.
    "wrong": Way(("--backend", "hots"), {"SYMMEM_CONFIG": LAPTOP}, ranks=1, torchrun=True),
}
UNDER_TORCHRUN = [name for name, way in WAYS.items() if way.torchrun]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Start all runs of torchrun at once, because they mostly wait for their processes to start."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    started = {}
    try:
        for name in UNDER_TORCHRUN:
            way = WAYS[name]
            # --standalone takes a free port per run, so that runs do not join each other.
            launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(way.ranks))
            started[name] = subprocess.Popen(
                [sys.executable, *launch, str(HELLO), *way.options],
                env=clean | {"PYTHONUNBUFFERED": "1"} | way.env,  # every write appears at once
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        yield started
    finally:
        for process in started.values():
            with process:  # closes its pipes
                process.terminate()


@pytest.mark.ranks
@pytest.mark.parametrize("name", [name for name in UNDER_TORCHRUN if name != "wrong"])
def test_hello_works_under_torchrun(name: str, runs: dict[str, subprocess.Popen[str]]) -> None:
    out, err = runs[name].communicate(timeout=TASK)
    assert runs[name].returncode == 0, err
    check(name, out)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [name for name in WAYS if name not in UNDER_TORCHRUN])
def test_hello_works_with_the_environment_of_a_pool(name: str) -> None:
    way = WAYS[name]
    env: dict[str, str | None] = {**dict.fromkeys(VARIABLES), **way.env}
    with RankPool(way.ranks, env=env, timeout=TASK, process_group=None) as pool:
        check(name, "".join(pool.run(run_file, str(HELLO), *way.options)))


def check(name: str, out: str) -> None:
    """Every rank of hello.py printed the same memory and the right sum."""
    world = WAYS[name].ranks
    told = sorted(re.findall(r"^rank (\d+) of (\d+): (\w+) memory, sum over all ranks (\d+)$", out, re.MULTILINE))
    memory = {backend for _, _, backend, _ in told}
    assert memory == {"host"} or (name == "default" and len(memory & set(BACKENDS)) == len(memory) == 1)
    total = world * (world - 1) // 2
    assert told == [(str(rank), str(world), *memory, str(total)) for rank in range(world)]


@pytest.mark.ranks
def test_a_wrong_choice_is_an_error_that_lists_the_valid_ones(runs: dict[str, subprocess.Popen[str]]) -> None:
    out, err = runs["wrong"].communicate(timeout=TASK)
    assert runs["wrong"].returncode == 1
    assert "memory" not in out
    assert "ConfigError: argument backend: unknown backend 'hots'" in err
    assert f"use one of: {', '.join(('auto', *BACKENDS))}" in err
    assert "did you mean 'host'?" in err
