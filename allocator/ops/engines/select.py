"""Resolve the group of an operator call, and choose its engine for a device."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
import torch.distributed as dist

from symmem.errors import GroupError, UnsupportedError
from symmem.group.group import Group, GroupLike, default_group, known_groups, resolve_group
from symmem.memory import cuda_graphs
from symmem.ops.engines.base import Engine, Engines
from symmem.ops.engines.checked import CheckedEngine

__all__ = ["engine_for", "group_named", "group_of", "name_of"]

_of_process_groups: dict[str, weakref.ref[Group]] = {}
_of_stores: dict[str, weakref.ref[Group]] = {}


def group_of(group: GroupLike = None) -> Group:
    """A quick :func:`symmem.resolve_group`. A name may also mean a group made from a store. Local.

    Raises:
        GroupError: No group or several groups have this name, or the group was closed.
    """
    if group is None:
        return default_group() or resolve_group(None)
    if isinstance(group, str):
        return group_named(group)
    if isinstance(group, Group):
        if group.closed:
            raise GroupError(f"the group {group.name!r} is closed", rank=group.rank)
        return group
    name = _names().get(group) if isinstance(group, dist.ProcessGroup) else None
    return resolve_group(group) if name is None else group_named(name)


def name_of(group: GroupLike = None) -> str:
    """The name of a group in operator calls. Local.

    Args:
        group: As for :func:`symmem.resolve_group`. Operators then find a group made from a store by its name, while it
            lives.

    Raises:
        GroupError: There is no such group. Or it was made from a store and a process group has the same name.
    """
    resolved = resolve_group(group)
    if resolved.process_group is None:
        if _is_process_group(resolved.name):
            raise GroupError(
                f"a process group is named {resolved.name!r} like this group, which was made from a store",
                hint="give the group another name: operators find groups by name",
            )
        _remember(_of_stores, resolved)
    return resolved.name


def group_named(name: str) -> Group:
    """Find a group by name: the process group, else the only group with this name made from a store. Local.

    Raises:
        GroupError: No group has this name, or several have it.
    """
    reference = _of_process_groups.get(name)
    known = None if reference is None else reference()
    if known is not None and not known.closed and known.process_group in dist.distributed_c10d._world.pg_map:
        return known
    reference = _of_stores.get(name)
    known = None if reference is None else reference()
    if known is not None and not known.closed:
        return known
    if not _is_process_group(name):
        made = [group for group in known_groups() if group.name == name and group.made_from_store and not group.closed]
        if len(made) == 1:
            return _remember(_of_stores, made[0])
        if made:
            raise GroupError(
                f"{len(made)} groups made from stores are named {name!r}",
                hint="give them different names, or pass the group itself to symmem.ops",
            )
    return _remember(_of_process_groups, resolve_group(name))


def _remember(known: dict[str, weakref.ref[Group]], group: Group) -> Group:
    for name in [name for name, reference in known.items() if reference() is None]:
        del known[name]
    known[group.name] = weakref.ref(group)
    return group


def _names() -> Mapping[dist.ProcessGroup, str]:
    return dist.distributed_c10d._world.pg_names


def _is_process_group(name: str) -> bool:
    return dist.is_available() and name in _names().values()


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
