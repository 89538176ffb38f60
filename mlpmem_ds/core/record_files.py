"""A typed record as a JSON file of its own, under a format and a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.typed_json import from_json, to_json

Record = TypeVar("Record")


def write_record(path: Path, record: Any, *, kind: str, version: int, seal: bool = False) -> None:
    """Publish a record (typed_json.py) under the format `mlpmem-KIND`; `seal` is of `publish_json`."""
    publish_json(path, {"format": f"mlpmem-{kind}", "version": version, **to_json(record)}, seal=seal)


def read_record(path: Path, type_: type[Record], *, kind: str, version: int, refusal: str) -> Record:
    """The record of a file.

    Args:
        path: of the file.
        type_: of the record.
        kind: its format, without `mlpmem-`.
        version: of the format.
        refusal: what is said, after the path, of a file of another format or version; with the remedy.

    Raises:
        DamagedDataError: missing, of another format or version, or with a key too many or too few.
    """
    fields: Any = read_json(path)
    found = (fields.pop("format", None), fields.pop("version", None)) if isinstance(fields, dict) else None
    if found != (f"mlpmem-{kind}", version):
        raise DamagedDataError(f"{path} {refusal}")
    return from_json(type_, fields, where=str(path), version=version)
