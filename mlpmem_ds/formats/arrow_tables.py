"""Arrow streams as the method's authors exchange them: datastores (`keys`, `vals`) and targets (one row a
position).

    datastore   keys: fixed-size list of float16 [D]; vals: int32
    targets     id_cnt: int32; token_id: list of int32; prob: list of float16, falling; label: int32

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
from mlpmem_ds.formats.arrow_library import import_arrow
from mlpmem_ds.maths.sparse_rows import SparseRows

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
DATASTORE, TARGETS = ("keys", "vals"), ("id_cnt", "token_id", "prob", "label")


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
        """The same of a column of numbers, as an array [n]."""
        column = self.column(name, start, stop)
        if column.null_count:
            raise self.fault(start, f"{name} has empty values")
        return np.asarray(column)

    def fault(self, row: int, reason: str) -> UserError:
        """The error that names a row."""
        return UserError(f"{self.flag}, row {row:,}: {reason}: download or make the file again")


def open_arrow(paths: Sequence[Path], columns: Sequence[str], *, flag: str) -> ArrowTable:
    """Open Arrow streams (or Arrow files) with these columns.

    Raises:
        UserError: pyarrow is not installed, or a file is missing, damaged, unfinished or of another kind.
    """
    tables = []
    for path in paths:
        ipc, pyarrow = import_arrow("ipc", path=path), import_arrow("lib", path=path)
        if not path.is_file():
            raise UserError(f"{flag} {path} does not exist: give the .arrow files in their order")
        try:
            source = pyarrow.memory_map(str(path))
            content = memoryview(source.read_buffer())
            is_file = bytes(content[:6]) == b"ARROW1"
            # Without the mark pyarrow reads the batches that are there and says nothing.
            if not is_file and bytes(content[-8:]) != _END_OF_STREAM:
                raise ValueError("it has no end-of-stream mark")
            source.seek(0)
            tables.append((ipc.open_file(source) if is_file else ipc.open_stream(source)).read_all())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{flag} {path} is no whole Arrow stream ({error}): a run that wrote it may have been killed;"
                " make or download it again"
            ) from error
        if missing := [name for name in columns if name not in tables[-1].column_names]:
            raise UserError(
                f"{flag} {path} has no column {missing[0]!r} (it has {', '.join(tables[-1].column_names)}):"
                f" needed are {', '.join(columns)}"
            )
    whole = import_arrow("lib", path=paths[0]).concat_tables(
        [table.select(list(columns)) for table in tables]
    )
    return ArrowTable(num_rows=whole.num_rows, flag=f"{flag} {paths[0]}", _table=whole)


def key_width(table: ArrowTable) -> int:
    """Numbers in a key.

    Raises:
        UserError: the keys are not lists of one length of float16 or float32.
    """
    kind = table._table.schema.field("keys").type
    width = getattr(kind, "list_size", 0)
    if width < 1 or str(kind.value_type) not in ("halffloat", "float"):
        raise UserError(f"{table.flag}: its keys are {kind}, not fixed-size lists of float16")
    return int(width)


def read_keys(table: ArrowTable, start: int, stop: int) -> np.ndarray:
    """float16 [n, D]."""
    column = table.column("keys", start, stop)
    keys_nD = np.asarray(column.flatten()).reshape(stop - start, -1).astype(np.float16, copy=False)
    if not np.isfinite(keys_nD).all():
        row = start + int(np.flatnonzero(~np.isfinite(keys_nD).all(axis=1))[0])
        raise table.fault(row, "its key has numbers that are not finite")
    return keys_nD


def read_rows(table: ArrowTable, start: int, stop: int, vocab_size: int) -> tuple[SparseRows, np.ndarray]:
    """(rows with ascending ids, whose dropped mass is what they lack of 1; labels [n]).

    Raises:
        UserError: names the first row that is no distribution over the vocabulary.
    """
    tokens, probabilities = table.column("token_id", start, stop), table.column("prob", start, stop)
    counts_n = np.diff(np.asarray(tokens.offsets)).astype(np.int64)
    row_of_E = np.repeat(np.arange(stop - start), counts_n)
    ids_E = np.asarray(tokens.flatten()).astype(np.int64)
    values_E = np.asarray(probabilities.flatten()).astype(np.float64)
    declared_n = table.numbers("id_cnt", start, stop)
    if not (
        np.array_equal(declared_n, counts_n)
        and np.array_equal(np.diff(np.asarray(probabilities.offsets)), counts_n)
    ):
        wrong_n = (declared_n != counts_n) | (np.diff(np.asarray(probabilities.offsets)) != counts_n)
        raise table.fault(
            start + int(np.flatnonzero(wrong_n)[0]), "id_cnt is not the length of token_id and prob"
        )
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
