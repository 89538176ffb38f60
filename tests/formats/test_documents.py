import bz2
import codecs
import errno
import gzip
import json
import lzma
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.documents import Document, SourceFile, cut_text, read_documents
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


def read_one(path: Path, **rules: Any) -> Document | Omission:
    (file,) = find_files([str(path.parent)], None, ()).files
    (read,) = read_documents(file, ReadRules(**rules))
    return read


def test_a_pointer_in_the_place_of_a_file_is_no_text(tmp_path: Path) -> None:
    for number, content in enumerate(
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"/annex/objects/SHA256E-s3--0\n")
    ):
        path = tmp_path / str(number) / "x.txt"
        path.parent.mkdir()
        path.write_bytes(content)
        assert read_one(path) == Omission(name="x.txt", reason="pointer")
        with pytest.raises(UserError, match="pointer of Git LFS or git-annex.*fetch"):
            list(read_documents(find_files([str(path)], None, ()).files[0], ReadRules()))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "X.TXT.XZ"])
def test_a_compressed_text_is_its_text(name: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(compress("\ufeffsome text ä\r\n".encode()))
    document = read_one(path, encoding="latin-1")
    assert isinstance(document, Document) and document.text == "some text ä\n"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{name}.*(cut short|damaged)"):
        read_one(path)


def test_what_a_file_looks_like_is_said(tmp_path: Path) -> None:
    path = tmp_path / "in" / "x.txt"
    path.parent.mkdir()
    path.write_bytes(b"%PDF-1.7 \xff\xfe")
    omission = read_one(path)
    assert isinstance(omission, Omission) and omission.detail.startswith("a PDF document; it is not UTF-8")


def test_a_file_that_may_not_be_read_is_named_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in" / "x.txt"
    path.parent.mkdir()
    path.write_text("text")
    (named,) = find_files([str(path)], None, ()).files
    errors = {errno.EACCES: "change its permissions", errno.EIO: "when the disk can be read"}
    for number, remedy in errors.items():

        def fail(path: Path, number: int = number) -> bytes:
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(Path, "read_bytes", fail)
        with pytest.raises(UserError, match=f"x.txt cannot be read .{os.strerror(number)}.*{remedy}"):
            list(read_documents(named, ReadRules()))
        if number == errno.EIO:  # it may be gone at the next try: no reason to leave the text out
            with pytest.raises(UserError, match=remedy):
                read_one(path)
        else:
            assert read_one(path) == Omission(name="x.txt", reason="unreadable", detail="Permission denied")
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(UserError, match="no longer there: the input changed"):
        list(read_documents(named, ReadRules()))


_TEXTS = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\ufeff\r"), min_size=1
).filter(lambda text: not text.isspace())
_SPELLINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16 big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "other line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "gzip": lambda text: gzip.compress(text.encode()),
    "zstd": lambda text: zstandard.compress(text.encode("utf-16")),
}


@given(
    st.lists(
        st.tuples(
            _TEXTS,
            st.sampled_from(sorted(_SPELLINGS)),
            st.sampled_from(["", "a/", "a/b/", "ü \n/", "a.txt/"]),
            st.sampled_from([".txt", ".TXT", ".md", ".py.gz"]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["utf-8", "latin-1", "gb18030"]),
)
def test_texts_in_any_spelling_and_folder_are_read_as_they_are(
    documents: list[tuple[str, str, str, str]], encoding: str
) -> None:
    with tempfile.TemporaryDirectory() as root:
        wanted = {}
        for number, (text, spelling, folder, suffix) in enumerate(documents):
            name = f"{folder}{number}{suffix}"
            if suffix == ".py.gz":  # a few characters may be the start of a compressed file
                text = f"# {text}"
            (Path(root) / folder).mkdir(parents=True, exist_ok=True)
            (Path(root) / name).write_bytes(_SPELLINGS[spelling](text))
            wanted[name] = text
        found = find_files([root], None, ())
        assert found.omissions == []
        read = [next(read_documents(file, ReadRules(encoding=encoding))) for file in found.files]
        assert {document.name: document.text for document in read if isinstance(document, Document)} == wanted


def test_a_mark_at_the_start_of_a_record_is_no_text(tmp_path: Path) -> None:
    path, texts = tmp_path / "x.jsonl", ("\ufeffone", "one", "\ufeff ", "a\ufeffb")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (file,) = find_files([str(path)], None, ()).files
    read = list(read_documents(file, ReadRules()))
    found = [document.text for document in read if isinstance(document, Document)]
    assert found == ["one", "one", "a\ufeffb"]
    assert read[2] == Omission(name="x.jsonl:3", reason="empty")


MISNAMED = {
    "JSON lines": (b'\xef\xbb\xbf\n{"text": "a"}\n{"text": "b"}\n', ".jsonl"),
    "an array": (b'[\n {"text": "a"}\n]', ".jsonl"),
    "packed JSON lines": (gzip.compress(b'{"text": "a"}\n'), ".jsonl"),
    "a tar": (b"a.txt".ljust(257, b"\0") + b"ustar\0" + b"text " * 600, ".tar"),
    "a tar of small members": (b"a.txt".ljust(257, b"\0") + b"ustar\0" + bytes(9000), ".tar"),
    "Parquet": (b"PAR1" + bytes(range(256)) + b"PAR1", ".parquet"),
    "an Arrow file": (b"ARROW1\0\0" + b"text " * 60 + b"ARROW1", ".arrow"),
}


@pytest.mark.parametrize(("content", "suffix"), MISNAMED.values(), ids=MISNAMED)
def test_many_documents_under_the_name_of_a_text_are_never_one_text(
    content: bytes, suffix: str, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    (tmp_path / "y.txt").write_text("y")
    with pytest.raises(UserError, match=rf"x.txt has the name of a text .*rename it to \*{suffix}"):
        list(read_documents(SourceFile(path=tmp_path / "x.txt", name="x.txt", is_named=True), ReadRules()))
    files = find_files([str(tmp_path)], None, ()).files
    found = [item for file in files for item in read_documents(file, ReadRules())]
    assert found[0] == Omission(name="x.txt", reason="misnamed", detail=suffix)
    assert isinstance(found[1], Document)


@pytest.mark.parametrize(
    "text",
    [
        '{"body": "a"}\n',
        '{"text": "a"}\nand more',
        "[[Link]] to a page",
        "{ block }",
        '[1, "text"]',
        "{}",
        "[]",
    ],
)
def test_texts_that_begin_like_json_are_texts(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(text)
    document = read_one(tmp_path / "x.txt")
    assert isinstance(document, Document) and document.text == text


def test_a_compressed_text_cut_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(b"")
    with pytest.raises(UserError, match="cut short in its header"):
        read_one(tmp_path / "x.txt.gz")


@given(st.text(alphabet="ab \n", max_size=200), st.integers(2, 50))
def test_pieces_are_the_text_and_none_is_longer(text: str, size: int) -> None:
    pieces = cut_text(text, size)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= size
    assert all(pieces) or not text


def test_long_texts_are_cut_where_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one two\nthree four\nfive")
    (file,) = find_files([str(path)], None, ()).files
    documents = [read for read in read_documents(file, ReadRules(piece=12)) if isinstance(read, Document)]
    assert [document.text for document in documents] == ["one two\n", "three four\n", "five"]
    assert [document.name for document in documents] == [f"book.txt, piece {n}" for n in (1, 2, 3)]
    assert len({document.group for document in documents}) == 1


def test_of_long_texts_only_the_beginning_is_taken_and_this_is_told(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one two\nthree four\nfive")
    (tmp_path / "note.txt").write_text("six\nseven")
    files = find_files([str(tmp_path)], None, ()).files
    rules = ReadRules(piece=12, first_piece_only=True)
    read = [entry for file in files for entry in read_documents(file, rules)]
    texts = {entry.name: entry.text for entry in read if isinstance(entry, Document)}
    assert texts == {"book.txt": "one two\n", "note.txt": "six\nseven"}
    assert [entry for entry in read if isinstance(entry, Omission)] == [
        Omission(name="book.txt", reason="shortened")
    ]


def test_the_beginning_of_a_text_is_not_the_space_before_it(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n" * 30 + "words\n" + "more\n" * 9)
    (file,) = find_files([str(tmp_path)], None, ()).files
    document, omission = read_documents(file, ReadRules(piece=12, first_piece_only=True))
    assert isinstance(document, Document) and isinstance(omission, Omission)
    assert document.text.strip().startswith("words") and omission.reason == "shortened"
