"""Groups of ranks: identity, agreement, joining, and the transports between ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from symmem._lazy import lazy_exports

if TYPE_CHECKING:
    from symmem.group.group import (
        Collective,
        Group,
        GroupLike,
        Place,
        check_timeout,
        default_group,
        differing,
        known_groups,
        resolve_group,
    )

__all__ = [
    "Collective",
    "Group",
    "GroupLike",
    "Place",
    "check_timeout",
    "default_group",
    "differing",
    "known_groups",
    "resolve_group",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Collective": "symmem.group.group",
        "Group": "symmem.group.group",
        "GroupLike": "symmem.group.group",
        "Place": "symmem.group.group",
        "check_timeout": "symmem.group.group",
        "default_group": "symmem.group.group",
        "differing": "symmem.group.group",
        "known_groups": "symmem.group.group",
        "resolve_group": "symmem.group.group",
    },
)
