"""Which group a name means, and which engine runs its operations on a device."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from symmem.errors import GroupError, UnsupportedError
from symmem.group import Group, GroupLike, known_groups, resolve_group

if TYPE_CHECKING:
    from symmem.ops.engine import Engine

__all__ = ["engine_for", "group_named", "name_of"]

_of_process_groups: weakref.WeakValueDictionary[str, Group] = weakref.WeakValueDictionary()
_of_stores: weakref.WeakValueDictionary[str, Group] = weakref.WeakValueDictionary()


def name_of(group: GroupLike = None) -> str:
    """The name by which operators know a group. Local.

    Args:
        group: As for :func:`symmem.resolve_group`. A group made from a store is known by its name from here on, for as
            long as it lives.

    Raises:
        GroupError: There is no such group; or it was made from a store, and a process group has the same name.
    """
    resolved = resolve_group(group)
    if resolved.process_group is None:
        if _is_process_group(resolved.name):
            raise GroupError(
                f"a process group is named {resolved.name!r} like this group, which was made from a store",
                hint="give the group another name: operators tell groups by their names",
            )
        _of_stores[resolved.name] = resolved
    return resolved.name


def group_named(name: str) -> Group:
    """The group of a name: the process group's, else that of the one group made from a store that has it. Local.

    Raises:
        GroupError: There is no such group, or there are several.
    """
    known = _of_process_groups.get(name)
    if known is not None and not known.closed and known.process_group in _process_groups():
        return known
    known = _of_stores.get(name)
    if known is not None and not known.closed:
        return known
    if not _is_process_group(name):
        made = [each for each in known_groups() if each.name == name and not each.closed]
        if len(made) == 1:
            _of_stores[name] = made[0]
            return made[0]
        if made:
            raise GroupError(
                f"{len(made)} groups made from stores are named {name!r}",
                hint="give them different names, or pass the group itself to symmem.ops",
            )
    found = _of_process_groups[name] = resolve_group(name)
    return found


def _process_groups() -> Mapping[dist.ProcessGroup, object]:
    return dist.distributed_c10d._world.pg_map


def _is_process_group(name: str) -> bool:
    return dist.is_available() and name in dist.distributed_c10d._world.pg_names.values()


def engine_for(group: Group, device: torch.device) -> Engine:
    """What runs a group's operations on a device; goes with the group. Collective over the group, the first time.

    Raises:
        UnsupportedError: There is none for devices of this type.
        SymmemError: It could not be made; the same on all ranks.
    """
    engine: Engine | None = group.engines.get(device)
    if engine is None:
        engine = group.engines[device] = _make(group, device)
    return engine


def _make(group: Group, device: torch.device) -> Engine:
    if device.type == "cpu":
        from symmem.ops.host_engine import HostEngine

        return HostEngine(group)
    if device.type == "cuda":
        from symmem.ops.cuda_engine import CudaEngine

        made: Engine = CudaEngine(group, device)
        return made
    raise UnsupportedError(
        f"there are no collective operations on the device {str(device)!r}", hint="use tensors on the CPU or on CUDA"
    )
