"""A record as a file: read as it was written; another format or version is refused in the caller's words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.record_files import read_record, write_record


@dataclass(frozen=True, kw_only=True)
class Thing:
    name: str
    values: tuple[float, ...]


@pytest.mark.parametrize("seal", [False, True])
def test_a_record_is_read_as_it_was_written_or_refused(tmp_path: Path, seal: bool) -> None:
    path, thing = tmp_path / "thing.json", Thing(name="a", values=(1.0, 2.5))
    write_record(path, thing, kind="thing", version=1, seal=seal)
    assert read_record(path, Thing, kind="thing", version=1, refusal="is wrong") == thing
    for kind, version in (("other", 1), ("thing", 2)):
        with pytest.raises(DamagedDataError, match=r"thing\.json is wrong: make it again$"):
            read_record(path, Thing, kind=kind, version=version, refusal="is wrong: make it again")
