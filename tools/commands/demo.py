"""``symmem demo``: processes allocate symmetric memory, access each other's, and reduce over it."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist

import symmem
from symmem.backends import select_backend
from symmem.config import load_settings
from symmem.tools.ranks import RankPool
from symmem.tools.table import render

__all__ = ["run"]

_ELEMENTS = 1 << 18  # 1 MiB of float32 per rank


def _rank(backend: str | None) -> list[dict[str, Any]]:
    """Run the demo on one rank. Returns its steps with a description, the check of the result, and the time."""
    rank, world = dist.get_rank(), dist.get_world_size()
    neighbour, before = (rank + 1) % world, (rank - 1) % world
    steps: list[dict[str, Any]] = []
    clock = time.perf_counter()

    def done(step: str, detail: str, right: bool) -> None:
        nonlocal clock
        now = time.perf_counter()
        steps.append({"step": step, "what": detail, "right": right, "ms": (now - clock) * 1e3})
        clock = time.perf_counter()

    st = symmem.allocate(_ELEMENTS, torch.float32, backend=backend)
    done(
        "allocate",
        f"{st.nbytes >> 10} KiB on {st.device.type} with {st.backend!r}",
        not st.tensor.any().item(),
    )

    st.rendezvous()
    done("rendezvous", f"{world} ranks map each other's memory", len(st.remote_pointers) == world)

    st.tensor.fill_(rank + 1)
    st.barrier()
    peers = [st.remote_tensor(peer) for peer in range(world)]
    seen = [peer[0].item() for peer in peers]
    done(
        "read peers",
        f"first elements are {[int(value) for value in seen]}",
        seen == list(range(1, world + 1)),
    )

    total = torch.stack(peers).sum(0)
    expected = world * (world + 1) // 2
    done("reduce", f"sum over all ranks is {int(total[0].item())}", bool((total == expected).all().item()))
    st.barrier()

    st.remote_tensor(neighbour)[rank] = -1.0 - rank
    st.put_signal(neighbour)
    st.wait_signal(before)
    got = st.tensor[before].item()
    done("write a peer", f"rank {before} wrote {int(got)} here and signalled", got == -1.0 - before)
    st.barrier()

    if symmem.Capability.CONTIGUOUS_VIEW in select_backend([st.backend], None).capabilities:
        view = st.contiguous_view()
        right = tuple(view.shape) == (world, _ELEMENTS) and view[neighbour][-1].item() == neighbour + 1
        done("contiguous view", f"one tensor of shape {tuple(view.shape)}", right)
    st.barrier()
    return steps


def run(ranks: int, backend: str | None, *, as_json: bool) -> int:
    """Run the demo. The exit code is 0 if all results are right."""
    settings = load_settings({} if backend is None else {"backend": backend})
    chosen = select_backend(settings.backend, None)
    with RankPool(ranks) as pool:
        results = pool.run(_rank, chosen.name)
        pids = pool.pids
    right = all(step["right"] for steps in results for step in steps)
    if as_json:
        outcomes = [{"rank": rank, "pid": pids[rank], "steps": steps} for rank, steps in enumerate(results)]
        print(json.dumps({"backend": chosen.name, "ranks": ranks, "right": right, "results": outcomes}, indent=2))
        return 0 if right else 1
    print(f"{ranks} processes started by {os.getpid()}, backend {chosen.name!r}\n")
    rows = [
        (rank, pid, step["step"], f"{step['ms']:.2f}", "ok" if step["right"] else "WRONG", step["what"])
        for rank, (pid, steps) in enumerate(zip(pids, results, strict=True))
        for step in steps
    ]
    print(render(("rank", "pid", "step", "ms", "check", "what it did"), rows))
    print("\nAll results are right." if right else "\nA result is WRONG: see the table.")
    return 0 if right else 1
