"""Groups of ranks: identity, agreement, join, comparison, and the transports between ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from symmem._lazy import lazy_exports

if TYPE_CHECKING:
    from symmem.group.agreement import CollectiveOperation
    from symmem.group.compare import differing
    from symmem.group.group import Group, check_timeout, known_groups
    from symmem.group.resolve import GroupLike, default_group, resolve_group

__all__ = [
    "CollectiveOperation",
    "Group",
    "GroupLike",
    "check_timeout",
    "default_group",
    "differing",
    "known_groups",
    "resolve_group",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CollectiveOperation": "symmem.group.agreement",
        "Group": "symmem.group.group",
        "GroupLike": "symmem.group.resolve",
        "check_timeout": "symmem.group.group",
        "default_group": "symmem.group.resolve",
        "differing": "symmem.group.compare",
        "known_groups": "symmem.group.group",
        "resolve_group": "symmem.group.resolve",
    },
)
