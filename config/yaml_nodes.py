"""A strict reader of YAML files. It uses nodes, which have a line and a column, not the values that PyYAML makes.

Errors are :class:`ConfigError` and name file, line, column and key. A scalar is the text in the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NoReturn

import yaml

from symmem.config.owned_files import ADVICE, UntrustedFileError, open_file
from symmem.config.values import advise, shown
from symmem.errors import ConfigError

__all__ = ["NodeReader", "Pairs", "read_text"]

Pairs = Mapping[str, tuple[yaml.Node, yaml.Node]]
"""Key and value nodes of a mapping, by key."""

_MAX_FILE = 2**20
_TAG = "tag:yaml.org,2002:"
_NULL = _TAG + "null"
# Tags that PyYAML gives to plain text. Any other tag is written in the file, and is not supported.
_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "map", "seq")}


def read_text(file: str, kind: str, hint: str, plan: str) -> str:
    """Read the text of a configuration file.

    Args:
        file: Its path.
        kind: The kind of file, for errors: "cluster file".
        hint: The hint if it cannot be read.
        plan: The hint if it is another kind of file.

    Raises:
        ConfigError: It is missing, unreadable, not a regular file, larger than 1 MiB, or not UTF-8; or another user
            can change it.
    """
    try:
        with open(open_file(file), "rb") as stream:
            data = stream.read(_MAX_FILE + 1)
    except UntrustedFileError as error:
        raise ConfigError(f"cannot trust the {kind} {file!r}: {error}", hint=ADVICE) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the {kind} {file!r}: {reason}", hint=hint) from None
    if len(data) > _MAX_FILE:
        raise ConfigError(f"{file}: larger than 1 MiB, too large for a {kind}", hint=plan)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text at byte {error.start}", hint="save it as UTF-8") from None


class NodeReader:
    """Reads the nodes of one file. It goes only as deep as the caller asks, so aliases to parents are harmless.

    Args:
        file: Its name, for errors.
        kind: The kind of file: "cluster file".
        plan: The hint if it is another kind of file.
    """

    def __init__(self, file: str, kind: str, plan: str) -> None:
        self._file = file
        self._kind = kind
        self._plan = plan

    def compose(self, text: str) -> yaml.Node:
        """The root node of a text."""
        file = self._file
        try:
            node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
            raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}", hint=self._plan) from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # YAML forbids the character, or PyYAML does not check an escape.
            reason = getattr(error, "reason", None) or error
            raise ConfigError(f"{file}: not valid YAML: {reason}", hint=self._plan) from None
        except RecursionError:
            raise ConfigError(f"{file}: not a {self._kind}: nested too deeply", hint=self._plan) from None
        if node is None:
            raise ConfigError(f"{file}: the file is empty", hint=self._plan)
        return node

    def mapping(self, node: yaml.Node, path: str, keys: Collection[str]) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key and value nodes by key. Raises for unknown and repeated keys."""
        self._check_tag(node, path)
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, path, f"expected a mapping, got {_name(node)}", f"write keys: {', '.join(keys)}")
        pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value in node.value:
            key = self.text(key_node, path)
            if key not in keys:
                self.fail(key_node, path, f"unknown key {shown(key)}", advise(key, keys))
            if key in pairs:
                what = f"key {key!r} is given twice, first in line {pairs[key][0].start_mark.line + 1}"
                self.fail(key_node, path, what, "keep one of them")
            pairs[key] = key_node, value
        return pairs

    def entries(self, top: Pairs, key: str, begin: str) -> Iterator[tuple[str, yaml.Node]]:
        """Path and node of every entry of a list; nothing if the key is missing."""
        if key not in top:
            return
        node = top[key][1]
        self._check_tag(node, key)
        if not isinstance(node, yaml.SequenceNode):
            hint = f"write a list: each entry begins with '- {begin}', or remove {key!r}"
            self.fail(node, key, f"expected a list, got {_name(node)}", hint)
        for index, item in enumerate(node.value):
            yield f"{key}[{index}]", item

    def text(self, node: yaml.Node, path: str) -> str:
        """The text of a scalar, exactly as in the file."""
        self._check_tag(node, path)
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, path, f"expected a single value, got {_name(node)}", self._plan)
        text: str = node.value
        if node.tag == _NULL and text:
            self.fail(node, path, f"{shown(text)} is no value", "remove the key to get the default, or quote a text")
        return text

    def _check_tag(self, node: yaml.Node, path: str) -> None:
        if node.tag not in _TAGS:
            self.fail(node, path, f"the tag {shown(node.tag)} is not supported", "remove the tag")

    def check_version(self, top: yaml.Node, pairs: Pairs, version: str) -> None:
        """Raise unless the file has this version."""
        if "version" not in pairs:
            self.fail(top, "version", "the key is missing", f"write 'version: {version}' at the top")
        node = pairs["version"][1]
        found = self.text(node, "version")
        if found != version:
            what = f"unknown version {shown(found)}"
            self.fail(node, "version", what, f"write 'version: {version}', the version that this symmem reads")

    def place(self, node: yaml.Node) -> str:
        """The place of a node, in errors and origins."""
        return f"{self._file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def fail(self, node: yaml.Node, path: str, what: str, hint: str) -> NoReturn:
        """Raise an error about the node at ``path`` in the document."""
        raise ConfigError(f"{self.place(node)}: {path + ': ' if path else ''}{what}", hint=hint)


def _name(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
