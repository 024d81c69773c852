"""Functions that the package calls with every new group. A module apart, because it loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from symmem.backends.base import Group

__all__ = ["group_made"]

group_made: list[Callable[[Group], object]] = []
"""Called in order when a group is made; for example to start the inspection server."""
