"""hello.py with every documented way to choose a backend, under torchrun or on a pool of ranks, which starts faster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from patience import TASK
from programs import run_program

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


WAYS = {
    "default": Way(),
    "argument": Way(("--backend", "host"), ranks=4),
    "SYMMEM_ENABLE": Way(env={"SYMMEM_ENABLE": "symmetric_memory_backend(host)"}),
    "NVFUSER_ENABLE": Way(env={"NVFUSER_ENABLE": "other_option(1),symmetric_memory_backend(host)"}),
    "SYMMEM_CONFIG": Way(env={"SYMMEM_CONFIG": LAPTOP}),
}


def without_choices() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}


@pytest.mark.ranks
def test_hello_works_under_torchrun() -> None:
    # --standalone takes a free port per run, so that runs do not join each other.
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WAYS["default"].ranks))
    env = without_choices() | {"PYTHONUNBUFFERED": "1"}  # every write appears at once
    done = subprocess.run([sys.executable, *launch, str(HELLO)], env=env, capture_output=True, text=True, timeout=TASK)
    assert done.returncode == 0, done.stderr
    check("default", done.stdout)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [name for name in WAYS if name != "default"])
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
def test_a_wrong_choice_is_an_error_that_lists_the_valid_ones() -> None:
    """The argument wins over the file. The program has the environment that torchrun gives it."""
    program = f"import runpy, sys; sys.argv[0] = {str(HELLO)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env = without_choices() | alone | {"SYMMEM_CONFIG": LAPTOP}
    done = run_program(program, "--backend", "hots", env=env)
    assert done.returncode == 1
    assert "memory" not in done.stdout
    assert "ConfigError: argument backend: unknown backend 'hots'" in done.stderr
    assert f"use one of: {', '.join(('auto', *BACKENDS))}" in done.stderr
    assert "did you mean 'host'?" in done.stderr
