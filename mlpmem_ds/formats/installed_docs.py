"""Documentation that a Python installation brings: text that every machine has.

    docs:PACKAGE    the docstrings of an installed package; a document a module
    docs:python     the reference of the Python language (`pydoc_data.topics`); a document a topic

The same versions give the same text. Sources are parsed; nothing of them is imported or run.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record

DOCS_PREFIX = "docs:"
_LANGUAGE, _TOPICS = "python", "pydoc_data"
_MODULE_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def place_of_docs(given: str) -> Path:
    """Where the sources of an input `docs:NAME` lie: the folder of a package, or the file of a module.

    Raises:
        UserError: no package of this environment has that name, or not as Python source.
    """
    name = given.removeprefix(DOCS_PREFIX)
    if not _MODULE_NAME.fullmatch(name):
        raise UserError(f"--input {given} names no package: docs:PACKAGE, such as docs:torch, or docs:python")
    top, *rest = (_TOPICS if name == _LANGUAGE else name).split(".")
    try:
        spec = importlib.util.find_spec(top)  # of a name without dots: finds the file and imports nothing
    except ValueError:
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if folders:
        place = Path(folders[0], *rest)
        if name == _LANGUAGE:
            place /= "topics.py"
        if place.is_dir() or (place := place.with_suffix(".py")).is_file():
            return place
    elif spec is not None and not rest and spec.origin is not None and spec.origin.endswith(".py"):
        return Path(spec.origin)
    raise UserError(
        f"--input {given}: this environment has no Python source of {name}: install the package, or name"
        " another"
    )


def read_docs(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """The documents of one source file: of `pydoc_data/topics.py` its topics, of another one its docstrings.

    `rules` do not matter: Python source says its own encoding.
    """
    tree = _parsed(path)
    if path.parts[-2:] == (_TOPICS, "topics.py"):
        for name, text in _topics(tree).items():
            yield Record(key=name, text=text, group=None)
        return
    folder = path_in_package(path).parent.as_posix()
    yield Record(key="docstrings", text=docstrings_of(tree), group=None if folder == "." else folder)


def path_in_package(path: Path) -> Path:
    """A folder's or module's path below `site-packages` or the library: `torch/nn/functional.py`."""
    roots = [Path(os.path.abspath(entry)) for entry in sys.path]
    inner = [root for root in roots if root in path.parents]
    return path.relative_to(max(inner, key=lambda root: len(root.parts))) if inner else Path(path.name)


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (SyntaxWarning, DeprecationWarning))  # of others' escapes
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template, or source of another version of Python
            return ast.Module(body=[], type_ignores=[])


def _topics(tree: ast.Module) -> dict[str, str]:
    """The one dictionary of names and texts that the file holds."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(name): str(text) for name, text in ast.literal_eval(node.value).items()}
    return {}


def docstrings_of(tree: ast.Module) -> str:
    """The module's docstring, and of each public class and function the signature and the docstring.

    What has no docstring is left out. Empty where nothing has one.
    """
    parts = [ast.get_docstring(tree) or "", *_docstrings_in(tree.body, "")]
    return "\n\n\n".join(part for part in parts if part)


def _docstrings_in(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if node.name.startswith("_"):
            continue
        if text := ast.get_docstring(node):
            yield f"{_signature(node, prefix)}\n{text}"
        if isinstance(node, ast.ClassDef):
            yield from _docstrings_in(node.body, f"{prefix}{node.name}.")


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
    """As a reader of documentation sees it: names and defaults, without decorators and types."""
    if isinstance(node, ast.ClassDef):
        return f"class {prefix}{node.name}"
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"{prefix}{node.name}({ast.unparse(node.args)})"
