"""Files of JSON as documents: the same ones however the file is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.documents import SourceFile
from mlpmem_ds.formats.json_readers import read_json
from mlpmem_ds.formats.records import ReadRules, Record

RECORDS = [{"text": "one", "by": "A"}, {"text": "two \u2028\x85 lines", "by": "B"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
CONTENTS = {
    "lines": LINES.encode(),
    "mark": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    "no last end": LINES.rstrip("\n").encode(),
    "utf-16": LINES.encode("utf-16"),
    "array": json.dumps(RECORDS).encode(),
    "indented": json.dumps(RECORDS, indent=2).encode("utf-8-sig"),
    "gzip": gzip.compress(LINES.encode()),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("name", ["x.json", "x.JSONL", "x.ndjson", "x.jsonlines"])
def test_every_spelling_gives_the_same_records(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert SourceFile(path=path, name=name, is_named=True).kind == "json"
    read = list(read_json(path, ReadRules(group_field="by")))
    found = [(record.key, record.text, record.group) for record in read if isinstance(record, Record)]
    assert found == [("1", "one", "A"), ("2", "two \u2028\x85 lines", "B")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "text": "b", "by": 1}', "line 1: its text stands there more than once"),
        ('{"doc": {"text": "a"}, "doc": {"text": "b"}}', "line 1 is not an object with the fields text, by"),
        ('{"text": "\\ud83d", "by": 1}', "line 1: its text is not UTF-8 text"),
        ('{"text": ["a", 1], "by": 1}', "line 1: its text is int, not text: choose another --text-field"),
        ('{"text": 1.5, "by": 1}', "line 1: its text is float, not text"),
        ('{"body": "a", "by": 1}', r"line 1 .*it has body, by.*name them with --text-field"),
        ('"a"', "line 1 is not an object"),
    ],
)
def test_a_record_without_one_text_is_named_and_never_called_damaged(
    line: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=f"x.jsonl {message}") as caught:
        list(read_json(tmp_path / "x.jsonl", ReadRules(group_field="by")))
    assert "damaged" not in str(caught.value)


def test_a_field_that_stands_twice_with_one_value_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "text": "a", "n": 1, "n": 2}\n')
    (record,) = read_json(tmp_path / "x.jsonl", ReadRules())
    assert isinstance(record, Record) and record.text == "a"
