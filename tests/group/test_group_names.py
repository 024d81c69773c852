"""The names by which ``groups`` in the cluster file match a group."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

FILE = """
version: 1
groups:
  - {match: "tp*", arena_size: 2MiB}
  - {match: "mesh_pp", arena_size: 4MiB}
  - {match: "mine", arena_size: 8MiB}
  - {match: "default_pg", arena_size: 16MiB}
  - {match: "epp*", arena_size: 32MiB}
"""

# One rank. Torch gives the default group to a dimension with all ranks, so new groups stand for dimensions here.
PROGRAM = """
import json, os, sys
import torch.distributed as dist
import symmem
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
groups = {
    "described": dist.new_group([0], group_desc="tp0"),
    "dimension": dist.new_group([0], group_desc="mesh_tp"),
    "long name": dist.new_group([0], group_desc="mesh_pp"),
    "plain": dist.new_group([0]),
    "mine": symmem.Group.from_store(0, 1, store, "mine"),
}
if sys.argv[1] == "mesh":
    groups["world"] = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
else:
    groups["world"] = None
print(json.dumps({name: symmem.resolve_group(group).settings.arena_size >> 20 for name, group in groups.items()}))
"""


def run(tmp_path: Path, world: str, text: str = FILE, **variables: str) -> tuple[dict[str, Any], str]:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    env = {**os.environ, "SYMMEM_CONFIG": str(file), **variables}
    done = run_program(PROGRAM, world, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_groups_match_by_the_names_that_users_know(rank: str, tmp_path: Path) -> None:
    """An entry that matched nothing is logged once, by one rank of the job."""
    sizes, errors = run(tmp_path, "default", RANK=rank)
    assert sizes == {"described": 2, "dimension": 2, "long name": 4, "plain": 64, "mine": 8, "world": 16}
    assert errors.count("matched no group of this process") == (rank == "0")
    if rank == "0":
        assert "groups[4] (match: 'epp*') matched no group" in errors
        assert "groups[0]" not in errors
        assert "'default_pg', 'mesh_pp', 'mesh_tp', 'mine', 'pp', 'tp', 'tp0'" in errors


def test_a_mesh_over_all_ranks_names_the_default_group(tmp_path: Path) -> None:
    """If the mesh is what symmem gets first for that group."""
    sizes, _errors = run(tmp_path, "mesh", text=FILE.replace("default_pg", "other"))
    assert sizes["world"] == 2
