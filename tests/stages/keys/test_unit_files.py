"""A unit's files, written behind the forward pass: whole or not at all, at most a few batches late."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.array_files import ArrayWriter
from mlpmem_ds.core.files import record_file
from mlpmem_ds.core.unit_writer import UnitWriter
from mlpmem_ds.stages.keys.unit_files import unit_files

ROWS = {
    "values": np.arange(6, dtype=np.uint16),
    "input_scales": np.ones((6, 1), np.float32),
    "keys": np.arange(12, dtype=np.int8).reshape(6, 2),
}


def name_of(array: str) -> str:
    return f"{array}-0.npy"


def put_all(writer: UnitWriter, *, stop: int = 6, then: Callable[[], None] = lambda: None) -> None:
    with unit_files(writer, 6, name_of) as files:
        for start in range(0, stop, 2):
            files.put({name: array[start : start + 2] for name, array in ROWS.items()})
        then()


def test_the_files_and_their_records_in_the_order_of_a_record(tmp_path: Path) -> None:
    writer = UnitWriter(tmp_path)
    put_all(writer)
    names = ["keys-0.npy", "values-0.npy", "input_scales-0.npy"]
    assert [record.name for record in writer.records] == names
    assert writer.records == [record_file(tmp_path, name) for name in names]
    for name, array in ROWS.items():
        np.testing.assert_array_equal(np.load(tmp_path / name_of(name)), array)


def test_no_file_appears_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the base failed")

    with pytest.raises(RuntimeError, match="the base failed"):
        put_all(UnitWriter(tmp_path), then=fail)
    with pytest.raises(AssertionError, match="4 of 6 rows"):
        put_all(UnitWriter(tmp_path), stop=4)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_thread_is_the_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(self: ArrayWriter, rows: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArrayWriter, "append", append)
    with pytest.raises(OSError, match="No space left"):
        put_all(UnitWriter(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_at_most_a_few_batches_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: while the disk hangs, the third batch waits."""
    may_write, num_put, append = threading.Event(), 0, ArrayWriter.append

    def hang(self: ArrayWriter, rows: np.ndarray) -> None:
        assert may_write.wait(20)
        append(self, rows)

    monkeypatch.setattr(ArrayWriter, "append", hang)
    with unit_files(UnitWriter(tmp_path), 6, name_of) as files:
        for start in (0, 2):
            files.put({"keys": ROWS["keys"][start : start + 2]})
            num_put += 1
        late = threading.Thread(target=lambda: files.put({"keys": ROWS["keys"][4:]}))
        late.start()
        late.join(0.2)
        assert num_put == 2 and late.is_alive()
        may_write.set()
        late.join(20)
    np.testing.assert_array_equal(np.load(tmp_path / "keys-0.npy"), ROWS["keys"])
