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

import importlib
from typing import TYPE_CHECKING, Any

from symmem.version import VERSION as __version__

if TYPE_CHECKING:
    from symmem.backends.base import Capability
    from symmem.collection import collect
    from symmem.context import use_symmetric_memory
    from symmem.device_view import DeviceView, include_path
    from symmem.errors import SymmemError
    from symmem.group import Group, resolve_group
    from symmem.statistics import memory_snapshot, memory_stats
    from symmem.tensor import SymmetricTensor, allocate, find

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
    "memory_snapshot",
    "memory_stats",
    "register_symm_mem_args",
    "resolve_group",
    "use_symmetric_memory",
]

_HOMES = {
    "Capability": "symmem.backends.base",
    "DeviceView": "symmem.device_view",
    "Group": "symmem.group",
    "SymmemError": "symmem.errors",
    "SymmetricTensor": "symmem.tensor",
    "allocate": "symmem.tensor",
    "collect": "symmem.collection",
    "find": "symmem.tensor",
    "include_path": "symmem.device_view",
    "memory_snapshot": "symmem.statistics",
    "memory_stats": "symmem.statistics",
    "register_symm_mem_args": "symmem.ops.registry",
    "resolve_group": "symmem.group",
    "use_symmetric_memory": "symmem.context",
}


# Not to be imported here, where names and types are checked: layers above this one, and one that needs Triton.
_SUBPACKAGES = {"compile", "ops", "triton"}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"symmem.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'symmem' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
