"""CSV as others write it gives the texts that went in; a row that may be read in two ways is refused."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.csv_readers import read_csv
from mlpmem_ds.formats.document_readers import kind_of
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record

TEXTS = ["one", 'a "quoted", word', "two\nlines; \u2028\there|", "a\r\nb", "ü" * 200_000, ""]


def written(rows: list[list[str]], **dialect: object) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, **dialect).writerows(rows)  # type: ignore[arg-type]
    return stream.getvalue()


def texts_of(path: Path, text_field: str = "text", group_field: str | None = None) -> list[tuple[str, str]]:
    read = read_csv(path, ReadRules(text_field=text_field, group_field=group_field))
    return [(record.group or "", record.text) for record in read if isinstance(record, Record)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_any_dialect_gives_the_same_texts(
    delimiter: str, quoting: int, encoding: str, tmp_path: Path
) -> None:
    rows = [["id", "text", "by"], *([str(n), text, "A"] for n, text in enumerate(TEXTS))]
    for terminator in ("\n", "\r\n"):
        content = written(rows, delimiter=delimiter, quoting=quoting, lineterminator=terminator)
        (tmp_path / "x.csv").write_bytes(content.encode(encoding))
        assert texts_of(tmp_path / "x.csv", group_field="by") == [("A", text) for text in TEXTS]


WRITABLE = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff")


@given(st.lists(st.text(WRITABLE), min_size=1))
@settings(max_examples=50, deadline=None)
def test_any_texts_come_back(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.csv"
        path.write_text(written([["n", "text"], *(["1", text] for text in texts)]), "utf-8", newline="")
        assert [text for _, text in texts_of(path)] == texts


def test_one_column_blank_lines_and_compression(tmp_path: Path) -> None:
    (tmp_path / "one.csv.gz").write_bytes(gzip.compress(b"text\nalpha\n\nbeta"))
    assert texts_of(tmp_path / "one.csv.gz") == [("", "alpha"), ("", "beta")]
    (tmp_path / "late.csv").write_bytes(b"\n \r\ntext\nalpha\n")
    assert texts_of(tmp_path / "late.csv") == [("", "alpha")]
    (tmp_path / "latin.csv").write_bytes("text\ncaf\xe9".encode("latin-1"))
    read = read_csv(tmp_path / "latin.csv", ReadRules(encoding="latin-1"))
    assert [record.text for record in read if isinstance(record, Record)] == ["caf\xe9"]
    (tmp_path / "lang=de").mkdir()
    (tmp_path / "lang=de" / "x.tsv").write_text("text\n\talpha\n".replace("\t", ""))
    assert texts_of(tmp_path / "lang=de" / "x.tsv", group_field="lang") == [("de", "alpha")]
    (tmp_path / "empty.csv").write_bytes(codecs.BOM_UTF8)
    assert [type(found) for found in read_csv(tmp_path / "empty.csv", ReadRules())] == [Omission]
    assert [kind_of(Path(name)) for name in ("a.CSV", "b.tsv.zst", "c.csv.txt")] == ["csv", "csv", "text"]


BAD = {
    "column": (b"id,body\n1,a\n", r"has no column 'text' \(it has id, body\): name it with --text-field"),
    "twice": (b"text,text\na,b\n", "has 2 columns 'text'"),
    "more fields": (b"id,text\n1,a\n2,b,c\n", "up to line 3 .*it has 3 fields, the first line 2 names"),
    "fewer fields": (b"id,text\n1\n", "up to line 2 .*it has 1 fields"),
    "names": (b'"id";"text\n1;"a"\n', "up to line 1 .*first line is no row of names"),
    "open quote": (b'id,text\n1,"a\n2,b\n', "up to line 3 .*unexpected end of data"),
    "after a quote": (b'id,text\n1,"a" b\n', "up to line 2 .*expected after"),
    "backslash": (b'id,text\n1,"a \\"b\\" c"\n', "up to line 2"),
    "encoding": (b"id,text\n1,a\n2,caf\xe9\n", "up to line 3 .*utf-8"),
    "old line ends": (b"id,text\r1,a\r2,b\r", "carriage return alone"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_could_be_read_in_two_ways_is_refused(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / "x.csv")
    with pytest.raises(UserError):
        texts_of(tmp_path / "x.csv", group_field="none")
