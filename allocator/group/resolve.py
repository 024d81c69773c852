"""Find the :class:`Group` for a process group, a name, a device mesh or None; the only cache of names.

The eager C module keeps the group of a prepared call as well, because it must not call Python.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

import torch.distributed as dist

from symmem.backends.untraced import untraced
from symmem.errors import GroupError
from symmem.group.group import Group, known_groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["GroupLike", "default_group", "group_named", "is_current", "name_of", "open_group", "resolve_group"]

GroupLike: TypeAlias = "Group | ProcessGroup | DeviceMesh | str | None"
"""A group, or a value that names one; see :func:`resolve_group`."""

_c10d: Any = dist.distributed_c10d if dist.is_available() else None

_of_process_groups: weakref.WeakKeyDictionary[Any, Group] = weakref.WeakKeyDictionary()
_of_names: dict[str, weakref.ref[Group]] = {}
_default: tuple[weakref.ref[Any], weakref.ref[Group]] | None = None  # the last default process group, and its Group


def resolve_group(group: GroupLike = None) -> Group:
    """Return the :class:`Group` of a value that names one; the same object every time. Local.

    Args:
        group: A Group, a process group or subgroup, the name of one or of a group made from a store, a one-dimensional
            DeviceMesh, or None for the default process group.

    Raises:
        GroupError: There is no such group, or several of that name; or this process is not in it; or the mesh has more
            dimensions.
    """
    if group is None and (known := default_group()):
        return known
    if isinstance(group, Group):
        return group
    if isinstance(group, str):
        return group_named(group)
    if isinstance(group, dist.ProcessGroup) and group in _c10d._world.pg_map:
        known = _of_process_groups.get(group)
        if known is not None and not known.closed:
            return known
    return _of_mesh_or_process_group(group)


def open_group(group: GroupLike = None) -> Group:
    """Like :func:`resolve_group`, but refuse a closed group. Local.

    Raises:
        GroupError: See :func:`resolve_group`; or the group is closed.
    """
    resolved = resolve_group(group)
    if resolved.closed:
        raise GroupError(f"the group {resolved.name!r} is closed", rank=resolved.rank)
    return resolved


def default_group() -> Group | None:
    """Return the :class:`Group` of the default process group; None if there is none. Local."""
    global _default
    process_group = _c10d._world.default_pg if _c10d else None  # dist.group.WORLD, in half the time
    if process_group is None:
        return None
    if _default is not None and _default[0]() is process_group:
        known = _default[1]()
        if known is not None and not known.closed:
            return known
    known = resolve_group(process_group)
    _default = weakref.ref(process_group), weakref.ref(known)
    return known


def group_named(name: str) -> Group:
    """Return the group of a name. A process group takes precedence over a group made from a store. Local.

    Raises:
        GroupError: There is no such group, or several made from stores have the name.
    """
    reference = _of_names.get(name)
    known = None if reference is None else reference()
    if known is not None and not known.closed and (known.made_from_store or known.process_group in _c10d._world.pg_map):
        return known
    if not _is_process_group(name):
        made = [group for group in known_groups() if group.name == name and group.made_from_store and not group.closed]
        if len(made) == 1:
            return _remember(made[0])
        if made:
            raise GroupError(
                f"{len(made)} groups made from stores are named {name!r}",
                hint="give them different names, or pass the group itself to symmem.ops",
            )
    return _remember(_of_process_group(_process_group(name)))


def name_of(group: GroupLike = None) -> str:
    """Return the name by which operators know a group. Local.

    Args:
        group: As for :func:`resolve_group`. From here on, the name of a group made from a store refers to that group,
            as long as it lives.

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
        _remember(resolved)
    return resolved.name


def is_current(group: Group) -> bool:
    """Whether the name of a group still refers to it. Local.

    Raises:
        GroupError: No group has that name any more.
    """
    # Not `group.process_group`, because compiled code asks at every call.
    in_use = not group.closed and _c10d is not None and group._process_group() in _c10d._world.pg_map
    return in_use or group_named(group.name) is group


def _remember(group: Group) -> Group:
    for name in [name for name, reference in list(_of_names.items()) if reference() is None]:
        _of_names.pop(name, None)
    _of_names[group.name] = weakref.ref(group)
    return group


def _is_process_group(name: str) -> bool:
    return _c10d is not None and name in _c10d._world.pg_names.values()


@untraced
def _of_mesh_or_process_group(group: ProcessGroup | DeviceMesh | None) -> Group:
    return _of_process_group(_process_group(group), getattr(group, "mesh_dim_names", None) or ())


@untraced
def _of_process_group(process_group: ProcessGroup, dimensions: Sequence[str] = ()) -> Group:
    known = _of_process_groups.get(process_group)
    if known is None or known.closed:
        rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
        store = _c10d._get_process_group_store(process_group)
        known = Group(store, rank, size, process_group.group_name, process_group, _aliases(process_group, dimensions))
        _of_process_groups[process_group] = known
    return known


def _aliases(process_group: ProcessGroup, dimensions: Sequence[str]) -> list[str]:
    """The names of a process group that a user has given: its description, and the dimension of its DeviceMesh.

    Torch describes the group of a dimension NAME as mesh_NAME. But a dimension that has all ranks uses the default
    group, so its name is known only if the mesh itself was passed.
    """
    description = getattr(process_group, "group_desc", "undefined")
    names = [] if description == "undefined" else [description]
    names += [name for dimension in dimensions for name in (dimension, f"mesh_{dimension}")]
    names += [name.removeprefix("mesh_") for name in names]
    return list(dict.fromkeys(names))


@untraced
def _process_group(group: ProcessGroup | DeviceMesh | str | None) -> ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise GroupError(
            "torch.distributed is not initialised, so there is no process group",
            hint="call torch.distributed.init_process_group(), or pass symmem.Group.from_store(rank, size, store)",
        )
    if group is None:
        return dist.group.WORLD  # type: ignore[return-value]
    if isinstance(group, str):
        names = sorted(_c10d._world.pg_names.values())
        if group not in names:
            raise GroupError(f"there is no process group {group!r} here; there are {names}")
        found: ProcessGroup = _c10d._resolve_process_group(group)
        return found
    if isinstance(group, dist.ProcessGroup):
        if group not in _c10d._world.pg_map:
            raise GroupError(
                "torch does not know the process group: it was destroyed, or not made by torch.distributed.new_group()",
                hint="make a new process group, and pass that",
            )
        if dist.get_rank(group) < 0:
            raise GroupError("this process is not a member of the group")
        return group
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
        raise GroupError("this process is not a member of the group", hint="call it on its members only")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise GroupError(
                f"a DeviceMesh of {group.ndim} dimensions is several groups",
                hint=f"pass one dimension, such as mesh[{(group.mesh_dim_names or ('name',))[0]!r}]",
            )
        return group.get_group()
    raise GroupError(
        f"{type(group).__name__} is not a group",
        hint="pass a process group, its name, a one-dimensional DeviceMesh, a symmem.Group, or None",
    )
