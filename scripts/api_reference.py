"""Write the API reference, HTML made from docstrings by pdoc: scripts/api_reference.py FOLDER."""

from __future__ import annotations

import html
import importlib
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import pdoc.doc
import pdoc.render

MODULES = (
    "symmem",
    "symmem.errors",
    "symmem.ops",
    "symmem.compile",
    "symmem.triton",
    "symmem.torch_compat",
    "symmem.config",
    "symmem.backends",
    "symmem.backends.base",
    "symmem.testing",
    "symmem.tools.ranks",
    "symmem.tools.conformance",
)
ROLE = re.compile(r":(?:class|meth|func|attr|data|mod):`~?\.?([^`]+)`")


def module_of(name: str) -> pdoc.doc.Module | None:
    """A module with all names that it makes only when they are asked for; None if it needs what is not installed."""
    try:
        module = importlib.import_module(name)
    except (ImportError, NotImplementedError) as error:
        print(f"left out: {name}: {error}", file=sys.stderr)
        return None
    for public in getattr(module, "__all__", ()):
        getattr(module, public)
    return pdoc.doc.Module(module)


def described(thing: pdoc.doc.Doc) -> Iterator[pdoc.doc.Doc]:
    """All that a module or class has of its own, and itself."""
    yield thing
    if isinstance(thing, pdoc.doc.Namespace):
        for member in thing.own_members:
            if not isinstance(member, pdoc.doc.Module):
                yield from described(member)


def index(modules: Mapping[str, pdoc.doc.Module]) -> str:
    """The first page: pdoc's own would lead to the top module, which has no list of the others."""
    lines = ['<!doctype html><meta charset="utf-8"><title>symmem</title><h1>symmem: API reference</h1><ul>']
    for name, module in modules.items():
        about = html.escape(module.docstring.partition("\n")[0])
        lines.append(f'<li><a href="{name.replace(".", "/")}.html"><code>{name}</code></a>: {about}')
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Write a page for each module, and an index with a search."""
    # Types that are named for the type checker alone are shown as they are written.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    pdoc.render.configure(docformat="google", show_source=False)
    modules = {name: made for name in MODULES if (made := module_of(name)) is not None}
    for module in modules.values():
        for thing in described(module):
            thing.docstring = ROLE.sub(r"`\1`", thing.docstring)  # pdoc makes a link of what is a known name
    for name, module in modules.items():
        path = folder / f"{name.replace('.', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pdoc.render.html_module(module, modules))
    (folder / "index.html").write_text(index(modules))
    (folder / "search.js").write_text(pdoc.render.search_index(modules))
    print(folder / "index.html")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
