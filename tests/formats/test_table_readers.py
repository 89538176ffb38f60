"""Parquet and Arrow: any encoding of the same texts gives the same documents; what is wrong is named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.documents import find_files, read_documents

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

RECORDS: list[dict[str, Any]] = [
    {"text": "one", "author": "A"},
    {"text": "  \n", "author": "A"},
    {"text": None, "author": "B"},
    {"text": "zwei ü", "author": "B"},
]


def write_parquet(path: Path) -> None:
    parquet.write_table(
        pyarrow.Table.from_pylist([{"other": 1, **record} for record in RECORDS]), path, row_group_size=2
    )


def documents_of(given: Path | str, **fields: Any) -> list[tuple[str, str]]:
    fields = {"text_field": "text", "group_field": "author"} | fields
    return [
        (document.group, document.text)
        for file in find_files([str(given)], None, ())
        for document in read_documents(file, **fields)
    ]


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'mlpmem-ds\[arrow\]'"):
        documents_of(tmp_path / "x.parquet")


def damaged(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 10])

    return make


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("l.parquet", damaged(write_parquet), "l.parquet is cut short or damaged"),
    (
        "m.parquet",
        lambda path: parquet.write_table(pyarrow.table({"body": ["a"]}), path),
        "no column 'text' .it has body",
    ),
    (
        "n.parquet",
        lambda path: parquet.write_table(pyarrow.table({"text": [1], "author": [1]}), path),
        "row 0: its text is int",
    ),
]


@pytest.mark.parametrize(("name", "make", "message"), BAD, ids=[name for name, *_ in BAD])
def test_what_is_malformed_is_named(
    name: str, make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=message):
        documents_of(tmp_path / name)
