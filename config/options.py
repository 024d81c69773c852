"""The grammar of ``SYMMEM_ENABLE``. nvFuser's ``NVFUSER_ENABLE`` has the same grammar.

Options are separated by commas and may have arguments in parentheses. Spaces are allowed around every part::

    symmetric_memory_backend(native,pytorch_nccl), multicast(off)

Positions count characters of the variable's value from 1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NoReturn

from symmem.config.values import advise, shown
from symmem.errors import ConfigError

__all__ = ["Argument", "Option", "find_option", "parse_options", "place_of"]

_SIMILAR = 0.8
"""The ratio of difflib from which a word is a misspelling. No option of nvFuser comes near."""


@dataclass(frozen=True)
class Argument:
    """One argument of an option, and the position of its first character."""

    text: str
    position: int


@dataclass(frozen=True)
class Option:
    """One option with its arguments, and the position of its first character."""

    name: str
    args: tuple[Argument, ...]
    position: int


def place_of(variable: str, position: int) -> str:
    """The name of a character of an environment variable, in errors and origins."""
    return f"{variable}, character {position}"


def parse_options(text: str, variable: str, known: Collection[str]) -> tuple[Option, ...]:
    """Parse the value of an environment variable that belongs to symmem.

    Args:
        text: The value; empty or blank means no options.
        variable: Name of the variable, for errors.
        known: The names of options that exist.

    Raises:
        ConfigError: Unbalanced parenthesis, empty item, unknown or repeated option.
    """
    options: dict[str, Option] = {}
    for start, end in _items(text, variable) if text.strip() else ():
        option = _option(text, start, end, variable)
        if option.name not in known:
            what = f"unknown option {shown(option.name)}"
            _fail(variable, option.position, what, advise(option.name, known))
        _add(options, option, variable)
    return tuple(options.values())


def find_option(text: str, variable: str, name: str) -> Option | None:
    """Find one option in an environment variable that belongs to another program.

    Other options are not checked, unless their names are so similar that a typing error is likely. Unbalanced
    parentheses are an error if the text mentions the option, because they hide where an option ends.

    Raises:
        ConfigError: The option is malformed, misspelled or given twice.
    """
    if not any(_is_like(word, name) for word in re.split(r"[\s,()]+", text)):
        return None
    options: dict[str, Option] = {}
    for start, end in _items(text, variable):
        given = text[start:end].partition("(")[0].strip()
        if given == name:
            _add(options, _option(text, start, end, variable), variable)
        elif _is_like(given, name):
            position = start + _indent(text[start:end]) + 1
            _fail(variable, position, f"unknown option {shown(given)}", f"did you mean {name!r}?")
    return options.get(name)


def _is_like(word: str, name: str) -> bool:
    """Whether a word is the name, or a likely misspelling of it."""
    return bool(difflib.get_close_matches(word.lower().replace("-", "_"), [name], cutoff=_SIMILAR))


def _fail(variable: str, position: int, what: str, hint: str) -> NoReturn:
    raise ConfigError(f"{place_of(variable, position)}: {what}", hint=hint)


def _add(options: dict[str, Option], option: Option, variable: str) -> None:
    if option.name in options:
        first = options[option.name].position
        what = f"option {option.name!r} is given twice, first at character {first}"
        _fail(variable, option.position, what, "give each option once, with all its arguments")
    options[option.name] = option


def _items(text: str, variable: str) -> Iterator[tuple[int, int]]:
    """Start and end of the items between commas outside of parentheses."""
    start, opened = 0, 0
    for index, char in enumerate(text):
        if char == "(":
            if opened:
                _fail(variable, index + 1, "parentheses cannot be nested", "close the first by ')'")
            opened = index + 1
        elif char == ")":
            if not opened:
                _fail(variable, index + 1, "')' without '('", "remove it, or write name(argument)")
            opened = 0
        elif char == "," and not opened:
            yield start, index
            start = index + 1
    if opened:
        _fail(variable, opened, "'(' is never closed", "add ')' after the last argument")
    yield start, len(text)


def _option(text: str, start: int, end: int, variable: str) -> Option:
    """Parse one item. Its parentheses are balanced and not nested."""
    before, parenthesis, rest = text[start:end].partition("(")
    name = _word(before, start, variable, "name(argument)")
    if not parenthesis:
        return Option(name.text, (), name.position)
    inside, _, after = rest.partition(")")
    opened = start + len(before)
    if after.strip():
        position = opened + len(inside) + 2 + _indent(after) + 1
        _fail(variable, position, f"expected ',' but got {shown(after.strip())}", "separate options by ','")
    return Option(name.text, tuple(_arguments(inside, opened + 1, variable)), name.position)


def _arguments(text: str, start: int, variable: str) -> Iterator[Argument]:
    for piece in text.split(","):
        yield _word(piece, start, variable, "an argument")
        start += len(piece) + 1


def _word(piece: str, start: int, variable: str, expected: str) -> Argument:
    """Strip a piece of text and return it with its position. It must not be blank."""
    word = piece.strip()
    if not word:
        _fail(variable, start + 1, "empty item", f"write {expected} here, or remove the separator")
    return Argument(word, start + _indent(piece) + 1)


def _indent(piece: str) -> int:
    return len(piece) - len(piece.lstrip())
