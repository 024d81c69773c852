"""Configuration: the environment, the YAML cluster file, and the settings made from both.

This package imports only the standard library, PyYAML and :mod:`symmem.errors`. PyYAML is loaded with the first YAML
file.
"""

from typing import TYPE_CHECKING

from symmem._lazy import lazy_exports
from symmem.config.kinds import AUTO, BACKENDS, installed_backends
from symmem.config.machine import gpu_model, multicast_blocker
from symmem.config.options import Argument, Option, find_option, parse_options
from symmem.config.settings import (
    BACKEND_OPTION,
    SETTINGS,
    Setting,
    Settings,
    check_sources,
    load_node_settings,
    load_settings,
    reference_table,
)
from symmem.config.values import Found, Kind

if TYPE_CHECKING:
    from symmem.config.cluster import Cluster, Entry, parse_cluster, read_file

__all__ = [
    "AUTO",
    "BACKENDS",
    "BACKEND_OPTION",
    "SETTINGS",
    "Argument",
    "Cluster",
    "Entry",
    "Found",
    "Kind",
    "Option",
    "Setting",
    "Settings",
    "check_sources",
    "find_option",
    "gpu_model",
    "installed_backends",
    "load_node_settings",
    "load_settings",
    "multicast_blocker",
    "parse_cluster",
    "parse_options",
    "read_file",
    "reference_table",
]

_CLUSTER = ("Cluster", "Entry", "parse_cluster", "read_file")
__getattr__, __dir__ = lazy_exports(__name__, dict.fromkeys(_CLUSTER, "symmem.config.cluster"))
