"""Arrow streams as the method's authors exchange them: datastores (`keys`, `vals`) and targets (one row a
position).

    datastore   keys: fixed-size list of float16 [D]; vals: int32
    targets     id_cnt: int32; token_id: list of int32; prob: list of float16, falling; label: int32

Read are also lists of other kinds, integers and floating numbers of other sizes; keys become float16.

Files are memory-mapped, so that a table of any size costs memory for its batches' descriptions only. pyarrow
is optional.

n rows, D numbers of a key, E entries of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.manifest import Manifest
from mlpmem_ds.formats.arrow_library import arrow_batches, arrow_errors, import_arrow
from mlpmem_ds.formats.records import listed
from mlpmem_ds.maths.sparse_rows import SparseRows

DATASTORE, TARGETS = ("keys", "vals"), ("id_cnt", "token_id", "prob", "label")
_LISTS = ("keys", "token_id", "prob")
_LIST_TYPES = ("is_list", "is_large_list", "is_fixed_size_list")


@dataclass(frozen=True, kw_only=True)
class ArrowManifest(Manifest):
    """Exported files: rows of each, and numbers of a key (0 without a datastore)."""

    FORMAT: ClassVar[str] = "arrow"
    VERSION: ClassVar[int] = 1

    num_positions: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ArrowTable:
    """The rows of some files, one after the other."""

    num_rows: int
    flag: str
    _table: Any = field(repr=False)

    def column(self, name: str, start: int, stop: int) -> Any:
        """Rows [start, stop) of a column as one pyarrow array."""
        combined = self._table.column(name).slice(start, stop - start).combine_chunks()
        return combined.chunk(0) if hasattr(combined, "num_chunks") else combined

    def numbers(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same of a column of numbers, as an array [n]. Raises UserError for a null, with its row."""
        column = self.column(name, start, stop)
        if column.null_count:
            raise self.fault(start + _first_null(column), f"{name} has no value")
        return np.asarray(column)

    def lists(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers in each row, int64 [n]; all of them [E]) of a column of lists; a null is an empty list.

        Raises:
            UserError: a null within a list, with its row.
        """
        column = self.column(name, start, stop)
        lengths = import_arrow("compute", path=Path(self.flag)).list_value_length(column).fill_null(0)
        counts_n, flat = np.asarray(lengths).astype(np.int64), column.flatten()
        if flat.null_count:
            row = int(np.searchsorted(np.cumsum(counts_n), _first_null(flat), side="right"))
            raise self.fault(start + row, f"{name} has an element without a value")
        return counts_n, np.asarray(flat)

    def fault(self, row: int, reason: str) -> UserError:
        """The error that names a row."""
        return UserError(f"{self.flag}, row {row:,}: {reason}: download or make the file again")


def _first_null(column: Any) -> int:
    return int(np.argmax(np.asarray(column.is_null())))


def open_arrow(paths: Sequence[Path], columns: Sequence[str], *, flag: str) -> ArrowTable:
    """Open Arrow streams (or Arrow files) with these columns.

    Raises:
        UserError: pyarrow is not installed, or a file is missing, damaged, unfinished or of another kind.
    """
    tables: list[Any] = []
    for path in paths:
        try:
            tables.append(_open_table(path, columns))
        except UserError as error:
            raise UserError(f"{flag} {error}") from error
        if tables[-1].schema.types != tables[0].schema.types:
            raise UserError(
                f"{flag} {path} has columns of other types than {paths[0].name}"
                f" ({_types_of(tables[-1])}, there {_types_of(tables[0])}): give files of one kind"
            )
    whole = import_arrow("lib", path=paths[0]).concat_tables(tables, promote_options="permissive")
    return ArrowTable(num_rows=whole.num_rows, flag=f"{flag} {paths[0]}", _table=whole)


def _open_table(path: Path, columns: Sequence[str]) -> Any:
    """The requested columns of a file, mapped."""
    arrow = import_arrow("lib", path=path)
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {problem}: give the .arrow files in their order")
    schemas: list[Any] = []

    def check(schema: Any) -> None:
        for name in columns:
            _check_column(path, schema, name, columns)
        schemas.append(arrow.schema([schema.field(name) for name in columns]))

    with arrow_errors(path), open(path, "rb") as stream:
        batches = [batch.select(list(columns)) for batch in arrow_batches(path, stream, check)]
        for batch in batches:
            batch.validate(full=True)  # lengths and offsets, before any is followed; not the numbers
        return arrow.Table.from_batches(batches, schemas[0])  # an error where streams in it differ


def _check_column(path: Path, schema: Any, name: str, columns: Sequence[str]) -> None:
    types = import_arrow("types", path=path)
    found = [field.type for field in schema if field.name == name]
    if len(found) != 1:
        raise UserError(
            f"{path} has {len(found) or 'no'} column{'s' * bool(found)} {name!r} (it has"
            f" {listed(schema.names)}): needed are {', '.join(columns)}, each once"
        )
    kind, is_list = found[0], name in _LISTS
    if is_list and any(getattr(types, test)(kind) for test in _LIST_TYPES):
        kind, is_list = kind.value_type, False
    number_type = "floating" if name in ("keys", "prob") else "integer"
    if is_list or not getattr(types, f"is_{number_type}")(kind):
        lists = "lists of " if name in _LISTS else ""
        raise UserError(
            f"{path}: its {name} are {found[0]}, not {lists}{number_type} numbers: give the files of the"
            " method's public code, or convert them"
        )


def _types_of(table: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in table.schema)


def key_width(table: ArrowTable) -> int:
    """Numbers in a key.

    Raises:
        UserError: there are none.
    """
    width = getattr(table._table.schema.field("keys").type, "list_size", 0)
    if width < 1 and table.num_rows:
        width = len(table.lists("keys", 0, 1)[1])
    if width < 1:
        raise UserError(f"{table.flag} has no keys: give files with rows")
    return int(width)


def read_keys(table: ArrowTable, start: int, stop: int) -> np.ndarray:
    """float16 [n, D].

    Raises:
        UserError: names the first row whose key has another length or a number that float16 cannot hold.
    """
    counts_n, values_E = table.lists("keys", start, stop)
    width = key_width(table)
    if (counts_n != width).any():
        row = int(np.argmax(counts_n != width))
        raise table.fault(start + row, f"its key has {counts_n[row]:,} numbers, not {width:,}")
    with np.errstate(over="ignore"):
        keys_nD = values_E.astype(np.float16, copy=False).reshape(stop - start, width)
    if not np.isfinite(keys_nD).all():
        row = int(np.flatnonzero(~np.isfinite(keys_nD).all(axis=1))[0])
        raise table.fault(start + row, "its key has numbers that are not finite in float16 (up to 65,504)")
    return keys_nD


def read_rows(table: ArrowTable, start: int, stop: int, vocab_size: int) -> tuple[SparseRows, np.ndarray]:
    """(rows with ascending ids, whose dropped mass is what they lack of 1; labels [n]).

    Raises:
        UserError: names the first row that is no distribution over the vocabulary.
    """
    counts_n, tokens_E = table.lists("token_id", start, stop)
    probability_counts_n, probabilities_E = table.lists("prob", start, stop)
    declared_n = table.numbers("id_cnt", start, stop)
    wrong_n = (declared_n != counts_n) | (probability_counts_n != counts_n)
    if wrong_n.any():
        raise table.fault(start + int(np.argmax(wrong_n)), "id_cnt is not the length of token_id and prob")
    row_of_E = np.repeat(np.arange(stop - start), counts_n)
    ids_E, values_E = tokens_E.astype(np.int64), probabilities_E.astype(np.float64)
    order_E = np.lexsort((ids_E, row_of_E))
    ids_E, values_E = ids_E[order_E], values_E[order_E]
    same_E = np.zeros(len(ids_E), dtype=bool)
    same_E[1:] = (ids_E[1:] == ids_E[:-1]) & (row_of_E[1:] == row_of_E[:-1])
    for bad_E, reason in (
        ((ids_E < 0) | (ids_E >= vocab_size), f"a token is not in the vocabulary of {vocab_size:,}"),
        (same_E, "a token occurs twice"),
        (~((values_E >= 0) & (values_E <= 1.001)), "a probability does not lie in [0, 1]"),
    ):
        if bad_E.any():
            raise table.fault(start + int(row_of_E[np.flatnonzero(bad_E)[0]]), reason)
    sums_n = np.bincount(row_of_E, weights=values_E, minlength=stop - start)
    if (sums_n > 1.01).any():
        raise table.fault(start + int(np.argmax(sums_n > 1.01)), "its probabilities sum to more than 1")
    lacking_n = np.where(counts_n > 0, np.maximum(1 - sums_n, 0), 0)
    rows = SparseRows.from_counts(counts_n, ids_E, values_E, lacking_n)
    return rows, table.numbers("label", start, stop)


def write_datastore(path: Path, parts: Iterable[tuple[np.ndarray, np.ndarray]], width: int) -> int:
    """Write (float16 keys [n, D], values [n]) batch by batch; the number of rows."""
    arrow = import_arrow("lib", path=path)
    schema = arrow.schema([("keys", arrow.list_(arrow.float16(), width)), ("vals", arrow.int32())])

    def batches() -> Iterable[list[Any]]:
        for keys_nD, values_n in parts:
            flat = arrow.array(np.ascontiguousarray(keys_nD, dtype=np.float16).reshape(-1))
            yield [arrow.FixedSizeListArray.from_arrays(flat, width), arrow.array(values_n.astype(np.int32))]

    return _write(path, schema, batches())


def write_rows(path: Path, parts: Iterable[tuple[SparseRows, np.ndarray]]) -> int:
    """Write (rows, labels [n]) batch by batch, each row by falling probability; the number of rows."""
    arrow = import_arrow("lib", path=path)
    schema = arrow.schema(
        [
            ("id_cnt", arrow.int32()),
            ("token_id", arrow.list_(arrow.int32())),
            ("prob", arrow.list_(arrow.float16())),
            ("label", arrow.int32()),
        ]
    )

    def batches() -> Iterable[list[Any]]:
        for rows, labels_n in parts:
            order_E = np.lexsort((rows.ids, -rows.probabilities, rows.row_of_E))
            offsets = arrow.array(rows.offsets.astype(np.int32))
            ids = arrow.array(rows.ids[order_E].astype(np.int32))
            values = arrow.array(rows.probabilities[order_E].astype(np.float16))
            yield [
                arrow.array(rows.counts_n.astype(np.int32)),
                arrow.ListArray.from_arrays(offsets, ids),
                arrow.ListArray.from_arrays(offsets, values),
                arrow.array(labels_n.astype(np.int32)),
            ]

    return _write(path, schema, batches())


def _write(path: Path, schema: Any, batches: Iterable[list[Any]]) -> int:
    arrow, ipc = import_arrow("lib", path=path), import_arrow("ipc", path=path)
    num_rows = 0
    with open(path, "wb") as stream, ipc.new_stream(stream, schema) as writer:
        for columns in batches:
            writer.write_batch(arrow.RecordBatch.from_arrays(columns, schema=schema))
            num_rows += len(columns[0])
    return num_rows
