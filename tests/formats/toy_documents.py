"""Four records, two of which have a text; a saved data set of them, and the documents that an input gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.formats.documents import Document, read_documents
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.records import ReadRules

pyarrow = pytest.importorskip("pyarrow")

RECORDS: list[dict[str, Any]] = [
    {"text": "one", "author": "A"},
    {"text": "  \n", "author": "A"},
    {"text": None, "author": "B"},
    {"text": "zwei ü", "author": "B"},
]
EXPECTED = [("A", "one"), ("B", "zwei ü")]


def write_saved_dataset(path: Path) -> None:
    """As datasets' save_to_disk lays it out."""
    path.mkdir(parents=True)
    for number, part in enumerate((RECORDS[:1], RECORDS[1:])):
        table = pyarrow.Table.from_pylist(
            part, schema=pyarrow.schema({"text": pyarrow.string(), "author": pyarrow.string()})
        )
        with pyarrow.ipc.new_stream(path / f"data-{number:05d}-of-00002.arrow", table.schema) as stream:
            stream.write_table(table)
    files = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
    (path / "state.json").write_text(json.dumps({"_data_files": files}))
    (path / "dataset_info.json").write_text("{}")


def documents_of(given: Path | str, **fields: Any) -> list[tuple[str, str]]:
    fields = {"text_field": "text", "group_field": "author"} | fields
    return [
        (document.group, document.text)
        for file in find_files([str(given)], None, ()).files
        for document in read_documents(file, ReadRules(**fields))
        if isinstance(document, Document)
    ]
