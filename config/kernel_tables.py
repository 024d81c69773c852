"""Tables of algorithms: YAML files that choose the kernel of a collective operation on CUDA, by ranks and bytes.

::

    version: 1
    rows:
      - {operation: all_reduce, world: 2, nbytes: 256KiB, kernel: one_shot, threads: 128, blocks: 128}
      - {operation: all_reduce, world: 2, kernel: two_shot, threads: 512, blocks: 256}
      - {operation: move, world: 2, kernel: put, threads: 512, blocks: 128}
      - {operation: move, world: 2, kernel: pull, threads: 512, blocks: 64}

The rows for one operation and number of ranks replace all built-in rows for them. Other operations and numbers of ranks
keep their built-in rows. The first matching row is used, so rows are in the order of their bytes, and the last row is
for any number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import yaml

from symmem.config.kinds import SIZE
from symmem.config.values import InvalidValue, advise, shown
from symmem.config.yaml_nodes import NodeReader, Pairs, read_text

__all__ = [
    "KERNELS",
    "MOST_BLOCKS",
    "PLAN",
    "SYMMETRIC_ONLY",
    "Row",
    "Rows",
    "parse_algorithms",
    "read_algorithms",
]

T = TypeVar("T")

KERNELS: Mapping[str, tuple[str, ...]] = {
    "all_reduce": ("one_shot", "two_shot"),
    "reduce_scatter": ("reduce_scatter",),
    "move": ("exchange", "pull", "put"),
}
"""The kernels of every operation. ``move`` stands for all operations that only move bytes."""

MOST_BLOCKS = 256
"""The most blocks of any kernel."""

SYMMETRIC_ONLY = ("put",)
"""Kernels that store directly into the results of all ranks. The results must be in symmetric memory."""

PLAN = "let `symmem tune` write one, and see docs/configuration.md"
"""The hint for a file that is not a table of algorithms."""

_THREADS = (64, 512)  # at least one per rank; at most the number that the kernels are compiled for
_WORLD = (2, 64)
_NAP = (0, 1_000_000)
_ONLY = ", ".join(map(repr, SYMMETRIC_ONLY))
_VERSION = "1"
_KEYS = ("operation", "world", "nbytes", "kernel", "threads", "blocks", "nap")
_NEEDED = ("operation", "world", "kernel", "threads", "blocks")


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        world: The number of ranks; in the built-in table, the largest number.
        nbytes: The largest number of bytes; None for any number.
        kernel: Name of the kernel.
        threads: Threads per block.
        blocks: The most blocks.
        nap: Nanoseconds between two loads of a waiting thread.
    """

    world: int
    nbytes: int | None
    kernel: str
    threads: int
    blocks: int
    nap: int = 0

    @property
    def symmetric(self) -> bool:
        """Whether the kernel needs results in symmetric memory."""
        return self.kernel in SYMMETRIC_ONLY


Rows = Mapping[tuple[str, int], tuple[Row, ...]]
"""The rows of a file, by operation and number of ranks."""


def read_algorithms(file: str) -> Rows:
    """Read a table.

    Raises:
        ConfigError: It cannot be read, or is not a valid table. The error names file, line, column and key.
    """
    return parse_algorithms(read_text(file, "table of algorithms", "name a readable YAML file", PLAN), file)


@lru_cache(maxsize=4)
def parse_algorithms(text: str, file: str) -> Rows:
    """Parse and check the text of a table.

    Raises:
        ConfigError: As :func:`read_algorithms`.
    """
    reader = _TableReader(file, "table of algorithms", PLAN)
    return reader.rows(reader.compose(text))


class _TableReader(NodeReader):
    def rows(self, root: yaml.Node) -> Rows:
        top = self.mapping(root, "", ("version", "rows"))
        self.check_version(root, top, _VERSION)
        tables: dict[tuple[str, int], list[Row]] = {}
        last: dict[tuple[str, int], tuple[str, yaml.Node]] = {}
        for path, node in self.entries(top, "rows", "operation: NAME"):
            operation, row = self._row(path, node)
            rows = tables.setdefault((operation, row.world), [])
            if rows:
                self._check_order(path, node, rows[-1], row)
            rows.append(row)
            last[operation, row.world] = path, node
        if not tables:
            self.fail(root, "rows", "the table has no rows", PLAN)
        for (operation, world), rows in tables.items():
            if rows[-1].nbytes is not None or rows[-1].symmetric:
                path, node = last[operation, world]
                beyond = "" if rows[-1].nbytes is None else f" of more than {SIZE.format(rows[-1].nbytes)}"
                what = f"a gap after this row: no row is for any {operation} of {world} ranks{beyond}"
                self.fail(node, path, what, f"end with a row that has no 'nbytes', and a kernel other than {_ONLY}")
        return {key: tuple(rows) for key, rows in tables.items()}

    def _check_order(self, path: str, node: yaml.Node, before: Row, row: Row) -> None:
        """Raise if the row before makes this row useless."""
        grows = before.nbytes is not None and (row.nbytes is None or row.nbytes > before.nbytes)
        if not grows and not (before.symmetric and not row.symmetric and row.nbytes == before.nbytes):
            what = "this row is never used: the row before is for as many bytes or more"
            self.fail(node, path, what, f"order the rows by bytes; for equal bytes, put {_ONLY} first")

    def _row(self, path: str, node: yaml.Node) -> tuple[str, Row]:
        pairs = self.mapping(node, path, _KEYS)
        for key in _NEEDED:
            if key not in pairs:
                self.fail(node, path, f"the key {key!r} is missing", f"every row has {', '.join(_NEEDED)}")
        operation = self._word(pairs, path, "operation", tuple(KERNELS))
        kernel = self._word(pairs, path, "kernel", KERNELS[operation])
        nap = self._number(pairs, path, "nap", _NAP) if "nap" in pairs else 0
        nbytes: int | None = self._parsed(pairs, path, "nbytes", SIZE.parse) if "nbytes" in pairs else None
        threads = self._number(pairs, path, "threads", _THREADS, multiple=32)
        blocks = self._number(pairs, path, "blocks", (1, MOST_BLOCKS))
        world = self._number(pairs, path, "world", _WORLD)
        return operation, Row(world, nbytes, kernel, threads, blocks, nap)

    def _word(self, pairs: Pairs, path: str, key: str, choices: tuple[str, ...]) -> str:
        def parse(items: Any) -> str:
            if items[0] not in choices:
                raise InvalidValue(f"unknown {key} {shown(items[0])}", advise(items[0], choices))
            return str(items[0])

        return self._parsed(pairs, path, key, parse)

    def _number(self, pairs: Pairs, path: str, key: str, limits: tuple[int, int], multiple: int = 1) -> int:
        def parse(items: Any) -> int:
            text, (least, most) = items[0], limits
            valid = text.isascii() and text.isdecimal() and len(text) < 10
            if not (valid and least <= int(text) <= most and int(text) % multiple == 0):
                kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
                raise InvalidValue(f"expected {kind} from {least} to {most}; got {shown(text)}", "write such a number")
            return int(text)

        return self._parsed(pairs, path, key, parse)

    def _parsed(self, pairs: Pairs, path: str, key: str, parse: Callable[[Any], T]) -> T:
        node, where = pairs[key][1], f"{path}.{key}"
        try:
            return parse([self.text(node, where)])
        except InvalidValue as bad:
            self.fail(node, where, bad.what, bad.hint)
