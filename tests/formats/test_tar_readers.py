"""Tars as documents: no text of a member is lost, and a tar that is cut or altered is refused."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record
from mlpmem_ds.formats.tar_readers import read_tar


def tar_of(*members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def texts_of(folder: Path, content: bytes, group: str | None = None) -> list[tuple[str, str]]:
    (folder / "x.tar").write_bytes(content)
    read = read_tar(folder / "x.tar", ReadRules(group_field=group))
    return [(record.key, record.text) for record in read if isinstance(record, Record)]


SAMPLES = [(f"{number:03d}.txt", f"text {number}".encode()) for number in range(12)]
EXPECTED = [(f"{number:03d}", f"text {number}") for number in range(12)]


def test_names_with_dots_lose_no_text(tmp_path: Path) -> None:
    names = ("one.txt", "22.05.txt", "22.06.txt", "notes v1.2.txt", "a/mr. smith.TXT", ".hidden.md")
    found = texts_of(tmp_path, tar_of(*((name, name.encode()) for name in names)))
    assert [text for _, text in found] == list(names)
    assert [key for key, _ in found] == ["one", *names[1:]]


def test_every_text_of_a_sample_is_a_document(tmp_path: Path) -> None:
    members = [("x.md", b"two"), ("x.txt", b"one"), ("x.seg.txt", b"three"), ("x.jpg", b"\xff\xd8")]
    assert texts_of(tmp_path, tar_of(*members)) == [("x.md", "two"), ("x", "one"), ("x.seg.txt", "three")]
    twice = tar_of(("x.txt", b"old"), ("y.txt", b"y"), ("x.txt", b"new"), ("x.txt", b"newer"))
    assert [text for _, text in texts_of(tmp_path, twice)] == ["old", "y", "new", "newer"]
    objects = [(name, json.dumps({"text": name}).encode()) for name in ("y.json", "y.2.json", "y.json")]
    assert [text for _, text in texts_of(tmp_path, tar_of(*objects))] == [name for name, _ in objects]


def test_tars_that_were_joined_are_read_whole(tmp_path: Path) -> None:
    first, second = tar_of(*SAMPLES[:5]), tar_of(*SAMPLES[5:], format=tarfile.GNU_FORMAT)
    assert texts_of(tmp_path, first + second) == EXPECTED
    assert texts_of(tmp_path, gzip.compress(first) + gzip.compress(second)) == EXPECTED
    assert texts_of(tmp_path, bytes(10240) + first + bytes(10240) + second) == EXPECTED


def test_long_names_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    long = "folder/" + "n" * 300
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        names = [long, "caf\udce9", "überall", "../up", "/root"]
        found = texts_of(tmp_path, tar_of(*((f"{name}.txt", b"a") for name in names), format=format))
        assert len(found) == len(names)
        assert [key for key, _ in found][:3] == names[:3]


def test_names_do_not_depend_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tar_of(("ü.txt", b"a"), ("caf\udce9.txt", b"b"), format=tarfile.GNU_FORMAT)
    monkeypatch.setattr(tarfile.TarFile, "encoding", "latin-1")
    assert [key for key, _ in texts_of(tmp_path, content)] == ["ü", "caf\udce9"]


def test_an_empty_tar_has_no_documents_and_one_of_no_bytes_is_refused(tmp_path: Path) -> None:
    assert texts_of(tmp_path, bytes(10240)) == texts_of(tmp_path, tar_of()) == []
    with pytest.raises(UserError, match="before its first member .*no end-of-archive block"):
        texts_of(tmp_path, b"")


def test_a_tar_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    """Until the first block of its end is whole."""
    whole = tar_of(*SAMPLES[:3])
    end = 3 * 1024
    for size in [*range(0, end + 512, 97), *range(512, end, 512), end + 511]:
        with pytest.raises(UserError, match="x.tar is cut short or damaged (after|before)"):
            texts_of(tmp_path, whole[:size])
    for size in (end + 512, end + 1024, len(whole)):
        assert texts_of(tmp_path, whole[:size]) == EXPECTED[:3]


def test_a_tar_with_a_changed_header_is_refused(tmp_path: Path) -> None:
    """The data have no checksum; zeros that fill a block are no data."""
    whole, chosen = tar_of(*SAMPLES[:4]), random.Random(0)
    for place in [*range(0, 512, 31), *range(1024, 1536, 31), *range(3072, 3584, 31)]:
        altered = bytearray(whole)
        altered[place] ^= 1 << chosen.randrange(8)
        try:
            assert texts_of(tmp_path, bytes(altered)) == EXPECTED[:4], place
        except UserError as error:
            assert "x.tar is cut short or damaged" in str(error)
            assert ("before its first member" if place < 512 else "after member") in str(error)


def test_bytes_after_the_end_that_are_no_tar_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x.tar has bytes after its end, after member .* that are no tar"):
        texts_of(tmp_path, tar_of(*SAMPLES) + b"x" * 512)
    with pytest.raises(UserError, match="bytes after its end"):
        texts_of(tmp_path, tar_of(*SAMPLES) + b"\n")


def test_a_sample_may_have_its_group_in_its_own_json(tmp_path: Path) -> None:
    members = [
        ("22.json", b'{"by": "both"}'),
        ("22.05.txt", b"five"),
        ("22.06.json", b'{"by": "six"}'),
        ("22.06.txt", b"six"),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(*members))
    read = list(read_tar(tmp_path / "x.tar", ReadRules(group_field="by")))
    found = [(record.text, record.group) for record in read if isinstance(record, Record)]
    assert found == [("five", "both"), ("six", "six")]


def test_links_have_the_content_of_their_file_and_broken_ones_are_named(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, target in (
            ("./s/0.txt", tarfile.REGTYPE, ""),
            ("s/1.txt", tarfile.LNKTYPE, "s/0.txt"),
            ("s/2.txt", tarfile.SYMTYPE, "0.txt"),
            ("t/3.md", tarfile.SYMTYPE, "../s/2.txt"),
            ("t/4.txt", tarfile.SYMTYPE, "/somewhere/else.txt"),
            ("t/5.txt", tarfile.SYMTYPE, "5.txt"),
            ("t/6.txt", tarfile.LNKTYPE, "t/blob"),
            ("t/blob", tarfile.REGTYPE, ""),
            ("t", tarfile.DIRTYPE, ""),
            ("t/pipe", tarfile.FIFOTYPE, ""),
            ("t/volume", b"M", ""),
            ("t/label", b"V", ""),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            content = name.encode() if kind == tarfile.REGTYPE else b""
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    for suffix, content in (("", stream.getvalue()), (".gz", gzip.compress(stream.getvalue()))):
        path = tmp_path / f"x.tar{suffix}"
        path.write_bytes(content)
        found = list(read_tar(path, ReadRules()))
        assert [(each.key, each.text) for each in found if isinstance(each, Record)] == [
            ("./s/0", "./s/0.txt"),
            ("s/1", "./s/0.txt"),
            ("s/2", "./s/0.txt"),
            ("t/3", "./s/0.txt"),
            ("t/6", "t/blob"),
        ]
        omissions = [(each.name, each.reason, each.detail) for each in found if isinstance(each, Omission)]
        assert omissions == [
            ("t/4.txt", "broken link", "/somewhere/else.txt"),
            ("t/5.txt", "broken link", "5.txt"),
            ("t/blob", "other member", ""),
            ("t/pipe", "special file", ""),
            ("t/volume", "other member", "of type 'M'"),
        ]


def test_links_to_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpmem_ds.formats.tar_readers.MAX_LINKED_BYTES", 3)
    stream = io.BytesIO(tar_of(("a.txt", b"four")))
    with tarfile.open(fileobj=stream, mode="a") as archive:
        entry = tarfile.TarInfo("b.txt")
        entry.type, entry.linkname = tarfile.LNKTYPE, "a.txt"
        archive.addfile(entry)
    with pytest.raises(UserError, match="links to files of more than 3 bytes"):
        texts_of(tmp_path, stream.getvalue())
