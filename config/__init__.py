"""Configuration: the environment, the YAML cluster file, and the settings that come out of both.

The lowest layer of symmem: it imports only the standard library, PyYAML and :mod:`symmem.errors`.
"""

from symmem.config.cluster import Cluster, Entry, parse_cluster, read_file
from symmem.config.kinds import AUTO, BACKENDS, installed_backends
from symmem.config.machine import gpu_model, multicast_blocker
from symmem.config.options import Argument, Option, find_option, parse_options
from symmem.config.settings import (
    BACKEND_OPTION,
    SETTINGS,
    Setting,
    Settings,
    check_sources,
    load_settings,
    reference_table,
)
from symmem.config.values import Found, Kind

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
    "load_settings",
    "multicast_blocker",
    "parse_cluster",
    "parse_options",
    "read_file",
    "reference_table",
]
