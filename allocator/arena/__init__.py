"""Arenas: symmetric memory from which every rank sub-allocates the same blocks without communication."""

from __future__ import annotations

from typing import TYPE_CHECKING

from symmem._lazy import lazy_exports

if TYPE_CHECKING:
    from symmem.arena.arena import Arena, arena_for, supports_arenas

__all__ = ["Arena", "arena_for", "supports_arenas"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Arena": "symmem.arena.arena",
        "arena_for": "symmem.arena.arena",
        "supports_arenas": "symmem.arena.arena",
    },
)
