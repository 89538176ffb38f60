"""Read tables of documents as streams: Parquet, and Arrow's stream and file formats, told apart by their
marks.

Only the requested columns are read, and a few rows of them are in memory at once. A column of texts holds
strings or bytes in UTF-8, plain, in a dictionary, or as lists of parts; it may be a field of a struct, named
with a dot.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.arrow_library import arrow_batches, arrow_errors, import_arrow
from mlpmem_ds.formats.chats import CHAT_FIELDS, chat_record
from mlpmem_ds.formats.file_marks import NUM_MARK_BYTES
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record, listed, make_record, partition_of
from mlpmem_ds.formats.streams import opened

_ROWS = 256  # in memory at once
_BUFFER_BYTES = 1 << 20  # read at once of a Parquet column
_PARQUET = (b"PAR1", b"PARE")
_TEXT = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
_LISTS = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
_NESTED = (*_LISTS, "is_struct", "is_map", "is_union")


def read_table(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """One record a row; its key is the row's number from 0. A null text is an omission.

    Args:
        path: Parquet, an Arrow stream (as `datasets` saves it) or an Arrow file (Feather), under any name.
        rules: the text's field is a column, or a path of names with dots into structs; the group's the same,
            or the name of a folder `NAME=VALUE` above the file.

    Raises:
        UserError: no such column, no text in it, or the file is something else, cut short or damaged.
    """
    if rules.chats:
        yield from _read_chats(path, rules.group_field)
        return
    text_field, group_field = rules.text_field, rules.group_field

    def columns_of(schema: Any) -> list[str]:
        _check_columns(path, schema, text_field, group_field)
        return [text_field, *([group_field] if group_field else [])]

    with _seekable(path) as stream, arrow_errors(path):
        first = 0
        for batch in _batches(path, stream, columns_of):
            texts = _column(batch, _text_place(path, batch.schema, text_field))
            groups = None if group_field is None else _groups(path, batch, group_field)
            for start in range(0, batch.num_rows, _ROWS):
                rows = range(first + start, first + min(start + _ROWS, batch.num_rows))
                text_values = _values(path, texts.slice(start, _ROWS), rows, text_field)
                group_values = (
                    [None] * len(rows)
                    if groups is None
                    else _values(path, groups.slice(start, _ROWS), rows, group_field)
                )
                for row, text, group in zip(rows, text_values, group_values, strict=True):
                    place = f"row {row}"
                    yield make_record(path, place, str(row), text, group, text_field, group_field)
            first += batch.num_rows


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """The file; where it is compressed, a temporary file of its content: tables are not read in order."""
    with opened(path) as stream:
        if isinstance(stream.raw, io.FileIO):
            yield stream
            return
        with tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(stream, plain, _BUFFER_BYTES)
            plain.seek(0)
            yield plain


def _read_chats(path: Path, group_field: str | None) -> Iterator[Record | Omission]:
    """One conversation a row, of the columns that hold its parts."""

    def columns_of(schema: Any) -> list[str]:
        found = [
            name for name in schema.names
            if name in CHAT_FIELDS or (group_field is not None and f"{group_field}.".startswith(f"{name}."))
        ]  # fmt: skip
        if not set(found) & set(CHAT_FIELDS):
            raise UserError(
                f"{path} has no column of a conversation, such as messages (it has {listed(_names(schema))})"
            )
        return found

    with _seekable(path) as stream, arrow_errors(path):
        first = 0
        for batch in _batches(path, stream, columns_of):
            chosen = batch.select(columns_of(batch.schema))
            chosen.validate(full=True)
            for start in range(0, chosen.num_rows, _ROWS):
                for row, values in enumerate(chosen.slice(start, _ROWS).to_pylist(), start=first + start):
                    yield chat_record(path, f"row {row}", str(row), values, group_field)
            first += batch.num_rows


def _batches(path: Path, stream: IO[bytes], columns_of: Callable[[Any], list[str]]) -> Iterator[Any]:
    """The record batches; `columns_of` checks a schema, and names the columns that are read of it."""
    first = stream.read(NUM_MARK_BYTES)
    stream.seek(0)
    if first.startswith(_PARQUET):
        return _parquet_batches(path, stream, columns_of)
    return arrow_batches(path, stream, columns_of)


def _parquet_batches(path: Path, stream: IO[bytes], columns_of: Callable[[Any], list[str]]) -> Iterator[Any]:
    parquet = import_arrow("parquet", path=path)
    # pyarrow would read the columns of a whole row group ahead: 390 MiB of one of 377, against 22.
    file = parquet.ParquetFile(
        stream, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )
    columns = columns_of(file.schema_arrow)
    num_rows = 0
    for row_group in range(file.num_row_groups):  # pyarrow cannot join dictionaries in lists across two
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=[row_group], columns=columns):
            yield batch
            num_rows += batch.num_rows
    if num_rows != file.metadata.num_rows:
        raise ValueError(f"it has {num_rows:,} of the {file.metadata.num_rows:,} rows that it names")


# Columns: a place is the number of a column, and then those of the fields down through structs.


def _check_columns(path: Path, schema: Any, text_field: str, group_field: str | None) -> None:
    """Refuse a table without these columns, also where it has no rows."""
    _text_place(path, schema, text_field)
    if group_field is not None:
        _group_place(path, schema, group_field)


def _text_place(path: Path, schema: Any, name: str) -> tuple[int, ...]:
    types = import_arrow("types", path=path)
    place, kind = _place(path, schema, name, "--text-field")
    if place is None:
        raise _no_column(path, schema, name, "--text-field")
    value = _value_type(kind, types)
    if any(getattr(types, is_list)(value) for is_list in _LISTS):
        value = _value_type(value.value_type, types)
    if str(value) not in _TEXT and not types.is_fixed_size_binary(value):
        raise UserError(
            f"{path}: its column {name!r} is of type {kind}, not text: choose another --text-field (it has"
            f" {listed(_names(schema))})"
        )
    return place


def _group_place(path: Path, schema: Any, name: str) -> tuple[int, ...] | None:
    """None where a folder above the file names the group of all its rows."""
    types = import_arrow("types", path=path)
    place, kind = _place(path, schema, name, "--group-field")
    if place is None:
        try:
            partition_of(path, name)
        except KeyError as error:
            raise _no_column(path, schema, name, "--group-field") from error
    elif any(getattr(types, is_nested)(_value_type(kind, types)) for is_nested in _NESTED):
        raise UserError(
            f"{path}: its column {name!r} is of type {kind}, not one name a row: choose another --group-field"
            f" (it has {listed(_names(schema))})"
        )
    return place


def _place(path: Path, schema: Any, name: str, flag: str) -> tuple[tuple[int, ...] | None, Any]:
    """(place, type) of the one column of this name; None where there is none."""
    found = list(_places(schema, name, import_arrow("types", path=path)))
    if len(found) > 1:
        raise UserError(
            f"{path} has {len(found)} columns {name!r}: rename all but one of them, or choose another {flag}"
        )
    return found[0] if found else (None, None)


def _places(fields: Iterable[Any], name: str, types: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The places and types of columns of this name, else of the path of names with dots that it is."""
    kinds = [(number, field.name, _stored_type(field.type)) for number, field in enumerate(fields)]
    exact = [((number,), kind) for number, field_name, kind in kinds if field_name == name]
    yield from exact
    for number, field_name, kind in [] if exact else kinds:
        if name.startswith(f"{field_name}.") and types.is_struct(kind):
            for place, inner in _places(kind, name[len(field_name) + 1 :], types):
                yield (number, *place), inner


def _stored_type(kind: Any) -> Any:
    """The type in which an extension type is stored; other types as they are."""
    return getattr(kind, "storage_type", kind)


def _value_type(kind: Any, types: Any) -> Any:
    """The type of the values that a dictionary or runs stand for."""
    while types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        kind = kind.value_type
    return _stored_type(kind)


def _names(fields: Iterable[Any], prefix: str = "") -> Iterator[str]:
    """The names of all columns and of structs' fields, as the flags take them."""
    for field in fields:
        if str(field.type).startswith("struct<"):
            yield from _names(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _no_column(path: Path, schema: Any, name: str, flag: str) -> UserError:
    return UserError(f"{path} has no column {name!r} (it has {listed(_names(schema))}): name it with {flag}")


def _column(batch: Any, place: tuple[int, ...]) -> Any:
    """A column as it is stored, checked: offsets and numbers in it that point nowhere are an error."""
    outer, *inner = place
    column = batch.column(outer)
    try:
        column.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error):  # whose row is named where it is read
            raise
    column = getattr(column, "storage", column)
    for number in inner:
        column = column.flatten()[number]  # where the struct is null, so are its fields
        column = getattr(column, "storage", column)
    return column


def _groups(path: Path, batch: Any, name: str) -> Any:
    """The groups of a batch's rows, from a column or a folder."""
    arrow = import_arrow("lib", path=path)
    place = _group_place(path, batch.schema, name)
    if place is None:
        return arrow.repeat(arrow.scalar(partition_of(path, name), arrow.string()), batch.num_rows)
    return _column(batch, place)


def _values(path: Path, column: Any, rows: Sequence[int], name: str | None) -> list[Any]:
    """A column's values as Python's objects. pyarrow never looks whether a string is UTF-8.

    Raises:
        UserError: names the row whose text is not.
    """
    try:
        return list(column.to_pylist())
    except (ValueError, LookupError):
        return [_value(path, value, row, name) for row, value in zip(rows, column, strict=True)]


def _value(path: Path, value: Any, row: int, name: str | None) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} row {row}: its {name} is not UTF-8 text ({error}): mend that record"
        ) from error
    except (ValueError, LookupError):  # a moment in nanoseconds, of which only pandas makes an object
        pass
    try:
        return value.cast(import_arrow("lib", path=path).string()).as_py()
    except ValueError as error:  # of a time zone that this machine does not have
        raise UserError(
            f"{path} row {row}: its {name} cannot be written as text ({error}): choose another --group-field"
        ) from error
