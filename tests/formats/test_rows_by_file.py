"""Rows at any places of several files."""

from __future__ import annotations

import numpy as np
import pytest

from mlpmem_ds.formats.rows_by_file import rows_by_file


@pytest.mark.parametrize("largest", [3, 1 << 16, 1 << 40])
def test_each_file_has_its_rows_in_order(largest: int) -> None:
    file_of_N = np.random.default_rng(0).choice([0, 2, largest], 50)
    found = list(rows_by_file(file_of_N))
    assert [file for file, _ in found] == [0, 2, largest]
    for file, places in found:
        assert np.array_equal(places, np.flatnonzero(file_of_N == file))


def test_no_rows_are_of_no_file() -> None:
    assert not list(rows_by_file(np.empty(0, np.int64)))
