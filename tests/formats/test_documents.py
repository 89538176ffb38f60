import gzip
import json
from pathlib import Path

import pytest
import zstandard

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.documents import Document, read_documents
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_of_every_compression(tmp_path: Path, suffix: str) -> None:
    records = [
        {"text": "one", "author": "A"},
        {"text": "  ", "author": "A"},
        {"text": "zwei ü", "author": "B"},
    ]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path = tmp_path / f"books{suffix}"
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    elif suffix.endswith(".zst"):  # two frames, as tools that append write them
        content = zstandard.compress(content[:10]) + zstandard.compress(content[10:])
    path.write_bytes(content)
    (file,) = find_files([str(path)], None, ()).files
    read = list(read_documents(file, ReadRules(group_field="author")))
    documents = [document for document in read if isinstance(document, Document)]
    assert read[1] == Omission(name=f"books{suffix}:2", reason="empty") and len(read) == 3
    assert [(document.group, document.text) for document in documents] == [("A", "one"), ("B", "zwei ü")]
    assert documents[1].name == f"books{suffix}:3"


def test_a_line_without_the_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (file,) = find_files([str(tmp_path / "x.jsonl")], None, ()).files
    with pytest.raises(UserError, match="line 2.*--text-field"):
        list(read_documents(file, ReadRules()))


def test_binary_is_left_out_of_a_directory_but_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\x80\x00")
    (walked,) = find_files([str(tmp_path)], None, ()).files
    (named,) = find_files([str(path)], None, ()).files
    (omission,) = read_documents(walked, ReadRules())
    assert isinstance(omission, Omission) and (omission.name, omission.reason) == ("x.txt", "encoding")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_documents(named, ReadRules()))


def test_the_group_is_the_top_level_package(tmp_path: Path) -> None:
    for name in ("pkg/deep/x.py", "single.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    files = find_files([str(tmp_path)], None, ()).files
    documents = [next(read_documents(file, ReadRules())) for file in files]
    assert [document.group for document in documents if isinstance(document, Document)] == ["pkg", "single"]


def test_line_ends_are_read_as_python_reads_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("one\r\ntwo\rthree\n\r\nfour \u00e4\r".encode())
    (document,) = read_documents(find_files([str(path)], None, ()).files[0], ReadRules())
    assert isinstance(document, Document)
    assert document.text == path.read_text(encoding="utf-8") and document.num_bytes == len(
        document.text.encode()
    )
