"""Docstrings of installed packages as documents: what is in them, by which names, and that nothing is run."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.documents import Document, read_documents
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.installed_docs import docstrings_of
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules

SOURCE = '''"""Sails and masts."""
raise SystemExit("imported")

class Ship(Base):
    """A ship.

    It floats.
    """

    def sail(self, to: str, *, speed: float = 2.5) -> None:
        """Go to a port."""

    def _leak(self):
        """Not told."""

    async def anchor(self): pass

def launch(*ships, **settings):
    r"""Let them \\slide."""

class _Hidden:
    def shown(self):
        """Of a class that is not."""
'''
TEXT = r"""Sails and masts.


class Ship
A ship.

It floats.


Ship.sail(self, to, *, speed=2.5)
Go to a port.


launch(*ships, **settings)
Let them \slide."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {
        "harbour/__init__.py": "",
        "harbour/ships.py": SOURCE,
        "harbour/tests/test_ships.py": '"""Tests."""',
        "harbour/plain/quay.py": '"""In a folder without __init__.py."""',
        "harbour/plain/template.py": "class {{ name }}:",
        "harbour/notes.txt": "no source",
        "lighthouse.py": '"""One file."""',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def documents(*inputs: str, exclude: tuple[str, ...] = ()) -> list[Document]:
    found = find_files(inputs, None, exclude)
    assert not found.unused_patterns
    read = [item for file in found.files for item in read_documents(file, ReadRules())]
    assert all(item.reason == "empty" for item in read if isinstance(item, Omission))
    return [item for item in read if isinstance(item, Document)]


def test_public_names_with_a_docstring_are_a_document(site: Path) -> None:
    assert docstrings_of(ast.parse(SOURCE)) == TEXT
    found = {document.name: document for document in documents("docs:harbour", exclude=("tests",))}
    assert list(found) == ["harbour/plain/quay.py:docstrings", "harbour/ships.py:docstrings"]
    assert found["harbour/ships.py:docstrings"].text == TEXT
    assert [document.group for document in found.values()] == ["harbour/plain", "harbour"]
    assert "harbour" not in sys.modules and "harbour.ships" not in sys.modules


def test_a_part_of_a_package_a_single_module_and_an_exclusion_by_path(site: Path) -> None:
    assert [document.text for document in documents("docs:harbour.ships", "docs:lighthouse")] == [
        TEXT,
        "One file.",
    ]
    names = [document.name for document in documents("docs:harbour", exclude=("harbour/plain", "tests"))]
    assert names == ["harbour/ships.py:docstrings"]


def test_the_reference_of_the_language_is_a_document_a_topic() -> None:
    found = documents("docs:python")
    assert len(found) > 50
    (one,) = [document for document in found if document.name.endswith(":assert")]
    assert one.text.startswith("The ") and "AssertionError" in one.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("docs:", "names no package"),
        ("docs:../etc", "names no package"),
        ("docs:no_such_package", "no Python source of no_such_package: install"),
        ("docs:harbour.none", "no Python source of harbour.none"),
        ("docs:sys", "no Python source of sys"),
    ],
)
def test_what_has_no_source_is_refused(given: str, message: str, site: Path) -> None:
    with pytest.raises(UserError, match=message):
        find_files([given], None, ())
