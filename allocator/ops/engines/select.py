"""Select the engine for the operations of a group on a device."""

from __future__ import annotations

import torch

from symmem.backends.neutral import neutral_mode
from symmem.errors import UnsupportedError
from symmem.group.group import Group
from symmem.memory import cuda_graphs
from symmem.ops.engines.base import Engine, Engines
from symmem.ops.engines.checked import CheckedEngine

__all__ = ["engine_for"]


def engine_for(group: Group, device: torch.device) -> Engine:
    """The group's engine for a device. It lives as long as the group. Collective over the group the first time.

    Raises:
        UnsupportedError: Devices of this type have no engine.
        SymmemError: The engine could not be made. All ranks raise the same error.
    """
    try:
        known: Engine = group.extensions[Engines][device]
    except KeyError:
        pass  # the engine is made outside of this block, so that its errors do not show the KeyError as their context
    else:
        return known
    with neutral_mode():
        engine = _make(group, device)
    if group.settings.collective_check == "each":
        engine = CheckedEngine(engine, group)
    group.extension(Engines)[device] = engine
    return engine


def _make(group: Group, device: torch.device) -> Engine:
    if device.type == "cpu":
        from symmem.ops.engines.host import HostEngine

        return HostEngine(group)
    if device.type == "cuda":
        from symmem.ops.engines.cuda import CudaEngine

        return cuda_graphs.apart(device, "an engine cannot be made", lambda: CudaEngine(group, device))
    raise UnsupportedError(
        f"there are no collective operations on the device {str(device)!r}", hint="use tensors on the CPU or on CUDA"
    )
