import gzip
import json
from pathlib import Path

import pytest
import zstandard

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.documents import TEXT_PATTERNS, find_files, read_documents


def names(*inputs: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [file.name for file in find_files(inputs, TEXT_PATTERNS, exclude)]


def test_directories_are_walked_in_order_and_filtered(tmp_path: Path) -> None:
    for name in ("b/x.py", "a/y.md", "a/tests/z.py", "a/image.png", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    assert names(str(tmp_path)) == ["a/tests/z.py", "a/y.md", "b/x.py", "c.txt"]
    assert names(str(tmp_path), exclude=("tests", "c.*")) == ["a/y.md", "b/x.py"]
    assert names(str(tmp_path / "*" / "x.py")) == ["x.py"]


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        names(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no text files.*--include"):
        names(str(tmp_path))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_of_every_compression(tmp_path: Path, suffix: str) -> None:
    records = [{"text": "one", "author": "A"}, {"text": "  ", "author": "A"}, {"text": "zwei ü", "author": "B"}]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path = tmp_path / f"books{suffix}"
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    elif suffix.endswith(".zst"):  # two frames, as tools that append write them
        content = zstandard.compress(content[:10]) + zstandard.compress(content[10:])
    path.write_bytes(content)
    (file,) = find_files([str(path)], TEXT_PATTERNS, ())
    documents = list(read_documents(file, text_field="text", group_field="author"))
    assert [(document.group, document.text) for document in documents] == [("A", "one"), ("B", "zwei ü")]
    assert documents[1].name == f"books{suffix}:3"


def test_a_line_without_the_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (file,) = find_files([str(tmp_path / "x.jsonl")], TEXT_PATTERNS, ())
    with pytest.raises(UserError, match="line 2.*--text-field"):
        list(read_documents(file, text_field="text", group_field=None))


def test_binary_is_left_out_of_a_directory_but_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\xfe\x00")
    (walked,) = find_files([str(tmp_path)], TEXT_PATTERNS, ())
    (named,) = find_files([str(path)], TEXT_PATTERNS, ())
    assert list(read_documents(walked, text_field="text", group_field=None)) == []
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_documents(named, text_field="text", group_field=None))


def test_the_group_is_the_top_level_package(tmp_path: Path) -> None:
    for name in ("pkg/deep/x.py", "single.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    files = find_files([str(tmp_path)], TEXT_PATTERNS, ())
    assert [next(read_documents(file, text_field="text", group_field=None)).group for file in files] == [
        "pkg",
        "single",
    ]
