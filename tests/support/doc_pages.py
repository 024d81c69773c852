"""What the tests of the documentation read out of its pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^ *```(\w*)$")
MARK = re.compile(r"^<!-- (not run|needs): (.+) -->$")


def pages() -> list[Path]:
    """All pages of the documentation, those of the root included."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: As the fence says.
        line: Of its first line, from 0.
        lines: The lines in it.
        not_run: Why it is not run; empty if it is.
        needs: Modules without which it cannot be run.
    """

    language: str
    line: int
    lines: tuple[str, ...]
    not_run: str = ""
    needs: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks. The line before a fence may say why the block is not run, or what it needs."""
    lines = text.splitlines()
    opened: tuple[str, int] | None = None
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence is None:
            continue
        if opened is None:
            opened = fence[1], number + 1
            continue
        language, first = opened
        mark = MARK.match(lines[first - 2]) if first > 1 else None
        said = {mark[1]: mark[2]} if mark else {}
        needs = tuple(said["needs"].split(", ")) if "needs" in said else ()
        yield Block(language, first, tuple(lines[first:number]), said.get("not run", ""), needs)
        opened = None
    assert opened is None, f"a fence that is opened in line {opened[1]} is not closed"


def prose(text: str) -> str:
    """A page without its fenced blocks; lines keep their numbers."""
    lines = text.splitlines()
    for block in blocks(text):
        lines[block.line - 1 : block.line + len(block.lines) + 1] = [""] * (len(block.lines) + 2)
    return "\n".join(lines)


def program(text: str) -> str:
    """All Python of a page that is run, as one program; every line has the number that it has in the page."""
    kept = [""] * len(text.splitlines())
    for block in blocks(text):
        if block.language == "python" and not block.not_run:
            kept[block.line : block.line + len(block.lines)] = block.lines
    return "\n".join(kept).rstrip()


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    for line in prose(text).splitlines():
        heading = re.match(r"^#{1,6} +(.+?)\s*#*$", line)
        if heading is None:
            continue
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])  # of a link, its text
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = found.get(slug, 0)
        found[slug] = number + 1
        result.add(f"{slug}-{number}" if number else slug)
    return result


def links(text: str) -> list[str]:
    """What a page links to; code is no link."""
    shown = re.sub(r"`[^`]*`", "``", prose(text))
    inline = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", shown)
    return [*inline, *re.findall(r"^\[[^\]]+\]: +(\S+)", shown, re.MULTILINE)]
