"""The documentation: links, tables that are made from code, and messages that the code has."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from doc_pages import ROOT, anchors, blocks, links, pages, program, prose
from patience import TASK

import symmem.errors
from symmem.errors import SymmemError
from symmem.tools.capabilities import capability_table
from symmem.tools.cli import main
from symmem.tools.examples import run_file
from symmem.tools.ranks import RankPool

DOCS = ROOT / "docs"
NAMES = [str(path.relative_to(ROOT)) for path in pages()]
CODE = ("allocator", "backends", "config")


# Links.


def broken(page: Path, text: str) -> list[str]:
    """What a page links to and is not there. Of addresses on the web only the form is looked at."""
    found = []
    for link in links(text):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            if parts.scheme != "https" or not parts.netloc:
                found.append(f"{link}: not an address that begins with https://")
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if parts.path and not (target.exists() and target.is_relative_to(ROOT)):
            found.append(f"{link}: there is no such file")
        elif parts.fragment:
            known = anchors(text if target == page else target.read_text()) if target.suffix == ".md" else set()
            if parts.fragment not in known:
                found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken(ROOT / name, (ROOT / name).read_text()) == []


def test_a_broken_link_is_found() -> None:
    text = "# One `x` & two\n[a](why.md) [b](no.md) [c](#one-x--two) [d](#no) [e](why.md#no) `[g](no)`\n[f](http://x.org)\n"
    page = DOCS / "page.md"
    assert broken(page, text) == [
        "no.md: there is no such file",
        "#no: no such heading",
        "why.md#no: no such heading",
        "http://x.org: not an address that begins with https://",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_are_there(name: str) -> None:
    """Paths from the root of the repository, in code."""
    folders = "allocator|backends|config|docs|examples|scripts|tests|tools"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", prose((ROOT / name).read_text()))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_index_has_every_page() -> None:
    linked = {(DOCS / urlsplit(link).path).resolve() for link in links((DOCS / "README.md").read_text())}
    assert {path for path in DOCS.glob("*.md") if path.name != "README.md"} <= linked


@pytest.mark.parametrize("name", NAMES)
def test_python_is_python(name: str) -> None:
    for block in blocks((ROOT / name).read_text()):
        if block.language == "python":
            ast.parse(block.text)


def test_a_program_keeps_its_lines() -> None:
    text = "# T\n```python\na = 1\n```\n<!-- not run: why -->\n```python\nb = 2\n```\n```sh\nc\n```\n"
    assert program(f"{text}```python\nd = 4\n```\n") == "\n\na = 1" + "\n" * 10 + "d = 4"


def commands() -> list[str]:
    """The commands that pages name, without their arguments."""
    command = re.compile(r"(?<![\w./])symmem((?: [a-z][a-z-]+\b(?![./=]))+)")
    named = set()
    for page in pages():
        text = page.read_text()
        code = re.findall(r"`([^`]*)`", prose(text))
        code += [block.text for block in blocks(text) if block.language == "sh"]
        named |= {found for each in code for found in command.findall(each)}
    return sorted(named)


@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_named_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert f"usage: symmem{command}" in capsys.readouterr().out


# Tables.


def test_the_table_of_backends_is_that_of_the_flags() -> None:
    text = (DOCS / "backends.md").read_text()
    assert text.count(capability_table()) == 1


# Troubleshooting.


@functools.cache
def messages() -> tuple[str, ...]:
    """All texts in the code; where something is filled in, there is a NUL."""
    found = []
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += list(_texts(ast.parse(path.read_text())))
    return tuple(found)


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_in_code(message: str) -> bool:
    """Whether the code has a text with all of a message, but for what stands for ``...`` in it."""
    pattern = re.compile(".*".join(re.escape(piece) for piece in message.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in messages())


def sections() -> dict[str, str]:
    text = (DOCS / "troubleshooting.md").read_text()
    return dict(re.findall(r"^## `(\w+)`$\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def quoted(section: str) -> list[str]:
    """The messages of a section: each begins a point."""
    return re.findall(r"^- `([^`]+)`: ", section, re.MULTILINE)


def error_classes() -> set[str]:
    known = {name: getattr(symmem.errors, name) for name in symmem.errors.__all__}
    return {name for name, value in known.items() if isinstance(value, type) and issubclass(value, SymmemError)}


def test_troubleshooting_has_every_class_of_error() -> None:
    assert set(sections()) == error_classes()


@pytest.mark.parametrize("name", sorted(error_classes()))
def test_messages_that_are_quoted_are_those_of_the_code(name: str) -> None:
    found = quoted(sections()[name])
    assert found
    assert [message for message in found if not is_in_code(message)] == []


def test_reasons_that_are_quoted_are_those_of_the_report() -> None:
    text = (DOCS / "compile.md").read_text()
    found = re.findall(r"^\| `([^`]+)` \|", text.partition("| the report says |")[2], re.MULTILINE)
    assert len(found) > 5
    assert [reason for reason in found if not is_in_code(reason)] == []


def test_a_message_that_is_not_in_the_code_is_found() -> None:
    assert is_in_code("ranks ... did not come in time")
    assert not is_in_code("ranks ... did come in time")
    assert not is_in_code("did not come in time ... an arena")


# The API reference.


@pytest.mark.ranks
@pytest.mark.slow
def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    """On a rank, which need not import torch and its compiler again."""
    if importlib.util.find_spec("pdoc") is None:
        pytest.skip("pdoc is not installed: pip install pdoc")
    with RankPool(1, process_group=None, timeout=TASK) as pool:
        pool.run(run_file, str(ROOT / "scripts/api_reference.py"), str(tmp_path))
    for module, names in {"symmem": symmem.__all__, "symmem.errors": symmem.errors.__all__}.items():
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text()
        assert [name for name in names if f'id="{name}"' not in page] == []
    assert 'href="symmem/errors.html"' in (tmp_path / "index.html").read_text()
    assert ":class:" not in (tmp_path / "symmem.html").read_text()
