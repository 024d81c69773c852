"""The YAML cluster file, which describes hosts and groups for a whole cluster.

::

    version: 1
    defaults: {arena_size: 64MiB}
    hosts:
      - {match: "dgx-*", gpu: "*H200*", backend: [native, nvshmem]}
    groups:
      - {match: "tp*", arena_size: 2GiB}

Every reader checks the whole file, including the entries for other hosts. It works on the nodes of the YAML document,
not on the values that PyYAML makes from them, because nodes have a line and a column.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import yaml

from symmem.config.values import Found, Kind, read
from symmem.config.yaml_nodes import NodeReader, Pairs, read_text

__all__ = ["Cluster", "Entry", "parse_cluster", "read_file"]

VERSION = "1"
PLAN = "start from one of the files in examples/clusters, and see docs/configuration.md"
"""The hint for a file that is not a cluster file."""

_BEGIN = 'match: "PATTERN"'


@dataclass(frozen=True)
class Entry:
    """One entry of the file: settings, and patterns for the hosts, GPUs and groups that they apply to.

    Attributes:
        path: Its place in the document, for example ``hosts[0]``.
        values: Settings by name.
        host: Pattern of the host name; None if the entry applies to all hosts.
        gpu: Pattern of the GPU model; None if the entry applies to all models and to hosts without a GPU.
        group: Pattern of the names of a group, one of which must match; None if the entry applies to all groups.
    """

    path: str
    values: Mapping[str, Found]
    host: str | None = None
    gpu: str | None = None
    group: str | None = None

    def matches(self, hostname: str, gpu: str | None, group: Collection[str]) -> bool:
        """Whether the entry applies to a group with these names on a host with this name and GPU model."""
        patterns = ((self.host, (hostname,)), (self.gpu, () if gpu is None else (gpu,)), (self.group, group))
        return all(pattern is None or any(fnmatchcase(text, pattern) for text in texts) for pattern, texts in patterns)


@dataclass(frozen=True)
class Cluster:
    """A cluster file: its name, and its entries in order. A later entry overrides an earlier one."""

    file: str
    entries: tuple[Entry, ...]

    def values(self, hostname: str, gpu: str | None, group: Collection[str]) -> dict[str, Found]:
        """The settings for one host, GPU model and group, by the group's names. The last matching entry wins."""
        merged: dict[str, Found] = {}
        for entry in self.entries:
            if entry.matches(hostname, gpu, group):
                merged.update(entry.values)
        return merged

    def unmatched(self, groups: Collection[str]) -> list[str]:
        """The entries for groups that match none of these names."""
        entries = [entry for entry in self.entries if entry.group is not None]
        return [
            f"{e.path} (match: {e.group!r})" for e in entries if not any(fnmatchcase(n, e.group or "") for n in groups)
        ]

    def needs_gpu(self, hostname: str) -> Entry | None:
        """The first entry for this host that also depends on the GPU model, or None."""
        named = (entry for entry in self.entries if entry.host is not None and entry.gpu is not None)
        return next((entry for entry in named if fnmatchcase(hostname, entry.host or "")), None)


def read_file(file: str) -> str:
    """Read the text of a cluster file.

    Raises:
        ConfigError: It is missing, unreadable, not a regular file, larger than 1 MiB, or not UTF-8.
    """
    return read_text(file, "cluster file", "let SYMMEM_CONFIG name a readable YAML file, or unset it", PLAN)


def parse_cluster(text: str, file: str, kinds: Mapping[str, Kind[Any]]) -> Cluster:
    """Parse and check a cluster file.

    Args:
        text: The YAML text.
        file: Name of the file, for errors and origins.
        kinds: The kind of every setting, by name.

    Raises:
        ConfigError: The text is not YAML, or not a valid cluster file. The error names file, line, column and key.
    """
    reader = _ClusterReader(file, kinds)
    return reader.cluster(reader.compose(text))


class _ClusterReader(NodeReader):
    """Reads the nodes of one cluster file."""

    def __init__(self, file: str, kinds: Mapping[str, Kind[Any]]) -> None:
        super().__init__(file, "cluster file", PLAN)
        self._kinds = kinds

    def cluster(self, root: yaml.Node) -> Cluster:
        top = self.mapping(root, "", ("version", "defaults", "hosts", "groups"))
        self.check_version(root, top, VERSION)
        return Cluster(self._file, tuple(self._all(top)))

    def _all(self, top: Pairs) -> Iterator[Entry]:
        """All entries: defaults, then hosts, then groups."""
        if "defaults" in top:
            pairs = self.mapping(top["defaults"][1], "defaults", self._kinds)
            yield Entry("defaults", self._values(pairs, "defaults"))
        for path, node in self.entries(top, "hosts", _BEGIN):
            pairs = self.mapping(node, path, ("match", "gpu", *self._kinds))
            host, gpu = self._pattern(node, pairs, path, "match"), None
            if "gpu" in pairs:
                gpu = self._pattern(node, pairs, path, "gpu")
            yield Entry(path, self._values(pairs, path), host=host, gpu=gpu)
        for path, node in self.entries(top, "groups", _BEGIN):
            pairs = self.mapping(node, path, ("match", *self._kinds))
            group = self._pattern(node, pairs, path, "match")
            yield Entry(path, self._values(pairs, path), group=group)

    def _values(self, pairs: Pairs, path: str) -> dict[str, Found]:
        """The settings among the keys of an entry."""
        return {
            name: self._value(kind, *pairs[name], path, f"{path}.{name}")
            for name, kind in self._kinds.items()
            if name in pairs
        }

    def _value(self, kind: Kind[Any], key: yaml.Node, node: yaml.Node, path: str, key_path: str) -> Found:
        items = [(key_path, node)]
        if kind.several and isinstance(node, yaml.SequenceNode):
            items = [(f"{key_path}[{index}]", item) for index, item in enumerate(node.value)]
        texts = [self.text(item, item_path) for item_path, item in items]
        places = [f"{self.place(item)}: {item_path}" for item_path, item in items]
        return read(kind, texts, f"{self.place(key)} ({path})", f"{self.place(node)}: {key_path}", places)

    def _pattern(self, entry: yaml.Node, pairs: Pairs, path: str, key: str) -> str:
        hint = f'write {key}: "PATTERN", where * stands for any characters'
        if key not in pairs:
            self.fail(entry, path, f"the key {key!r} is missing", hint)
        node = pairs[key][1]
        pattern = self.text(node, f"{path}.{key}")
        if not pattern:
            self.fail(node, f"{path}.{key}", "an empty pattern matches nothing", hint)
        return pattern
