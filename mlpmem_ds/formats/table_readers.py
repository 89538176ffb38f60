"""Read tables of documents as streams: Parquet and Arrow. Only the requested columns are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.arrow_library import arrow_errors, import_arrow
from mlpmem_ds.formats.records import Record, record_of

_ROWS = 256  # of a Parquet or Arrow batch


def read_parquet(path: Path, text_field: str, group_field: str | None) -> Iterator[Record]:
    """One record a row; its key is the row's number from 0. Only the requested columns are read."""
    parquet = import_arrow("parquet", path=path)
    with arrow_errors(path):
        file = parquet.ParquetFile(path)
        columns = _columns(path, file.schema_arrow.names, text_field, group_field)
        yield from _rows(path, file.iter_batches(batch_size=_ROWS, columns=columns), text_field, group_field)


def read_arrow(path: Path, text_field: str, group_field: str | None) -> Iterator[Record]:
    """One record a row of an Arrow stream, as `datasets` saves it; its key is the row's number from 0."""
    ipc = import_arrow("ipc", path=path)
    with arrow_errors(path), open(path, "rb") as stream:
        batches = ipc.open_stream(stream)
        columns = _columns(path, batches.schema.names, text_field, group_field)
        yield from _rows(path, (batch.select(columns) for batch in batches), text_field, group_field)


def _columns(path: Path, names: list[str], text_field: str, group_field: str | None) -> list[str]:
    requested = [text_field, *([group_field] if group_field else [])]
    if missing := [name for name in requested if name not in names]:
        raise UserError(
            f"{path} has no column {missing[0]!r} (it has {', '.join(names)}): name it with --text-field or"
            " --group-field"
        )
    return list(dict.fromkeys(requested))


def _rows(path: Path, batches: Any, text_field: str, group_field: str | None) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            record = record_of(path, f"row {number}", str(number), values, text_field, group_field)
            if record is not None:
                yield record
            number += 1
