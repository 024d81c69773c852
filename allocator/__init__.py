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
    from symmem.errors import SymmemError
    from symmem.group import Group, resolve_group
    from symmem.tensor import SymmetricTensor, allocate, find

__all__ = [
    "Capability",
    "Group",
    "SymmemError",
    "SymmetricTensor",
    "__version__",
    "allocate",
    "find",
    "resolve_group",
]

_HOMES = {
    "Capability": "symmem.backends.base",
    "Group": "symmem.group",
    "SymmemError": "symmem.errors",
    "SymmetricTensor": "symmem.tensor",
    "allocate": "symmem.tensor",
    "find": "symmem.tensor",
    "resolve_group": "symmem.group",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'symmem' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
