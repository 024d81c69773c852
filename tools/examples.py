"""Runs the example programs on a pool of ranks, for ``symmem validate`` and the tests."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import runpy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from symmem.tools.ranks import RankPool, rank_store

__all__ = ["EXAMPLES", "Example", "run_example", "why_not"]


@dataclass(frozen=True)
class Example:
    """The requirements of an example.

    Attributes:
        modules: Modules that it imports beyond torch, on any machine.
        cuda_modules: More modules that it imports on a machine with GPUs.
        compiles: Whether it compiles kernels for the CPU. That needs a C++ compiler and half a minute.
    """

    modules: tuple[str, ...] = ()
    cuda_modules: tuple[str, ...] = ()
    compiles: bool = False


EXAMPLES: Mapping[str, Example] = {
    "hello.py": Example(),
    "triton_all_reduce.py": Example(modules=("triton", "numpy")),
    "halo_exchange.py": Example(cuda_modules=("cuda.core",)),
    "gather_matmul.py": Example(),
    "tensor_parallel.py": Example(cuda_modules=("cuda.core",), compiles=True),
    "custom_op.py": Example(),
    "expert_dispatch.py": Example(),
    "data_parallel.py": Example(),
    "fully_sharded.py": Example(),
    "anywhere.py": Example(cuda_modules=("cuda.core",)),
}
"""All examples of ``examples/``, by file name."""


def why_not(name: str, *, cuda: bool) -> str:
    """Return why an example cannot run on this machine; empty if it can."""
    example = EXAMPLES[name]
    for module in (*example.modules, *(example.cuda_modules if cuda else ())):
        parent = module.partition(".")[0]
        if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return ""


def run_example(path: Path, world: int, env: Mapping[str, str | None] | None = None, timeout: float = 60.0) -> str:
    """Run an example on ``world`` ranks, as torchrun does, and return the output of rank 0.

    Raises:
        RanksFailedError: A rank raised, or did not exit with 0.
    """
    with RankPool(world, env=env, timeout=timeout, process_group=None) as pool:
        printed: list[str] = pool.run(run_file, str(path))
    return printed[0]


def run_file(path: str, *options: str) -> str:
    """Run a program with options on this rank of a pool, as torchrun would; returns what it printed."""
    # The example uses the pool's store, as it uses the agent's store under torchrun.
    store = rank_store()
    assert isinstance(store, TCPStore)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.argv = [path, *options]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return printed.getvalue()
