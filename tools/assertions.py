"""Failing assertions in ranks show their values: by pytest's rewriting, or else by the names in the statement."""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import linecache
import os
import reprlib
import sys
import traceback
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

__all__ = ["PRELOAD", "Rewriting", "add_values", "install", "rewriting"]

PRELOAD = ["_pytest.assertion.rewrite", "_pytest.config"]
"""Modules that :func:`install` needs; to be imported before ranks are forked."""

_ALWAYS = ("symmem.tools.conformance",)
_LINES = 40  # of the differences between two values

Rewriting = tuple[list[str], list[str]]
"""Patterns of file names, and names of modules and packages, whose assertions pytest rewrites."""


def rewriting() -> Rewriting | None:
    """The modules whose assertions are rewritten in this process; None if pytest does not run here."""
    rewrite = sys.modules.get("_pytest.assertion.rewrite")
    for hook in sys.meta_path if rewrite is not None else ():
        if isinstance(hook, rewrite.AssertionRewritingHook):  # type: ignore[union-attr]
            return list(hook.fnpats), sorted(hook._must_rewrite)
    return None


def install(rewriting: Rewriting) -> importlib.abc.Loader | None:
    """Rewrite assertions in modules that this process imports from now on.

    Returns:
        The loader that rewrites a module; None if this version of pytest has no such hook.
    """
    patterns, names = rewriting
    try:
        from _pytest.assertion import util
        from _pytest.assertion.rewrite import AssertionRewritingHook, assertstate_key
    except ImportError:
        return None
    # The hook needs three things of pytest's Config. A real Config loads all plugins, which takes too long here.
    config: Any = SimpleNamespace(
        getini={"python_files": patterns}.get,
        stash={assertstate_key: SimpleNamespace(trace=lambda text: None)},
    )
    hook = AssertionRewritingHook(config)
    hook._must_rewrite.update(names, _ALWAYS)
    sys.meta_path.insert(0, hook)
    util._reprcompare = _compare
    return hook


def _compare(operator: str, left: object, right: object) -> str | None:
    """The differences between two values, as pytest shows them."""
    with contextlib.suppress(Exception):  # the values themselves are shown in any case
        from _pytest.config import _prepareconfig

        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        config = _prepareconfig(["-v", "-c", os.devnull, "--rootdir", os.sep], None)
        for lines in config.hook.pytest_assertrepr_compare(config=config, op=operator, left=left, right=right):
            if lines:
                return "\n~".join(line.replace("\n", "\\n") for line in lines[:_LINES]).replace("%", "%%")
    return None


def add_values(error: BaseException) -> None:
    """Give an AssertionError without a message the statement that failed, and the values of its names."""
    if not isinstance(error, AssertionError) or error.args or error.__traceback__ is None:
        return
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    with contextlib.suppress(Exception):  # no source, or a value that cannot be shown
        statement = _statement(frame, line)
        values = {**frame.f_globals, **frame.f_locals}
        names = dict.fromkeys(node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
        shown = [
            f"\n  {name} = {reprlib.repr(values[name])}"
            for name in names
            if name in values and not callable(values[name]) and not isinstance(values[name], ModuleType)
        ]
        error.args = (ast.unparse(statement.test) + "".join(shown),)


def _statement(frame: FrameType, line: int) -> ast.Assert:
    source = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and node.lineno <= line <= (node.end_lineno or node.lineno):
            return node
    raise LookupError(line)
