"""How raw values become checked ones, whichever source they come from.

Every source (argument, environment, YAML) hands raw values, mostly texts, to the same :class:`Kind`, so that
a value means the same wherever it is written. YAML scalars come as the text that stands in the file: YAML's
own reading of ``off`` as False, or of ``60:30`` as 3630, never applies.
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
    """A raw value is not valid; :func:`read`, which knows the place, turns this into a :class:`ConfigError`.

    Args:
        what: What is wrong with the value.
        hint: What to write instead.
        item: Index of the item concerned where several were given; None if it is about all of them.
    """

    def __init__(self, what: str, hint: str, item: int | None = 0) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.item = item


@dataclass(frozen=True)
class Found:
    """A value and the text that says where it came from."""

    value: object
    origin: str


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How the values of a setting are read and written.

    Attributes:
        parse: Turns the raw items into the value; raises :class:`InvalidValue`.
        format: The inverse: a text that ``parse`` reads as the same value.
        values: What may be written, for people.
        unit: Unit of the value and of plain numbers; empty if there is none.
        several: Whether a list of items may be given; otherwise it is exactly one.
    """

    parse: Callable[[Sequence[object]], T]
    format: Callable[[T], str]
    values: str
    unit: str = ""
    several: bool = False


def read(kind: Kind[T], items: Sequence[object], origin: str, place: str, places: Sequence[str]) -> Found:
    """Parse what one source gives for one setting.

    Args:
        kind: How to read it.
        items: The raw values.
        origin: Where they came from, kept with the value.
        place: Names the place of the whole in an error.
        places: Names the place of each item in an error.

    Raises:
        ConfigError: A value is not valid; the text begins with its place.
    """
    try:
        return Found(kind.parse(items), origin)
    except InvalidValue as bad:
        where = place if bad.item is None else places[bad.item]
        raise ConfigError(f"{where}: {bad.what}", hint=bad.hint) from None


def shown(value: object) -> str:
    """A raw value as it appears in an error: short, whatever was given."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:57]!r}..."
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a value of type {type(value).__name__}"


def advise(word: str, choices: Collection[str]) -> str:
    """The hint for an unknown word: all valid ones, and the nearest."""
    text = f"use one of: {', '.join(choices)}"
    near = difflib.get_close_matches(word[:80], choices, n=1, cutoff=0.5)
    return f"{text}; did you mean {near[0]!r}?" if near else text
