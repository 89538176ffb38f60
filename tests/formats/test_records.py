"""Texts and groups of objects: what is one, what is none, and what a field's name means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import Record, field_of, listed, record_of


def read(values: Any, text_field: str = "text", group_field: str | None = None) -> Any:
    return record_of(Path("lang=de/x.jsonl"), "line 1", "1", values, text_field, group_field)


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"doc.text": "dot", "doc": {"text": "in"}}, "doc.text", "dot"),
        ({"doc": {"text": "in"}}, "doc.text", "in"),
        ({"a.b": {"c": "in"}}, "a.b.c", "in"),
        ({"a": {"b.c": "in"}}, "a.b.c", "in"),
        ({"a.b": {"x": 1}, "a": {"b": {"c": "in"}}}, "a.b.c", "in"),
        ({"doc": None}, "doc.text", None),
    ],
)
def test_a_name_with_dots_is_a_name_or_a_path(values: Any, name: str, expected: Any) -> None:
    assert field_of(values, name) == expected


@pytest.mark.parametrize("values", [{}, {"doc": "text"}, {"doc": {"body": 1}}, {"doc": ["text"]}])
def test_what_is_not_there_is_said_with_what_is(values: Any) -> None:
    with pytest.raises(KeyError):
        field_of(values, "doc.text")
    with pytest.raises(UserError, match=r"fields doc.text \(it has (none|doc)\)"):
        read(values, "doc.text")


def test_texts_are_strings_bytes_or_lists_of_them() -> None:
    for value in ("a\nü", b"a\n\xc3\xbc", ["a", "ü"], ("a", b"\xc3\xbc"), ["a", None, "ü"]):
        assert read({"text": value}) == Record(key="1", text="a\nü", group=None)
    for value in (None, [None]):
        assert read({"text": value}) == Omission(name="1", reason="empty")
    for value in (1, 1.5, True, {"a": "b"}, [["a"]], [1]):
        with pytest.raises(UserError, match="line 1: its text is .*not text: choose another --text-field"):
            read({"text": value})
    for value in ("\ud800", b"\xff", ["a", "\udfff"]):
        with pytest.raises(UserError, match="line 1: its text is not UTF-8"):
            read({"text": value})


def test_groups_have_a_name_or_none() -> None:
    for value, expected in (("a", "a"), (7, "7"), (True, "True"), (b"\xc3\xbc", "ü"), (None, None)):
        assert read({"text": "a", "by": value}, group_field="by").group == expected
    assert read({"text": "a"}, group_field="lang").group == "de"
    assert read({"text": "a", "lang": "en"}, group_field="lang").group == "en"
    for value in (["a"], {"a": 1}, "\ud800", b"\xff"):
        with pytest.raises(UserError, match="its by is no name of a group .*choose another --group-field"):
            read({"text": "a", "by": value}, group_field="by")


def test_many_names_are_shortened_and_cannot_break_the_line() -> None:
    assert listed([]) == "none" and listed(["a", "b\nc\x1b"]) == "a, b\\nc\\x1b"
    assert listed(range(100)).endswith("28, 29 and 70 more")
