"""JSON from users: each line a value, also with separators in its texts; what is no JSON is named by line."""

from __future__ import annotations

import io
import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats import json_lines as module
from mlpmem_ds.formats.json_lines import (
    NotJsonError,
    RepeatedNames,
    json_records,
    parse_json,
    text_lines,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


def lines_of(content: bytes) -> list[tuple[int, Any]]:
    """(line, value) of JSON lines, of which the first is no array: that would be all."""
    return [(number, value) for _, number, value in json_records(io.BytesIO(content), name="x.jsonl")]


def records_of(content: bytes) -> list[tuple[str, int, Any]]:
    return [tuple(record) for record in json_records(io.BytesIO(content), name="x.json")]


@given(
    values=st.lists(VALUES, min_size=1, max_size=5).filter(lambda values: not isinstance(values[0], list)),
    encoding=st.sampled_from(ENCODINGS),
    end=st.sampled_from(["\n", "\r\n"]),
    is_ascii=st.booleans(),
    last=st.sampled_from(["", "\n", "\n\n \t\n"]),
)
def test_lines_in_any_encoding_give_their_values(
    values: list[Any], encoding: str, end: str, is_ascii: bool, last: str
) -> None:
    text = end.join(json.dumps(value, ensure_ascii=is_ascii) for value in values) + last
    content = text.encode(encoding, "surrogatepass" if is_ascii else "strict")
    assert lines_of(content) == list(enumerate(values, start=1))


@given(values=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=4))
def test_lines_an_array_and_an_indented_array_give_the_same_records(values: list[Any]) -> None:
    lines = "\n".join(map(json.dumps, values)).encode()
    found = [(number, value) for _, number, value in records_of(lines)]
    assert found == list(enumerate(values, start=1))
    for indent in (None, 2):
        array = records_of(json.dumps(values, indent=indent).encode())
        assert array == [(f"item {number}", number, value) for number, value in found]
    (alone,) = records_of(json.dumps(values[0], indent=1).encode() + b"\n")
    assert alone[2] == values[0]


def test_separators_inside_texts_do_not_end_lines() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    assert lines_of(json.dumps(text, ensure_ascii=False).encode()) == [(1, text)]
    content = b'"a\xe2\x80\xa8b\xc2\x85c"\n\r\n"d"\r\n'
    assert lines_of(content) == [(1, "a\u2028b\x85c"), (3, "d")]
    assert list(text_lines(io.BytesIO(b"a\xe2\x80\xa8b\r\n\x0cc\n\nd"), name="x")) == [
        (1, "a\u2028b"),
        (2, "\x0cc"),
        (3, ""),
        (4, "d"),
    ]


def test_files_with_marks_that_were_joined_are_read() -> None:
    assert lines_of(b"\xef\xbb\xbf1\n\xef\xbb\xbf2\n") == [(1, 1), (2, 2)]
    assert lines_of(b"") == lines_of(b"\xef\xbb\xbf") == lines_of(b"\n \n") == []


def test_numbers_that_python_writes_and_long_integers_are_read() -> None:
    assert parse_json("-" + "9" * 5000) == Decimal("-" + "9" * 5000)
    assert parse_json('{"a": [1, ' + "7" * 4301 + '], "b": "x"}')["b"] == "x"
    assert parse_json("[NaN, Infinity, 1e999]")[1:] == [float("inf")] * 2


def test_a_name_that_stands_twice_is_marked_where_the_values_differ() -> None:
    value = parse_json('{"a": 1, "b": 2, "a": 3, "b": 2}')
    assert value == {"a": 3, "b": 2}
    assert isinstance(value, RepeatedNames) and value.repeated == {"a"}
    assert not isinstance(parse_json('{"a": 1, "a": 1}'), RepeatedNames)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'1\n{"text": "abc', "line 2 is not JSON .Unterminated string"),
        (b"1\n\xff\n", "line 2 is not UTF-8"),
        (b"1\n" + b"\0" * 4096, "line 2 is not JSON .it holds only zero bytes"),
        ("{}\n".encode("utf-16-le"), "is neither JSON lines .line 1: .*UTF-16 without a mark"),
        ("1\n".encode("utf-16-le"), "line 1 is not JSON .*UTF-16 without a mark"),
        ("1\n2".encode("utf-16")[:-1], "line [12] is not UTF-16.*truncated data"),
        (b"[" * 100_000, "is neither JSON lines .line 1: .*nested too deep"),
        (b"1\n" + b"[" * 100_000, "line 2 is not JSON .*nested too deep"),
        (b"{'a': 1}", "is neither JSON lines .line 1: "),
        (b"1 2", "line 1 is not JSON .Extra data"),
    ],
)
def test_what_is_no_json_is_named_by_its_line(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"x.jsonl {message}"):
        lines_of(content)


def test_a_file_that_is_neither_lines_nor_one_value_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="neither JSON lines .line 1: .* nor one JSON value"):
        records_of(b'[{"text": "a"},\n{"text": "b"}')
    with pytest.raises(UserError, match="line 1 is an array, and more lines follow"):
        records_of(b"[1]\n[2]\n")
    with pytest.raises(UserError, match="line 2 is not JSON"):
        records_of(b'{"a": 1}\n{\n"a": 1}')
    monkeypatch.setattr(module, "MAX_WHOLE_CHARACTERS", 8)
    with pytest.raises(UserError, match="may have 8 characters"):
        records_of(b'[\n{"text": "a"}\n]')


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for read in (lines_of, records_of):
        try:
            read(content)
        except UserError as error:
            assert "x.json" in str(error)


def test_a_text_that_is_no_json_says_where() -> None:
    with pytest.raises(NotJsonError, match="Expecting value at character 2 of 2"):
        parse_json("[}")


def test_lines_of_a_named_encoding() -> None:
    mixed = '{"a": "ü"}\n'.encode() + '{"a": "é"}\n'.encode("latin-1")
    found = json_records(io.BytesIO(mixed), name="x", encoding="latin-1")
    assert [record.value for record in found] == [{"a": "ü"}, {"a": "é"}]
    plain = '{"a": "\u2028"}\n\n"é"'.encode("utf-16-le")
    found = json_records(io.BytesIO(plain), name="x", encoding="utf-16-le")
    assert [record[1:] for record in found] == [(1, {"a": "\u2028"}), (3, "é")]
    with pytest.raises(UserError, match="x line 2 is not UTF-8 .*--encoding"):
        list(json_records(io.BytesIO(mixed), name="x"))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-be", "utf-16"])
@pytest.mark.parametrize("written", ["utf-8", "utf-8-sig"])
def test_what_is_utf_8_stays_so_where_a_wide_encoding_is_named(encoding: str, written: str) -> None:
    content = '{"a": "é"}\n{"a": "日"}\n'.encode(written)
    found = json_records(io.BytesIO(content), name="x", encoding=encoding)
    assert [record.value for record in found] == [{"a": "é"}, {"a": "日"}]
    with pytest.raises(UserError, match="x line 2 is not UTF-8"):
        list(json_records(io.BytesIO(content.replace("日".encode(), b"\xff")), name="x", encoding=encoding))


def test_a_wrong_first_line_of_json_lines_is_said_before_the_rest_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_WHOLE_CHARACTERS", 100)
    content = b'{"text": "cut\n' + b'{"text": "a whole line"}\n' * 100
    with pytest.raises(UserError, match="x.jsonl line 1 is not JSON"):
        list(json_records(io.BytesIO(content), name="x.jsonl"))
