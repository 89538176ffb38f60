from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core import array_files
from mlpmem_ds.core.array_files import array_file, read_array
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_array, record_file


@pytest.mark.parametrize(
    "array",
    [
        np.arange(14, dtype=np.int8).reshape(7, 2),
        np.arange(7, dtype=np.float32),
        np.arange(21, dtype=np.float16).reshape(7, 3),
        np.empty((0, 4), np.uint16),
    ],
)
def test_rows_a_few_at_a_time_give_the_same_bytes(
    tmp_path: Path, array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_files, "_BYTES_BETWEEN_FLUSHES", 5)
    whole = publish_array(tmp_path / "whole.npy", array)
    assert whole == record_file(tmp_path, "whole.npy")  # hashed as it was written
    with array_file(tmp_path / "rows.npy", array.shape, array.dtype) as rows:
        for start in range(0, len(array), 3):
            rows.append(array[start : start + 3])
        assert not (tmp_path / "rows.npy").exists()
    assert (tmp_path / "rows.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert rows.record("rows.npy") == record_file(tmp_path, "rows.npy")


def test_rows_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(4, 6)[:, ::2]
    with array_file(tmp_path / "rows.npy", array.shape, array.dtype) as rows:
        rows.append(array)
    assert (np.load(tmp_path / "rows.npy") == array).all()


def test_a_file_with_too_few_rows_does_not_appear(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="2 of 3 rows"),
        array_file(tmp_path / "rows.npy", (3,), np.dtype(np.int8)) as rows,
    ):
        rows.append(np.zeros(2, np.int8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mapped", [True, False])
def test_what_is_no_array_of_numbers_is_damaged(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(read_array(path, mapped=mapped), np.arange(6).reshape(2, 3))
    content = path.read_bytes()
    np.save(tmp_path / "objects.npy", np.array([{}, "x"], dtype=object), allow_pickle=True)
    for wrong in ((tmp_path / "objects.npy").read_bytes(), content[:-1], content[:5], b"", b"PK\x03\x04"):
        path.write_bytes(wrong)
        with pytest.raises(DamagedDataError, match="a.npy is no array of numbers"):
            read_array(path, mapped=mapped)
