"""`symmem.testing`, as the tests of another project use it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from programs import run_program

import symmem
from symmem.errors import InvalidArgumentError
from symmem.testing import ranks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("count", [8, 1000])
@ranks(2)
def test_neighbours_memory(count: int, rank: int, world: int) -> None:
    assert (rank, world) == (dist.get_rank(), 2)
    st = symmem.allocate(count, torch.float32, device="cpu").rendezvous()
    st.tensor.fill_(rank)
    st.barrier()
    assert st.remote_tensor(1 - rank)[0] == 1 - rank
    st.barrier()


@ranks(2, env={"SYMMEM_HOST_ID": "another"})
def test_the_environment_of_the_ranks() -> None:
    assert os.environ["SYMMEM_HOST_ID"] == "another"


USER = """
import threading
import pytest, torch, symmem
from symmem.testing import ranks


@pytest.fixture
def factor():
    return 3


@ranks(2)
def test_passes(rank, world, factor):
    st = symmem.allocate(4, torch.float32, device="cpu").rendezvous()
    st.tensor.fill_(rank * factor)
    st.barrier()
    assert st.remote_tensor(1 - rank)[0] == (1 - rank) * factor


@ranks(2)
def test_fails(rank):
    found = 40 + rank
    assert found == 40


@ranks(2, timeout=3)
def test_hangs(rank):
    if rank == 1:
        threading.Event().wait()


@ranks(2)
def test_works_after_a_hang(rank, world):
    assert world == 2


@pytest.fixture
def lock():
    return threading.Lock()


@ranks(2)
def test_takes_a_lock(lock):
    pass
"""


def test_a_project_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(USER)
    program = "import pytest; pytest.main(['-q', '-p', 'no:cacheprovider', 'test_user.py'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = run_program(program, env=environment, folder=tmp_path)
    assert "3 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "--- rank 1" in done.stdout
    assert "assert 41 == 40" in done.stdout
    assert "did not answer in 3 s" in done.stdout
    assert "an argument of test_takes_a_lock cannot travel to the ranks" in done.stdout


def test_what_cannot_be_decorated() -> None:
    with pytest.raises(InvalidArgumentError, match="positive number of ranks, not 0"):
        ranks(0)
    with pytest.raises(InvalidArgumentError, match="not at module level"):

        @ranks(2)
        def test_inner() -> None:
            pass
