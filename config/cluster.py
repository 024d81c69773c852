"""The YAML cluster file, which describes hosts and groups for a whole cluster.

::

    version: 1
    defaults: {arena_size: 64MiB}
    hosts:
      - {match: "dgx-*", gpu: "*H200*", backend: [native, nvshmem]}
    groups:
      - {match: "tp*", arena_size: 2GiB}

The whole file is checked wherever it is read, entries for other hosts included. The nodes of the YAML
document are used rather than the values PyYAML would make of them, because nodes know their line and column.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn

import yaml

from symmem.config.values import Found, Kind, advise, read, shown
from symmem.errors import ConfigError

__all__ = ["Cluster", "Entry", "parse_cluster", "read_file"]

VERSION = "1"
_MAX_FILE = 2**20
_TAG = "tag:yaml.org,2002:"
# Tags that plain YAML text gets by itself; any other was written by hand, and asks for what we do not do.
_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "map", "seq")}
_PLAN = "start from one of the files in examples/clusters, and see docs/configuration.md"


@dataclass(frozen=True)
class Entry:
    """One entry of the file: settings, and the patterns that say where they hold.

    Attributes:
        path: Where it stands in the document, for example ``hosts[0]``.
        values: Settings by name.
        host: Pattern of the host name; None if the entry is not about hosts.
        gpu: Pattern of the GPU model; None for any, or no GPU at all.
        group: Pattern of the group name; None if the entry is not about groups.
    """

    path: str
    values: Mapping[str, Found]
    host: str | None = None
    gpu: str | None = None
    group: str | None = None

    def matches(self, hostname: str, gpu: str | None, group: str | None) -> bool:
        """Whether the entry holds on a host with this GPU model for this group."""
        patterns = ((self.host, hostname), (self.gpu, gpu), (self.group, group))
        return all(pattern is None or (text is not None and fnmatchcase(text, pattern)) for pattern, text in patterns)


@dataclass(frozen=True)
class Cluster:
    """A cluster file: its name as given, and its entries in the order in which they override each other."""

    file: str
    entries: tuple[Entry, ...]

    def values(self, hostname: str, gpu: str | None, group: str | None) -> dict[str, Found]:
        """Settings for one host, GPU model and group: the last entry that matches wins."""
        merged: dict[str, Found] = {}
        for entry in self.entries:
            if entry.matches(hostname, gpu, group):
                merged.update(entry.values)
        return merged


def read_file(file: str) -> str:
    """Read the text of a cluster file.

    Raises:
        ConfigError: It is missing, unreadable, not a regular file, larger than 1 MiB, or not UTF-8.
    """
    try:
        # Without waiting for a writer, should it be a FIFO.
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise OSError("it is not a regular file")
            data = stream.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot read the cluster file {file!r}: {reason}",
            hint="let SYMMEM_CONFIG name a readable YAML file, or unset it",
        ) from None
    if len(data) > _MAX_FILE:
        raise ConfigError(f"{file}: larger than 1 MiB, which no cluster file is", hint=_PLAN)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text at byte {error.start}", hint="save it as UTF-8") from None


def parse_cluster(text: str, file: str, kinds: Mapping[str, Kind[Any]]) -> Cluster:
    """Parse and check a cluster file.

    Args:
        text: The YAML text.
        file: Name of the file, for errors and origins.
        kinds: How to read each setting, by name.

    Raises:
        ConfigError: The text is not YAML, or not a valid cluster file; it names file, line, column and key.
    """
    return _Reader(file, kinds).cluster(_compose(text, file))


def _compose(text: str, file: str) -> yaml.Node:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}", hint=_PLAN) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # Characters that YAML forbids, and escapes that PyYAML fails to check.
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"{file}: not valid YAML: {reason}", hint=_PLAN) from None
    except RecursionError:
        raise ConfigError(f"{file}: not a cluster file: nested too deeply", hint=_PLAN) from None
    if node is None:
        raise ConfigError(f"{file}: the file is empty", hint=_PLAN)
    return node


class _Reader:
    """Walks the nodes of one file. Its depth is that of the schema, so aliases to parents do no harm."""

    def __init__(self, file: str, kinds: Mapping[str, Kind[Any]]) -> None:
        self._file = file
        self._kinds = kinds

    def cluster(self, root: yaml.Node) -> Cluster:
        top = self._mapping(root, "", ("version", "defaults", "hosts", "groups"))
        if "version" not in top:
            self._fail(root, "version", "the key is missing", f"write 'version: {VERSION}' at the top")
        node = top["version"][1]
        version = self._text(node, "version")
        if version != VERSION:
            what = f"unknown version {shown(version)}"
            self._fail(node, "version", what, f"write 'version: {VERSION}', which this symmem reads")
        return Cluster(self._file, tuple(self._entries(top)))

    def _entries(self, top: Mapping[str, tuple[yaml.Node, yaml.Node]]) -> Iterator[Entry]:
        """All entries, less specific ones first."""
        if "defaults" in top:
            pairs = self._mapping(top["defaults"][1], "defaults", self._kinds)
            yield Entry("defaults", self._values(pairs, "defaults"))
        for path, node in self._list(top, "hosts"):
            pairs = self._mapping(node, path, ("match", "gpu", *self._kinds))
            host, gpu = self._pattern(node, pairs, path, "match"), None
            if "gpu" in pairs:
                gpu = self._pattern(node, pairs, path, "gpu")
            yield Entry(path, self._values(pairs, path), host=host, gpu=gpu)
        for path, node in self._list(top, "groups"):
            pairs = self._mapping(node, path, ("match", *self._kinds))
            group = self._pattern(node, pairs, path, "match")
            yield Entry(path, self._values(pairs, path), group=group)

    def _values(self, pairs: Mapping[str, tuple[yaml.Node, yaml.Node]], path: str) -> dict[str, Found]:
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
        texts = [self._text(item, item_path) for item_path, item in items]
        places = [f"{self._place(item)}: {item_path}" for item_path, item in items]
        return read(kind, texts, f"{self._place(key)} ({path})", f"{self._place(node)}: {key_path}", places)

    def _mapping(
        self, node: yaml.Node, path: str, keys: Mapping[str, object] | tuple[str, ...]
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key and value nodes by key, all keys known and none repeated."""
        self._check_tag(node, path)
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, path, f"expected a mapping, got {_name(node)}", f"write keys: {', '.join(keys)}")
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value in node.value:
            key = self._text(key_node, path)
            if key not in keys:
                self._fail(key_node, path, f"unknown key {shown(key)}", advise(key, keys))
            if key in pairs:
                what = f"key {key!r} is given twice, first in line {pairs[key][0].start_mark.line + 1}"
                self._fail(key_node, path, what, "keep one of them")
            pairs[key] = key_node, value
        return pairs

    def _list(self, top: Mapping[str, tuple[yaml.Node, yaml.Node]], key: str) -> Iterator[tuple[str, yaml.Node]]:
        """Path and node of each entry of a list; nothing if the key is absent."""
        if key not in top:
            return
        node = top[key][1]
        self._check_tag(node, key)
        if not isinstance(node, yaml.SequenceNode):
            hint = f"write a list: each entry begins with '- match: \"PATTERN\"', or remove {key!r}"
            self._fail(node, key, f"expected a list, got {_name(node)}", hint)
        for index, item in enumerate(node.value):
            yield f"{key}[{index}]", item

    def _pattern(self, entry: yaml.Node, pairs: Mapping[str, tuple[yaml.Node, yaml.Node]], path: str, key: str) -> str:
        hint = f'write {key}: "PATTERN", where * stands for any characters'
        if key not in pairs:
            self._fail(entry, path, f"the key {key!r} is missing", hint)
        node = pairs[key][1]
        pattern = self._text(node, f"{path}.{key}")
        if not pattern:
            self._fail(node, f"{path}.{key}", "an empty pattern matches nothing", hint)
        return pattern

    def _text(self, node: yaml.Node, path: str) -> str:
        """The text of a scalar exactly as it stands in the file."""
        self._check_tag(node, path)
        if not isinstance(node, yaml.ScalarNode):
            self._fail(node, path, f"expected a single value, got {_name(node)}", _PLAN)
        text: str = node.value
        return text

    def _check_tag(self, node: yaml.Node, path: str) -> None:
        if node.tag not in _TAGS:
            self._fail(node, path, f"the tag {shown(node.tag)} is not supported", "remove the tag")

    def _place(self, node: yaml.Node) -> str:
        return f"{self._file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _fail(self, node: yaml.Node, path: str, what: str, hint: str) -> NoReturn:
        raise ConfigError(f"{self._place(node)}: {path + ': ' if path else ''}{what}", hint=hint)


def _name(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
