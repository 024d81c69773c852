"""Make torch.compile faster in tests. A test run imports this before it forks ranks; nothing else does.

At the first compile of a process, Inductor imports 300 modules, hashes the sources of torch and Triton, and makes the
patterns of its passes, which takes more than a second. So this module compiles a product, which needs no C++ compiler
and leaves no thread behind.

At every compile, Dynamo writes 32 MiB to empty the caches of the CPU, and then measures and logs how long the guards
take. That is half the time of a small compile, so it is left out. So is the description of the key of each graph in
Inductor's cache, which is for its log: for that, all parts of the key are hashed once more, one by one.
"""

from __future__ import annotations

# ruff: noqa: E402
import gc
import os
import tempfile

gc.disable()  # until the end of this module: nearly all objects that it makes stay

import torch
import torch._dynamo.guards
import torch._inductor.codecache
import torch._inductor.config
import torch.utils.cpp_extension

import symmem.compile.explanation
import symmem.compile.wrappers  # noqa: F401

__all__: list[str] = []

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def _compile() -> None:
    before, threads = os.environ.get(_VARIABLE), torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch._inductor.config.patch(compile_threads=1):
        os.environ[_VARIABLE] = folder
        torch.compile(lambda x: x @ x)(torch.ones(2, 2))
    torch._dynamo.reset()
    torch.set_num_threads(threads)
    os.environ.pop(_VARIABLE)
    if before is not None:
        os.environ[_VARIABLE] = before


vars(torch._dynamo.guards)["profile_guard_manager"] = lambda manager, scope, repetitions: 0.0
setattr(torch._inductor.codecache.FxGraphCachePickler, "debug_lines", lambda pickler, details: [])  # noqa: B010
_compile()
gc.enable()
