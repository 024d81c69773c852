"""Symmetric memory for PyTorch programs that run one process per GPU.

    import symmem

    st = symmem.allocate((256, 512), dtype=torch.float32)
    st.rendezvous()                       # collective
    st.tensor.fill_(rank)
    st.barrier()
    peer = st.remote_tensor((rank + 1) % world_size)

See :class:`symmem.SymmetricTensor`. Names are loaded when they are first used: ``import symmem`` alone does not
import torch, so that the command line stays quick.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from symmem import _torch_backend_setting, _torch_ops, _torch_process_group
from symmem._lazy import lazy_exports
from symmem.errors import PlatformError
from symmem.group.observers import group_made
from symmem.service import start_inspection
from symmem.version import VERSION as __version__

if TYPE_CHECKING:
    from symmem.arena.collect import collect
    from symmem.arena.statistics import memory_snapshot, memory_stats
    from symmem.backends.base import Capability
    from symmem.errors import SymmemError
    from symmem.group.group import Group
    from symmem.group.resolve import resolve_group
    from symmem.redirect.context import use_symmetric_memory
    from symmem.tensor.device_view import DeviceView, include_path
    from symmem.tensor.tensor import SymmetricTensor, allocate, find

_platform: str = sys.platform  # a variable, so that type checkers on other systems still see the names below
if _platform != "linux":
    _error = PlatformError(
        f"only Linux is supported, and this is {_platform!r}",
        hint="run it in WSL 2 or in a Linux container; docs/quickstart.md, 'Windows and macOS', shows how",
    )
    _program = os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0]
    if _program == "symmem" or sys.orig_argv[1:3] == ["-m", "symmem"]:
        sys.exit(f"symmem: PlatformError: {_error}")  # the command prints no traceback
    raise _error

__all__ = [
    "Capability",
    "DeviceView",
    "Group",
    "SymmemError",
    "SymmetricTensor",
    "__version__",
    "allocate",
    "collect",
    "find",
    "include_path",
    "last_error",
    "memory_snapshot",
    "memory_stats",
    "register_symm_mem_args",
    "requires_symmetric_memory",
    "resolve_group",
    "use_symmetric_memory",
]

group_made.append(start_inspection)

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Capability": "symmem.backends.base",
        "DeviceView": "symmem.tensor.device_view",
        "Group": "symmem.group.group",
        "SymmemError": "symmem.errors",
        "SymmetricTensor": "symmem.tensor.tensor",
        "allocate": "symmem.tensor.tensor",
        "collect": "symmem.arena.collect",
        "find": "symmem.tensor.tensor",
        "include_path": "symmem.tensor.device_view",
        "last_error": "symmem.torch_backend.bridge",
        "memory_snapshot": "symmem.arena.statistics",
        "memory_stats": "symmem.arena.statistics",
        "register_symm_mem_args": "symmem.ops.registry.registry",
        "requires_symmetric_memory": "symmem.ops.registry.registry",
        "resolve_group": "symmem.group.resolve",
        "use_symmetric_memory": "symmem.redirect.context",
    },
    # Layers above this one, and one that needs Triton: the type checker must not see imports of them here.
    subpackages=frozenset({"compile", "distributed", "ops", "torch_backend", "triton"}),
)

_torch_ops.install()
_torch_backend_setting.install()
_torch_process_group.install()
