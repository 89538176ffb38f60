"""Files of many documents: each format gives the same documents; what is malformed is named by file and
record."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.document_readers import kind_of
from mlpmem_ds.formats.documents import Document, read_documents
from mlpmem_ds.formats.input_files import find_files
from mlpmem_ds.formats.records import ReadRules

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from .toy_documents import EXPECTED, RECORDS, documents_of, write_saved_dataset  # noqa: E402


def tar_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def write_tar(path: Path) -> None:
    """Half of the samples have their text as a file, half in their JSON; a picture is passed over."""
    members: dict[str, bytes] = {"shard/": b""}
    for number, record in enumerate(RECORDS):
        members[f"shard/{number:03d}.png"] = b"\x89PNG"
        if number % 2 and record["text"] is not None:
            members[f"shard/{number:03d}.txt"] = record["text"].encode()
            members[f"shard/{number:03d}.json"] = json.dumps({"author": record["author"]}).encode()
        else:
            members[f"shard/{number:03d}.json"] = json.dumps(record).encode()
    members.pop("shard/")
    content = tar_bytes(members)
    if path.name.endswith(("gz", "tgz")):
        content = gzip.compress(content)
    path.write_bytes(zstandard.compress(content) if path.name.endswith(".zst") else content)


def write_parquet(path: Path) -> None:
    parquet.write_table(
        pyarrow.Table.from_pylist([{"other": 1, **record} for record in RECORDS]), path, row_group_size=2
    )


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.tar", write_tar),
        ("x.tar.gz", write_tar),
        ("x.tgz", write_tar),
        ("x.tar.zst", write_tar),
        ("x.parquet", write_parquet),
        ("saved", write_saved_dataset),
    ],
)
def test_every_container_gives_its_documents(
    name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    write(path)
    assert documents_of(path) == EXPECTED
    (path.parent / "beside.txt").write_text("plain")
    if (
        path.is_file()
    ):  # a directory's containers count by default, and not where the user names other patterns
        assert documents_of(path.parent) == [("beside", "plain"), *EXPECTED]
        files = find_files([str(path.parent)], ("*.txt",), ()).files
        assert [file.name for file in files] == ["beside.txt"]
    file, *_ = find_files([str(path)], None, ()).files
    read = list(read_documents(file, ReadRules()))
    groups = {document.group for document in read if isinstance(document, Document)}
    assert groups == {file.name}


def damaged(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 10])

    return make


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "a.jsonl",
        lambda path: path.write_bytes(b'{"text": "a", "author": 1}\n{"text": \n'),
        "a.jsonl line 2 is not JSON",
    ),
    (
        "b.jsonl",
        lambda path: path.write_bytes(b'{"text": "a", "author": 1}\n\xff\xfe\n'),
        "b.jsonl line 2 is not UTF-8",
    ),
    ("c.jsonl", lambda path: path.write_bytes(b"[1]\n"), "c.jsonl item 1 is not an object"),
    (
        "d.jsonl",
        lambda path: path.write_bytes(b'{"text": 7, "author": 1}\n'),
        "d.jsonl line 1: its text is int",
    ),
    (
        "e.jsonl",
        lambda path: path.write_bytes(b'{"text": "\\ud800", "author": 1}\n'),
        "e.jsonl line 1.*UTF-8",
    ),
    (
        "f.jsonl.gz",
        lambda path: path.write_bytes(gzip.compress(b'{"text": "a", "author": 1}\n' * 99)[:-9]),
        "f.jsonl.gz cannot be read whole .*cut short",
    ),
    ("g.jsonl.zst", lambda path: path.write_bytes(b"no frame"), "g.jsonl.zst line 1 is not JSON"),
    ("h.tar", damaged(write_tar), "h.tar is cut short or damaged after member 'shard/"),
    ("i.tar", lambda path: path.write_bytes(tar_bytes({"s1.json": b"{"})), "i.tar member 's1.json' is not"),
    (
        "j.tar",
        lambda path: path.write_bytes(tar_bytes({"s1.txt": b"\xff"})),
        "j.tar member 's1.txt' is not UTF-8",
    ),
    (
        "k.tar",
        lambda path: path.write_bytes(tar_bytes({"s1.json": b'{"x": 1}'})),
        "k.tar member 's1.json', .*it has x",
    ),
]


@pytest.mark.parametrize(("name", "make", "message"), BAD, ids=[name for name, *_ in BAD])
def test_what_is_malformed_is_named(
    name: str, make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=message):
        documents_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.txt", "text"),
        ("x.py.gz", "text"),
        ("x.JSONL.ZST", "json"),
        ("x.json.bz2", "json"),
        ("c4.00000-of-01024.json.gz", "json"),
        ("x.TGZ", "tar"),
        ("x.tar.xz", "tar"),
        ("x.zip", "zip"),
        ("x.jsonl.gz.001", "part"),
        ("x.tar.zst-aa", "part"),
        ("x.tar.part2", "part"),
        ("notes.zip.md", "text"),
        ("x.jsonl-00000-of-00005", "text"),
        ("app.json.1", "text"),
    ],
)
def test_the_kind_that_a_name_calls_for(name: str, kind: str) -> None:
    assert kind_of(Path(name)) == kind


def test_a_part_of_a_file_is_refused_with_what_joins_it(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz.part-002").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"join the parts .cat. to x.jsonl.gz and"):
        documents_of(tmp_path / "x.jsonl.gz.part-002")
