"""Exact distances of candidates, against NumPy in float64."""

import numpy as np
import pytest

from mlpmem_ds.maths import rescoring


@pytest.mark.parametrize("dtype", [np.int8, np.float16])
@pytest.mark.parametrize("num_dims", [7, 1040, 1200])
def test_rescored_distances(dtype: type, num_dims: int) -> None:
    generator = np.random.default_rng(0)
    size = 127 if dtype == np.int8 else 3  # whole numbers whose squares float32 adds exactly
    stored = generator.integers(-size, size + 1, (50, num_dims)).astype(dtype)
    queries = generator.integers(-size, size + 1, (9, num_dims)).astype(dtype)
    stored[3], queries[5] = size, -size  # the greatest distance
    ids = np.stack([generator.permutation(50)[:5] for _ in range(9)])
    ids[5] = [3, 1, 0, 2, 4]
    ids[[0, 4, 8], -1] = -1
    found = rescoring.rescore(queries, ids, stored).unpack()
    for row in range(9):
        present = ids[row][ids[row] >= 0]
        expected = ((stored[present].astype(np.float64) - queries[row].astype(np.float64)) ** 2).sum(-1)
        order = np.lexsort((present, expected))
        np.testing.assert_array_equal(found.ids_QK[row, : len(present)], present[order])
        np.testing.assert_array_equal(found.distances_QK[row, : len(present)], expected[order])
    assert (found.ids_QK == -1).sum() == 3 and (found.distances_QK[found.ids_QK == -1] > 1e18).all()
    assert found.distances_QK.dtype == (np.int64 if dtype == np.int8 else np.float64)


def test_chunks_and_the_order_of_candidates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    stored = generator.integers(-3, 4, (200, 6)).astype(np.int8)  # many ties
    ids = np.stack([generator.permutation(200)[:40] for _ in range(30)])
    expected = rescoring.rescore(stored[:30], ids, stored).packed_QK
    monkeypatch.setattr(rescoring, "_GATHERED_BYTES", 7 * 40 * 6)
    monkeypatch.setattr(rescoring, "_FLOAT_ELEMENTS", 2 * 40 * 6)
    found = rescoring.rescore(stored[:30], generator.permuted(ids, axis=1), stored).packed_QK
    np.testing.assert_array_equal(found, expected)
