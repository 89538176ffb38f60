"""Lists without codes against NumPy, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.formats.index_lists import IndexLists, bytes_of_lists

NUM_LISTS = 7


@pytest.mark.parametrize("num_keys", [0, 1, 200])
@pytest.mark.parametrize(("num_positions", "dtype"), [(900, np.uint32), (2**32, np.int64)])
def test_a_list_has_its_positions(tmp_path: Path, num_keys: int, num_positions: int, dtype: type) -> None:
    generator = np.random.default_rng(0)
    numbers = generator.integers(0, NUM_LISTS - 1, num_keys)  # the last list is empty
    positions = np.sort(generator.choice(900, num_keys, replace=False))
    made = IndexLists.from_numbers(numbers, positions, NUM_LISTS)
    np.save(tmp_path / "lists.npy", made.packed(num_positions))
    assert np.load(tmp_path / "lists.npy").dtype == dtype
    size = (tmp_path / "lists.npy").stat().st_size
    assert size - 128 == bytes_of_lists(num_positions, NUM_LISTS, 1) - np.dtype(dtype).itemsize * (
        num_positions - num_keys
    )
    for lists in (made, IndexLists.map(tmp_path / "lists.npy", NUM_LISTS)):
        assert lists.list_sizes().tolist() == [(numbers == number).sum() for number in range(NUM_LISTS)]
        for number in range(NUM_LISTS):
            found = lists.ids_of_list(number)
            assert found.dtype == np.int64 and np.array_equal(found, positions[numbers == number])


def test_what_is_no_array_of_lists_is_damaged(tmp_path: Path) -> None:
    lists = IndexLists.from_numbers(np.zeros(5, np.int64), np.arange(5), NUM_LISTS).packed(5)
    path = tmp_path / "lists.npy"
    for stored in (lists[:-1], lists[:4], np.empty(0, np.uint32)):
        np.save(path, stored)
        with pytest.raises(DamagedDataError, match=f"{path} does not hold 7 lists: build the index again"):
            IndexLists.map(path, NUM_LISTS)
    path.write_bytes(b"no array")
    with pytest.raises(DamagedDataError, match="no array of lists"):
        IndexLists.map(path, NUM_LISTS)
