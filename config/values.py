"""The checks of raw values, the same for every source.

Every source (argument, environment, YAML) passes raw values, mostly texts, to the same :class:`Kind`. So a value has
the same meaning in every source. A YAML scalar is passed as the text in the file: YAML would read ``off`` as False and
``60:30`` as 3630.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from symmem.errors import ConfigError

__all__ = ["Found", "InvalidValue", "Kind", "advise", "read", "shown"]

T = TypeVar("T")


class InvalidValue(Exception):
    """A raw value is not valid. :func:`read` adds the place and raises a :class:`ConfigError`.

    Args:
        what: The problem with the value.
        hint: How to write a valid value.
        item: Index of the invalid item; None if the problem concerns all items.
    """

    def __init__(self, what: str, hint: str, item: int | None = 0) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.item = item


@dataclass(frozen=True)
class Found:
    """A value and its origin, as text."""

    value: object
    origin: str


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of setting: how to read and write its values.

    Attributes:
        parse: Converts the raw items to the value. Raises :class:`InvalidValue`.
        format: The inverse: returns a text that ``parse`` reads as the same value.
        values: The valid values, in words.
        unit: The unit of the value and of plain numbers; empty if it has no unit.
        several: Whether a list of items is valid. Otherwise there is exactly one item.
    """

    parse: Callable[[Sequence[object]], T]
    format: Callable[[T], str]
    values: str
    unit: str = ""
    several: bool = False


def read(kind: Kind[T], items: Sequence[object], origin: str, place: str, places: Sequence[str]) -> Found:
    """Parse the items of one setting from one source.

    Args:
        kind: The kind of the setting.
        items: The raw values.
        origin: The origin to keep with the value.
        place: The place of all items together, for errors.
        places: The places of the single items, for errors.

    Raises:
        ConfigError: A value is not valid. The text begins with its place.
    """
    try:
        return Found(kind.parse(items), origin)
    except InvalidValue as bad:
        where = place if bad.item is None else places[bad.item]
        raise ConfigError(f"{where}: {bad.what}", hint=bad.hint) from None


def shown(value: object) -> str:
    """A raw value for an error: always short."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:57]!r}..."
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a value of type {type(value).__name__}"


def advise(word: str, choices: Collection[str]) -> str:
    """The hint for an unknown word: all valid words, and the nearest of them."""
    text = f"use one of: {', '.join(choices)}"
    near = difflib.get_close_matches(word[:80], choices, n=1, cutoff=0.5)
    return f"{text}; did you mean {near[0]!r}?" if near else text
