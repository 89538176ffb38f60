"""Read CSV and TSV with a line of names as documents: a row is a record.

As RFC 4180 has it, a field in double quotes may hold separators, line ends and doubled quotes. The separator
is the one of comma, semicolon, tab and bar that gives the requested names. All else is refused (a row of
another length, text after a closing quote, a quote without end): a wrong guess would cut texts in silence.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.json_lines import decoded_lines
from mlpmem_ds.formats.omissions import Omission
from mlpmem_ds.formats.records import ReadRules, Record, listed, make_record, partition_of
from mlpmem_ds.formats.streams import opened

_SEPARATORS = ",;\t|"


def read_csv(path: Path, rules: ReadRules) -> Iterator[Record | Omission]:
    """One record a row; its key is the row's number from 0. The names of the first line are the fields.

    Raises:
        UserError: no such column, or a row that cannot be read; names the line.
    """
    csv.field_size_limit(sys.maxsize)  # 131,072 characters, as Python has it, are no long document
    with opened(path) as stream:
        names, rows = _table(path, decoded_lines(stream, rules.encoding), rules)
        if not names:
            yield Omission(name="", reason="empty")
            return
        text_column = _column(path, names, rules.text_field, "--text-field")
        group_column, group = _group(path, names, rules.group_field)
        for number, row in enumerate(rows):
            yield make_record(
                path,
                f"row {number}",
                str(number),
                row[text_column],
                group if group_column is None else row[group_column],
                rules.text_field,
                rules.group_field,
            )


def _table(path: Path, lines: Iterator[str], rules: ReadRules) -> tuple[list[str], Iterator[list[str]]]:
    """The names of the first line, and the rows below it; no names where the file is empty."""
    with _csv_errors(path, lambda: 0):
        first = next((line for line in lines if line.strip()), "")
        if "\r" in first.rstrip("\r\n"):
            raise csv.Error("its lines end with a carriage return alone")
    requested = {rules.text_field, rules.group_field}
    by_separator = {separator: _names(first, separator) for separator in _SEPARATORS}
    separator, names = max(
        by_separator.items(), key=lambda item: (len(requested.intersection(item[1])), len(item[1]))
    )
    if first and not names:
        with _csv_errors(path, lambda: 1):
            raise csv.Error("its first line is no row of names")
    return names, _rows(path, csv.reader(lines, delimiter=separator, strict=True), len(names))


def _names(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error:
        return []


def _rows(path: Path, reader: Any, width: int) -> Iterator[list[str]]:
    """The rows that are not blank, each with a field for each name."""
    with _csv_errors(path, lambda: reader.line_num + 1):
        for row in reader:
            if row and len(row) != width:
                raise csv.Error(f"it has {len(row):,} fields, the first line {width:,} names")
            if row:
                yield row


@contextmanager
def _csv_errors(path: Path, line: Callable[[], int]) -> Iterator[None]:
    """Errors inside as UserErrors; `line` counts the lines that were read."""
    try:
        yield
    except (csv.Error, UnicodeDecodeError) as error:
        number = line() + isinstance(error, UnicodeDecodeError)  # which comes before the line is counted
        raise UserError(
            f"{path} up to line {max(number, 1):,} cannot be read as CSV ({error}): mend it, write it"
            " as JSON lines, or name its --encoding"
        ) from error


def _column(path: Path, names: list[str], name: str, flag: str) -> int:
    if names.count(name) > 1:
        raise UserError(f"{path} has {names.count(name)} columns {name!r}: rename all but one of them")
    if name not in names:
        raise UserError(f"{path} has no column {name!r} (it has {listed(names)}): name it with {flag}")
    return names.index(name)


def _group(path: Path, names: list[str], name: str | None) -> tuple[int | None, str | None]:
    """(the group's column, or the group of all rows)."""
    if name is None:
        return None, None
    if name not in names:
        try:
            return None, partition_of(path, name)
        except KeyError:
            pass  # said by _column
    return _column(path, names, name, "--group-field"), None
