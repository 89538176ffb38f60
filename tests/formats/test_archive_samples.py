"""Members of an archive as documents: each text is one, and what is no text is counted by its suffix."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats import archive_samples
from mlpmem_ds.formats.archive_samples import Member, is_read, omission_of, sample_records
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record


def read(*members: tuple[str, object], rules: ReadRules | None = None) -> list[tuple[str, str, str | None]]:
    """(key, text, group) of each document; a member's content is bytes, a text, or an object for JSON."""
    given = [
        Member(
            name=name,
            content=content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode(),
        )
        for name, content in members
    ]
    found = sample_records(Path("x.tar"), iter(given), rules or ReadRules())
    return [(record.key, record.text, record.group) for record in found if isinstance(record, Record)]


def test_the_main_text_has_the_name_of_its_sample_and_others_their_own() -> None:
    members = [("x.md", "two"), ("x.txt", "one"), ("x.seg.txt", "three"), ("x.TEXT", "four")]
    assert [(key, text) for key, text, _ in read(*members)] == [
        ("x.md", "two"),
        ("x", "one"),
        ("x.seg.txt", "three"),
        ("x.TEXT", "four"),
    ]
    assert [key for key, *_ in read(("22.05.txt", "a"), ("22.06.txt", "b"), ("f.1/a.txt", "c"))] == [
        "22.05.txt",
        "22.06.txt",
        "f.1/a",
    ]


def test_a_json_with_another_text_than_its_text_member_is_a_document_too() -> None:
    assert read(("x.txt", "one\n"), ("x.json", {"text": "one"})) == [("x", "one\n", None)]
    assert read(("x.txt", "one"), ("x.json", {"text": 7})) == [("x", "one", None)]
    assert read(("x.txt", "one"), ("x.json", {"text": "other"})) == [
        ("x", "one", None),
        ("x.json", "other", None),
    ]
    assert read(("x.json", {"text": "one"}), ("x.meta.json", {"n": 1})) == [("x", "one", None)]
    assert [key for key, *_ in read(("x.text.json", {"text": "one"}))] == ["x.text.json"]


def test_marks_and_encodings_are_those_of_text_files() -> None:
    assert read(("x.txt", "\ufeffü\r\n"), ("y.txt", "ü".encode("utf-16"))) == [
        ("x", "ü\n", None),
        ("y", "ü", None),
    ]
    assert read(("x.txt", b"\xfc"), rules=ReadRules(encoding="latin-1")) == [("x", "ü", None)]
    with pytest.raises(UserError, match="x.tar member 'x.txt' is not UTF-8 text .*--encoding"):
        read(("x.txt", b"\xfc"))


def test_a_sample_whose_json_has_no_text_is_refused_where_it_stands_alone() -> None:
    with pytest.raises(UserError, match=r"member 'x.json', with no text member next to it, .*it has n"):
        read(("x.json", {"n": 1}), ("y.txt", "y"), ("x.txt", "x"))
    with pytest.raises(UserError, match="member 'x.json'.* more than once"):
        read(("x.txt", "x"), ("x.json", b'{"text": "a", "text": "b"}'))


def test_files_of_the_system_are_no_documents() -> None:
    members = [
        Member(name="a/._x.txt", content=b"\x00\x05\x16\x07rest"),
        Member(name="__MACOSX/x.txt", content=b"x"),
        Member(name="PaxHeaders.12/x.txt", content=b"30 mtime=1"),
    ]
    found = list(sample_records(Path("x.tar"), iter(members), ReadRules()))
    assert found == [Omission(name="a/._x.txt", reason="system file", count=3)]


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("a.JPG", "not text", ".jpg"),
        ("a.cls", "not text", ".cls"),
        ("a.py", "other member", ".py"),
        ("a.jsonl", "other member", ".jsonl"),
        ("README", "other member", ""),
        ("mr. smith", "other member", ""),
        ("a/.DS_Store", "system file", ""),
    ],
)
def test_members_that_are_not_read_are_counted_by_suffix(name: str, reason: str, detail: str) -> None:
    assert not is_read(name)
    omission = omission_of(name)
    assert (omission.reason, omission.detail) == (reason, detail)


def test_a_large_sample_is_given_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_samples, "_MAX_MEMBERS", 3)
    texts = [(f"wiki.{number}.txt", f"text {number}") for number in range(8)]
    assert read(*texts) == [(name, text, None) for name, text in texts]
    pairs = [each for name, text in texts for each in ((name, text), (f"{name[:-4]}.json", {"by": text}))]
    rules = ReadRules(group_field="by")
    assert read(*pairs, rules=rules) == [(name, text, text) for name, text in texts]
    for late in ("wiki.1.json", "wiki.json"):
        with pytest.raises(UserError, match=f"x.tar member '{late}' may belong to texts .*unpack"):
            read(*texts, (late, {"text": "text 1"}))


def test_only_the_held_members_of_a_sample_are_in_memory() -> None:
    alive = weakref.WeakSet[Member]()

    def members() -> Iterator[Member]:
        for number in range(3000):
            member = Member(name=f"wiki.{number}.txt", content=b"a text")
            alive.add(member)
            assert len(alive) <= 1002
            yield member

    assert sum(1 for _ in sample_records(Path("x.tar"), members(), ReadRules())) == 3000
