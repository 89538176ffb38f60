"""Data sets of `datasets`, saved and streamed: every document is read, or what is wrong is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.documents import find_files, read_documents

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
        for file in find_files([str(given)], None, ())
        for document in read_documents(file, **fields)
    ]


def test_splits_of_a_saved_dataset_and_a_missing_file(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_saved_dataset(tmp_path / "both" / split)
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    names = [file.name for file in find_files([str(tmp_path / "both")], None, ())]
    assert names == [
        f"{split}/data-0000{number}-of-00002.arrow" for split in ("train", "test") for number in range(2)
    ]
    assert documents_of(tmp_path / "both") == EXPECTED * 2
    (tmp_path / "both" / "test" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="without its file data-00001"):
        documents_of(tmp_path / "both")
    (tmp_path / "both" / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match="list of files cannot be read"):
        documents_of(tmp_path / "both")


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not needed to test what we ask of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, **rest: Any) -> list[dict[str, Any]]:
        asked.append((name, configuration, rest))
        return RECORDS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert documents_of("datasets:org/name:wikitext-103:test") == EXPECTED
    assert documents_of("datasets:org/name") == EXPECTED
    assert asked == [
        ("org/name", "wikitext-103", {"split": "test", "streaming": True}),
        ("org/name", None, {"split": "train", "streaming": True}),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        documents_of("datasets:org/name")
