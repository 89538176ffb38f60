"""Zip archives as documents: the same ones as of a tar; what is damaged, joined or encrypted is refused."""

from __future__ import annotations

import io
import random
import warnings
import zipfile
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record
from mlpmem_ds.formats.zip_readers import read_zip

MEMBERS = [("a/", b""), ("a/1.txt", b"one " * 50), ("a/2.json", b'{"text": "two"}'), ("a/v1.2.md", b"three")]
EXPECTED = [("a/1", "one " * 50), ("a/2", "two"), ("a/v1.2.md", "three")]


def zip_of(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED, comment: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression=method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that occur twice
        archive.comment = comment
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def read(folder: Path, content: bytes) -> list[Record | Omission]:
    (folder / "x.zip").write_bytes(content)
    return list(read_zip(folder / "x.zip", ReadRules()))


def texts(folder: Path, content: bytes) -> list[tuple[str, str]]:
    return [(each.key, each.text) for each in read(folder, content) if isinstance(each, Record)]


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_every_compression_gives_the_documents(method: int, tmp_path: Path) -> None:
    assert texts(tmp_path, zip_of(*MEMBERS, method=method, comment=b"of 2020")) == EXPECTED


def test_members_of_other_names_links_and_repeated_names_are_said(tmp_path: Path) -> None:
    stream = io.BytesIO(zip_of(("b.JPG", b"\xff"), ("c.py", b"x = 1"), ("d.txt", b"d"), ("d.txt", b"again")))
    link = zipfile.ZipInfo("e.txt")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr(link, "d.txt")
    found = read(tmp_path, stream.getvalue())
    assert [each.text for each in found if isinstance(each, Record)] == ["d", "again"]
    assert [(each.name, each.reason, each.detail) for each in found if isinstance(each, Omission)] == [
        ("b.JPG", "not text", ".jpg"),
        ("c.py", "other member", ".py"),
        ("e.txt", "other member", "a link"),
    ]


def test_an_archive_cut_at_any_byte_or_altered_is_refused(tmp_path: Path) -> None:
    whole, chosen = zip_of(*MEMBERS), random.Random(0)
    for size in range(0, len(whole), 11):
        with pytest.raises(UserError, match="x.zip is cut short or damaged"):
            read(tmp_path, whole[:size])
    for place in chosen.sample(range(len(whole)), 200):
        altered = bytearray(whole)
        altered[place] ^= 1 << chosen.randrange(8)
        try:
            found = read(tmp_path, bytes(altered))
            given = sorted(each.text for each in found if isinstance(each, Record))
            is_named = any(isinstance(each, Omission) for each in found)
            assert is_named or given == sorted(text for _, text in EXPECTED), place
        except UserError as error:
            assert "x.zip" in str(error)


def test_archives_that_were_joined_are_refused(tmp_path: Path) -> None:
    one, two = zip_of(*MEMBERS), zip_of(("b.txt", b"b"))
    for content, where in ((one + two, "before"), (b"#!/bin/sh\n" + one, "before"), (one + b"rest", "after")):
        with pytest.raises(UserError, match=f"x.zip has bytes {where} its zip archive"):
            read(tmp_path, content)


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    content = bytearray(zip_of(("a.txt", b"a")))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + at] |= 1
    with pytest.raises(UserError, match="member 'a.txt' cannot be read .*encrypted.*unpack the archive"):
        read(tmp_path, bytes(content))
