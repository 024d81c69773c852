"""The settings, each declared once, and the one precedence: argument > environment > YAML > defaults.

The fields of :class:`Settings` are the only declaration: the options of ``SYMMEM_ENABLE``, the keys of the
cluster file, ``symmem config show`` and the table in ``docs/configuration.md`` are all made from them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from symmem.config.kinds import (
    AUTO,
    BACKEND_ORDER,
    BUILT_IN,
    CHECK,
    COLLECTIVE_CHECK,
    DURATION,
    FACTOR,
    INSPECTION,
    MULTICAST,
    REPORT,
    SIZE,
    SYMMETRIC_ARGUMENTS,
    one,
)
from symmem.config.machine import gpu_model, multicast_blocker
from symmem.config.options import Option, find_option, parse_options, place_of
from symmem.config.values import Found, InvalidValue, Kind, advise, read, shown
from symmem.errors import ConfigError

__all__ = [
    "BACKEND_OPTION",
    "SETTINGS",
    "Setting",
    "Settings",
    "check_sources",
    "load_settings",
    "reference_table",
]

if TYPE_CHECKING:
    from symmem.config.cluster import Cluster

T = TypeVar("T")

BACKEND_OPTION = "symmetric_memory_backend"
"""The option that chooses backends, under the name that nvFuser gave it."""


_TABLE_VALUES = f"{BUILT_IN}, or the path of a table of algorithms"


def _parse_table(value: object) -> str:
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise InvalidValue(f"expected {_TABLE_VALUES}; got {shown(value)}", f"write {_TABLE_VALUES}")
    if value == BUILT_IN:
        return BUILT_IN
    from symmem.config.kernel_tables import PLAN, read_algorithms

    file = os.path.abspath(value)
    try:
        read_algorithms(file)
    except ConfigError as error:
        raise InvalidValue(error.what, error.hint or PLAN) from None
    return file


_TABLE: Kind[str] = Kind(one(_parse_table, _TABLE_VALUES), str, _TABLE_VALUES)
"""A table of algorithms: the absolute path of a valid file, or :data:`BUILT_IN`."""


def _declare(kind: Kind[T], default: T, about: str, option: str | None = None) -> T:
    """A field of :class:`Settings`; its type as seen from outside is that of its value."""
    metadata = {"kind": kind, "help": about, "option": option}
    declared: Any = field(default=default, metadata=metadata)
    value: T = declared
    return value


@dataclass(frozen=True)
class Settings:
    """Every setting of symmem, valid and in its own unit; made by :func:`load_settings`.

    Attributes:
        backend: Names of backends in the order of preference, or ``("auto",)``.
        multicast: ``"auto"``, or ``"off"``: then no code path may create a multicast object.
        rendezvous_timeout: Seconds.
        signal_timeout: Seconds.
        arena_size: Bytes on each rank.
        arena_growth: Factor.
        arena_limit: Bytes on each rank.
        allocation_check: ``"meeting"`` or ``"each"``.
        symmetric_arguments: ``"error"``, ``"copy"`` or ``"off"``.
        collective_check: ``"off"`` or ``"each"``.
        algorithms: ``"built-in"``, or the absolute path of a table of algorithms.
        compile_report: ``"off"``, or the absolute path of a file.
        inspection: ``"on"`` or ``"off"``: then nobody can ask what this rank of the group does.
        origins: For each setting, the text that says where its value came from.
    """

    backend: tuple[str, ...] = _declare(
        BACKEND_ORDER,
        (AUTO,),
        "Backends in the order of preference; `auto` chooses by probing.",
        option=BACKEND_OPTION,
    )
    multicast: str = _declare(MULTICAST, "auto", "Whether multicast may be used where the hardware has it.")
    rendezvous_timeout: float = _declare(
        DURATION, 300.0, "How long each collective step waits for the other ranks before it fails."
    )
    signal_timeout: float = _declare(
        DURATION, 300.0, "How long a barrier or a wait for a signal may take before it fails."
    )
    arena_size: int = _declare(SIZE, 64 * 2**20, "Size of an arena's first segment, on each rank.")
    arena_growth: float = _declare(FACTOR, 2.0, "How much larger each further segment is than the one before.")
    arena_limit: int = _declare(SIZE, 2**40, "What the segments of an arena may have together, on each rank.")
    allocation_check: str = _declare(
        CHECK, "meeting", "When ranks compare what they have allocated: whenever they meet, or at each allocation."
    )
    symmetric_arguments: str = _declare(
        SYMMETRIC_ARGUMENTS,
        "error",
        "What happens where an op that is checked gets plain memory for an argument that is registered as symmetric.",
    )
    collective_check: str = _declare(
        COLLECTIVE_CHECK,
        "off",
        "Whether ranks compare operation, shape and dtype before each collective operation; for finding mistakes.",
    )
    algorithms: str = _declare(
        _TABLE, BUILT_IN, "Which kernels run collective operations on CUDA; `symmem tune` writes such a table."
    )
    compile_report: str = _declare(
        REPORT, "off", "Where each rank appends what torch.compile did with registered arguments, as JSON lines."
    )
    inspection: str = _declare(
        INSPECTION, "on", "Whether `symmem top`, `inspect` and `dump` of the same user can see what each rank does."
    )
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting.

    Attributes:
        name: Field of :class:`Settings`, key of the cluster file, and name of the argument.
        option: Name of the option in ``SYMMEM_ENABLE``.
        kind: How values are read and written, and their unit.
        default: The value that holds where nobody says otherwise.
        help: One line.
    """

    name: str
    option: str
    kind: Kind[Any]
    default: object
    help: str


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        item.name: Setting(
            name=item.name,
            option=item.metadata["option"] or item.name,
            kind=item.metadata["kind"],
            default=item.default,
            help=item.metadata["help"],
        )
        for item in fields(Settings)
        if item.metadata
    }
)
"""All settings by name, in the order in which they are shown."""

_KINDS = {name: setting.kind for name, setting in SETTINGS.items()}
_BY_OPTION = {setting.option: setting for setting in SETTINGS.values()}


def load_settings(
    overrides: Mapping[str, object] | None = None,
    *,
    group: str | None = None,
    environ: Mapping[str, str] | None = None,
    hostname: str | None = None,
    gpu: str | None = None,
) -> Settings:
    """Merge all sources into one :class:`Settings`. Nothing is collective, and nothing is remembered.

    Args:
        overrides: Arguments of the caller by name; None as a value means that it was not given.
        group: Name of the group, matched by the ``groups`` of the cluster file; None matches no entry.
        environ: The environment; that of the process by default.
        hostname: Matched by the ``hosts`` of the cluster file; this host's name by default.
        gpu: The GPU model, matched by ``gpu`` in the ``hosts`` entries; this host's by default, and an empty
            text for none.

    Raises:
        ConfigError: Any source is not valid, overridden values included; the text names the place.
    """
    environ = os.environ if environ is None else environ
    found = {name: Found(setting.default, "default") for name, setting in SETTINGS.items()}
    if file := environ.get("SYMMEM_CONFIG"):
        hostname = socket.gethostname() if hostname is None else hostname
        gpu = gpu_model() if gpu is None else gpu
        found |= _cluster(file).values(hostname, gpu or None, group)
    found |= _from_nvfuser(environ) | _from_environment(environ) | _from_arguments(overrides or {})
    if blocker := multicast_blocker(environ):
        found["multicast"] = Found("off", blocker)
    values: dict[str, Any] = {name: item.value for name, item in found.items()}
    return Settings(**values, origins={name: item.origin for name, item in found.items()})


def check_sources(environ: Mapping[str, str], file: str | None = None) -> Iterator[tuple[str, str | ConfigError]]:
    """Check each source by itself, so that an error in one does not hide those of the others.

    Args:
        environ: The environment.
        file: The cluster file; the one that ``SYMMEM_CONFIG`` names by default.

    Yields:
        The source, and what was found in it or the error.
    """
    for variable, source in (("SYMMEM_ENABLE", _from_environment), ("NVFUSER_ENABLE", _from_nvfuser)):
        try:
            given = ", ".join(_spelled(source(environ)))
            yield variable, given or "nothing set"
        except ConfigError as error:
            yield variable, error
    file = environ.get("SYMMEM_CONFIG") or None if file is None else file
    if file is None:
        yield "SYMMEM_CONFIG", "nothing set"
        return
    try:
        yield file, f"entries: {', '.join(entry.path for entry in _cluster(file).entries) or 'none'}"
    except ConfigError as error:
        yield file, error


def reference_table() -> str:
    """The table of all settings in Markdown, as ``docs/configuration.md`` has it."""
    lines = [
        "| setting and YAML key | option in `SYMMEM_ENABLE` | values | unit | default | what it does |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for setting in SETTINGS.values():
        default = setting.kind.format(setting.default)
        argument = "value[,value...]" if setting.kind.several else "value"
        lines.append(
            f"| `{setting.name}` | `{setting.option}({argument})` | {setting.kind.values} "
            f"| {setting.kind.unit or '-'} | `{default}` | {setting.help} |"
        )
    return "\n".join(lines) + "\n"


def _spelled(found: Mapping[str, Found]) -> Iterator[str]:
    for name, item in found.items():
        yield f"{name} = {SETTINGS[name].kind.format(item.value)}"


def _cluster(file: str) -> Cluster:
    from symmem.config.cluster import read_file

    return _parsed(read_file(file), file)


@lru_cache(maxsize=4)
def _parsed(text: str, file: str) -> Cluster:
    # Keyed by the text, which is read at every call: an edited file takes effect at once.
    from symmem.config.cluster import parse_cluster

    return parse_cluster(text, file, _KINDS)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Found]:
    options = parse_options(environ.get("SYMMEM_ENABLE", ""), "SYMMEM_ENABLE", _BY_OPTION)
    return dict(_from_option(option, "SYMMEM_ENABLE") for option in options)


def _from_nvfuser(environ: Mapping[str, str]) -> dict[str, Found]:
    option = find_option(environ.get("NVFUSER_ENABLE", ""), "NVFUSER_ENABLE", BACKEND_OPTION)
    return dict([_from_option(option, "NVFUSER_ENABLE")]) if option else {}


def _from_option(option: Option, variable: str) -> tuple[str, Found]:
    setting = _BY_OPTION[option.name]
    origin = place_of(variable, option.position)
    places = [f"{place_of(variable, argument.position)}: {option.name}" for argument in option.args]
    texts = [argument.text for argument in option.args]
    return setting.name, read(setting.kind, texts, origin, f"{origin}: {option.name}", places)


def _from_arguments(overrides: Mapping[str, object]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for name, value in overrides.items():
        if name not in SETTINGS:
            raise ConfigError(f"unknown setting {name!r}", hint=advise(str(name), SETTINGS))
        if value is not None:
            kind, place = SETTINGS[name].kind, f"argument {name}"
            items = list(value) if kind.several and isinstance(value, (list, tuple)) else [value]
            places = [f"{place}[{index}]" for index in range(len(items))] if len(items) > 1 else [place]
            found[name] = read(kind, items, "argument", place, places)
    return found
