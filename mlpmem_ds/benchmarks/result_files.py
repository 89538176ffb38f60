"""Results of benchmarks as JSON files: a record with its format and version, read back with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.typed_json import from_json, to_json

Record = TypeVar("Record")


def write_record(path: Path, record: Any, *, kind: str, version: int) -> None:
    """Publish a record (typed_json.py) under the format `mlpmem-KIND`."""
    publish_json(path, {"format": f"mlpmem-{kind}", "version": version, **to_json(record)})


def read_record(path: Path, type_: type[Record], *, kind: str, version: int, maker: str) -> Record:
    """The record of a file; `maker` is what writes it anew, in words.

    Raises:
        DamagedDataError: missing, of another kind or version, or with a key too many or too few.
    """
    fields = read_json(path)
    found = (fields.pop("format", None), fields.pop("version", None)) if isinstance(fields, dict) else None
    if found != (f"mlpmem-{kind}", version):
        raise DamagedDataError(
            f"{path} is no mlpmem-{kind} of version {version}: run {maker} again, it writes it anew"
        )
    return from_json(type_, fields, where=str(path), version=version)
