"""Inspection of a running process from outside: the socket, and the answers. Loads no torch by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from symmem.backends.base import RankGroup

__all__ = ["start_inspection"]


def start_inspection(group: RankGroup) -> None:
    """Start the inspection server of this process, unless the settings of its new group switch it off."""
    if group.settings.inspection == "on":
        from symmem.service import server

        server.begin()
