"""A record as a file: read as it was written; another kind or version is refused with the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.result_files import read_record, write_record
from mlpmem_ds.core.errors import DamagedDataError


@dataclass(frozen=True, kw_only=True)
class Thing:
    name: str
    values: tuple[float, ...]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, thing = tmp_path / "thing.json", Thing(name="a", values=(1.0, 2.5))
    write_record(path, thing, kind="thing", version=1)
    assert read_record(path, Thing, kind="thing", version=1, maker="bench") == thing
    for kind, version in (("other", 1), ("thing", 2)):
        with pytest.raises(DamagedDataError, match=f"no mlpmem-{kind} of version {version}: run bench again"):
            read_record(path, Thing, kind=kind, version=version, maker="bench")
    path.write_text("[]")
    with pytest.raises(DamagedDataError, match="run bench again, it writes it anew"):
        read_record(path, Thing, kind="thing", version=1, maker="bench")
