"""Parquet and Arrow: any encoding of the same texts gives the same documents; what is wrong is named."""

from __future__ import annotations

import datetime
import gzip
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.arrow_library import arrow_errors
from mlpmem_ds.formats.file_marks import is_no_text_by_name, kind_by_mark
from mlpmem_ds.formats.records import ReadRules, Record
from mlpmem_ds.formats.table_readers import read_table

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

TEXTS = ["one", "zwei ü", "drei\nLines \u2028 here", "", "vier"]


def records_of(path: Path, text_field: str = "text", group_field: str | None = None) -> list[Record]:
    read = read_table(path, ReadRules(text_field=text_field, group_field=group_field))
    return [record for record in read if isinstance(record, Record)]


def texts_of(path: Path, text_field: str = "text") -> list[tuple[str, str]]:
    return [(record.key, record.text) for record in records_of(path, text_field)]


def numbered(texts: list[str | None]) -> list[tuple[str, str]]:
    return [(str(row), text) for row, text in enumerate(texts) if text is not None]


# The same texts as columns of many types


def in_struct(texts: list[str | None]) -> Any:
    return pa.array([None if text is None else {"part": text, "other": 1} for text in texts])


def runs(texts: list[str | None]) -> Any:
    return pa.RunEndEncodedArray.from_arrays(
        pa.array(range(1, len(texts) + 1), pa.int32()), pa.array(texts, pa.string())
    )


def plain(kind: Any) -> Callable[[list[str | None]], Any]:
    return lambda texts: pa.array(texts, pa.large_string()).cast(kind)


def as_bytes(kind: Any) -> Callable[[list[str | None]], Any]:
    return lambda texts: pa.array([None if text is None else text.encode() for text in texts], kind)


def lists(kind: Any) -> Callable[[list[str | None]], Any]:
    """Lists of the texts' lines: their parts stand on lines of their own."""
    return lambda texts: pa.array([None if text is None else text.split("\n") for text in texts], kind)


ENCODINGS: dict[str, tuple[Callable[[list[str | None]], Any], str]] = {
    "string": (plain(pa.string()), "text"),
    "large_string": (plain(pa.large_string()), "text"),
    "string_view": (plain(pa.string_view()), "text"),
    "dictionary": (lambda texts: plain(pa.string())(texts).dictionary_encode(), "text"),
    "dictionary of large": (lambda texts: plain(pa.large_string())(texts).dictionary_encode(), "text"),
    "dictionary of int8": (plain(pa.dictionary(pa.int8(), pa.string())), "text"),
    "binary": (as_bytes(pa.binary()), "text"),
    "large_binary": (as_bytes(pa.large_binary()), "text"),
    "binary_view": (as_bytes(pa.binary_view()), "text"),
    "list": (lists(pa.list_(pa.string())), "text"),
    "large_list": (lists(pa.large_list(pa.large_string())), "text"),
    "list of dictionaries": (lists(pa.list_(pa.dictionary(pa.int32(), pa.string()))), "text"),
    "struct": (in_struct, "text.part"),
    "runs": (runs, "text"),
}


def write_stream(path: Path, table: Any, *, rows: int = 2, **options: Any) -> None:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)


def write_file(path: Path, table: Any, *, rows: int = 2, **options: Any) -> None:
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.unify_dictionaries().to_batches(max_chunksize=rows):
            writer.write_batch(batch)


CONTAINERS: dict[str, Callable[[Path, Any], None]] = {
    "x.parquet": lambda path, table: parquet.write_table(table, path, row_group_size=2),
    "checked.parquet": lambda path, table: parquet.write_table(table, path, write_page_checksum=True),
    "old.parq": lambda path, table: parquet.write_table(table, path, version="1.0", compression="gzip"),
    "stream.arrow": write_stream,
    "zstd.arrows": lambda path, table: write_stream(path, table, compression="zstd"),
    "legacy.arrow": lambda path, table: write_stream(path, table, use_legacy_format=True),
    "file.arrow": write_file,
    "lz4.feather": lambda path, table: write_file(path, table, compression="lz4"),
    "file called.parquet": write_file,
    "parquet called.arrow": lambda path, table: parquet.write_table(table, path),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_encoding_of_the_same_texts_gives_the_same_documents(
    encoding: str, container: str, tmp_path: Path
) -> None:
    make, field = ENCODINGS[encoding]
    texts = [*TEXTS, None, "sieben"]
    table = pa.table({"other": range(len(texts)), "text": make(texts)})
    if encoding == "runs" and "parq" in container and "file called" not in container:
        return  # pyarrow cannot write them
    CONTAINERS[container](tmp_path / container, table)
    assert texts_of(tmp_path / container, field) == numbered(texts)


@given(
    st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]))),
    st.sampled_from(sorted(set(ENCODINGS) - {"runs"})),
    st.sampled_from(sorted(CONTAINERS)),
)
@settings(max_examples=60, deadline=None)
def test_any_texts_come_back(texts: list[str | None], encoding: str, container: str) -> None:
    make, field = ENCODINGS[encoding]
    if not texts and encoding == "struct":
        return  # an empty list says no type
    with tempfile.TemporaryDirectory() as folder:
        table = pa.table({"text": make(texts)})
        if encoding == "struct" and table.schema.field("text").type == pa.null():
            return
        CONTAINERS[container](Path(folder) / container, table)
        assert texts_of(Path(folder) / container, field) == numbered(texts)


def write(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def test_a_column_of_that_very_name_is_meant_before_a_field_of_a_struct(tmp_path: Path) -> None:
    structs = [{"text": "in a struct", "more": {"text": "deep"}}]
    both = write(tmp_path / "both.parquet", doc=structs, **{"doc.text": ["with a dot"]})
    assert texts_of(both, "doc.text") == [("0", "with a dot")]
    assert texts_of(both, "doc.more.text") == [("0", "deep")]
    alone = write(tmp_path / "alone.parquet", doc=structs, n=[1])
    assert texts_of(alone, "doc.text") == [("0", "in a struct")]
    with pytest.raises(UserError, match=r"no column 'text' \(it has doc.text, doc.more.text, n\)"):
        texts_of(alone)
    with pytest.raises(UserError, match="its column 'doc' is of type struct"):
        texts_of(alone, "doc")


def test_fields_of_a_null_struct_are_null(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", doc=pa.array([{"text": "a"}, None, {"text": None}, {"text": "d"}]))
    assert texts_of(path, "doc.text") == [("0", "a"), ("3", "d")]


def test_tables_without_rows_or_texts_give_nothing_and_are_no_error(tmp_path: Path) -> None:
    schema = pa.schema({"text": pa.string()})
    parquet.ParquetWriter(tmp_path / "no_groups.parquet", schema).close()
    parquet.write_table(schema.empty_table(), tmp_path / "no_rows.parquet")
    write_stream(tmp_path / "no_batches.arrow", schema.empty_table())
    write_file(tmp_path / "no_batches.feather", schema.empty_table())
    write(tmp_path / "nulls.parquet", text=pa.nulls(3))
    for path in tmp_path.iterdir():
        assert texts_of(path) == []
        with pytest.raises(UserError, match="no column 'body' .it has text.: name it with --text-field"):
            texts_of(path, "body")


def test_groups_of_any_type_have_names_and_a_null_is_none(tmp_path: Path) -> None:
    moment = datetime.datetime(2020, 1, 2, 3, 4, 5)
    columns: dict[str, tuple[Any, str]] = {
        "string": (pa.array(["ä", None]), "ä"),
        "dictionary": (pa.array(["ä", None]).dictionary_encode(), "ä"),
        "integer": (pa.array([7, None], pa.int64()), "7"),
        "bytes": (pa.array(["ä".encode(), None]), "ä"),
        "date": (pa.array([moment.date(), None]), "2020-01-02"),
        "moment": (pa.array([moment, None], pa.timestamp("s")), "2020-01-02 03:04:05"),
        "nanosecond": (pa.array([1, None], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
        "yes": (pa.array([True, None]), "True"),
    }
    path = write(
        tmp_path / "x.parquet", text=["a", "b"], **{name: column for name, (column, _) in columns.items()}
    )
    for name, (_, expected) in columns.items():
        assert [record.group for record in records_of(path, group_field=name)] == [expected, None], name
    with pytest.raises(UserError, match="no column 'author' .*--group-field"):
        records_of(path, group_field="author")
    elsewhere = pa.table({"text": ["a"], "at": pa.array([1], pa.timestamp("us", tz="Mars/Base"))})
    write_stream(tmp_path / "zone.arrow", elsewhere)
    with pytest.raises(UserError, match="row 0: its at cannot be written as text .*choose another"):
        records_of(tmp_path / "zone.arrow", group_field="at")
    nested = write(tmp_path / "nested.parquet", text=["a"], tags=[["x"]])
    with pytest.raises(UserError, match="'tags' is of type list.*not one name a row"):
        records_of(nested, group_field="tags")


def test_a_folder_may_name_the_group_of_its_files(tmp_path: Path) -> None:
    """As Hive and Spark lay out a table: the column is in no file."""
    for folder, expected in (
        ("lang=en", "en"),
        ("lang=a%2Fb", "a/b"),
        ("lang=__HIVE_DEFAULT_PARTITION__", None),
    ):
        (tmp_path / folder / "n=1").mkdir(parents=True)
        path = write(tmp_path / folder / "n=1" / "part-0.parquet", text=["a"])
        assert [record.group for record in records_of(path, group_field="lang")] == [expected]
    stored = write(tmp_path / "lang=en" / "b.parquet", text=["a"], lang=["stored"])
    assert [record.group for record in records_of(stored, group_field="lang")] == ["stored"]


class Wrapped(pa.ExtensionType):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.wrapped")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Wrapped:
        return cls()


def test_extension_types_are_read_as_they_are_stored(tmp_path: Path) -> None:
    column = pa.ExtensionArray.from_storage(Wrapped(), pa.array(["a", "b"]))
    path = write(tmp_path / "x.parquet", text=column)
    assert texts_of(path) == [("0", "a"), ("1", "b")]
    pa.register_extension_type(Wrapped())
    try:
        assert texts_of(path) == [("0", "a"), ("1", "b")]
    finally:
        pa.unregister_extension_type("tests.wrapped")


def test_dictionaries_that_change_between_batches(tmp_path: Path) -> None:
    batches = [
        pa.record_batch({"text": pa.array(texts).dictionary_encode()})
        for texts in (["a", "b"], ["c"], ["b", "d"])
    ]
    with pa.ipc.new_stream(tmp_path / "x.arrow", batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    assert texts_of(tmp_path / "x.arrow") == numbered(["a", "b", "c", "b", "d"])


def test_streams_one_after_the_other_are_read_on(tmp_path: Path) -> None:
    write_stream(tmp_path / "a.arrow", pa.table({"text": ["a", "b", "c"]}))
    write_stream(tmp_path / "b.arrow", pa.table({"n": [1], "text": ["d"]}))
    joined = tmp_path / "joined.arrow"
    joined.write_bytes((tmp_path / "a.arrow").read_bytes() + (tmp_path / "b.arrow").read_bytes())
    assert texts_of(joined) == numbered(["a", "b", "c", "d"])


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_that_was_cut_anywhere_is_refused(container: str, tmp_path: Path) -> None:
    CONTAINERS[container](tmp_path / container, pa.table({"text": TEXTS}))
    whole = (tmp_path / container).read_bytes()
    for stop in {*range(0, len(whole), 7), len(whole) - 8, len(whole) - 4, len(whole) - 1}:
        (tmp_path / container).write_bytes(whole[:stop])
        with pytest.raises(UserError):
            texts_of(tmp_path / container)


def not_utf8(*, in_dictionary: bool = False) -> Any:
    """A column of strings, or of a dictionary of them, whose third is no UTF-8."""
    stored = pa.array([b"ok", "ü".encode(), b"\xff\xfe"])
    column = pa.Array.from_buffers(pa.string(), 3, stored.buffers())
    return column.dictionary_encode() if in_dictionary else column


def damage(make: Callable[[Path], object], change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def made(path: Path) -> None:
        make(path)
        path.write_bytes(change(path.read_bytes()))

    return made


def table_of(**columns: Any) -> Callable[[Path], object]:
    return lambda path: write(path, **columns)


def write_doubled(path: Path) -> None:
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text"] * 2), path)


def write_checked(path: Path) -> None:
    parquet.write_table(pa.table({"text": TEXTS}), path, write_page_checksum=True, compression="none")


WORDS = pa.table({"text": TEXTS})
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "integers.parquet": (table_of(text=[1], author=[1]), "'text' is of type int64, not text"),
    "floats.arrow": (lambda path: write_stream(path, pa.table({"text": [1.5]})), "is of type double, not"),
    "nested.parquet": (table_of(text=[[["a"]]]), "is of type list<.*list<.*not text"),
    "messages.parquet": (table_of(text=[[{"role": "user", "content": "a"}]]), "is of type list<.*struct"),
    "map.parquet": (table_of(text=pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))), "type map"),
    "column.parquet": (
        table_of(body=["a"], id=[1]),
        r"column.parquet has no column 'text' \(it has body, id\): name it with --text-field",
    ),
    "case.arrow": (lambda path: write_stream(path, pa.table({"Text": ["a"]})), r"\(it has Text\)"),
    "twice.parquet": (write_doubled, "has 2 columns 'text': rename all but one"),
    "bytes.parquet": (table_of(text=[b"a", b"\xff"]), "bytes.parquet row 1: its text is not UTF-8"),
    "string.parquet": (table_of(text=not_utf8()), "string.parquet row 2: its text is not UTF-8"),
    "string.arrow": (
        lambda path: write_stream(path, pa.table({"text": not_utf8()})),
        "string.arrow row 2: its text is not UTF-8",
    ),
    "dictionary.arrow": (
        lambda path: write_stream(path, pa.table({"text": not_utf8(in_dictionary=True)}), rows=3),
        "dictionary.arrow row 2: its text is not UTF-8",
    ),
    "list.arrow": (
        lambda path: write_stream(
            path, pa.table({"text": pa.ListArray.from_arrays(pa.array([0, 1, 3]), not_utf8())})
        ),
        "list.arrow row 1: its text is not UTF-8",
    ),
    "empty.parquet": (lambda path: path.write_bytes(b""), "empty.parquet is no table, but empty"),
    "empty.arrow": (lambda path: path.write_bytes(b""), "empty.arrow is no table, but empty"),
    "text.parquet": (
        lambda path: path.write_text("Once upon a time"),
        "neither Parquet nor Arrow: it begins",
    ),
    "text.arrow": (lambda path: path.write_text("Once upon a time"), "neither Parquet nor Arrow"),
    "page.parquet": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "but a web page"),
    "lfs.parquet": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "lines.parquet": (lambda path: path.write_text('{"text": "a"}\n'), "but JSON"),
    "first.feather": (lambda path: path.write_bytes(b"FEA1" + bytes(60)), "Feather file of version 1"),
    "checksum.parquet": (
        damage(write_checked, lambda content: content.replace(b"zwei", b"Zwei", 1)),
        "checksum.parquet is cut short or damaged .*CRC",
    ),
    "trailing.arrow": (
        damage(lambda path: write_stream(path, WORDS), lambda content: content + b"more"),
        "trailing.arrow is cut short or damaged",
    ),
    "between.arrow": (
        damage(lambda path: write_stream(path, WORDS), lambda content: content[:-8]),
        "no end-of-stream mark",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_and_a_whole_file_is_never_called_damaged(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as found:
        texts_of(tmp_path / name)
    assert ("damaged" in str(found.value)) == ("damaged" in message or "mark" in message)
    assert "\n" not in str(found.value)


def test_errors_are_told_apart(tmp_path: Path) -> None:
    for error, message in (
        (pa.ArrowMemoryError("malloc of size 9 failed"), "needs more memory"),
        (pa.ArrowNotImplementedError("no codec\nlz9"), "cannot read .no codec lz9.: install a newer"),
        (OSError("Could not read encrypted metadata"), "is encrypted"),
        (pa.ArrowInvalid("bad"), "cut short or damaged"),
        (pa.ArrowKeyError("bad"), "cut short or damaged"),
    ):
        with pytest.raises(UserError, match=message), arrow_errors(tmp_path):
            raise error
    with pytest.raises(PermissionError), arrow_errors(tmp_path):
        raise PermissionError(13, "no")


def test_a_compressed_table_is_read(tmp_path: Path) -> None:
    for container in ("x.parquet", "stream.arrow", "lz4.feather"):
        CONTAINERS[container](tmp_path / container, WORDS)
        packed = gzip.compress((tmp_path / container).read_bytes())
        (tmp_path / f"{container}.gz").write_bytes(packed)
        assert texts_of(tmp_path / f"{container}.gz") == numbered(list(TEXTS))
        (tmp_path / f"{container}.gz").write_bytes(packed[:-9])
        with pytest.raises(UserError, match="cannot be read whole .* gzip"):
            texts_of(tmp_path / f"{container}.gz")


def test_names_of_columns_cannot_move_the_cursor(tmp_path: Path) -> None:
    control = write(tmp_path / "y.parquet", **{"te\nxt\x1b[31m": ["a"]})
    with pytest.raises(UserError, match=r"it has te\\nxt\\x1b\[31m"):
        texts_of(control)


def test_one_big_batch_is_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stream(tmp_path / "x.arrow", pa.table({"text": [str(row) for row in range(1000)]}), rows=1000)
    monkeypatch.setattr("mlpmem_ds.formats.table_readers._ROWS", 7)
    assert texts_of(tmp_path / "x.arrow") == [(str(row), str(row)) for row in range(1000)]


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install 'pyarrow>=25'"):
        texts_of(tmp_path / "x.parquet")


def test_what_spark_writes_next_to_a_table_is_no_text() -> None:
    for name in ("_SUCCESS", "_metadata", "_common_metadata", ".part-00000.parquet.crc", "x.png"):
        assert is_no_text_by_name(name), name
    for name in ("SUCCESS", "crc", "notes.crc", "metadata", "x.unknown"):
        assert not is_no_text_by_name(name), name


def test_marks_of_files() -> None:
    assert kind_by_mark(b"") == "empty" and kind_by_mark(b"\0\1\2") == ""
    assert "gzip" in kind_by_mark(b"\x1f\x8b\x08\0") and "Parquet" in kind_by_mark(b"PAR1")
