"""All settings, and their precedence: argument > environment > YAML > default.

A setting is declared once, as a field of :class:`Settings`. The options of ``SYMMEM_ENABLE``, the keys of the cluster
file, ``symmem config show`` and the table in ``docs/configuration.md`` are made from these fields.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator, Mapping
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
    COMPILED_COLLECTIVES,
    DURATION,
    FACTOR,
    INSPECTION,
    MULTICAST,
    REPORT,
    SIZE,
    SYMMETRIC_ARGUMENTS,
    TORCH_BACKEND,
    one,
)
from symmem.config.machine import gpu_model, multicast_blocker
from symmem.config.options import Option, find_option, parse_options, place_of
from symmem.config.values import Found, InvalidValue, Kind, advise, read, shown
from symmem.errors import ConfigError

__all__ = [
    "BACKEND_OPTION",
    "GROUP_NAMES",
    "SETTINGS",
    "Setting",
    "Settings",
    "check_sources",
    "load_node_settings",
    "load_settings",
    "reference_table",
    "unmatched_entries",
]

if TYPE_CHECKING:
    from symmem.config.cluster import Cluster

T = TypeVar("T")

BACKEND_OPTION = "symmetric_memory_backend"
"""The option that chooses backends. nvFuser uses the same name."""

GROUP_NAMES = (
    "A group matches by any of its names: the name given to symmem.Group, the group_desc given to new_group, the "
    "dimension NAME of a DeviceMesh (NAME and mesh_NAME), default_pg for the default group, or the name made by torch"
)
"""The names of a group, for users."""

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
    """A field of :class:`Settings`, typed as its value."""
    metadata = {"kind": kind, "help": about, "option": option}
    declared: Any = field(default=default, metadata=metadata)
    value: T = declared
    return value


@dataclass(frozen=True)
class Settings:
    """All settings of symmem, checked and in their units. Made by :func:`load_settings`.

    Attributes:
        backend: Names of backends in the order of preference, or ``("auto",)``.
        multicast: ``"auto"`` or ``"off"``. With ``"off"``, no code may create a multicast object.
        rendezvous_timeout: Seconds.
        signal_timeout: Seconds.
        arena_size: Bytes per rank.
        arena_growth: Factor.
        arena_limit: Bytes per rank.
        allocation_check: ``"meeting"`` or ``"each"``.
        symmetric_arguments: ``"error"``, ``"copy"`` or ``"off"``.
        collective_check: ``"off"`` or ``"each"``.
        algorithms: ``"built-in"``, or the absolute path of a table of algorithms.
        compile_report: ``"off"``, or the absolute path of a file.
        compiled_collectives: ``"auto"``, ``"on"`` or ``"off"``. See :mod:`symmem.distributed.functional`.
        inspection: ``"on"`` or ``"off"``. With ``"off"``, this rank of the group does not answer the inspection tools.
        torch_backend: ``"on"`` or ``"off"``. See :mod:`symmem.torch_backend`. It is for the process, not for a group.
        origins: The origin of every setting's value, as text.
    """

    backend: tuple[str, ...] = _declare(
        BACKEND_ORDER,
        (AUTO,),
        "Backends in the order of preference. `auto` chooses by probing.",
        option=BACKEND_OPTION,
    )
    multicast: str = _declare(MULTICAST, "auto", "Whether multicast may be used if the hardware supports it.")
    rendezvous_timeout: float = _declare(
        DURATION, 300.0, "How long a collective step waits for the other ranks before it fails."
    )
    signal_timeout: float = _declare(
        DURATION, 300.0, "How long a barrier or a signal waits for another rank before it fails."
    )
    arena_size: int = _declare(SIZE, 64 * 2**20, "Size of the first segment of an arena, per rank.")
    arena_growth: float = _declare(FACTOR, 2.0, "How many times larger a new segment is than the previous segment.")
    arena_limit: int = _declare(SIZE, 2**40, "The most bytes of all segments of an arena together, per rank.")
    allocation_check: str = _declare(
        CHECK,
        "meeting",
        "When ranks compare their allocations: at collective steps (`meeting`), or at every allocation (`each`).",
    )
    symmetric_arguments: str = _declare(
        SYMMETRIC_ARGUMENTS,
        "error",
        "If a checked op gets plain memory for an argument registered as symmetric: raise, copy, or do nothing.",
    )
    collective_check: str = _declare(
        COLLECTIVE_CHECK,
        "off",
        "Whether ranks compare operation, shape and dtype before every collective operation, to find mistakes.",
    )
    algorithms: str = _declare(
        _TABLE,
        BUILT_IN,
        "The table of kernels for collective operations on CUDA. `symmem tune` writes such a table.",
    )
    compile_report: str = _declare(
        REPORT, "off", "The file to which every rank appends JSON lines about registered arguments in torch.compile."
    )
    compiled_collectives: str = _declare(
        COMPILED_COLLECTIVES,
        "auto",
        "Whether symmem's operators run the functional collectives of graphs that torch.compile makes with symmem: of "
        "process groups of the backend symmem (`auto`), of all (`on`), or of none (`off`).",
    )
    inspection: str = _declare(
        INSPECTION,
        "on",
        "Whether `symmem top`, `inspect` and `dump` of the same user can see the state of the ranks.",
    )
    torch_backend: str = _declare(
        TORCH_BACKEND,
        "off",
        "Whether torch.distributed._symmetric_memory uses symmem for CPU tensors, and offers it for CUDA, in a program "
        "that imports symmem.",
    )
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting.

    Attributes:
        name: Field of :class:`Settings`, key of the cluster file, and name of the argument.
        option: Name of the option in ``SYMMEM_ENABLE``.
        kind: How values are read and written, and their unit.
        default: The value if no source gives another.
        help: One line of description.
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
    group: str | Collection[str] | None = None,
    environ: Mapping[str, str] | None = None,
    hostname: str | None = None,
    gpu: str | None = None,
) -> Settings:
    """Merge all sources into one :class:`Settings`. It is not collective, and keeps no state.

    Args:
        overrides: The caller's arguments by name. A value of None means that the argument was not given.
        group: Name or names of the group, for the ``groups`` of the cluster file. None matches no entry.
        environ: The environment; by default, the environment of the process.
        hostname: Host name for the ``hosts`` of the cluster file; by default, the name of this host.
        gpu: GPU model for ``gpu`` in the ``hosts`` entries; by default, the model of this host. An empty text means
            no GPU.

    Raises:
        ConfigError: A source is not valid. Overridden values are checked too. The text names the place.
    """
    environ = os.environ if environ is None else environ
    found = {name: Found(setting.default, "default") for name, setting in SETTINGS.items()}
    if file := environ.get("SYMMEM_CONFIG"):
        hostname = socket.gethostname() if hostname is None else hostname
        gpu = gpu_model() if gpu is None else gpu
        found |= _cluster(file).values(hostname, gpu or None, _names(group))
    found |= _from_nvfuser(environ) | _from_environment(environ) | _from_arguments(overrides or {})
    if blocker := multicast_blocker(environ):
        found["multicast"] = Found("off", blocker)
    values: dict[str, Any] = {name: item.value for name, item in found.items()}
    return Settings(**values, origins={name: item.origin for name, item in found.items()})


def load_node_settings(
    hostname: str,
    gpu: str | None = None,
    *,
    group: str | Collection[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of another host that reads the same cluster file and has the same environment.

    Args:
        hostname: Name of the host.
        gpu: Its GPU model; an empty text for a host without a GPU; None if it is unknown.
        group: See :func:`load_settings`.
        environ: See :func:`load_settings`.

    Raises:
        ConfigError: See :func:`load_settings`; or the settings depend on the GPU model, and it is unknown.
    """
    environ = os.environ if environ is None else environ
    if gpu is None and (file := environ.get("SYMMEM_CONFIG")) and (entry := _cluster(file).needs_gpu(hostname)):
        raise ConfigError(
            f"{file}: {entry.path} applies to the host {hostname!r} if its GPU model matches {entry.gpu!r}",
            hint="name the model with --gpu, for example --gpu 'NVIDIA H200'; for a host without a GPU: --gpu ''",
        )
    return load_settings(group=group, environ=environ, hostname=hostname, gpu=gpu or "")


def check_sources(environ: Mapping[str, str], file: str | None = None) -> Iterator[tuple[str, str | ConfigError]]:
    """Check every source separately, so that an error in one source does not hide errors in others.

    Args:
        environ: The environment.
        file: The cluster file; by default, the file in ``SYMMEM_CONFIG``.

    Yields:
        The source, and its content or its error.
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
        entries = _cluster(file).entries
        about = f". {GROUP_NAMES}" if any(entry.group for entry in entries) else ""
        yield file, f"entries: {', '.join(entry.path for entry in entries) or 'none'}{about}"
    except ConfigError as error:
        yield file, error


def unmatched_entries(groups: Collection[str], environ: Mapping[str, str] | None = None) -> list[str]:
    """The entries for groups in the cluster file that match none of these names.

    Raises:
        ConfigError: The file is not valid.
    """
    file = (os.environ if environ is None else environ).get("SYMMEM_CONFIG")
    return _cluster(file).unmatched(groups) if file else []


def reference_table() -> str:
    """The table of all settings in Markdown, for ``docs/configuration.md``."""
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


def _names(group: str | Collection[str] | None) -> Collection[str]:
    return () if group is None else (group,) if isinstance(group, str) else group


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
