import fnmatch
import gzip
import json
from pathlib import Path

import pytest
import zstandard

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.documents import TEXT_PATTERNS, find_files, read_documents


def names(*inputs: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [file.name for file in find_files(inputs, None, exclude)]


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
    (file,) = find_files([str(path)], None, ())
    documents = list(read_documents(file, text_field="text", group_field="author"))
    assert [(document.group, document.text) for document in documents] == [("A", "one"), ("B", "zwei ü")]
    assert documents[1].name == f"books{suffix}:3"


def test_a_line_without_the_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (file,) = find_files([str(tmp_path / "x.jsonl")], None, ())
    with pytest.raises(UserError, match="line 2.*--text-field"):
        list(read_documents(file, text_field="text", group_field=None))


def test_binary_is_left_out_of_a_directory_but_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\xfe\x00")
    (walked,) = find_files([str(tmp_path)], None, ())
    (named,) = find_files([str(path)], None, ())
    assert list(read_documents(walked, text_field="text", group_field=None)) == []
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_documents(named, text_field="text", group_field=None))


def test_the_group_is_the_top_level_package(tmp_path: Path) -> None:
    for name in ("pkg/deep/x.py", "single.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    files = find_files([str(tmp_path)], None, ())
    assert [next(read_documents(file, text_field="text", group_field=None)).group for file in files] == [
        "pkg",
        "single",
    ]


def test_a_walk_gives_what_sorting_all_paths_gives(tmp_path: Path) -> None:
    """The order and the choice of sorted(rglob) and fnmatch, which files were numbered by before."""
    names = [
        "b.txt",
        "a/z.txt",
        "a-b/x.txt",
        "a.txt",
        "a/b/c.txt",
        "a/b.txt",
        "A/x.TXT",
        ".hidden/x.txt",
        "build/x.txt",
        "a/build/x.txt",
        "a/x.py",
        "c.d/x.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    for exclude in ((), ("build",), ("a/b/*", "A"), ("a/build",), ("*.txt",)):
        wanted = []
        for path in sorted(tmp_path.rglob("*")):
            relative = path.relative_to(tmp_path)
            parts = [relative.as_posix(), *relative.parts]
            is_excluded = any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in exclude)
            if path.is_file() and fnmatch.fnmatch(path.name, "*.txt") and not is_excluded:
                wanted.append(relative.as_posix())
        if wanted:
            assert [file.name for file in find_files([str(tmp_path)], ("*.txt",), exclude)] == wanted, exclude


def test_line_ends_are_read_as_python_reads_text(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("one\r\ntwo\rthree\n\r\nfour \u00e4\r".encode())
    (document,) = read_documents(find_files([str(path)], None, ())[0], text_field="text", group_field=None)
    assert document.text == path.read_text(encoding="utf-8") and document.num_bytes == len(
        document.text.encode()
    )


def test_patterns_that_are_given_are_all_that_count(tmp_path: Path) -> None:
    for name in ("a.txt", "b.parquet", "c.tar.gz"):
        (tmp_path / name).write_text("text")
    assert [file.name for file in find_files([str(tmp_path)], None, ())] == ["a.txt", "b.parquet", "c.tar.gz"]
    assert [file.name for file in find_files([str(tmp_path)], TEXT_PATTERNS, ())] == ["a.txt"]
