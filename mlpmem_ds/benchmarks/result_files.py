"""Results of benchmarks as JSON files: a record with its format and version, read back with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from mlpmem_ds.core import record_files

Record = TypeVar("Record")


def write_record(path: Path, record: Any, *, kind: str, version: int) -> None:
    """Publish a record (typed_json.py) under the format `mlpmem-KIND`."""
    record_files.write_record(path, record, kind=kind, version=version)


def read_record(path: Path, type_: type[Record], *, kind: str, version: int, maker: str) -> Record:
    """The record of a file; `maker` is what writes it anew, in words.

    Raises:
        DamagedDataError: missing, of another kind or version, or with a key too many or too few.
    """
    refusal = f"is no mlpmem-{kind} of version {version}: run {maker} again, it writes it anew"
    return record_files.read_record(path, type_, kind=kind, version=version, refusal=refusal)
