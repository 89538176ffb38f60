"""Files of JSON as documents: the same ones however the file is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

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
