"""The kinds of settings: sizes, durations, factors, choices and backends."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from fractions import Fraction
from typing import NoReturn, TypeVar

from symmem.config.values import InvalidValue, Kind, advise, shown

__all__ = [
    "AUTO",
    "BACKENDS",
    "BACKEND_ORDER",
    "BUILT_IN",
    "CHECK",
    "COLLECTIVE_CHECK",
    "COMPILED_COLLECTIVES",
    "DURATION",
    "FACTOR",
    "INSPECTION",
    "MAX_SECONDS",
    "MULTICAST",
    "REPORT",
    "SIZE",
    "SYMMETRIC_ARGUMENTS",
    "TORCH_BACKEND",
    "installed_backends",
    "one",
]

T = TypeVar("T")

AUTO = "auto"
"""The backend name that selects a backend by probing."""

BACKENDS = ("native", "pytorch_nccl", "pytorch_nvshmem", "pytorch_cuda", "nvshmem", "host")
"""The names of the built-in backends."""

BUILT_IN = "built-in"
"""The value of `algorithms` that selects the table that comes with symmem."""

_ENTRY_POINTS = "symmem.backends"
_MAX_BYTES = 2**63 - 1
# poll() and socket timeouts count milliseconds in 31 bits: 24.8 days.
MAX_SECONDS = 24 * 86400
"""The longest time of a setting or an argument."""
# Growth multiplies sizes in bytes. A larger factor is a mistake, and would overflow at the second segment.
_MAX_FACTOR = 1024
_SIZE_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_TIME_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
# The number of digits is limited because int() refuses texts of more than 4300 digits.
_SIZE_TEXT = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)")
_NUMBER_TEXT = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,4})?)\s*([A-Za-z]*)")


def installed_backends() -> tuple[str, ...]:
    """The names in the entry-point group ``symmem.backends`` of other packages."""
    # A search of the installed packages takes milliseconds, so it is done only for an unknown name.
    from importlib.metadata import entry_points

    return tuple(sorted({entry.name for entry in entry_points(group=_ENTRY_POINTS)} - set(BACKENDS)))


def one(parse: Callable[[object], T], values: str) -> Callable[[Sequence[object]], T]:
    """A parser that applies ``parse`` to exactly one item. ``values`` describes the valid values, for errors."""

    def parse_items(items: Sequence[object]) -> T:
        if len(items) == 1:
            return parse(items[0])
        item = 1 if items else None
        raise InvalidValue(f"expected one value, got {len(items) or 'none'}", f"give one of: {values}", item)

    return parse_items


def _refuse(value: object, values: str) -> NoReturn:
    got = "nothing" if isinstance(value, str) and not value.strip() else shown(value)
    raise InvalidValue(f"expected {values}; got {got}", f"write {values}")


def _split(
    value: str, pattern: re.Pattern[str], units: Mapping[str, float], base: str, values: str
) -> tuple[str, float]:
    """Split a text into its number and the factor of its unit. A plain number is in the unit ``base``."""
    match = pattern.fullmatch(value.strip())
    if match is None:
        _refuse(value, values)
    number, unit = match.groups()
    if unit and unit not in units:
        raise InvalidValue(f"unknown unit {shown(unit)} in {shown(value)}", advise(unit, units))
    return number, units[unit or base]


_SIZE_VALUES = "a size in bytes, such as 67108864, 64MiB or 2GiB"
_DURATION_VALUES = "a time in seconds, such as 90, 90s, 500ms, 5m or 1h"
_REPORT_VALUES = "off, or the path of a file"
_WORDS = ("on", "yes", "true", "no", "false", "null", "none", "~")  # probably not meant as the name of a file
_FACTOR_VALUES = f"a factor from 1 to {_MAX_FACTOR}"


def _parse_size(value: object) -> int:
    if isinstance(value, str):
        number, factor = _split(value, _SIZE_TEXT, _SIZE_UNITS, "B", _SIZE_VALUES)
        size = Fraction(number) * Fraction(factor)
        if size.denominator != 1:
            raise InvalidValue(f"{shown(value)} is not a whole number of bytes", f"write {_SIZE_VALUES}")
    elif isinstance(value, int) and not isinstance(value, bool):
        size = Fraction(value)
    else:
        _refuse(value, _SIZE_VALUES)
    if not 1 <= size <= _MAX_BYTES:
        raise InvalidValue(f"{shown(value)} is not within 1 to {_MAX_BYTES} bytes", f"write {_SIZE_VALUES}")
    return int(size)


def _format_size(size: int) -> str:
    unit = next(unit for unit, factor in reversed(_SIZE_UNITS.items()) if size % factor == 0)
    return f"{size // _SIZE_UNITS[unit]}{unit}"


def _parse_duration(value: object) -> float:
    seconds: float
    if isinstance(value, str):
        number, factor = _split(value, _NUMBER_TEXT, _TIME_UNITS, "s", _DURATION_VALUES)
        seconds = float(number) * factor
    elif isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = value
    else:
        _refuse(value, _DURATION_VALUES)
    # Also false for NaN.
    if not 0 < seconds <= MAX_SECONDS:
        what = f"{shown(value)} is not more than 0 and at most {MAX_SECONDS} seconds (24 days)"
        raise InvalidValue(what, f"write {_DURATION_VALUES}")
    return float(seconds)


def _parse_factor(value: object) -> float:
    factor: float
    if isinstance(value, str):
        factor = float(_split(value, _NUMBER_TEXT, {"": 1}, "", _FACTOR_VALUES)[0])
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        factor = value
    else:
        _refuse(value, _FACTOR_VALUES)
    if not 1 <= factor <= _MAX_FACTOR:
        raise InvalidValue(f"{shown(value)} is not within 1 to {_MAX_FACTOR}", f"write {_FACTOR_VALUES}")
    return float(factor)


def _format_number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _choice(*choices: str) -> Kind[str]:
    """A kind that takes one of these words."""

    def parse(value: object) -> str:
        if isinstance(value, str) and value in choices:
            return value
        word = value if isinstance(value, str) else ""
        raise InvalidValue(f"unknown value {shown(value)}", advise(word, choices))

    values = " or ".join(choices)
    return Kind(one(parse, values), str, values)


def _check_backend(name: object, item: int) -> str:
    if not isinstance(name, str):
        raise InvalidValue(f"expected the name of a backend; got {shown(name)}", "write its name", item)
    if name == AUTO or name in BACKENDS:
        return name
    installed = installed_backends()
    if name in installed:
        return name
    raise InvalidValue(f"unknown backend {shown(name)}", advise(name, (AUTO, *BACKENDS, *installed)), item)


def _parse_backends(items: Sequence[object]) -> tuple[str, ...]:
    if not items:
        raise InvalidValue("expected a backend, got none", advise("", (AUTO, *BACKENDS)), None)
    names = tuple(_check_backend(name, item) for item, name in enumerate(items))
    for item, name in enumerate(names):
        if name in names[:item]:
            raise InvalidValue(f"backend {name!r} is named twice", "name each backend once", item)
        if name == AUTO and len(names) > 1:
            raise InvalidValue(
                f"{AUTO!r} cannot be combined with other backends",
                f"write {AUTO!r} alone, or only the names in the order of preference",
                item,
            )
    return names


SIZE: Kind[int] = Kind(one(_parse_size, _SIZE_VALUES), _format_size, _SIZE_VALUES, "bytes")
"""A number of bytes from 1 to 2**63 - 1. Text may have a unit: B, KiB, MiB, GiB or TiB."""

DURATION: Kind[float] = Kind(
    one(_parse_duration, _DURATION_VALUES),
    lambda seconds: f"{_format_number(seconds)}s",
    _DURATION_VALUES,
    "seconds",
)
"""A time in seconds, more than 0 and at most 24 days. Text may have a unit: ms, s, m or h."""

FACTOR: Kind[float] = Kind(one(_parse_factor, _FACTOR_VALUES), _format_number, _FACTOR_VALUES, "factor")
"""A factor of growth."""

MULTICAST = _choice("auto", "off")
"""Whether multicast may be used."""

CHECK = _choice("meeting", "each")
"""The times at which ranks compare allocations."""

COLLECTIVE_CHECK = _choice("off", "each")
"""Whether ranks compare the arguments of collective operations."""

INSPECTION = _choice("on", "off")
"""Whether a process answers questions about its ranks."""

COMPILED_COLLECTIVES = _choice("auto", "on", "off")
"""The groups whose functional collectives compiled graphs give to symmem's operators."""

TORCH_BACKEND = _choice("off", "on")
"""Whether torch's symmetric memory uses symmem for CPU tensors."""


def _parse_report(value: object) -> str:
    """``off``, or the absolute path of a file that can be made."""
    if not isinstance(value, str) or not value:
        raise InvalidValue(f"expected {_REPORT_VALUES}, got {shown(value)}", "write the path of a file, or off")
    if value == "off":
        return value
    if value.lower() in _WORDS:
        raise InvalidValue(f"expected {_REPORT_VALUES}, got {shown(value)}", f"write ./{value} for a file of that name")
    path = os.path.abspath(os.path.expanduser(value))
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path)):
        reason = "is a folder" if os.path.isdir(path) else "is in a folder that does not exist"
        raise InvalidValue(f"{shown(value)} {reason}", "name a file in a folder that exists")
    return path


REPORT: Kind[str] = Kind(one(_parse_report, _REPORT_VALUES), str, _REPORT_VALUES)
"""The file for reports of the compiler: an absolute path, or ``off``."""

SYMMETRIC_ARGUMENTS = _choice("error", "copy", "off")
"""The treatment of an argument that should be in symmetric memory, but is not."""

BACKEND_ORDER: Kind[tuple[str, ...]] = Kind(
    _parse_backends,
    ", ".join,
    f"{AUTO}, or one or more of {', '.join(BACKENDS)} or an installed backend",
    several=True,
)
"""Backends in the order of preference."""
