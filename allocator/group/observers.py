"""Functions that the package calls with every new group. A module apart, because it loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from symmem.backends.base import RankGroup

__all__ = ["group_made"]

group_made: list[Callable[[RankGroup], object]] = []
"""Called in order when a group is made; for example to start the inspection server."""
