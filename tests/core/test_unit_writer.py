"""A unit's files: whole under their names, with records, their folders flushed once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core import files, unit_writer
from mlpmem_ds.core.files import record_file
from mlpmem_ds.core.unit_writer import UnitWriter


def write_some(writer: UnitWriter) -> list[str]:
    with writer.file("a.txt") as path:
        path.write_text("some text")
    writer.array("b.npy", np.arange(5))
    with writer.array_file("inner/c.npy", (4, 2), np.dtype("<f4")) as rows:
        rows.append(np.ones((4, 2), np.float32))
    return ["a.txt", "b.npy", "inner/c.npy"]


def test_the_records_are_those_of_the_files(tmp_path: Path) -> None:
    writer = UnitWriter(tmp_path)
    names = write_some(writer)
    assert writer.records == [record_file(tmp_path, name) for name in names]
    assert not list(tmp_path.rglob(".*"))


def test_each_folder_is_flushed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    for module in (files, unit_writer):
        monkeypatch.setattr(module, "flush", flushed.append)
    writer = UnitWriter(tmp_path)
    write_some(writer)
    assert not any(path.is_dir() for path in flushed)
    writer.flush_folders()
    assert sorted(path for path in flushed if path.is_dir()) == [tmp_path, tmp_path / "inner"]


def test_a_file_that_could_not_be_written_has_no_record(tmp_path: Path) -> None:
    writer = UnitWriter(tmp_path)
    with pytest.raises(RuntimeError), writer.file("a.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert writer.records == [] and not list(tmp_path.iterdir())


def test_the_files_below_a_folder_get_names_by_their_place_in_it(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    for name in ("b.txt", "inner/a.txt", "inner/deep/c.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    writer = UnitWriter(output)
    writer.copy_folder(source)
    writer.copy_folder(source, "place", put=os.replace)
    names = ["b.txt", "inner/a.txt", "inner/deep/c.txt"]
    expected = [*names, *(f"place/{name}" for name in names)]
    assert [record.name for record in writer.records] == expected
    assert all((output / name).read_text() == name.removeprefix("place/") for name in expected)
    assert not any(path.is_file() for path in source.rglob("*")), "these were moved"
